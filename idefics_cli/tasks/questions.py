"""Several questions about one row: what the rows of a run are called, and where it goes on after a stop. Rows only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from idefics_cli.errors import InputError
from idefics_cli.rows import InputRow


def with_questions(rows: Iterable[InputRow], questions: Sequence[str], done: Sequence[str] = ()) -> Iterator[InputRow]:
    """Each row once for every question. Of several, the k-th makes the id `ID#k`, so that all ids stay apart.

    `done` are the ids of what an earlier run has asked of the first row.
    """
    for row in rows:
        asked = [_asked(row, questions, number) for number in range(len(questions))]
        if [each.id for each in asked[: len(done)]] != list(done):
            raise InputError(
                f"row {row.index + 1} of the input is now {row.id}, but the unfinished output ends with {done[-1]}:"
                " bring the old input back, or start anew with --overwrite"
            )
        yield from asked[len(done) :]
        done = ()
    if done:
        raise InputError(
            f"the input ends before the row of {done[-1]}, with which the unfinished output ends: bring the old input"
            " back, or start anew with --overwrite"
        )


def _asked(row: InputRow, questions: Sequence[str], number: int) -> InputRow:
    name = f"{row.id}#{number + 1}" if len(questions) > 1 else row.id
    return replace(row, id=name, asked=questions[number])


def rows_asked(ids: Iterable[str], num_questions: int, left: list[str]) -> Iterator[str]:
    """From the ids that `with_questions` gave to those of the rows of which all has been asked; the rest is `left`."""
    for name in ids:
        left.append(name)
        if len(left) == num_questions:
            left.clear()
            yield input_id(name, num_questions)


def input_id(name: str, num_questions: int) -> str:
    """The id that the row had before it was asked so many questions."""
    return name.rpartition("#")[0] if num_questions > 1 else name
