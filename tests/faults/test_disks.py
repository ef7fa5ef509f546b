"""Disks that are full, files that may not grow, and a system that cannot write: one line, and nothing lost."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_run import Settings
from runs import Ended, make_bench, until_untouched

ROWS = 100
MOST_CALLS = 60
CALLS_THAT_NEED_ROOM = ("write", "fsync", "ftruncate", "rename")

both_formats = pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
slow = [pytest.mark.slow, pytest.mark.timeout(1800)]


@both_formats
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for-ever"])
@pytest.mark.parametrize(
    ("action", "calls", "said"),
    [
        ("full", CALLS_THAT_NEED_ROOM, "No space left on device"),
        ("half", ("write",), "No space left on device"),
        ("io", ("fsync",), "Input/output error"),
    ],
)
@pytest.mark.parametrize("step", [3, pytest.param(1, marks=slow)], ids=["sample", "all"])
def test_a_call_that_fails_is_one_line_and_the_same_command_completes(
    tmp_path: Path, suffix: str, for_ever: bool, action: str, calls: tuple[str, ...], said: str, step: int
) -> None:
    bench = make_bench(tmp_path, ROWS, suffix)

    def failed_and_run_again(number: int) -> Ended | None:
        bench.clear()
        ended = bench.run_with_fault(number, action, calls=calls, for_ever=for_ever)
        if ended is not None:
            assert ended.code == 2, ended
            assert ended.said.startswith("Error: cannot ") and said in ended.said
            assert not list(bench.output.parent.glob("*.tmp")), "what is of no use holds room"
            assert bench.run().code == 3
            bench.verify()
        return ended

    assert until_untouched(failed_and_run_again, range(1, MOST_CALLS, step)) >= 2


@both_formats
@pytest.mark.parametrize("limit", [500, 5_000, 9_000])
def test_a_limit_on_the_size_of_files(tmp_path: Path, suffix: str, limit: int) -> None:
    bench = make_bench(tmp_path, ROWS, suffix)
    ended = bench.run(settings=Settings(file_limit=limit))
    assert ended.code == 2, ended
    assert "File too large" in ended.said
    assert bench.run().code == 3
    bench.verify()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 KB, for those who may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a disk")
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", folder], check=True)
        yield folder


@both_formats
def test_a_disk_that_is_really_full(small_disk: Path, suffix: str) -> None:
    bench = make_bench(small_disk.parent / "bench", ROWS, suffix, small_disk / f"f{suffix}")
    ended = bench.run()
    assert ended.code == 2 and "No space left on device" in ended.said
    assert bench.run().code == 2
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    assert bench.run().code == 3
    bench.verify()
