"""Worked examples from a file: which columns they are made of, and which of them a run or a row is shown.

Shots come from any manifest, in its order. This module knows no network: an embedding is a vector that it is given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from idefics_cli.data.readers import Inputs, open_inputs
from idefics_cli.data.rows import ReadOptions
from idefics_cli.errors import InputError, RowError
from idefics_cli.prompts import Shot, shot_answer
from idefics_cli.score import references_of

if TYPE_CHECKING:
    from torch import Tensor

ANSWER_COLUMNS = {"caption": ("caption", "captions", "answer", "answers"), "vqa": ("answer", "answers")}
Selection = Literal["first", "random", "similar"]


@dataclass(frozen=True)
class ShotOptions:
    """A manifest of worked examples, and which of them are shown.

    `similar` shows each row the pictures nearest to its own, the nearest last (RICES: Yang et al. 2022, section 3.2;
    Alayrac et al. 2022, appendix A.2); the others show all rows the same. `seed` decides what is random.
    """

    file: str
    number: int
    selection: Selection = "first"
    seed: int = 0
    image_column: str | None = None
    image_root: str | None = None


def open_shots(options: ShotOptions) -> Inputs:
    """The file's rows. Raises InputError for a file that cannot be read."""
    reading = ReadOptions(keep="all", image_column=options.image_column, image_root=options.image_root)
    return open_inputs((options.file,), reading)


def read_shots(options: ShotOptions, rows: Inputs, task: str, prepare: Callable[[Any], Any | RowError]) -> list[Shot]:
    """The pool, or as much of it as will be shown; `prepare` opens a picture. Raises InputError for a bad row."""
    wanted = options.number if options.selection == "first" else None
    pool: list[Shot] = []
    for row in rows.rows:
        if wanted is not None and len(pool) == wanted:
            break
        pictures = [] if row.error else [prepare(source) for source in row.sources]
        error = row.error or next((each for each in pictures if isinstance(each, RowError)), None)
        if error is not None:
            raise InputError(
                f"row {row.index + 1} of the shots in {options.file} is bad ({error}): mend it, or take it out"
            )
        pool.append(make_shot(row.values, tuple(pictures), task, f"row {row.index + 1} of {options.file}"))
    if len(pool) < options.number:
        raise InputError(f"{options.file} holds {len(pool)} shots: lower --num-shots {options.number}")
    return pool


def make_shot(values: Mapping[str, Any], pictures: tuple, task: str, place: str) -> Shot:
    """A row of a manifest as a worked example; of several answers the most common one is shown."""
    column = next((name for name in ANSWER_COLUMNS[task] if values.get(name) is not None), None)
    if column is None:
        raise InputError(
            f"{place} has no answer to show: shots need a column {' or '.join(ANSWER_COLUMNS[task])}, and it has"
            f" {', '.join(values) or 'none'}"
        )
    references = references_of(values[column], place)
    if not references:
        raise InputError(f"{place} has no answer to show: its {column} is empty")
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    return Shot(pictures or None, shot_answer(task, references), texts.get("question", ""), texts)


def chosen_for_all(options: ShotOptions, pool: Sequence[Shot]) -> list[Shot]:
    """The same shots for every row, so that what they cost is paid once."""
    assert options.selection != "similar", options
    if options.selection == "random":
        return random.Random(options.seed).sample(list(pool), options.number)
    return list(pool[: options.number])


def nearest(query: Tensor, pool: Tensor, number: int) -> list[int]:
    """Of `pool` (shots, dim) the indices of those most like `query` (dim,), by cosine, the nearest last."""
    import torch

    likeness = torch.nn.functional.cosine_similarity(pool.float(), query.float().unsqueeze(0), dim=-1)
    order = torch.sort(likeness, descending=True, stable=True).indices[:number]
    return order.flip(0).tolist()


def without_furthest(shots: Sequence[Shot]) -> Iterator[Sequence[Shot]]:
    """All shots, then without the first, and so on down to none."""
    for first in range(len(shots) + 1):
        yield shots[first:]
