"""What a row of a result holds, for each kind of question: its columns, and the row made from an outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from idefics_cli.columns import Column, finite
from idefics_cli.errors import InputError, RowError
from idefics_cli.result import Outcome, error_of
from idefics_cli.rows import InputRow

if TYPE_CHECKING:
    import pyarrow as pa

    from idefics_cli.prompts.postprocess import PostProcess
    from idefics_cli.result import Result


@dataclass(frozen=True)
class ResultForm:
    """The columns of a command's rows, those that are passed through from the manifest at the end.

    `text_column` is where the text stands, as `postprocess` leaves it; `question_of` finds the question to show.
    """

    text_column: Literal["caption", "answer", "text"]
    postprocess: PostProcess
    question_of: Callable[[InputRow], Any] | None = None
    candidates: bool = False
    kept: Mapping[str, pa.DataType | None] = field(default_factory=dict)
    kept_names: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        names = shown_names(self.kept, [column.name for column in self.own_columns])
        object.__setattr__(self, "kept_names", names)

    @property
    def own_columns(self) -> list[Column]:
        question = [Column("question", "text")] if self.question_of else []
        candidates = [Column("candidates", "candidates")] if self.candidates else []
        text = [Column(self.text_column, "text"), Column("score", "real"), Column("tokens", "count")]
        return [Column("id", "text"), Column("image", "text"), *question, *text, Column("error", "text"), *candidates]

    @property
    def columns(self) -> list[Column]:
        return self.own_columns + [Column(self.kept_names[name], of) for name, of in self.kept.items()]

    def row(self, row: InputRow, outcome: Outcome) -> dict[str, Any]:
        """A failed row has no text, and a score that is no number is null."""
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
            columns["candidates"] = candidate_rows(result, self.postprocess) if result else None
        return columns | kept_values(row, self.kept_names)


def shown_names(kept: Mapping[str, Any], own: list[str]) -> dict[str, str]:
    """What each kept column is called in a result: `input_...` where that has a column of its name."""
    names = {name: f"input_{name}" if name in own else name for name in kept}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise InputError(f"two kept columns would be called {', '.join(twice)}: keep one of them, by its name")
    return names


def kept_values(row: InputRow, names: Mapping[str, str]) -> dict[str, Any]:
    return {shown_as: row.values.get(name) for name, shown_as in names.items()}


def candidate_rows(result: Result, postprocess: PostProcess) -> list[dict[str, Any]]:
    """Best first."""
    return [{"text": postprocess(c.text), "score": finite(c.score), "tokens": c.tokens} for c in result.candidates]
