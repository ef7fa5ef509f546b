"""Journals that are cut or changed between two runs: repaired where a kill leaves it so, else refused by name."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeCaptioner
from runs import Bench, both_formats, make_bench, slow

from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.errors import OutputError
from idefics_cli.pipeline.prefetch import RunStats
from idefics_cli.pipeline.run import Run, RunOptions
from idefics_cli.pipeline.task import Observer
from idefics_cli.prompts.templates import PromptOptions
from idefics_cli.rows import ImageOptions
from idefics_cli.tasks.caption_vqa import CaptionVqa, CaptionVqaOptions
from idefics_cli.writers.journal import HEADER_START, Journal

ROWS = 7


def run(bench: Bench) -> str | None:
    """A run in this process and without the command line, of which there can be thousands; why it was refused."""
    options = RunOptions(
        (str(bench.images),),
        str(bench.output),
        ModelRequest("fake"),
        images=ImageOptions(decode_timeout=5.0, workers=1),
    )
    load: Any = lambda request, batch_size: FakeCaptioner()  # noqa: E731
    task = CaptionVqa(CaptionVqaOptions(PromptOptions("caption"), DecodingOptions()))
    try:
        Run(options, task, lambda request: "fake", load, RunStats(), Observer()).run(None)
    except OutputError as error:
        return str(error)
    return None


def finished_journal(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The journal of a run that has done all but to remove it."""
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", Journal.close)
        assert run(bench) is None
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, number: int | None
) -> None:
    bench = make_bench(tmp_path, ROWS, suffix)
    whole = finished_journal(bench, monkeypatch)
    for length in places(whole, number):
        bench.clear()
        bench.part.write_bytes(whole[:length])
        assert run(bench) is None, f"not repaired when cut to {length} bytes"
        bench.verify()


@both_formats
@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("number", [25, pytest.param(None, marks=slow)], ids=["sample", "all"])
def test_a_byte_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, is_finished: bool, number: int | None
) -> None:
    """Refused in one line and left alone; or repaired, where only the end of the last line is gone."""
    bench = make_bench(tmp_path, ROWS, suffix)
    whole = finished_journal(bench, monkeypatch)
    if not is_finished:
        whole = whole[: whole[:-1].rindex(b"\n") + 1]
    bits = random.Random(5)
    num_refused = 0
    for place in places(whole, number):
        changed = bytearray(whole)
        changed[place] ^= 1 << bits.randrange(8)
        bench.clear()
        bench.part.write_bytes(changed)
        refusal = run(bench)
        if refusal is None:
            assert place == len(whole) - 1, f"byte {place} was changed, and it was not noticed"
            bench.verify()
            continue
        num_refused += 1
        line = whole.count(b"\n", 0, place) + 1
        said = f"was changed in line {line}: " if place >= len(HEADER_START) else "is not a file of this program"
        assert refusal.startswith(f"{bench.part} {said}") and "\n" not in refusal, (place, refusal)
        assert bench.part.read_bytes() == changed
        assert [path.name for path in bench.output.parent.iterdir()] == [bench.part.name]
    assert num_refused > 25
