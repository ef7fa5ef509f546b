"""Captions and answers: what prompt is made of a row, and what the model is to do with it.

Rows in, prompts out. This module knows no output and no network: it is handed a model, and what opens images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from idefics_cli.errors import RowError
from idefics_cli.pipeline.prefetch import Steps
from idefics_cli.pipeline.task import Decode, Form, ImageWatch, Observer, Task, open_images, say_once
from idefics_cli.prompts.postprocess import PostProcess
from idefics_cli.prompts.templates import (
    TASKS,
    Prompt,
    Shot,
    build_prompt,
    choose_template,
    field_text,
    leading_shots,
    shared_start,
)
from idefics_cli.rows import InputRow, ReadOptions
from idefics_cli.tasks.embed import StoredLatents, without_names
from idefics_cli.tasks.few_shot import chosen_for_all, identity_of, open_shots, opened, read_shots
from idefics_cli.tasks.options import QUESTION, CaptionVqaOptions, require_space
from idefics_cli.tasks.result_rows import text_form
from idefics_cli.tasks.similar_shots import SimilarShots
from idefics_cli.validation import by_option

if TYPE_CHECKING:
    from idefics_cli.checkpoint.request import ModelRequest
    from idefics_cli.engine.prompt_source import EncodedPrompt, PromptSource
    from idefics_cli.images.worker_pool import WorkerPool
    from idefics_cli.loaded_model import LoadedModel
    from idefics_cli.readers.inputs import Inputs

Opened = tuple[InputRow, Sequence[Any]]  # a row and its images


class CaptionVqa(Task):
    """The task of `caption` and `vqa`. Raises InputError for shots and embeddings that cannot be read."""

    def __init__(self, options: CaptionVqaOptions) -> None:
        self.options = options
        self.embeddings = None if options.embeddings is None else StoredLatents(options.embeddings)
        self.command = options.prompts.task
        self.rows_each = len(options.questions) or 1
        self.columns = options.columns
        self.list_columns = () if options.choices.column is None else (options.choices.column,)
        self.needs_manifest = options.needs_manifest
        self.needs_image = options.embeddings is None
        self.files = tuple(filter(None, (options.shots.file, options.embeddings)))

    @classmethod
    def over_files(cls, options: CaptionVqaOptions, reading: ReadOptions) -> CaptionVqa:
        """With shots that are read as the inputs are."""
        names = "image_column", "allow_no_image", "delimited", "follow_links"
        shots = replace(options.shots, **{name: getattr(reading, name) for name in names})
        return cls(replace(options, shots=shots))

    @cached_property
    def _shots_file(self) -> Inputs | None:
        return None if self.options.shots.file is None else open_shots(self.options.shots, self.list_columns)

    @cached_property
    def _pool(self) -> list[Shot]:
        return read_shots(self.options, self._shots_file)

    @property
    def settings(self) -> dict[str, Any]:
        options, pool = by_option(self.options), self.options.shots.pool
        files = without_names(options, shots_file=self._shots_file, embeddings_file=self.embeddings)
        return files | ({"--shots": identity_of(pool)} if pool else {})

    def check(self, request: ModelRequest) -> None:
        """Raises for a bad shot, another model's embeddings, and tokens that the model has no positions for."""
        if self.embeddings is not None:
            self.embeddings.check(request)
        require_space(self.options.decoding, request)
        assert len(self._pool) >= self.options.prompts.num_shots, self.options

    @property
    def form(self) -> Form:
        options = self.options
        return text_form(
            "answer" if options.asks else "caption",
            self.postprocess,
            question_of=self._shown_question if options.asks else None,
            has_candidates=options.decoding.num_return_sequences > 1 or options.choices.are_given,
        )

    @property
    def postprocess(self) -> PostProcess:
        """Texts are cut as in the published protocol, or at the user's words; ranked answers are not."""
        options, task = self.options.postprocess, TASKS[self.command]
        if self.options.choices.are_given:
            return options
        words = task.stop_words if options.cut_words is None else options.cut_words
        return replace(options, cut_words=(*words, *task.banned_words))

    def expand(self, rows: Iterator[InputRow]) -> Iterator[InputRow]:
        return with_questions(rows, self.options.questions) if self.options.questions else rows

    def begin(self, model: LoadedModel, images: WorkerPool, resolve: Callable, observer: Observer) -> Steps:
        """Shots that all rows share are opened here: a bad one ends the run before there is an output."""
        if self.embeddings is not None:
            self.embeddings.begin(model)
        dropped = say_once(observer, "{} is too long for all shots: rows like it are shown fewer, the nearest ones")
        watch = ImageWatch(observer, "name the column of the images with --image-column")
        prompts = RowPrompts(self.options, model, images, self.embeddings, dropped, watch)
        shots, decode = self.options.shots, watch.watching(self._decode(model))
        if shots.number and shots.selection == "similar":
            similar = SimilarShots(shots, self._pool, model, prompts.open_shot, observer.say)
            return Steps(prompts.without_shots, lambda source: decode(SimilarPrompts(source, prompts, similar)))
        chosen = chosen_for_all(shots, self._pool)
        leading = [prompts.open_shot(shot) for shot in leading_shots(self.options.prompts, chosen, model.is_instruct)]
        start = shared_start(choose_template(self.options.prompts, model.is_instruct), leading)
        prompts = replace(prompts, start=start)
        return Steps(lambda row: prompts.of(row, leading), decode)

    def _decode(self, model: LoadedModel) -> Decode:
        options = self.options
        if options.choices.are_given:
            return lambda source: model.score_stream(source, options.choices.norm)
        banned_words, decoding = TASKS[self.command].banned_words, asdict(options.decoding)
        return lambda source: model.stream(source, banned_words=banned_words, **decoding)

    def _shown_question(self, row: InputRow) -> str | None:
        """As it stands in the result."""
        question = question_of(row, self.options.question_column)
        return None if isinstance(question, RowError) else question


def with_questions(rows: Iterable[InputRow], questions: Sequence[str]) -> Iterator[InputRow]:
    """Each row once for every question. Of several, the k-th makes the id `ID#k`, so that no two ids are equal."""
    for row in rows:
        for number, question in enumerate(questions, start=1):
            yield replace(row, id=f"{row.id}#{number}" if len(questions) > 1 else row.id, asked=question)


def input_id(name: str, num_questions: int) -> str:
    """The id that the row had before it was asked so many questions."""
    return name.rpartition("#")[0] if num_questions > 1 else name


def question_of(row: InputRow, column: str) -> str | RowError:
    if row.asked is not None:
        return row.asked
    question = field_text(column, row.values.get(column))
    if isinstance(question, str) and not question.strip():
        return RowError("row_invalid", f"the question in the column {column!r} is empty")
    return question


@dataclass(frozen=True)
class RowPrompts:
    """A row -> its prompt as the model takes it, or why there is none. Safe in many threads.

    `on_shots_dropped` is told the id of a row that is too long for all its shots. `start` is what all prompts begin
    with.
    """

    options: CaptionVqaOptions
    model: LoadedModel
    images: WorkerPool
    embeddings: StoredLatents | None
    on_shots_dropped: Callable[[str], None]
    watch: ImageWatch
    start: Prompt = ()

    def open_shot(self, shot: Shot) -> Shot:
        """With its images as they stand in many prompts: what identifies each is computed here, once."""
        return opened(
            shot, lambda source: self.model.encode_image(self.images.prepare(source)), self.options.shots.place
        )

    def of(self, row: InputRow, shots: Sequence[Shot]) -> EncodedPrompt | RowError:
        images = self._opened(row)
        return images if isinstance(images, RowError) else self.after_shots(row, images, shots)

    def without_shots(self, row: InputRow) -> Opened | RowError:
        """The row and its images; whatever is wrong with a row shows here, before its shots are chosen."""
        images = self._opened(row)
        if not isinstance(images, RowError) and not images:
            return RowError("row_invalid", "no image to compare with those of the shots: choose --shot-selection first")
        alone = images if isinstance(images, RowError) else self.after_shots(row, images, ())
        return alone if isinstance(alone, RowError) else (row, list(map(self.model.encode_image, images)))

    def _opened(self, row: InputRow) -> Sequence[Any] | RowError:
        """The row's images, or the latents instead."""
        self.watch.has_shown |= bool(row.sources) or self.embeddings is not None
        if self.embeddings is None:
            return open_images(row, self.images)
        latents = self.embeddings.latents(input_id(row.id, len(self.options.questions)))
        return latents if isinstance(latents, RowError) else [latents]

    def after_shots(self, row: InputRow, images: Sequence[Any], shots: Sequence[Shot]) -> EncodedPrompt | RowError:
        """The row's prompt after as many of the shots as the model has room for; the first are left out first."""
        fields = self._fields(row)
        if isinstance(fields, RowError):
            return fields
        for first in range(len(shots) + 1):
            encoded = self._encoded(row, fields, images, shots[first:])
            if not isinstance(encoded, RowError) or encoded.code != "prompt_too_long":
                break
        if first and not isinstance(encoded, RowError):
            self.on_shots_dropped(row.id)
        return encoded

    def _fields(self, row: InputRow) -> Mapping[str, Any] | RowError:
        """What the template's fields stand for in this row."""
        if not self.options.asks:
            return row.values
        question = question_of(row, self.options.question_column)
        return question if isinstance(question, RowError) else {**row.values, QUESTION: question}

    def _encoded(
        self, row: InputRow, fields: Mapping[str, Any], images: Sequence[Any], shots: Sequence[Shot]
    ) -> EncodedPrompt | RowError:
        prompt = build_prompt(self.options.prompts, fields, images, shots, self.model.is_instruct)
        if isinstance(prompt, RowError):
            return prompt
        if self.options.choices.are_given:
            return self.model.encode_choices(prompt, self.options.choices.of(row.values), self.start)
        return self.model.encode(prompt, self.options.decoding.max_new_tokens, self.start)


@dataclass(frozen=True)
class SimilarPrompts:
    """A source of rows with their images as a source of prompts after similar shots, for the model's thread."""

    rows: PromptSource
    prompts: RowPrompts
    similar: SimilarShots

    def take(self, most: int, wait: bool) -> list[EncodedPrompt]:
        rows: list[Opened] = self.rows.take(most, wait)
        shots = self.similar.shots_for([images for _, images in rows]) if rows else []
        return [self.prompts.after_shots(*row, chosen) for row, chosen in zip(rows, shots, strict=True)]
