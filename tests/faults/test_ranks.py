"""One command in two processes, of which one is stopped: all end, with the right code, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import save_image
from in_ranks import codes_of, start
from tiny_models import save_checkpoint

NUM_IMAGES = 80
STEP_SECONDS = 0.1  # longer in all than the others take to notice that one ends


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, images, one of them broken, and the rows that one process makes of them."""
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder / "model")
    (folder / "images").mkdir()
    for number in range(NUM_IMAGES):
        save_image(folder / "images" / f"{number:02}.png", seed=number)
    (folder / "images" / "broken.png").write_bytes(b"no image")
    assert run(folder, folder / "expected.jsonl", size=1) == [3]
    return folder


def run(folder: Path, output: Path, *options: str, size: int = 2, **fault: Any) -> list[int | None]:
    return codes_of(begin(folder, output, *options, size=size, **fault))


def begin(folder: Path, output: Path, *options: str, size: int = 2, fails: int | None = None) -> list[Any]:
    model = ["-m", str(folder / "model"), "--device", "cpu", "--max-new-tokens", "4", "--batch-size", "4"]
    command = ["caption", str(folder / "images"), *model, "-o", str(output), *options]
    return start(size, command_line, command, output, fails)


def command_line(command: list[str], output: Path, fails: int | None) -> None:
    """In a process of its own, whose stderr is a file; with `fails`, the second process has a bug at that step."""
    from idefics_cli.__main__ import main
    from idefics_cli.engine.scheduler import Scheduler

    rank = int(os.environ["RANK"])
    for number in (1, 2):
        os.dup2(os.open(said_by(output, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Scheduler.decode_step = slow(Scheduler.decode_step, fails if rank == 1 else None)  # type: ignore[method-assign]
    sys.argv = ["idefics", *command]
    main()


def said_by(output: Path, rank: int) -> Path:
    return output.with_name(f"{output.name}.said-{rank}")


def slow(step: Callable[..., None], fails: int | None) -> Callable[..., None]:
    numbers = iter(range(10**9))

    def stepping(*arguments: Any) -> None:
        time.sleep(STEP_SECONDS)
        if next(numbers) == fails:
            raise ZeroDivisionError("planted")
        step(*arguments)

    return stepping


def texts(output: Path) -> list[tuple[Any, ...]]:
    rows = map(json.loads, output.read_text().splitlines())
    return [(row["id"], row["caption"], row["error"]) for row in rows]


def rows_in(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0


def wait_for_rows(journal: Path) -> None:
    deadline = time.monotonic() + 120
    while rows_in(journal) < 4:
        assert time.monotonic() < deadline, "no row was written"
        time.sleep(0.01)


slow_case = pytest.mark.slow


@pytest.mark.parametrize(
    ("rank", "number", "codes"),
    [
        (0, signal.SIGINT, [130, 130]),
        (1, signal.SIGKILL, [1, -signal.SIGKILL]),
        pytest.param(0, signal.SIGTERM, [143, 143], marks=slow_case),
        pytest.param(0, signal.SIGKILL, [-signal.SIGKILL, 1], marks=slow_case),
        pytest.param(1, signal.SIGTERM, [143, 143], marks=slow_case),
        pytest.param(1, signal.SIGINT, [130, 130], marks=slow_case),
    ],
)
def test_one_of_two_processes_is_stopped(
    folder: Path, tmp_path: Path, rank: int, number: int, codes: list[int]
) -> None:
    output = tmp_path / "rows.jsonl"
    processes = begin(folder, output)
    wait_for_rows(tmp_path / "rows.jsonl.part")
    os.kill(processes[rank].pid, number)
    assert codes_of(processes) == codes
    if codes[0] > 0:
        assert "The same command continues from there" in said_by(output, 0).read_text()
    assert said_by(output, 1).read_text() == ""
    assert_continues(folder, output)


def test_a_bug_in_one_of_two_processes_ends_both(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    assert run(folder, output, fails=12) == [1, 1]
    assert "a bug in process 2 of 2: ZeroDivisionError: planted" in said_by(output, 0).read_text()
    assert_continues(folder, output)


def assert_continues(folder: Path, output: Path) -> None:
    assert run(folder, output) == [3, 3]
    assert texts(output) == texts(folder / "expected.jsonl")
    assert not output.with_name(output.name + ".part").exists()


def test_a_mistake_is_said_once(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    assert run(folder, output, "--device", "cuda:7") == [2, 2]
    (line,) = said_by(output, 0).read_text().splitlines()
    assert "--device" in line and said_by(output, 1).read_text() == ""
