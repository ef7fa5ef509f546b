"""Processes of units that die, drivers that are killed and stopped, and two drivers on one folder."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import expected_text
from faulty_run import Settings
from runs import KILLED, Bench, Started, expected_rows, make_bench, slow, wait_for

from idefics_cli.scale.processes import EARLY_ENDS

OPTIONS = "--format", "jsonl", "--unit-rows", "5"
SLOW = Settings(delay=0.02)
NUM_ROWS = 48


@pytest.fixture
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Bench:
    """With rows enough for all kills."""
    folder, kills = tmp_path / "captions", getattr(request.node, "callspec", None)
    many = kills is not None and kills.params.get("kills", 0) > 3
    made = make_bench(tmp_path, NUM_ROWS * (8 if many else 1), ".jsonl", output=folder / "x")
    return replace(made, output=Path(f"{folder}/"))


def start(bench: Bench, *options: str, settings: Settings = SLOW) -> Started:
    return replace(bench, output=f"{bench.output}/").start(*OPTIONS, *options, settings=settings)  # type: ignore[arg-type]


def workers(driver: int) -> list[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        found = [
            Path(f"/proc/{driver}/task/{each}/children").read_text() for each in os.listdir(f"/proc/{driver}/task")
        ]
        return [int(pid) for text in found for pid in text.split()]
    return []


def is_alive(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def parts(bench: Bench) -> list[Path]:
    return sorted(bench.output.glob("part-*"))


def verify(bench: Bench, fatal: str | None = None) -> None:
    """Each image has its row, once and in order, and nothing else is left."""
    rows = [json.loads(line) for path in parts(bench) for line in path.read_bytes().splitlines()]
    found = [(row["id"], row["caption"], (row["error"] or "").split(":")[0]) for row in rows]
    expected = expected_rows(bench.images)
    assert found == [
        (name, None, "process_died") if name == fatal else (name, text, error) for name, text, error in expected
    ]
    left = {path.name for path in bench.output.iterdir()} - {path.name for path in parts(bench)}
    assert left == {"_run.json", "_summary.json"}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=slow)])
def test_kills_of_workers_cost_nothing(bench: Bench, kills: int) -> None:
    """At random moments, yet not so many in a row that a row is blamed, or the loading of the model."""
    started, chance = (
        start(bench, "--processes", "2", settings=Settings(delay=0.4 if kills > 3 else 0.2)),
        random.Random(kills),
    )
    killed = 0
    while killed < kills and started.process.is_alive():
        time.sleep(chance.uniform(0.1, 0.4))
        found = workers(started.process.pid)
        if found:
            with suppress(ProcessLookupError):
                os.kill(chance.choice(found), signal.SIGKILL)
                killed += 1
        if killed and killed % (EARLY_ENDS - 1) == 0:
            before = len(parts(bench))
            wait_for(lambda before=before: len(parts(bench)) > before or not started.process.is_alive())
    ended = started.wait(120)
    assert ended.code == 3 and killed == kills, (killed, ended.stderr)
    verify(bench)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=slow)])
def test_kills_of_drivers_take_their_workers_along_and_another_way_finishes(bench: Bench, kills: int) -> None:
    chance = random.Random(kills)
    for _ in range(kills):
        before = len(parts(bench))
        started = start(bench, "--processes", "2", settings=Settings(delay=0.1))
        wait_for(lambda before=before: len(parts(bench)) > before)
        time.sleep(chance.uniform(0, 0.2))
        mine = workers(started.process.pid)
        os.kill(started.process.pid, signal.SIGKILL)
        assert started.wait().code == KILLED and mine
        wait_for(lambda mine=mine: not any(map(is_alive, mine)))
    for place in 3, 1, 2:
        assert start(bench, "--shard", f"{place}/3").wait().code in (0, 3)
    verify(bench)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=slow)])
def test_kills_of_tasks_of_an_array(bench: Bench, kills: int) -> None:
    """Three at a time; each that is killed is started again, and the rows are those of a run that was left alone."""
    chance = random.Random(kills)
    tasks = {place: start(bench, "--shard", f"{place}/3", settings=Settings(delay=0.05)) for place in (1, 2, 3)}
    for _ in range(kills):
        time.sleep(chance.uniform(0.1, 0.4))
        place = chance.choice(list(tasks))
        tasks[place].send(signal.SIGKILL)
        tasks[place].process.join(10)
        tasks[place] = start(bench, "--shard", f"{place}/3", settings=Settings(delay=0.05))
    for task in tasks.values():
        ended = task.wait(120)
        assert ended.code in (0, 3), ended.stderr
    verify(bench)


def test_a_row_that_ends_its_process_costs_itself_only(bench: Bench) -> None:
    fatal = bench.images / "0013.png"
    ended = start(bench, "--processes", "2", settings=Settings(fatal=expected_text(fatal))).wait(120)
    assert ended.code == 3 and "process_died" in ended.stderr, ended.stderr
    verify(bench, fatal=fatal.name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_all_processes_and_leave_nothing(bench: Bench, number: int) -> None:
    started = start(bench, "--processes", "2", settings=Settings(delay=0.2))
    wait_for(lambda: len(parts(bench)) > 2)  # of one at least the driver knows
    mine = workers(started.process.pid)
    started.send(number)
    ended = started.wait(10)
    assert ended.code == 128 + number and "The same command continues from there" in ended.said
    assert len(mine) == 2 and not any(map(is_alive, mine))
    assert {path.name for path in bench.output.iterdir()} - {path.name for path in parts(bench)} == {"_run.json"}
    assert start(bench).wait().code == 3
    verify(bench)


def test_of_two_drivers_the_second_is_refused(bench: Bench) -> None:
    first = start(bench, settings=Settings(delay=0.2))
    wait_for(lambda: parts(bench))
    first.send(signal.SIGSTOP)  # on a busy machine it would be done before the second begins
    for options in (), ("--shard", "2/2"):
        second = start(bench, *options).wait()
        assert second.code == 2 and "another run is at work on" in second.said, second.stderr
    first.send(signal.SIGCONT)
    assert first.wait(60).code == 3
    verify(bench)
