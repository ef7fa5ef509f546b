"""Tables as people have them: CSV of any dialect, lists in cells, results for other programs, damaged files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import FakeCaptioner, rows_of, save_image
from hypothesis import given
from hypothesis import strategies as st

from idefics_cli.columns import Column, json_text
from idefics_cli.writers.formats import Passthrough, format_of

# ---- results for other programs


def questions(folder: Path, count: int = 4, **more: Any) -> Path:
    """A manifest whose second image is missing."""
    for number in range(count):
        if number != 1:
            save_image(folder / f"{number}.png", number)
    rows = [{"question_id": 262148000 + i, "image": f"{i}.png", "question": f"Q{i}?"} for i in range(count)]
    frame = pd.DataFrame(rows).assign(**more)
    frame.to_json(folder / "m.jsonl", orient="records", lines=True)
    return folder / "m.jsonl"


def test_a_csv_result_is_what_pandas_reads_and_resumes_and_retries(run: Callable, tmp_path: Path) -> None:
    manifest, out = questions(tmp_path, note='a,"b"\nc', answers=[["a", "b"]] * 4), tmp_path / "f.csv"
    command = ("vqa", manifest, "-o", out, "--keep", "note,answers", "--id-column", "question_id")
    assert run(*command).exit_code == 3 and (tmp_path / "f.csv.run").exists()
    frame = pd.read_csv(out)
    assert list(frame.columns) == ["id", "image", "question", "answer", "score", "tokens", "error", "note", "answers"]
    assert frame.id.tolist() == [262148000 + i for i in range(4)] and set(frame.note) == {'a,"b"\nc'}
    assert frame.answer.isna().tolist() == [False, True, False, False] and set(frame.answers) == {'["a", "b"]'}
    again = FakeCaptioner()
    assert run(*command, captioner=again).exit_code == 3 and not again.calls
    save_image(tmp_path / "1.png", 1)
    assert run(*command, "--retry-errors", captioner=again).exit_code == 0 and again.calls == [1]
    retried = pd.read_csv(out)
    assert retried.error.isna().all() and retried.answer.tolist()[2:] == frame.answer.tolist()[2:]
    out.write_bytes(out.read_bytes().replace(b"Q2", b"Q3"))
    assert "not as a run of this program left it" in run(*command).stderr


def test_a_csv_result_is_scored(run: Callable, tmp_path: Path) -> None:
    manifest, out = questions(tmp_path, answers=["a", "a", "b", None]), tmp_path / "f.csv"
    captioner = FakeCaptioner(answer=lambda text: "a")
    assert run("vqa", manifest, "-o", out, "--keep", "answers", captioner=captioner).exit_code == 3
    found = json.loads(run("score", out).stdout)
    assert (found["rows"], found["errors"], found["unscored"]) == (3, 1, 1)
    assert found["exact_match"] == pytest.approx(1 / 3)


@given(st.lists(st.tuples(st.text(max_size=9), st.none() | st.floats(-9, 0), st.booleans()), max_size=5))
def test_csv_rows_come_back_equal(tmp_path_factory: pytest.TempPathFactory, values: list) -> None:
    names = {"id": "text", "answer": "text", "score": "real", "tokens": "count", "error": "text"}
    rows = [
        {
            "id": f"{i}{text}",
            "answer": None if failed else text,
            "score": score,
            "tokens": i,
            "error": (failed and "x") or None,
        }
        for i, (text, score, failed) in enumerate(values)
    ]
    path = tmp_path_factory.getbasetemp() / "f.csv"
    columns = [Column(name, kind) for name, kind in names.items()]
    format_of(path).write(path, lambda: map(json_text, rows), columns, Passthrough(), {})
    assert list(format_of(path).rows(path, list(names))) == rows
    with open(path, newline="", encoding="utf-8") as file:
        assert len(list(csv.reader(file))) == len(rows) + 1


def test_a_vqav2_submission_has_every_question(run: Callable, refused: Callable, tmp_path: Path) -> None:
    manifest, out = questions(tmp_path), tmp_path / "f.json"
    command = ("vqa", manifest, "-o", out, "--format", "vqav2")
    assert run(*command).exit_code == 3
    found = json.loads(out.read_bytes())
    assert [list(row) for row in found] == [["question_id", "answer"]] * 4
    assert [row["question_id"] for row in found] == [262148000 + i for i in range(4)]
    assert [bool(row["answer"]) for row in found] == [True, False, True, True]
    save_image(tmp_path / "1.png", 1)
    again = FakeCaptioner()
    assert run(*command, captioner=again).exit_code == 3 and not again.calls
    assert run(*command, "--retry-errors", captioner=again).exit_code == 0 and again.calls == [1]
    assert json.loads(out.read_bytes())[2:] == found[2:]
    usual = run("vqa", manifest, "--id-column", "question_id")
    assert [row["answer"] for row in rows_of(usual.stdout)] == [row["answer"] for row in json.loads(out.read_bytes())]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("-o", "f.jsonl"), "ends in .json"),
        (("-o", "f.json", "--keep", "note"), "leave --keep"),
        ((), "-o F.json"),
        (("-o", "f.json", "-q", "What?", "-q", "Who?"), "one question"),
    ],
)
def test_what_a_submission_cannot_hold_is_refused(refused: Callable, tmp_path: Path, more: tuple, said: str) -> None:
    assert said in refused("vqa", questions(tmp_path, note="x"), "--format", "vqav2", *more)
