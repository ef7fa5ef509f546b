"""What a row of a result with a text holds: its columns, and the row made from an outcome."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from idefics_cli.columns import Column, finite
from idefics_cli.errors import RowError
from idefics_cli.pipeline.task import Form
from idefics_cli.result import Candidate, Outcome, Result, error_of
from idefics_cli.rows import InputRow

if TYPE_CHECKING:
    from idefics_cli.prompts.postprocess import PostProcess


SCORE_DIGITS = 6  # after the point: further ones depend, in fp32, on which rows share a batch


def text_form(
    text_column: Literal["caption", "answer", "text"],
    postprocess: PostProcess,
    question_of: Callable[[InputRow], Any] | None = None,
    has_candidates: bool = False,
) -> Form:
    """`text_column` is where the text is, as `postprocess` leaves it; `question_of` finds the question to show.

    A failed row has no text, and a score of NaN or infinity is null.
    """

    def told(found: Result | Candidate) -> dict[str, Any]:
        return {"text": postprocess(found.text), "score": _shown_score(found.score), "tokens": found.tokens}

    def row(row: InputRow, outcome: Outcome) -> dict[str, Any]:
        error = error_of(outcome)
        result = None if isinstance(outcome, RowError) or error else outcome
        text, score, tokens = told(result).values() if result else (None, None, None)
        columns: dict[str, Any] = {"id": row.id, "image": row.image}
        if question_of:
            columns["question"] = question_of(row)
        columns |= {text_column: text, "score": score, "tokens": tokens, "error": str(error) if error else None}
        if has_candidates:
            columns["candidates"] = list(map(told, result.candidates)) if result else None  # best first
        return columns

    question = [Column("question", "text")] if question_of else []
    text = [Column(text_column, "text"), Column("score", "real"), Column("tokens", "count"), Column("error", "text")]
    candidates = [Column("candidates", "candidates")] if has_candidates else []
    return Form(text_column, [Column("id", "text"), Column("image", "text"), *question, *text, *candidates], row)


def _shown_score(score: float | None) -> float | None:
    score = finite(score)
    return None if score is None else round(score, SCORE_DIGITS) + 0.0  # no -0.0
