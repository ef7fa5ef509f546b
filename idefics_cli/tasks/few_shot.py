"""Worked examples (shots) from a manifest: which columns they are made of, and which of them stand before all rows.

Knows no network; `similar_shots.py` finds shots with similar images.
"""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from typing import Any

from idefics_cli.errors import InputError, RowError, first_error
from idefics_cli.pipeline.earlier import image_identity
from idefics_cli.prompts.templates import TEXT_ONLY_SHOTS, Shot, field_text, shot_answer
from idefics_cli.readers.inputs import Inputs, open_inputs
from idefics_cli.readers.references import references_of
from idefics_cli.rows import DelimitedOptions, InputRow, ReadOptions
from idefics_cli.storage.filenames import shown_place
from idefics_cli.tasks.options import CaptionVqaOptions, ShotOptions

ANSWER_COLUMNS = {"caption": ("caption", "captions", "answer", "answers"), "vqa": ("answer", "answers")}


def open_shots(options: ShotOptions, list_columns: tuple[str, ...] = ()) -> Inputs:
    """The file's rows, with images where these are shown: in `image_column`, where the file has one of that name.

    Their answers may be lists, and so may what stands in `list_columns`.

    Raises InputError for a file that cannot be read.
    """
    usual = tuple(filter(None, (options.image_column, *ReadOptions.usual_image_columns)))
    shows = options.number > 0
    reading = ReadOptions(
        follow_links=options.follow_links,
        keep="all",
        usual_image_columns=usual,
        allow_no_image=options.allow_no_image,
        needs_image=shows,
        needs_id=False,
        delimited=options.delimited or DelimitedOptions(),
        list_columns=(*ANSWER_COLUMNS["caption"], *list_columns),
    )
    rows = None if options.file == "-" else open_inputs((options.file,), reading)
    if rows is None or not all(rows.are_manifests):
        raise InputError(
            f"--shots needs a manifest with a column of captions or answers: {shown_place(options.file)} is not one"
        )
    return rows


def read_shots(options: CaptionVqaOptions, rows: Inputs | None) -> list[Shot]:
    """The pool, or as much of the file's as will be shown, its images not opened yet.

    Raises InputError for a bad row or shot, and for too few of them.
    """
    shots = options.shots
    wanted = shots.number or TEXT_ONLY_SHOTS if shots.selection == "first" else None
    if rows is None:
        pool = [_checked(number, shot, options) for number, shot in enumerate(shots.pool, start=1)]
    else:
        pool = [_read_shot(row, options) for row in islice(rows.rows, wanted)]
    if len(pool) < shots.number:
        raise InputError(f"--num-shots {shots.number} is more than {shots.place} has, {len(pool)}: lower it")
    return pool


def _checked(number: int, shot: Any, options: CaptionVqaOptions) -> Shot:
    """One that the caller has made."""
    place = f"shot {number}"
    if not isinstance(shot, Shot):
        raise InputError(f"{place} is of type {type(shot).__name__}: write Shot(image, question, answer)")
    if not isinstance(shot.answer, str) or not shot.answer.strip():
        raise InputError(f"{place} has no answer: write Shot(image, question, answer), or Shot(image, answer=caption)")
    return _with_fields(shot, place, options)


def _read_shot(row: InputRow, options: CaptionVqaOptions) -> Shot:
    """A row of the file as a worked example; of several answers the most common one is shown.

    Raises InputError for a row without an answer, or without one of the fields that prompts have.
    """
    place = f"row {row.index + 1} of {shown_place(options.shots.file)}"
    values, task = row.values, options.prompts.task
    if row.error is not None:
        raise _bad_shot(place, row.error)
    column = next((name for name in ANSWER_COLUMNS[task] if values.get(name) is not None), None)
    if column is None:
        raise InputError(
            f"{place} has no answer: shots need a column {' or '.join(ANSWER_COLUMNS[task])}, and it has"
            f" {', '.join(values) or 'none'}"
        )
    references = references_of(values[column], place, options.choices.of(values))
    if not references:
        raise InputError(f"{place} has no answer: its {column} is empty")
    texts = {name: text for name, value in values.items() if isinstance(text := field_text(name, value), str)}
    return _with_fields(Shot(row.sources, answer=shot_answer(task, references), fields=texts), place, options)


def _with_fields(shot: Shot, place: str, options: CaptionVqaOptions) -> Shot:
    without = next((name for name in options.prompt_fields if not isinstance(shot.texts.get(name), str)), None)
    if without is not None:
        raise InputError(f"{place} has no text in the column {without!r}, which the prompt needs: add it")
    return shot


def identity_of(pool: Sequence[Shot]) -> str:
    """What decides the rows after shots that the caller has made: of images in files, size and time."""
    digest = blake2b(digest_size=8)
    for shot in pool:
        digest.update(json.dumps([shot.answer, dict(shot.texts), len(shot.images)], sort_keys=True).encode())
        for image in shot.images:
            in_file = isinstance(image, str | os.PathLike) and os.path.exists(image)
            digest.update(image_identity(image) if in_file else pickle.dumps(image))
    return f"{len(pool)} examples ({digest.hexdigest()})"


def opened(shot: Shot, prepare: Callable[[Any], Any | RowError], place: str) -> Shot:
    """The shot with its images as `prepare` opens them. Raises InputError for one that cannot be opened."""
    images = tuple(prepare(source) for source in shot.images)
    error = first_error(images)
    if error is not None:
        raise _bad_shot(f"an image in {place}", error)
    return replace(shot, image=images)


def _bad_shot(place: str, error: RowError) -> InputError:
    return InputError(f"{place} cannot be used as a shot ({error}): fix or remove it")


def chosen_for_all(options: ShotOptions, pool: Sequence[Shot]) -> Sequence[Shot]:
    """The same shots for every row, so that what they cost is paid once; of 0 those that are shown as texts only."""
    if options.selection != "random":
        return pool
    return random.Random(options.seed).sample(list(pool), options.number or min(TEXT_ONLY_SHOTS, len(pool)))
