"""What share of the time the engine waits for images: `python -m benchmarks.engine_idle FOLDER...`.

Photographs are captioned by a model with random weights, through reader threads, worker processes and engine, twice
over: the first time the worker processes have yet to start, the second time (with other photographs) they are there.
The largest files below the folders are taken, so that none is quick to decode. On CUDA (`--device cuda`) also what
share of the time the device worked on images, prompts and texts, by its own events. `--beside N` instead: how long a
decode step takes beside 1 to N threads that encode prompts without a rest. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.image_decoding import find_images
from idefics_cli.bench.options import SIZES, BenchOptions
from idefics_cli.bench.subjects import random_subject
from idefics_cli.checkpoint.devices import resolve_device
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.engine.engine import Engine
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.engine.prompt_source import EncodedPrompt, IterableSource
from idefics_cli.engine.scheduler import Scheduler, stream
from idefics_cli.errors import RowError
from idefics_cli.images.worker_pool import WorkerPool
from idefics_cli.loaded_model import LoadedModel
from idefics_cli.model.packed_linear import pack_linears
from idefics_cli.pipeline.prefetch import FlowOptions, RunStats, Steps, run_rows
from idefics_cli.rows import ImageOptions, InputRow


@dataclass(frozen=True)
class WaitOptions:
    """`size` is the model's; `rows` the photographs of each of the two runs."""

    size: str = "mid"
    device: str = "cpu"
    dtype: str = "fp32"
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
    asked = BenchOptions(ModelRequest("", dtype=options.dtype), random=options.size, batch_size=options.batch_size)
    device = resolve_device(options.device)
    subject = random_subject(asked, device)
    if device.type == "cpu":
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
    engine.times.reset()
    with engine.timed_on_device():
        leave = lambda row, outcome: None  # noqa: E731
        run_rows(rows_of(paths), steps, leave, flow, stats, lambda finished: waited.append(stats.seconds_waited))
    busy = engine.times.vision + engine.times.prefill + engine.times.decode
    assert not stats.num_failed, f"{stats.num_failed} photographs could not be read"
    return {
        "rows": stats.rows,
        "seconds": stats.seconds,
        "seconds_waited": stats.seconds_waited,
        "seconds_waited_for_first": waited[0],
        "waited_share": stats.waited_share,
        "busy_share": busy / stats.seconds,
    }


# ---- a step beside threads that encode prompts

PROMPT = ("User: " + "What stands to the left of the large one, and which colour has it? " * 30, "\nAssistant:")
STEPS_BESIDE = 30


def measure_beside(most: int, device: str) -> dict[str, Any]:
    """Milliseconds of a decode step of the demo model, 8 rows of 3 beams, and prompts encoded meanwhile, by threads.
    Alone and beside them in turn: the machine's pace changes."""
    torch.set_num_threads(1)
    model = LoadedModel.from_pretrained("demo", device=device, batch_size=8)
    decoding = DecodingOptions(3, 1000, min_new_tokens=1000)
    prompts = IterableSource([model.encode([*PROMPT, str(number)], 1000) for number in range(8)])
    scheduler = Scheduler(model.engine, prompts, decoding, model.engine.vocabulary)
    scheduler.advance(scheduler.admit())
    report = {}
    for threads in range(1, most + 1):
        alone, beside, rate = zip(*(beside_once(scheduler, model, threads) for _ in range(3)), strict=True)
        ratios = [one / other for one, other in zip(beside, alone, strict=True)]
        report[threads] = {"alone_ms": alone, "beside_ms": beside, "ratio": statistics.median(ratios), "encoded": rate}
    return report


def beside_once(scheduler: Scheduler, model: LoadedModel, threads: int) -> tuple[float, float, float]:
    alone, stop, counts = step_milliseconds(scheduler), threading.Event(), [0] * threads

    def encode(thread: int) -> None:
        while not stop.is_set():
            model.encode(PROMPT, 1000)
            counts[thread] += 1

    running = [threading.Thread(target=encode, args=(each,)) for each in range(threads)]
    started = time.perf_counter()
    for thread in running:
        thread.start()
    beside = step_milliseconds(scheduler)
    stop.set()
    for thread in running:
        thread.join()
    return alone, beside, sum(counts) / (time.perf_counter() - started)


def step_milliseconds(scheduler: Scheduler) -> float:
    def once() -> float:
        started = time.perf_counter()
        scheduler.advance([])
        scheduler.evict()
        return (time.perf_counter() - started) * 1e3

    return statistics.median(once() for _ in range(STEPS_BESIDE))


@dataclass(frozen=True)
class Captioned:
    error: RowError | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--draft", action="store_true")
    parser.add_argument("--beside", type=int, default=0, metavar="N")
    options = parser.parse_args()
    if options.beside:
        print(json.dumps(measure_beside(options.beside, options.device)))
        return
    paths = sorted(find_images(options.folders), key=lambda path: -path.stat().st_size)[: 2 * options.rows]
    if len(paths) < 2 * options.rows:
        sys.exit(f"{len(paths)} images lie below these folders and {2 * options.rows} are needed: lower --rows")
    chosen = {each.name: getattr(options, each.name) for each in fields(WaitOptions) if hasattr(options, each.name)}
    print(json.dumps(measure(paths, WaitOptions(**chosen))))


if __name__ == "__main__":
    main()
