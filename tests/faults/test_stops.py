"""Signals at any moment, and two runs on one output."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty_run import Settings
from runs import both_formats, make_bench, sampled, slow, wait_for

SCRIPT = Path(__file__).with_name("faulty_run.py")
ROWS = 100
SECONDS_TO_STOP = 5
SLOW_ROWS = Settings(delay=0.02, batch_size=2, commit_rows=5)

all_signals = pytest.mark.parametrize(
    ("action", "number"),
    [("interrupt", signal.SIGINT), ("terminate", signal.SIGTERM), ("hang up", signal.SIGHUP)],
)


@both_formats
@all_signals
@sampled(7)
def test_a_signal_at_each_call(tmp_path: Path, suffix: str, action: str, number: signal.Signals, step: int) -> None:
    bench = make_bench(tmp_path, ROWS, suffix)
    for stopped in bench.faults(step, 3, action):
        assert stopped.code == 128 + number, stopped
        assert stopped.said.startswith(f"Stopped by {number.name}.")
        where = f" finished so far: safe in {bench.part}. The same command continues from there."
        assert stopped.said.endswith(where) == bench.part.exists(), stopped.said
        assert not list(bench.output.parent.glob("*.tmp"))
        assert bench.run().code == 3
        bench.verify()


@both_formats
@all_signals
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("stops", [3, pytest.param(30, marks=slow)])
def test_signals_at_random_moments(
    tmp_path: Path, suffix: str, action: str, number: signal.Signals, times: int, stops: int
) -> None:
    bench = make_bench(tmp_path, 30 * stops, suffix)
    moments = random.Random(stops)
    for _ in range(stops):
        run = bench.start(settings=SLOW_ROWS)
        wait_for((run.folder / "stderr").exists)
        for _ in range(times):
            time.sleep(moments.uniform(0, 0.1))
            run.send(number)
        ended = run.wait(SECONDS_TO_STOP)
        # Before it has begun a run is ended by the signal itself, which a shell shows as the same number.
        assert ended.code == 128 + number or (ended.code, ended.stderr) == (-number, ""), ended
        assert "Traceback" not in ended.stderr
        assert not processes_of(run.process.pid)
    assert bench.run().code == 3
    bench.verify()


def processes_of(group: int | None) -> str:
    return subprocess.run(["ps", "-o", "pid=", "-g", str(group)], capture_output=True, text=True).stdout.strip()


# Options take long to be read, as they do on a machine that is busy.
BEGINNING = """
import signal
from idefics_cli.cli import app as cli
from idefics_cli.__main__ import main

def app(**options):
    print("begun", flush=True)
    signal.sigtimedwait([], 60)

cli.command_line = lambda: app
main()
"""
# Modules take long to be imported.
IMPORTING = """
import signal, sys
from idefics_cli.__main__ import main

class Slow:
    def find_spec(self, name, path, target=None):
        print("begun", flush=True)
        signal.sigtimedwait([], 60)

sys.meta_path.insert(0, Slow())
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("beginning", [IMPORTING, BEGINNING])
def test_a_signal_before_anything_has_begun_ends_at_once_and_says_nothing(beginning: str, number: int) -> None:
    """By the exit code: a signal's own end does not come to the first process of a container."""
    process = subprocess.Popen([sys.executable, "-c", beginning], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"begun\n"
    process.send_signal(number)
    assert process.communicate(timeout=SECONDS_TO_STOP)[1] == b""
    assert process.returncode == 128 + number


@both_formats
@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--prefix", "other ")])
def test_a_second_run_on_the_same_output_is_refused(tmp_path: Path, suffix: str, options: tuple[str, ...]) -> None:
    bench = make_bench(tmp_path, ROWS, suffix)
    first = bench.start(settings=SLOW_ROWS)
    bench.wait_for_rows(2)
    first.send(signal.SIGSTOP)  # so that it does not end before the second begins
    second = bench.run(*options)
    first.send(signal.SIGCONT)
    assert second.code == 2
    assert second.said.startswith(f"Error: another run is writing {bench.part}: ")
    assert first.wait().code == 3
    bench.verify()


@both_formats
def test_many_runs_that_begin_at_one_moment(tmp_path: Path, suffix: str) -> None:
    """One does the work; the others are refused, or find it done."""
    bench = make_bench(tmp_path, ROWS, suffix)
    runs = [bench.start() for _ in range(6)]
    ended = [run.wait() for run in runs]
    assert {each.code for each in ended} <= {2, 3}
    assert all("another run is writing" in each.said for each in ended if each.code == 2)
    assert sum("with a text" in each.stderr for each in ended) == 1
    bench.verify()


@pytest.mark.parametrize("redirect", ["", "2>&1"])
def test_a_reader_that_has_had_enough(tmp_path: Path, redirect: str) -> None:
    bench = make_bench(tmp_path, ROWS, ".jsonl")
    command = f'set -o pipefail; "$@" {redirect} | head -n 1'
    run = [sys.executable, SCRIPT, "caption", bench.images]
    done = subprocess.run(["bash", "-c", command, "bash", *run], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
