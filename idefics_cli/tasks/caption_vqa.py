"""Captions and answers: what prompt is made of a row, and what the model is to do with it.

Rows in, prompts out. This module knows no output and no network: it is handed a model, and what opens images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from idefics_cli.errors import RowError
from idefics_cli.pipeline.prefetch import Steps
from idefics_cli.pipeline.task import Observer, Task, open_images, say_once
from idefics_cli.prompts.choices import ChoiceOptions
from idefics_cli.prompts.postprocess import PostProcess
from idefics_cli.prompts.templates import (
    IMAGE_FIELD,
    TASKS,
    Prompt,
    PromptOptions,
    Shot,
    build_prompt,
    choose_template,
    field_text,
    leading_shots,
)
from idefics_cli.result import Outcome
from idefics_cli.rows import InputRow
from idefics_cli.tasks.embed import StoredLatents, stored_latents
from idefics_cli.tasks.few_shot import ShotOptions, chosen_for_all, open_shots, opened, read_shots, without_furthest
from idefics_cli.tasks.questions import QUESTION, input_id, with_questions
from idefics_cli.tasks.result_rows import ResultForm
from idefics_cli.tasks.similar_shots import SimilarShots

if TYPE_CHECKING:
    from idefics_cli.checkpoint import ModelRequest
    from idefics_cli.engine.options import DecodingOptions
    from idefics_cli.engine.prompt_source import EncodedPrompt, PromptSource
    from idefics_cli.idefics import Idefics
    from idefics_cli.images.worker_pool import WorkerPool
    from idefics_cli.readers.inputs import Inputs


@dataclass(frozen=True)
class CaptionVqaOptions:
    """`questions` are asked about every row; without them each row has its own in `question_column`.

    `postprocess` makes the written text of the decoded one. With a file of `embeddings` no row's image is looked at.
    """

    prompts: PromptOptions
    decoding: DecodingOptions
    questions: tuple[str, ...] = ()
    question_column: str = QUESTION
    shots: ShotOptions | None = None
    choices: ChoiceOptions | None = None
    embeddings: str | None = None
    postprocess: PostProcess = field(default_factory=PostProcess)

    @property
    def asks(self) -> bool:
        return self.prompts.task == "vqa"

    @property
    def needs_question_column(self) -> bool:
        return self.asks and not self.questions

    @property
    def fields(self) -> tuple[str, ...]:
        """What prompts have fields for, images apart. Raises IdeficsError for a template that no model could take."""
        return tuple(dict.fromkeys(name for name in self._places if name != IMAGE_FIELD))

    @property
    def _places(self) -> tuple[str, ...]:
        return choose_template(self.prompts, instruct=True).fields  # that for base models has the same

    @property
    def shows_questions(self) -> bool:
        """Whether the model sees `questions`, if there are any."""
        return not self.questions or QUESTION in self.fields

    @property
    def columns(self) -> tuple[str, ...]:
        """The manifest's columns that prompts are made of."""
        needed = [name for name in self.fields if not (self.asks and name == QUESTION)]
        if self.choices is not None and self.choices.column is not None:
            needed.append(self.choices.column)
        return tuple(dict.fromkeys([self.question_column] * self.needs_question_column + needed))

    @property
    def needs_manifest(self) -> str | None:
        """What to do about an input that has no columns; None where it needs none."""
        images = self._places.count(IMAGE_FIELD)
        if images > 1:
            return f"name one with a list of {images} images in each row, or leave one {{image}} in --prompt"
        if self.columns == (self.question_column,) and self.needs_question_column:
            return f"ask with -q QUESTION, or name one with a column {self.question_column!r}"
        return f"name one that has what is asked for, {', '.join(self.columns)}" if self.columns else None

    def question_of(self, row: InputRow) -> str | RowError:
        if row.asked is not None:
            return row.asked
        question = field_text(self.question_column, row.values.get(self.question_column))
        if isinstance(question, str) and not question.strip():
            return RowError("row_invalid", f"the question in the column {self.question_column!r} is empty")
        return question

    def shown_question_of(self, row: InputRow) -> str | None:
        """As it stands in the result."""
        question = self.question_of(row)
        return None if isinstance(question, RowError) else question

    def fields_of(self, row: InputRow) -> Mapping[str, Any] | RowError:
        """What the template's fields stand for in this row."""
        if not self.asks:
            return row.values
        question = self.question_of(row)
        return question if isinstance(question, RowError) else {**row.values, QUESTION: question}


class CaptionVqa(Task):
    """The work of `caption` and `vqa`. Raises InputError for shots and embeddings that cannot be read."""

    def __init__(self, options: CaptionVqaOptions) -> None:
        self.options = options
        self.embeddings = stored_latents(options.embeddings)
        self.command = options.prompts.task
        self.rows_each = len(options.questions) or 1
        self.columns = options.columns
        self.needs_manifest = options.needs_manifest
        self.needs_image = options.embeddings is None
        self.files = tuple(filter(None, (options.shots and options.shots.file, options.embeddings)))

    @cached_property
    def shots(self) -> Inputs | None:
        return None if self.options.shots is None else open_shots(self.options.shots)

    @property
    def settings(self) -> dict[str, Any]:
        shots = None if self.shots is None else list(self.shots.identity)
        stored = None if self.embeddings is None else self.embeddings.identity
        return {**asdict(self.options), "shots_file": shots, "embeddings_file": stored}

    def check(self, request: ModelRequest) -> None:
        """Raises InputError for shots that are no shots, and for another model's embeddings."""
        if self.embeddings is not None:
            self.embeddings.check(request)
        assert len(self._pool) >= self.options.prompts.num_shots, self.options

    @property
    def form(self) -> ResultForm:
        options = self.options
        return ResultForm(
            "answer" if options.asks else "caption",
            options.postprocess,
            question_of=options.shown_question_of if options.asks else None,
            candidates=options.decoding.num_return_sequences > 1 or options.choices is not None,
        )

    def expand(self, rows: Iterator[InputRow]) -> Iterator[InputRow]:
        return with_questions(rows, self.options.questions) if self.options.questions else rows

    def begin(self, model: Idefics, images: WorkerPool, resolve: Callable, observer: Observer) -> Steps:
        options = self.options
        pool = self._pool
        if self.embeddings is not None:
            self.embeddings.begin(model)
        is_similar = options.shots is not None and options.shots.selection == "similar" and options.shots.number > 0
        prepare = Preparation(
            options,
            model,
            images,
            self.embeddings,
            () if is_similar else self._leading_shots(pool, model, images),
            on_shots_dropped=say_once(observer, "{} is too long for all shots: such rows lose the first ones"),
        )
        if not is_similar:
            return Steps(prepare, self._decode(model))
        assert options.shots is not None, options
        similar = SimilarShots(options.shots, pool, model, known_images(model, images))
        similar.encode_pool(observer.say)
        selection = Selection(prepare, similar)
        return Steps(selection.prepare, lambda source: self._decode(model)(Selected(source, selection)))

    def _decode(self, model: Idefics) -> Callable[[PromptSource], Iterator[tuple[int, Outcome]]]:
        options = self.options
        if options.choices is not None:
            norm = options.choices.norm
            return lambda source: model.score_stream(source, norm)
        banned_words, decoding = TASKS[options.prompts.task].banned_words, asdict(options.decoding)
        return lambda source: model.stream(source, banned_words=banned_words, **decoding)

    @cached_property
    def _pool(self) -> list[Shot]:
        options = self.options
        if options.shots is None:
            return []
        assert self.shots is not None, options
        return read_shots(options.shots, self.shots, options.prompts.task, options.fields)

    def _leading_shots(self, pool: list[Shot], model: Idefics, images: WorkerPool) -> Sequence[Shot]:
        """Those that stand before every row. Of shots that are shown as texts only no image is opened."""
        options = self.options
        if options.shots is not None:
            pool = chosen_for_all(options.shots, pool)
            if options.shots.number:
                pool = [opened(shot, known_images(model, images), options.shots.file) for shot in pool]
        return leading_shots(options.prompts, pool, model.is_instruct)


def known_images(model: Idefics, images: WorkerPool) -> Callable[[Any], Any | RowError]:
    """Opens images that stand in many prompts: what tells them from others is found once."""
    return lambda source: model.encode_image(images.prepare(source))


@dataclass(frozen=True)
class Preparation:
    """A row -> what the model takes, or why there is nothing. Safe in many threads.

    `on_shots_dropped` is told the id of a row that is too long for all the shots.
    """

    options: CaptionVqaOptions
    model: Idefics
    images: WorkerPool
    embeddings: StoredLatents | None
    shots: Sequence[Shot]
    on_shots_dropped: Callable[[str], None]

    def __call__(self, row: InputRow) -> EncodedPrompt | RowError:
        images = self.opened(row)
        return images if isinstance(images, RowError) else self.encoded(row, images, self.shots)

    def opened(self, row: InputRow) -> Sequence[Any] | RowError:
        """The row's images, or the latents in their place."""
        if self.embeddings is None:
            return open_images(row, self.images)
        latents = self.embeddings.latents(input_id(row.id, len(self.options.questions)))
        return latents if isinstance(latents, RowError) else [latents]

    def encoded(self, row: InputRow, opened: Sequence[Any], shots: Sequence[Shot]) -> EncodedPrompt | RowError:
        """The row's prompt behind as many of the shots as the model has room for; the furthest go first."""
        fields = self.options.fields_of(row)
        if isinstance(fields, RowError):
            return fields
        for kept in without_furthest(shots):
            prompt = build_prompt(self.options.prompts, fields, opened, kept, self.model.is_instruct)
            encoded = prompt if isinstance(prompt, RowError) else self._encoded(row, prompt)
            if not isinstance(encoded, RowError):
                if len(kept) < len(shots):
                    self.on_shots_dropped(row.id)
                break
            if encoded.code != "prompt_too_long":
                break
        return encoded

    def _encoded(self, row: InputRow, prompt: Prompt) -> EncodedPrompt | RowError:
        if self.options.choices is None:
            return self.model.encode(prompt, self.options.decoding.max_new_tokens)
        return self.model.encode_choices(prompt, self.options.choices.of(row.values))


# ---- shots that differ from row to row


@dataclass(frozen=True)
class OpenedRow:
    """A row whose shots have not been chosen yet."""

    row: InputRow
    images: Sequence[Any]


@dataclass(frozen=True)
class Selection:
    """Rows with their images opened -> prompts behind the shots whose images are most like their own."""

    preparation: Preparation
    similar: SimilarShots

    def prepare(self, row: InputRow) -> OpenedRow | RowError:
        """What is wrong with a row shows here, without its shots: in `prompts` nothing can be."""
        images = self.preparation.opened(row)
        if isinstance(images, RowError):
            return images
        if not images:
            return RowError("row_invalid", "there is no image that shots could be like")
        alone = self.preparation.encoded(row, images, ())
        return alone if isinstance(alone, RowError) else OpenedRow(row, images)

    def prompts(self, rows: Sequence[OpenedRow]) -> list[EncodedPrompt]:
        chosen = self.similar.shots_for([row.images for row in rows])
        return [self._prompt(row, shots) for row, shots in zip(rows, chosen, strict=True)]

    def _prompt(self, row: OpenedRow, shots: Sequence[Shot]) -> EncodedPrompt:
        encoded = self.preparation.encoded(row.row, row.images, shots)
        assert not isinstance(encoded, RowError), (row.row.id, encoded)
        return encoded


@dataclass(frozen=True)
class Selected:
    """A source of rows as a source of prompts, for the model's thread."""

    rows: PromptSource
    selection: Selection

    def take(self, most: int, wait: bool) -> list[EncodedPrompt]:
        rows = self.rows.take(most, wait)
        return self.selection.prompts(rows) if rows else []
