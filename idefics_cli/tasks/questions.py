"""Several questions about one row: the rows of the result that it becomes, and what they are called. Rows only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from idefics_cli.rows import InputRow


def with_questions(rows: Iterable[InputRow], questions: Sequence[str]) -> Iterator[InputRow]:
    """Each row once for every question. Of several, the k-th makes the id `ID#k`, so that no two ids are equal."""
    for row in rows:
        for number, question in enumerate(questions, start=1):
            yield replace(row, id=f"{row.id}#{number}" if len(questions) > 1 else row.id, asked=question)


def input_id(name: str, num_questions: int) -> str:
    """The id that the row had before it was asked so many questions."""
    return name.rpartition("#")[0] if num_questions > 1 else name
