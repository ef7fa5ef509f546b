from __future__ import annotations

import math

import pytest
from conftest import FakeCandidate, FakeResult

from idefics_cli.errors import RowError
from idefics_cli.prompts.postprocess import PostProcess
from idefics_cli.rows import InputRow
from idefics_cli.tasks.result_rows import text_form

ROW = InputRow(0, "a", "a.png", (), {"question": "What?", "width": 5, "caption": "old"})
RESULT = FakeResult("two dogs. More", -0.5, 3, (FakeCandidate("two dogs. More", -0.5, 3), FakeCandidate("x", -2.0, 1)))
FINISH = PostProcess((".",), "<", ">")


def test_a_captioned_row() -> None:
    form = text_form("caption", FINISH)
    values = {"caption": "<two dogs>", "score": -0.5, "tokens": 3, "error": None}
    assert form.row(ROW, RESULT) == {"id": "a", "image": "a.png", **values}


@pytest.mark.parametrize("is_result", [True, False])
def test_a_failed_row_has_a_reason_and_no_text(is_result: bool) -> None:
    error = RowError("image_missing", "no\nsuch file")
    outcome = FakeResult("half a text", -0.5, 3, error=error) if is_result else error
    row = text_form("answer", FINISH, has_candidates=True).row(ROW, outcome)
    assert row["error"] == "image_missing: no such file"
    assert [row[name] for name in ("answer", "score", "tokens", "candidates")] == [None] * 4


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_null(score: float) -> None:
    outcome = FakeResult("a", score, 1, (FakeCandidate("a", score, 1),))
    row = text_form("caption", FINISH, has_candidates=True).row(ROW, outcome)
    assert row["score"] is None and row["candidates"][0]["score"] is None


@pytest.mark.parametrize(("score", "shown"), [(-1.8047807316179387e-05, -1.8e-05), (-0.25, -0.25), (-1e-9, 0.0)])
def test_a_score_is_shown_without_the_digits_that_a_batch_decides(score: float, shown: float) -> None:
    row = text_form("caption", FINISH).row(ROW, FakeResult("a", score, 1))
    assert str(row["score"]) == str(shown)


def test_questions_and_candidates_have_their_places() -> None:
    form = text_form("answer", FINISH, question_of=lambda row: row.values["question"], has_candidates=True)
    row = form.row(ROW, RESULT)
    own = ["id", "image", "question", "answer", "score", "tokens", "error", "candidates"]
    assert list(row) == [column.name for column in form.columns] == own
    assert row["question"] == "What?" and row["candidates"][1] == {"text": "<x>", "score": -2.0, "tokens": 1}
