"""What a row of a result with a text holds: its columns, and the row made from an outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from idefics_cli.columns import Column, finite
from idefics_cli.errors import RowError
from idefics_cli.result import Outcome, Result, error_of
from idefics_cli.rows import InputRow

if TYPE_CHECKING:
    from idefics_cli.prompts.postprocess import PostProcess


@dataclass(frozen=True)
class ResultForm:
    """The columns of a command's rows.

    `text_column` is where the text is, as `postprocess` leaves it; `question_of` finds the question to show.
    """

    text_column: Literal["caption", "answer", "text"]
    postprocess: PostProcess
    question_of: Callable[[InputRow], Any] | None = None
    candidates: bool = False

    @property
    def columns(self) -> list[Column]:
        question = [Column("question", "text")] if self.question_of else []
        candidates = [Column("candidates", "candidates")] if self.candidates else []
        text = [Column(self.text_column, "text"), Column("score", "real"), Column("tokens", "count")]
        return [Column("id", "text"), Column("image", "text"), *question, *text, Column("error", "text"), *candidates]

    def row(self, row: InputRow, outcome: Outcome) -> dict[str, Any]:
        """A failed row has no text, and a score of NaN or infinity is null."""
        error = error_of(outcome)
        result = None if isinstance(outcome, RowError) or error else outcome
        columns: dict[str, Any] = {"id": row.id, "image": row.image}
        if self.question_of:
            columns["question"] = self.question_of(row)
        columns[self.text_column] = self.postprocess(result.text) if result else None
        columns["score"] = finite(result.score) if result else None
        columns["tokens"] = result.tokens if result else None
        columns["error"] = str(error) if error else None
        if self.candidates:
            columns["candidates"] = self._candidates(result) if result else None
        return columns

    def _candidates(self, result: Result) -> list[dict[str, Any]]:
        """Best first."""
        return [
            {"text": self.postprocess(each.text), "score": finite(each.score), "tokens": each.tokens}
            for each in result.candidates
        ]
