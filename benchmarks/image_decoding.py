"""How fast images become pixels: `python -m benchmarks.image_decoding FOLDER...`.

Every image below the folders is prepared by a plain Pillow loop (open, convert, resize) in N processes, by our worker
processes and by threads, in turn and several times. A rate is the median over the rounds, a ratio the median of the
rounds' ratios to the plain loop. Then JPEGs decoded as drafts are compared with the whole images, in levels of 0..255
after the resize. A table goes to stderr, one JSON object to stdout.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from idefics_cli.errors import RowError
from idefics_cli.images.decode import DRAFT_SIDES, load_image
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.images.worker_pool import WorkerPool
from idefics_cli.rows import ImageOptions

PROCESSOR = ImageProcessor()
LIMITS = ImageOptions()
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SIDES_KEPT = (1, 2, 4)
RunAll = Callable[[Sequence[Path]], None]


def find_images(folders: Sequence[Path]) -> list[Path]:
    """What can be read below the folders: the comparison is about good images."""
    found = (path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES)
    return [path for path in found if path.is_file() and not isinstance(load_image(path, LIMITS), RowError)]


# ---- rates


def plain(path: Path) -> None:
    with Image.open(path) as image:
        image.convert("RGB").resize((PROCESSOR.image_size, PROCESSOR.image_size), Image.Resampling.BICUBIC)


@contextmanager
def plain_processes(workers: int) -> Iterator[RunAll]:
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield lambda paths: list(pool.imap_unordered(plain, paths))


@contextmanager
def threads(workers: int) -> Iterator[RunAll]:
    with ThreadPoolExecutor(workers) as pool:
        yield lambda paths: list(pool.map(partial(PROCESSOR.prepare, options=LIMITS), paths))


@contextmanager
def worker_processes(workers: int) -> Iterator[RunAll]:
    with WorkerPool(PROCESSOR, ImageOptions(workers=workers)) as images, ThreadPoolExecutor(workers) as pool:
        yield lambda paths: list(pool.map(images.prepare, paths))


WAYS = {"plain": plain_processes, "processes": worker_processes, "threads": threads}


def measure_rates(paths: Sequence[Path], workers: int, rounds: int) -> dict[str, Any]:
    """For each way images per second, and how that compares with the plain loop."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds):
        for name in list(WAYS)[:: 1 if number % 2 else -1]:
            with WAYS[name](workers) as run_all:
                run_all(paths[: 4 * workers])  # whatever starts has started
                started = time.perf_counter()
                run_all(paths)
                seconds[name].append(time.perf_counter() - started)
    return {
        name: {
            "images_per_second": len(paths) / statistics.median(measured),
            "of_plain": statistics.median(p / s for p, s in zip(seconds["plain"], measured, strict=True)),
        }
        for name, measured in seconds.items()
    }


# ---- drafts


def measure_draft(paths: Sequence[Path], sides_kept: int) -> dict[str, Any]:
    """What drafts save, and how far they are from the whole images, where no side is drafted below so many times
    that of the pixels. `ImageOptions.draft` keeps DRAFT_SIDES."""
    whole, seconds_whole = _resized(paths, ImageOptions(), sides_kept)
    draft, seconds_draft = _resized(paths, ImageOptions(draft=True), sides_kept)
    differences = [np.abs(a.astype(int) - b) for a, b in zip(whole, draft, strict=True)]  # (3, S, S) each
    return {
        "images": len(paths),
        "differ": sum(bool(difference.any()) for difference in differences),
        "times_faster": seconds_whole / seconds_draft,
        "max_levels": float(max(difference.max() for difference in differences)),
        "mean_levels": float(np.mean([difference.mean() for difference in differences])),
        "worst_mean_levels": float(max(difference.mean() for difference in differences)),
    }


def _resized(paths: Sequence[Path], limits: ImageOptions, sides_kept: int) -> tuple[list[np.ndarray], float]:
    side = PROCESSOR.image_size * sides_kept // DRAFT_SIDES
    started = time.perf_counter()
    return [PROCESSOR.array(load_image(path, limits, side)) for path in paths], time.perf_counter() - started


# ---- the whole


def measure(folders: Sequence[Path], workers: Sequence[int], rounds: int) -> dict[str, Any]:
    paths = find_images(folders)
    jpegs = [path for path in paths if path.suffix.lower() in (".jpg", ".jpeg")]
    report: dict[str, Any] = {"images": len(paths), "bytes": sum(path.stat().st_size for path in paths)}
    report |= {"rounds": rounds, "processors": os.cpu_count(), "workers": {}}
    for number in tqdm(workers, unit="workers"):
        report["workers"][number] = measure_rates(paths, number, rounds)
    report["draft"] = {kept: measure_draft(jpegs, kept) for kept in SIDES_KEPT} if jpegs else None
    return report


def show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("workers", *WAYS, title=f"{report['images']} images, {report['bytes'] / 1e6:.0f} MB: per second")
    for number, ways in report["workers"].items():
        cells = (f"{way['images_per_second']:.1f} ({way['of_plain']:.2f}×)" for way in ways.values())
        table.add_row(str(number), *cells)
    Console(stderr=True).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--workers", nargs="*", type=int, default=[1, 2], help="none: drafts alone")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    report = measure(options.folders, options.workers, options.rounds)
    if not report["images"]:
        sys.exit("no image lies below these folders: name others")
    show(report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
