"""How fast rows go through everything but the model: `python -m benchmarks.rows`.

Manifests are made in a temporary folder, and the command line runs each from reader to published file in a process of
its own, with a model and images that cost nothing. Reported are rows per second, the seconds until the first row, and
memory over what the loaded program takes: its peak, and after each 100,000 rows; then the same for a run that an
earlier one has half done. Then come a Parquet file of images' bytes, a folder of files, and rows that are embedded and
captioned from their embeddings. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

FORMATS = ("jsonl", "csv", "parquet")
SUBJECTS = (*FORMATS, "images", "folder", "embeddings")
IMAGE_BYTES = 50_000  # of each image in the Parquet file of images
GROUP_ROWS = 10_000
RECORD_EVERY = 100_000  # rows
STOPPED = 130  # exit code


# ---- manifests


def make_manifest(path: Path, num_rows: int) -> None:
    """Columns id, image (a path) and question."""
    rows = map(_row, range(num_rows))
    if path.suffix == ".parquet":
        _make_parquet(path, rows)
        return
    with open(path, "w", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, list(_row(0)))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _row(number: int) -> dict[str, str]:
    name = f"{number:09}"
    return {"id": name, "image": f"shard/{name[:5]}/{name}.jpg", "question": "What is on the table, and is it red?"}


def _make_parquet(path: Path, rows: Iterator[dict[str, str]]) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    schema = pa.schema([(name, pa.string()) for name in _row(0)])
    with ParquetWriter(path, schema) as writer:
        while group := list(itertools.islice(rows, GROUP_ROWS)):
            writer.write_table(pa.Table.from_pylist(group, schema))


def make_images(path: Path, num_rows: int) -> None:
    """A Parquet file of images' bytes (random ones) in a single row group."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    images = pa.array([random.bytes(IMAGE_BYTES) for _ in range(num_rows)], pa.binary())
    table = pa.table({"id": [f"{number:09}" for number in range(num_rows)], "image": images})
    pq.write_table(table, path, row_group_size=num_rows, compression="none")


def make_folder(path: Path, num_files: int) -> None:
    """Files of no bytes, a thousand in each folder below `path`."""
    for number in range(num_files):
        file = path / f"{number // 1000:03}" / f"{number:09}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


# ---- one run, in this process


def run_once(arguments: list[str], stop_at: int | None = None) -> dict[str, Any]:
    """`idefics` with these arguments, to its end or until `stop_at` rows are out; seconds, rows and bytes."""
    import torch

    from idefics_cli import loaded_model
    from idefics_cli.bench.memory import reset_resident_peak, resident_bytes, resident_peak
    from idefics_cli.cli.app import app
    from idefics_cli.result import Result

    class Echo(loaded_model.LoadedModel):
        """The demo model, with texts and images that cost nothing. Counts the rows."""

        def image_workers(self, *options: Any, **more: Any) -> Any:
            return nullcontext(self)

        def prepare(self, source: Any) -> bytes:
            return source[:40] if isinstance(source, bytes) else os.fsencode(source)

        def encode(self, prompt: Any, *options: Any) -> str:
            image = next(item for item in prompt if isinstance(item, bytes | torch.Tensor))
            return image.hex() if isinstance(image, bytes) else f"{float(image[0, 0])}"

        def encode_image(self, image: Any) -> Any:
            return image

        def stream(self, source: Any, **decoding: Any) -> Iterator[tuple[int, Any]]:
            for number, prompt in self._taken(source):
                yield number, Result(f"a caption of {prompt}", -0.5, 5)

        def embed_stream(self, source: Any) -> Iterator[tuple[int, Any]]:
            noise = torch.randn(self.latents_shape).half()  # which does not compress
            for number, _ in self._taken(source):
                yield number, noise.roll(number)

        def _taken(self, source: Any) -> Iterator[tuple[int, Any]]:
            numbers = itertools.count()
            while prompts := source.take(self.batch_size, wait=True):
                for prompt in prompts:
                    yield next(numbers), prompt
                    count(next(rows))

    model = Echo.from_pretrained("demo", batch_size=64)
    loaded_model.LoadedModel.from_pretrained = staticmethod(lambda *options, **more: model)
    rows, first_row, memory = itertools.count(1), [], {}

    def count(number: int) -> None:
        if not first_row:
            first_row.append(time.perf_counter() - started)
        if number % RECORD_EVERY == 0:
            memory[number] = (resident_bytes() or 0) - before
        if number == stop_at:
            signal.raise_signal(signal.SIGINT)

    reset_resident_peak()
    before, started = resident_bytes() or 0, time.perf_counter()
    try:
        app([*arguments, "--model", "demo"])
    except SystemExit as end:
        assert end.code == (0 if stop_at is None else STOPPED), (end.code, arguments)
    seconds, num_rows = time.perf_counter() - started, next(rows) - 1
    return {
        "rows": num_rows,
        "seconds": seconds,
        "first_row_seconds": first_row[0],
        "rows_per_second": num_rows / seconds,
        "peak_bytes": (resident_peak() or 0) - before,
        "bytes_by_rows": memory,
    }


# ---- all runs, each in a process of its own


def run_alone(name: str, *arguments: str | Path) -> dict[str, Any]:
    found = json.loads(_in_a_process("--run", *arguments))
    print(f"{name}: {json.dumps(found)}", file=sys.stderr)
    return found


def _in_a_process(*arguments: str | Path) -> bytes:
    command = [sys.executable, "-m", __spec__.name, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def measure(folder: Path, subjects: list[str], options: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for subject in subjects:
        if subject in FORMATS:
            report |= measure_manifest(folder, subject, options.rows)
        elif subject == "embeddings":
            report |= measure_embeddings(folder, options.rows)
        elif subject == "folder":
            make_folder(folder / "files", options.files)
            report[subject] = run_alone(subject, "caption", folder / "files", "-o", folder / "files.jsonl")
        else:
            make_images(folder / "images.parquet", options.images)
            report[subject] = run_alone(subject, "caption", folder / "images.parquet", "-o", folder / "images.jsonl")
    return report


def measure_manifest(folder: Path, suffix: str, num_rows: int) -> dict[str, Any]:
    """A whole run, then the second half of one."""
    manifest = folder / f"rows.{suffix}"
    make_manifest(manifest, num_rows)
    whole, halves = (folder / f"{name}.{'parquet' if suffix == 'parquet' else 'jsonl'}" for name in ("whole", "halves"))
    report = {suffix: run_alone(suffix, "caption", manifest, "-o", whole)}
    _in_a_process("--stop-at", str(num_rows // 2), "--run", "caption", manifest, "-o", halves)
    report[f"{suffix}, half done"] = run_alone(f"{suffix}, half done", "caption", manifest, "-o", halves)
    assert whole.read_bytes() == halves.read_bytes(), f"{suffix}: a halved run wrote something else"
    for path in (manifest, whole, halves):
        path.unlink()
    return report


def measure_embeddings(folder: Path, num_rows: int) -> dict[str, Any]:
    """A manifest is embedded, then captioned from its embeddings."""
    manifest, embeddings, output = (folder / name for name in ("rows.jsonl", "latents.parquet", "captions.jsonl"))
    make_manifest(manifest, num_rows)
    report = {
        "embed": run_alone("embed", "embed", manifest, "-o", embeddings),
        "embeddings": run_alone("embeddings", "caption", manifest, "--embeddings", embeddings, "-o", output),
    }
    for path in (manifest, embeddings, output):
        path.unlink()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=10_000, help="of 50 kB each, in one row group")
    parser.add_argument("--files", type=int, default=50_000, help="in the folder")
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--stop-at", type=int, help="rows after which the one run is stopped")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="one run in this process: arguments of `idefics`")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_once(options.run, options.stop_at)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), options.only, options)))


if __name__ == "__main__":
    main()
