"""Journals that are cut or changed between two runs: repaired where a kill leaves it so, else refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from conftest import FakeCaptioner
from runs import Bench, make_bench
from typer.testing import CliRunner, Result

from idefics_cli import cli

ROWS = 7

both_formats = pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
slow = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`run(bench, *options)` in this process: thousands of times in a minute."""
    monkeypatch.delenv("IDEFICS_MODEL", raising=False)
    monkeypatch.setattr(cli, "check_model", lambda request: "fake")
    monkeypatch.setattr(cli, "load_model", lambda request, batch_size: FakeCaptioner())

    def invoke(bench: Bench, *options: str) -> Result:
        return CliRunner().invoke(cli.app, ["caption", str(bench.pictures), "-o", str(bench.output), *options])

    return invoke


def finished_journal(bench: Bench) -> bytes:
    """The journal of a run that is killed when all is done but the journal's end."""
    ended = bench.run_with_fault(1, "kill", calls=("unlink",))
    assert ended is not None
    return bench.part.read_bytes()


def places(whole: bytes, number: int | None) -> Iterable[int]:
    """All places in a journal, or so many and those about the ends of its lines."""
    if number is None:
        return range(len(whole))
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    about = {place + shift for place in ends for shift in (-1, 0, 1)}
    chosen = about | set(random.Random(number).sample(range(len(whole)), number))
    return sorted(place for place in chosen if place < len(whole))


@both_formats
@pytest.mark.parametrize("number", [40, pytest.param(None, marks=slow)], ids=["sample", "all"])
def test_a_journal_is_cut_at_each_byte(
    tmp_path: Path, run: Callable[..., Result], suffix: str, number: int | None
) -> None:
    bench = make_bench(tmp_path, ROWS, suffix)
    whole = finished_journal(bench)
    for length in places(whole, number):
        bench.clear()
        bench.part.write_bytes(whole[:length])
        result = run(bench)
        assert result.exit_code == 3, (length, result.output)
        bench.verify()


@both_formats
@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("number", [25, pytest.param(None, marks=slow)], ids=["sample", "all"])
def test_a_byte_is_changed(
    tmp_path: Path, run: Callable[..., Result], suffix: str, is_finished: bool, number: int | None
) -> None:
    """Refused in one line and left alone; or repaired, where only the end of the last line is gone."""
    bench = make_bench(tmp_path, ROWS, suffix)
    whole = finished_journal(bench)
    if not is_finished:
        whole = whole[: whole[:-1].rindex(b"\n") + 1]
    bits = random.Random(5)
    num_refused = 0
    for place in places(whole, number):
        changed = bytearray(whole)
        changed[place] ^= 1 << bits.randrange(8)
        bench.clear()
        bench.part.write_bytes(changed)
        result = run(bench)
        if result.exit_code == 3:
            assert place == len(whole) - 1, f"byte {place} was changed, and nobody noticed"
            bench.verify()
            continue
        num_refused += 1
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 2 and line.startswith(f"Error: {bench.part} "), (place, line)
        assert bench.part.read_bytes() == changed
        assert [path.name for path in bench.output.parent.iterdir()] == [bench.part.name]
    assert num_refused > 25
