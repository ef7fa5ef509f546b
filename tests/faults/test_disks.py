"""Disks that are full, files that may not grow, and a system that cannot write: one line, and nothing lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_run import Settings
from runs import both_formats, make_bench, sampled

ROWS = 100
CALLS_THAT_NEED_ROOM = ("write", "fsync", "ftruncate", "rename")


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
@sampled(3)
def test_a_call_that_fails_is_one_line_and_the_same_command_completes(
    tmp_path: Path, suffix: str, for_ever: bool, action: str, calls: tuple[str, ...], said: str, step: int
) -> None:
    bench = make_bench(tmp_path, ROWS, suffix)
    for failed in bench.faults(step, 2, action, calls=calls, for_ever=for_ever):
        assert failed.code == 2, failed
        assert failed.said.startswith("Error: cannot ") and said in failed.said
        assert not list(bench.output.parent.glob("*.tmp")), "what is of no use holds room"
        assert bench.run().code == 3
        bench.verify()


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
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)  # a worker may be ending still


@both_formats
def test_a_disk_that_is_really_full(small_disk: Path, suffix: str) -> None:
    bench = make_bench(small_disk.parent / "bench", ROWS, suffix, small_disk / f"f{suffix}")
    ended = bench.run()
    assert ended.code == 2 and "No space left on device" in ended.said
    assert bench.run().code == 2
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    assert bench.run().code == 3
    bench.verify()
