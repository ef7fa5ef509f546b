"""Runs with faults, and the oracle that says whether all their rows came out.

A run is a process forked from one that has imported everything, so that fifty of them take seconds.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from conftest import expected_text, save_image
from faulty_run import Fault, Settings, main_in_session

KILLED = -signal.SIGKILL
PLAIN = Settings()
BROKEN_EACH = 17

both_formats = pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
slow = [pytest.mark.slow, pytest.mark.timeout(1800)]


def sampled(step: int) -> pytest.MarkDecorator:
    """At every `step`-th call; the slow tests are at each."""
    return pytest.mark.parametrize("step", [step, pytest.param(1, marks=slow)], ids=["sample", "all"])


@cache
def forks() -> ForkServerContext:
    """Whose server has imported what a run needs; it is found by the environment only."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        forkserver.ensure_running()
    return context


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        """The one line on stderr, apart from the first errors of rows, which come as they happen."""
        (line,) = (each for each in self.stderr.splitlines() if not each.startswith("First "))
        return line


@dataclass(frozen=True)
class Started:
    process: BaseProcess
    folder: Path

    def send(self, number: int) -> None:
        """To the whole group. One that has not begun does not have one yet."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            self.process.join(0)
            if self.process.exitcode is None:
                os.kill(self.process.pid, number)

    def wait(self, seconds: float = 60) -> Ended:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s"
        texts = [path.read_text() if path.exists() else "" for path in (self.folder / "stdout", self.folder / "stderr")]
        return Ended(self.process.exitcode, *texts)


@dataclass(frozen=True)
class Bench:
    """A folder of images, a few of them broken, and where their captions go."""

    folder: Path
    output: Path
    spelling: str | None = None  # of the folder of images
    command: tuple[str, ...] = ()  # what is run in place of `caption IMAGES`
    stdin: bytes | None = None

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def part(self) -> Path:
        return self.output.with_name(self.output.name + ".part")

    def start(self, *options: str, settings: Settings = PLAIN) -> Started:
        command = self.command or ("caption", self.spelling or str(self.images))
        arguments = [*command, "-o", str(self.output), "--workers", "2", *options]
        streams = self.folder / f"streams-{time.monotonic_ns()}"
        streams.mkdir()
        files = str(streams / "stdout"), str(streams / "stderr")
        process = forks().Process(target=main_in_session, args=(arguments, settings, *files, self.stdin))
        process.start()
        return Started(process, streams)

    def run(self, *options: str, settings: Settings = PLAIN) -> Ended:
        return self.start(*options, settings=settings).wait()

    def run_with_fault(
        self, number: int, action: Any, *options: str, settings: Settings = PLAIN, **fault: Any
    ) -> Ended | None:
        """None: the run has fewer calls than that, and is not disturbed."""
        fired = self.folder / "fired"
        fired.unlink(missing_ok=True)
        settings = replace(settings, fault=Fault(number, action, str(fired), **fault))
        ended = self.run(*options, settings=settings)
        return ended if fired.exists() else None

    def faults(self, step: int, least: int, action: Any, *options: str, **fault: Any) -> Iterator[Ended]:
        """Runs, `least` or more, with the fault at each `step`-th call; before each the output is as it is now."""
        before = self.files()
        for made in count():
            self.clear()
            for path, data in before.items():
                path.write_bytes(data)
            ended = self.run_with_fault(1 + made * step, action, *options, **fault)
            if ended is None:
                assert made >= least, f"{made} calls were disturbed"
                return
            yield ended

    def files(self) -> dict[Path, bytes]:
        """What is in the folder of the output, but for the lock of a run that was killed."""
        return {path: path.read_bytes() for path in self.output.parent.iterdir() if not path.is_symlink()}

    def wait_for_rows(self, number: int) -> None:
        wait_for(lambda: self.part.exists() and self.part.read_bytes().count(b"\n") > number)

    def clear(self) -> None:
        for path in self.output.parent.iterdir():
            path.unlink()

    def rows(self) -> list[dict[str, Any]]:
        if self.output.suffix == ".jsonl":
            return [json.loads(line) for line in self.output.read_bytes().splitlines()]
        if self.output.suffix == ".csv":
            with open(self.output, newline="") as file:
                return [{name: cell or None for name, cell in row.items()} for row in csv.DictReader(file)]
        import pyarrow.parquet as pq

        return pq.read_table(self.output).to_pylist()

    def verify(self, prefix: str = "") -> None:
        """The oracle: each image has its row, in order, with its text or a reason; nothing else is left over."""
        expected = expected_rows(self.images)
        found = [(row["id"], row["caption"], (row["error"] or "").split(":")[0]) for row in self.rows()]
        assert found == [(name, text and prefix + text, error) for name, text, error in expected]
        left = {path.name for path in self.output.parent.iterdir()}
        assert left == {self.output.name + suffix for suffix in ("", ".run")}


def expected_rows(images: Path) -> list[tuple[str, str | None, str]]:
    """Worked out from the images, without a run."""
    return [(path.name, *expected_outcome(path.read_bytes(), path)) for path in sorted(images.glob("*.png"))]


@cache
def expected_outcome(data: bytes, path: Path) -> tuple[str | None, str]:
    return (None, "image_unreadable") if data == b"broken" else (expected_text(path), "")


def make_bench(folder: Path, number: int, suffix: str, output: Path | None = None) -> Bench:
    bench = Bench(folder, output or folder / "out" / f"f{suffix}")
    bench.output.parent.mkdir(parents=True, exist_ok=True)
    bench.images.mkdir(parents=True)
    for i in range(number):
        path = bench.images / f"{i:04}.png"
        if i % BROKEN_EACH == 5:
            path.write_bytes(b"broken")
        else:
            save_image(path, i)
    return bench


def repair_images(bench: Bench) -> None:
    for i, path in enumerate(sorted(bench.images.glob("*.png"))):
        if path.read_bytes() == b"broken":
            save_image(path, i)


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
