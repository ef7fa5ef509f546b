"""What units and processes cost and gain: `python -m benchmarks.units`, with a captioner that only waits.

Two cores cannot show what more models compute, so each batch takes a set time, as on a device of its own. The rows of a
manifest become the parts of a folder by 1, 2 and 4 processes; then by one in a single unit. One JSON line on
stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from PIL import Image

from idefics_cli.cli import app as cli
from idefics_cli.result import Result
from idefics_cli.scale import processes

BATCH = 8


class Waiting:
    """A model whose batches take `seconds` for each row."""

    is_instruct, batch_size, place = False, BATCH, None

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def image_workers(self, options: Any) -> Any:
        return nullcontext(self)

    def prepare(self, source: Any) -> str:
        return str(source)

    def encode_image(self, image: Any) -> Any:
        return image

    def encode(self, prompt: Any, max_new_tokens: int, start: Any = ()) -> str:
        return "prompt"

    def stream(self, source: Any, **decoding: Any) -> Iterator[tuple[int, Result]]:
        number = 0
        while prompts := source.take(BATCH, True):
            time.sleep(self._seconds * len(prompts))
            for _ in prompts:
                yield number, Result("a table", -0.5, 2)
                number += 1


def seconds(manifest: Path, row_seconds: float, *options: str) -> float:
    """Of a run, from its options to its end."""
    cli.check_model = lambda request: None
    cli.load_model = lambda request, batch_size: Waiting(row_seconds)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        cli.app(
            ["caption", str(manifest), "-o", f"{folder}/parts/", "--format", "jsonl", *options], standalone_mode=False
        )
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--row-seconds", type=float, default=0.02)
    parser.add_argument("--unit-rows", type=int, default=128)
    given = parser.parse_args()
    processes.START = "fork"  # with the waiting model
    found: dict[str, Any] = {"rows": given.rows, "row_seconds": given.row_seconds, "unit_rows": given.unit_rows}
    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", (8, 8)).save(Path(folder, "a.png"))
        manifest = Path(folder, "rows.jsonl")
        manifest.write_text('{"image": "a.png"}\n' * given.rows)
        cli.check_model = lambda request: None
        cli.load_model = lambda request, batch_size: Waiting(0)
        warm = ["caption", str(manifest), "--limit", "1", "-o", f"{folder}/warm.jsonl"]
        cli.app(warm, standalone_mode=False)  # what is imported is not measured
        import torch  # noqa: F401 (as in each process that has a model)

        for number in 1, 2, 4:
            units = "--unit-rows", str(given.unit_rows), "--processes", str(number)
            found[f"{number} processes"] = seconds(manifest, given.row_seconds, *units)
        found["one unit"] = seconds(manifest, given.row_seconds, "--unit-rows", str(given.rows))
    num_units = -(-given.rows // given.unit_rows)
    found["seconds of a unit"] = (found["1 processes"] - found["one unit"]) / (num_units - 1)
    found["share of 4,096 rows"] = found["seconds of a unit"] / (4096 * given.row_seconds)
    for number in 2, 4:
        found[f"gain of {number}"] = found["1 processes"] / found[f"{number} processes"]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
