"""What a terminal is shown: nothing that it obeys or that turns the direction of writing, and nothing endless."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FakeCaptioner, rows_of, save_image
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import Result

from idefics_cli.cli import console, status
from idefics_cli.storage.filenames import json_for_terminal

CONTROLS = ["\x9b2J", "\x7f", "\x1b[31m", "\u202egnp", "\u2066", "\u061c", "\u2028", "\U000e0041", "\x00", "\x85"]
OBEYED = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\U000e0000-\U000e007f]")
LIVELY = "d\u00e9j\u00e0 \u732b \U0001f600 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"  # Persian needs the joiner


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def shown() -> None:
        for module in console, status:
            monkeypatch.setattr(module, "is_terminal", lambda stream: True)

    return shown


def test_rows_on_a_terminal_are_escaped_and_mean_the_same(
    run: Callable[..., Result], tmp_path: Path, on_a_terminal: Callable[[], None]
) -> None:
    names = [f"{i}{control}{LIVELY}.png" for i, control in enumerate(CONTROLS) if control != "\x00"]
    for i, name in enumerate(names):
        save_image(tmp_path / "in" / name, i)
    speaks = FakeCaptioner(answer=lambda text: "".join(CONTROLS) + LIVELY)
    piped = run("caption", tmp_path / "in", captioner=speaks).stdout
    on_a_terminal()
    shown = run("caption", tmp_path / "in", captioner=speaks).stdout
    assert rows_of(shown.replace("\u2028", "")) == [json.loads(line) for line in piped.split("\n") if line]
    assert not OBEYED.search(shown) and LIVELY in shown
    assert "\x9b" in piped and "\u202e" in piped  # in a pipe and in a file they stay


def test_scores_on_a_terminal_are_escaped(
    run: Callable[..., Result], tmp_path: Path, on_a_terminal: Callable[[], None]
) -> None:
    rows = [{"id": str(i), "caption": "a", "error": None, "group": group} for i, group in enumerate(CONTROLS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "right": ["a"]}) + "\n" for row in rows))
    command = "score", tmp_path / "rows.jsonl", "--answers-column", "right", "--by", "group", "--metric", "exact"
    piped = run(*command)
    assert piped.exit_code == 0, piped.output
    on_a_terminal()
    shown = run(*command)
    assert json.loads(shown.stdout) == json.loads(piped.stdout)
    assert not OBEYED.search(shown.stdout)
    assert not OBEYED.search(piped.stderr)


def test_names_and_messages_are_shortened_wherever_they_are_shown(run: Callable[..., Result], tmp_path: Path) -> None:
    long = "x" * 9_000
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": f"{i}{long}", "image": long}) + "\n" for i in range(70)))
    few = run("caption", rows, "--limit", "5")
    assert few.exit_code == 3 and len(few.stderr) < 3_000 and "image_missing: 5 rows" in few.stderr
    many = run("caption", rows)
    assert many.exit_code == 2 and len(many.stderr) < 3_000
    assert "--max-errors N" in many.stderr  # the remedy at the end
    piped = run("caption", "-", input=b"\n".join([b"{" + b"y" * 200_000, *[b"y" * 300_000] * 3]))
    assert len(piped.stderr) < 3_000
    for wrong in "z" * 50_000, "\x9b" * 50_000:
        refusal = run("caption", tmp_path, "--image-root", wrong, "-o", tmp_path / "out.jsonl")
        assert refusal.exit_code == 2 and len(refusal.stderr) < 13_000 and "\x9b" not in refusal.stderr


def test_messages_hold_no_control_characters(run: Callable[..., Result], tmp_path: Path) -> None:
    for control in CONTROLS[1:4]:
        found = run("caption", tmp_path / f"none{control}.png")
        assert found.exit_code == 2 and not OBEYED.search(found.stderr.replace("\n", ""))
    os.mkdir(tmp_path / "in")
    (tmp_path / "in/bad\x9b\u202e.png").write_bytes(b"bad")
    assert not OBEYED.search(run("caption", tmp_path / "in").stderr.replace("\n", ""))


@given(st.dictionaries(st.text(), st.text() | st.lists(st.text())))
def test_json_for_a_terminal_means_the_same(value: dict) -> None:
    shown = json_for_terminal(json.dumps(value, ensure_ascii=False))
    assert json.loads(shown) == value and not OBEYED.search(shown)
