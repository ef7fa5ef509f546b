"""Runs that are killed: at random moments, and at every call of the system that changes a file."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from faulty_run import COMMIT_ROWS, Settings
from runs import (
    BROKEN_EACH,
    KILLED,
    Bench,
    both_formats,
    expected_rows,
    make_bench,
    repair_images,
    sampled,
    slow,
    wait_for,
)

from idefics_cli.writers.formats import mark_of

SCRIPT = Path(__file__).with_name("faulty_run.py")
ROWS = 200
SLOW_ROWS = Settings(delay=0.01, batch_size=2, commit_rows=5)
LONGEST_WAIT = 0.25  # in which that many rows may come out at the most:
ROWS_PER_KILL = round(LONGEST_WAIT / SLOW_ROWS.delay * SLOW_ROWS.batch_size)


# ---- at random moments


@both_formats
@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=slow)])
def test_kills_at_random_moments_lose_and_repeat_nothing(tmp_path: Path, suffix: str, kills: int) -> None:
    bench = make_bench(tmp_path, kills * ROWS_PER_KILL, suffix)
    moments = random.Random(kills)
    for number in range(kills):
        run = bench.start(settings=SLOW_ROWS)
        wait_longest = LONGEST_WAIT
        if number % 2:  # every other one when rows have come
            wait_for_growth(bench.part)
            wait_longest = 0.05
        time.sleep(moments.uniform(0, wait_longest))
        run.send(signal.SIGKILL)
        assert run.wait().code == KILLED
        assert not bench.output.exists()
    num_whole = bench.part.read_bytes().count(b"\n") - 1  # but for the first line, which tells the settings
    last = bench.run()
    assert last.code == 3 and f" {num_whole} of them done before" in last.stderr
    bench.verify()


def wait_for_growth(path: Path) -> None:
    before = size_of(path)
    wait_for(lambda: size_of(path) > before)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# ---- at every call


@both_formats
@sampled(5)
@pytest.mark.parametrize("action", ["kill", "torn"])
def test_a_kill_at_each_call(tmp_path: Path, suffix: str, action: str, step: int) -> None:
    bench = make_bench(tmp_path, ROWS, suffix)
    appends = ROWS // COMMIT_ROWS
    for killed in bench.faults(step, 2 * appends // step, action):
        assert killed.code == KILLED
        assert bench.run().code == 3
        bench.verify()


@both_formats
@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize("threads", ["all", "main"])
@pytest.mark.parametrize("numbers", [[1, 4], pytest.param(range(1, 10_000), marks=slow)], ids=["sample", "all"])
def test_a_kill_at_each_system_call(tmp_path: Path, suffix: str, threads: str, numbers: Sequence[int]) -> None:
    """Calls are counted in each thread by itself: where all are followed, the one that writes rows comes first."""
    bench = make_bench(tmp_path, ROWS, suffix)
    codes = []
    for number in numbers:
        bench.clear()
        codes.append(run_in_strace(bench, number, follow=threads == "all"))
        assert codes[-1] == 3 or bench.run().code == 3
        bench.verify()
        if codes[-1] != KILLED:
            break
    assert codes.count(KILLED) >= 2 and set(codes) <= {KILLED, 3}


def run_in_strace(bench: Bench, number: int, follow: bool) -> int:
    """The exit code of a run that the kernel kills at its `number`-th call on one of the output's files."""
    calls = "/^(write|fsync|ftruncate|rename.*|unlink.*)$"
    paths = [bench.output.with_name(bench.output.name + end) for end in ("", ".part", ".run", ".lock")]
    temporary = [path.with_name(f".idefics-{mark_of(path)}-temporary.tmp") for path in (paths[0], paths[2])]
    names = [*paths, *temporary]
    watched = [argument for name in names for argument in ("-P", str(name))]
    inject = f"inject={calls}:signal=KILL:when={number}"
    command = ["strace", *["-f"] * follow, "-qq", "-o", "/dev/null", *watched, "-e", f"trace={calls}", "-e", inject]
    run = [sys.executable, SCRIPT, "caption", bench.images, "-o", bench.output, "--workers", "2"]
    environment = {**os.environ, "FAKE": json.dumps(asdict(Settings(temporary="temporary")))}
    return subprocess.run([*command, *run], env=environment, capture_output=True, timeout=60).returncode


# ---- with the options that change what is there


@both_formats
@sampled(4)
def test_kills_while_failed_rows_are_done_again(tmp_path: Path, suffix: str, step: int) -> None:
    bench = make_bench(tmp_path, ROWS, suffix)
    assert bench.run().code == 3
    failed = bench.rows()
    repair_images(bench)
    for killed in bench.faults(step, 2, "kill", "--retry-errors"):
        assert killed.code == KILLED
        assert bench.rows() == failed or all(row["error"] is None for row in bench.rows())
        assert bench.run("--retry-errors").code == 0
        bench.verify()


@both_formats
@sampled(9)
def test_kills_while_a_result_is_replaced(tmp_path: Path, suffix: str, step: int) -> None:
    """What stands under the final name is the old result or the new one, and never a part of either."""
    bench = make_bench(tmp_path, ROWS, suffix)
    assert bench.run().code == 3
    new = bench.rows()
    bench.clear()
    assert bench.run("--prefix", "old ").code == 3
    old = bench.rows()
    for killed in bench.faults(step, 3, "kill", "--overwrite"):
        assert killed.code == KILLED
        assert bench.rows() in (old, new)
        assert bench.run(*([] if has_begun(bench) else ["--overwrite"])).code == 3
        bench.verify()


def has_begun(bench: Bench) -> bool:
    """Whether the run that replaces a result has said of what it is: then it resumes by itself."""
    return size_of(bench.part) > 0 and b"old " not in bench.part.read_bytes()


@sampled(30)
def test_kills_while_texts_are_written_beside_the_images(tmp_path: Path, step: int) -> None:
    kill_and_ask_for_texts(tmp_path, step, ROWS // step + 1, "--sidecar")


@sampled(10)
def test_texts_beside_the_images_are_asked_for_after_a_kill(tmp_path: Path, step: int) -> None:
    kill_and_ask_for_texts(tmp_path, step, 30 // step + 1)


def kill_and_ask_for_texts(tmp_path: Path, step: int, least: int, *first: str) -> None:
    """Runs with the options `first` are killed, and each time one with --sidecar ends well."""
    bench = make_bench(tmp_path, ROWS, ".jsonl")
    expected = {f"{Path(name).stem}.txt": text for name, text, _ in expected_rows(bench.images) if text}
    for killed in bench.faults(step, least, "kill", *first):
        assert killed.code == KILLED
        assert bench.run("--sidecar").code == 3
        bench.verify()
        assert {path.name: path.read_text().rstrip("\n") for path in texts_beside(bench)} == expected
        for path in texts_beside(bench):
            path.unlink()


def texts_beside(bench: Bench) -> list[Path]:
    return [path for path in bench.images.iterdir() if path.suffix != ".png"]


@both_formats
def test_kills_of_runs_that_stop_at_many_errors(tmp_path: Path, suffix: str) -> None:
    bench = make_bench(tmp_path, ROWS, suffix)
    options = "--max-errors", "2"
    for _ in range(2 * ROWS // BROKEN_EACH):
        killed = bench.run_with_fault(3, "kill", *options, calls=("write", "fsync"))
        assert killed is None or killed.code == KILLED
        ended = bench.run(*options)
        assert ended.code == 3
        assert bench.output.exists() != ("Stopped early" in ended.stderr)
        if bench.output.exists():
            break
    bench.verify()


COMMANDS = {
    "vqa": ("vqa", "IMAGES", "-q", "What is it?", "-q", "What color?"),
    "generate": ("generate", "PROMPTS"),
    "embed": ("embed", "IMAGES"),
    "shard": ("caption", "IMAGES", "--shard", "2/3"),
    "paths": ("caption", "-"),
    "lines": ("generate", "-"),
}
of_each_command = pytest.mark.parametrize(
    ("kind", "suffix"),
    [(kind, suffix) for kind in COMMANDS for suffix in (".jsonl", ".parquet") if (kind, suffix) != ("embed", ".jsonl")],
)


def bench_of(kind: str, folder: Path, suffix: str) -> Bench:
    """For the command of this kind, "paths" and "lines" coming through a pipe."""
    bench = make_bench(folder, ROWS // 2, suffix)
    paths = sorted(map(str, bench.images.iterdir()))
    lines = "".join(json.dumps({"prompt": ["Look:", {"image": path}]}) + "\n" for path in paths)
    prompts = folder / "prompts.jsonl"
    prompts.write_text(lines)
    places = {"IMAGES": str(bench.images), "PROMPTS": str(prompts)}
    stdin = {"paths": "\n".join(paths), "lines": lines}.get(kind)
    command = tuple(places.get(word, word) for word in COMMANDS[kind])
    return replace(bench, command=command, stdin=stdin and stdin.encode())


@of_each_command
@sampled(15)
def test_kills_of_other_commands(tmp_path: Path, suffix: str, kind: str, step: int) -> None:
    """All rows are those of a run that was left alone."""
    bench = bench_of(kind, tmp_path, suffix)
    assert bench.run().code == 3
    expected = bench.rows()
    assert len({row["id"] for row in expected}) == len(expected) >= ROWS // 6
    bench.clear()
    for killed in bench.faults(step, 1, "kill"):
        assert killed.code == KILLED
        assert bench.run().code == 3 and bench.rows() == expected


@of_each_command
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=slow)])
def test_kills_of_other_commands_at_random_moments(tmp_path: Path, suffix: str, kind: str, kills: int) -> None:
    bench = bench_of(kind, tmp_path, suffix)
    assert bench.run().code == 3
    expected = bench.rows()
    bench.clear()
    moments = random.Random(kills)
    for _ in range(kills):
        run = bench.start(settings=SLOW_ROWS)
        time.sleep(moments.uniform(0, LONGEST_WAIT))
        run.send(signal.SIGKILL)
        assert run.wait().code in (KILLED, 3, 0)
    assert bench.run().code in (3, 0) and bench.rows() == expected
