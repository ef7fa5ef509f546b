"""How fast rows go through everything but the model: `python -m benchmarks.rows`.

Manifests of so many rows are made in a temporary folder, and each is run through reader, pipeline, journal and writer
in a process of its own, with a model and images that cost nothing. Told are rows per second, when the first row was
written, and memory over what the imports take: its peak, and what was held after each 100,000 rows; then the same for a
run that an earlier one has half done. Then come a Parquet file of images' bytes, a folder of files, and rows that are
embedded and captioned from their embeddings. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idefics_cli.bench.memory import resident_bytes, resident_peak
from idefics_cli.checkpoint import ModelRequest
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.errors import RowError
from idefics_cli.pipeline.prefetch import RunStats
from idefics_cli.pipeline.run import Run, RunOptions
from idefics_cli.pipeline.task import Observer, Task
from idefics_cli.prompts.templates import PromptOptions, SpecialToken
from idefics_cli.rows import ImageOptions, ReadOptions
from idefics_cli.tasks.caption_vqa import CaptionVqa, CaptionVqaOptions
from idefics_cli.tasks.embed import Embed
from idefics_cli.writers.embeddings_file import VISION

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("jsonl", "csv", "parquet")
SUBJECTS = (*FORMATS, "images", "folder", "embeddings")
LATENTS_SHAPE = (16, 128)  # the demo model's, 4 kB in fp16
IMAGE_BYTES = 50_000  # of each image in the Parquet file of images
CHUNK_ROWS = 10_000


# ---- what costs nothing


@dataclass(frozen=True)
class EchoResult:
    text: str
    score: float = -0.5
    tokens: int = 5
    candidates: tuple = ()
    error: RowError | None = None


class EchoModel:
    """Answers each prompt with a text made of it; an image is what the row names."""

    batch_size = 64
    is_instruct = False
    fingerprint = "echo"

    def image_workers(self, options: ImageOptions) -> Any:
        return nullcontext(self)

    @property
    def latents_shape(self) -> tuple[int, int]:
        return LATENTS_SHAPE

    def prepare(self, source: Any) -> bytes:
        return source[:40] if isinstance(source, bytes) else os.fsencode(source)

    def encode(self, prompt: Sequence[Any], max_new_tokens: int) -> str:
        image = next(item for item in prompt if not isinstance(item, str | SpecialToken))
        return image.hex() if isinstance(image, bytes) else f"{float(image[0, 0])}"

    def encode_image(self, image: bytes) -> bytes:
        return image

    def stream(self, source: Any, **decoding: Any) -> Iterator[tuple[int, EchoResult]]:
        numbers = itertools.count()
        while prompts := source.take(self.batch_size, wait=True):
            for prompt in prompts:
                yield next(numbers), EchoResult(f"a caption of {prompt}")

    def embed_stream(self, source: Any) -> Iterator[tuple[int, EchoLatents]]:
        import torch

        noise = torch.randn(LATENTS_SHAPE).half()  # which cannot be packed
        numbers = itertools.count()
        while images := source.take(self.batch_size, wait=True):
            for _ in images:
                number = next(numbers)
                yield number, EchoLatents(noise.roll(number))


@dataclass(frozen=True)
class EchoLatents:
    latents: Tensor
    error: RowError | None = None


class EchoCaption(CaptionVqa):
    def check(self, request: ModelRequest) -> None:
        """There are no weights to compare."""


class EchoEmbedding(Embed):
    settings = {"embeds": True, VISION: EchoModel.fingerprint}  # noqa: RUF012


# ---- manifests


def make_manifest(path: Path, num_rows: int) -> None:
    """Columns id, image (a path) and question."""
    if path.suffix == ".parquet":
        _make_parquet(path, num_rows)
        return
    with open(path, "w", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, ["id", "image", "question"])
            writer.writeheader()
            writer.writerows(map(_row, range(num_rows)))
        else:
            file.writelines(json.dumps(_row(number)) + "\n" for number in range(num_rows))


def _row(number: int) -> dict[str, str]:
    name = f"{number:09}"
    return {"id": name, "image": f"shard/{name[:5]}/{name}.jpg", "question": "What is on the table, and is it red?"}


def _make_parquet(path: Path, num_rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in _row(0)])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, num_rows, CHUNK_ROWS):
            rows = [_row(number) for number in range(first, min(first + CHUNK_ROWS, num_rows))]
            writer.write_table(pa.Table.from_pylist(rows, schema))


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
        folder = path / f"{number // 1000:03}"
        if number % 1000 == 0:
            folder.mkdir(parents=True)
        (folder / f"{number:09}.jpg").touch()


# ---- one run, in this process


class Watch(Observer):
    """Follows a run: when the first row came, and memory when so many rows were out; stops it where it is told."""

    def __init__(self, stats: RunStats, stop_at: int | None):
        self.stats, self.stop_at = stats, stop_at
        self.started = time.perf_counter()
        self.first_row: float | None = None
        self.memory: dict[int, int] = {}

    def say(self, message: str) -> None:
        print(message, file=sys.stderr)

    def on_row(self) -> None:
        if self.first_row is None:
            self.first_row = time.perf_counter() - self.started
        if self.stats.rows % 100_000 == 0:
            self.memory[self.stats.rows] = resident_bytes() or 0
        if self.stats.rows == self.stop_at:
            raise KeyboardInterrupt


def make_work(kind: str, embeddings: str | None) -> Task:
    if kind == "embed":
        return EchoEmbedding(ModelRequest("echo"))
    return EchoCaption(CaptionVqaOptions(PromptOptions("caption"), DecodingOptions(), embeddings=embeddings))


def run_once(
    manifest: str, output: str, stop_at: int | None = None, kind: str = "caption", embeddings: str | None = None
) -> dict[str, Any]:
    """Run a manifest to its end, or until `stop_at` rows are out; seconds, rows and bytes."""
    options = RunOptions(
        inputs=(manifest,),
        output=output,
        request=ModelRequest("echo"),
        reading=ReadOptions(needs_image=embeddings is None),
        images=ImageOptions(workers=2),
    )
    before = resident_bytes() or 0
    task = make_work(kind, embeddings)
    stats = RunStats()
    watch = Watch(stats, stop_at)
    load: Any = lambda request, batch_size: EchoModel()  # noqa: E731
    try:
        Run(options, task, lambda request: "echo", load, stats, watch).run(stdout=None)
    except KeyboardInterrupt:
        if stop_at is None:
            raise
    seconds = time.perf_counter() - watch.started
    return {
        "rows": stats.rows - stats.resumed,
        "resumed": stats.resumed,
        "seconds": seconds,
        "first_row_seconds": watch.first_row,
        "rows_per_second": (stats.rows - stats.resumed) / seconds,
        "peak_bytes": (resident_peak() or 0) - before,
        "bytes_by_rows": {rows: memory - before for rows, memory in watch.memory.items()},
    }


# ---- all runs, each in a process of its own


def in_a_process(manifest: Path, output: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", __spec__.name, "--run", str(manifest), str(output), *more]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(folder: Path, subjects: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for subject in subjects:
        if subject in FORMATS:
            report |= measure_manifest(folder, subject, options.rows)
            continue
        if subject == "embeddings":
            report |= measure_embeddings(folder, options.rows)
            continue
        place = folder / ("files" if subject == "folder" else "images.parquet")
        make, size = (make_folder, options.files) if subject == "folder" else (make_images, options.images)
        make(place, size)
        report[subject] = say(subject, in_a_process(place, folder / f"{subject}.jsonl"))
    return report


def measure_manifest(folder: Path, suffix: str, num_rows: int) -> dict[str, Any]:
    """A whole run, then the second half of one."""
    manifest = folder / f"rows.{suffix}"
    make_manifest(manifest, num_rows)
    outputs = [folder / f"{name}.{'parquet' if suffix == 'parquet' else 'jsonl'}" for name in ("whole", "halves")]
    report = {suffix: say(suffix, in_a_process(manifest, outputs[0]))}
    in_a_process(manifest, outputs[1], "--stop-at", str(num_rows // 2))
    report[f"{suffix}, half done"] = say(f"{suffix}, half done", in_a_process(manifest, outputs[1]))
    assert outputs[0].read_bytes() == outputs[1].read_bytes(), f"{suffix}: a halved run wrote something else"
    for path in (manifest, *outputs):
        path.unlink()
    return report


def measure_embeddings(folder: Path, num_rows: int) -> dict[str, Any]:
    """A manifest is embedded, then captioned from its embeddings."""
    manifest, embeddings, output = (folder / name for name in ("rows.jsonl", "latents.parquet", "captions.jsonl"))
    make_manifest(manifest, num_rows)
    report = {"embed": say("embed", in_a_process(manifest, embeddings, "--kind", "embed"))}
    report["embeddings"] = say("embeddings", in_a_process(manifest, output, "--embeddings", str(embeddings)))
    for path in (manifest, embeddings, output):
        path.unlink()
    return report


def say(name: str, found: Mapping[str, Any]) -> Mapping[str, Any]:
    kept = [f"{memory / 1e6:.0f} MB at {int(rows):,} rows" for rows, memory in found["bytes_by_rows"].items()]
    print(
        f"{name}: {found['rows']} rows in {found['seconds']:.1f} s, {found['rows_per_second']:,.0f} rows/s, first row"
        f" after {found['first_row_seconds']:.2f} s, peak {found['peak_bytes'] / 1e6:.0f} MB over the imports"
        + "".join(f", {text}" for text in dict.fromkeys(kept[:1] + kept[-1:])),
        file=sys.stderr,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=10_000, help="of 50 kB each, in one row group")
    parser.add_argument("--files", type=int, default=50_000, help="in the folder")
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--run", nargs=2, metavar=("MANIFEST", "OUTPUT"), help="one run in this process")
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--kind", choices=["caption", "embed"], default="caption", help="of the one run")
    parser.add_argument("--embeddings", metavar="FILE", help="which the one run captions in place of images")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_once(*options.run, options.stop_at, options.kind, options.embeddings)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), options.only, options)))


if __name__ == "__main__":
    main()
