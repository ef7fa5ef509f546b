"""What share of the time the engine waits for images: `python -m benchmarks.engine_idle FOLDER...`.

Photographs are captioned by a model with random weights, through reader threads, worker processes and engine, twice
over: the first time the worker processes have yet to start, the second time (with other photographs) they are there.
The largest files below the folders are taken, so that none is quick to decode. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.image_decoding import find_images
from idefics_cli.bench.options import SIZES, BenchOptions
from idefics_cli.bench.subjects import random_subject
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.engine.engine import Engine
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.engine.prompt_source import EncodedPrompt
from idefics_cli.engine.scheduler import stream
from idefics_cli.errors import RowError
from idefics_cli.images.worker_pool import WorkerPool
from idefics_cli.model.packed_linear import pack_linears
from idefics_cli.pipeline.prefetch import FlowOptions, RunStats, Steps, run_rows
from idefics_cli.rows import ImageOptions, InputRow


@dataclass(frozen=True)
class WaitOptions:
    """`size` is the model's; `rows` the photographs of each of the two runs."""

    size: str = "mid"
    rows: int = 64
    batch_size: int = 8
    workers: int = 2
    num_beams: int = 3
    max_new_tokens: int = 20
    draft: bool = False

    @property
    def decoding(self) -> DecodingOptions:
        """Texts of one length, since random weights never end by themselves."""
        return DecodingOptions(self.num_beams, self.max_new_tokens, min_new_tokens=self.max_new_tokens)


def prepare(row: InputRow, images: WorkerPool, input_ids: Sequence[int]) -> EncodedPrompt | RowError:
    pixels = images.prepare(row.sources[0])
    return pixels if isinstance(pixels, RowError) else EncodedPrompt(list(input_ids), (pixels,))


def rows_of(paths: Sequence[Path]) -> Iterator[InputRow]:
    for index, path in enumerate(paths):
        yield InputRow(index, str(path), str(path), (path,), {})


def measure(paths: Sequence[Path], options: WaitOptions) -> dict[str, Any]:
    assert len(paths) == 2 * options.rows, f"{len(paths)} photographs for two runs of {options.rows}"
    asked = BenchOptions(ModelRequest(""), random=options.size, batch_size=options.batch_size)
    subject = random_subject(asked, torch.device("cpu"), torch.float32)
    pack_linears(subject.model)
    (prompt, *_) = subject.prompts.draw(0)
    engine = subject.engine(options.batch_size)
    with WorkerPool(subject.images, ImageOptions(draft=options.draft, workers=options.workers)) as images:
        run = partial(run_once, engine=engine, images=images, input_ids=prompt.input_ids, options=options)
        return {"options": asdict(options), "first": run(paths[::2]), "then": run(paths[1::2])}


def run_once(
    paths: Sequence[Path], engine: Engine, images: WorkerPool, input_ids: Sequence[int], options: WaitOptions
) -> dict[str, float]:
    stats = RunStats()
    steps = Steps(
        partial(prepare, images=images, input_ids=input_ids),
        lambda source: ((number, Captioned()) for number, _ in stream(engine, source, options.decoding)),
    )
    waited: list[float] = []  # by the time that each row was out
    flow = FlowOptions(options.batch_size, options.workers)
    run_rows(rows_of(paths), steps, lambda row, outcome: None, flow, stats, lambda: waited.append(stats.seconds_waited))
    assert not stats.num_failed, f"{stats.num_failed} photographs could not be read"
    return {
        "rows": stats.rows,
        "seconds": stats.seconds,
        "seconds_waited": stats.seconds_waited,
        "seconds_waited_for_first": waited[0],
        "waited_share": stats.waited_share,
    }


@dataclass(frozen=True)
class Captioned:
    error: RowError | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--draft", action="store_true")
    options = parser.parse_args()
    paths = sorted(find_images(options.folders), key=lambda path: -path.stat().st_size)[: 2 * options.rows]
    if len(paths) < 2 * options.rows:
        sys.exit(f"{len(paths)} images lie below these folders and {2 * options.rows} are needed: lower --rows")
    print(json.dumps(measure(paths, WaitOptions(options.size, options.rows, draft=options.draft))))


if __name__ == "__main__":
    main()
