"""How a run's rows are asked: which questions a row gets, what prompt is made of it, what becomes of the text.

Rows in, prompts out. This module knows no files and no network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from idefics_cli.data.rows import InputRow
from idefics_cli.errors import InputError, RowError
from idefics_cli.prompts import IMAGE_FIELD, TASKS, Prompt, PromptOptions, Shot, build_prompt, own_template
from idefics_cli.shots import ShotOptions, without_furthest
from idefics_cli.texts import Finish

if TYPE_CHECKING:
    from idefics_cli.processing import EncodedPrompt

QUESTION = "question"


@dataclass(frozen=True)
class AskOptions:
    """`questions` are asked about every row; without them each row has its own in `question_column`.

    `finish` makes the written text of the decoded one.
    """

    prompts: PromptOptions
    questions: tuple[str, ...] = ()
    question_column: str = QUESTION
    shots: ShotOptions | None = None
    finish: Finish = field(default_factory=Finish)

    @property
    def asks(self) -> bool:
        return self.prompts.task == "vqa"

    @property
    def needs_question_column(self) -> bool:
        return self.asks and not self.questions

    @property
    def columns(self) -> tuple[str, ...]:
        """The manifest's columns that prompts are made of."""
        fields = own_template(self.prompts.text, instruct=False).fields if self.prompts.text is not None else ()
        needed = [name for name in fields if name not in (IMAGE_FIELD, QUESTION)]
        return tuple(dict.fromkeys([self.question_column] * self.needs_question_column + needed))

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the texts, as a run's record holds it."""
        return asdict(self)

    def question_of(self, row: InputRow) -> Any:
        return row.values.get(QUESTION if self.questions else self.question_column)

    def fields_of(self, row: InputRow) -> Mapping[str, Any]:
        """What the template's fields stand for in this row."""
        return {**row.values, QUESTION: self.question_of(row)} if self.asks else row.values


# ---- several questions about one row


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


def _asked(row: InputRow, questions: Sequence[str], number: int) -> InputRow:
    name = f"{row.id}#{number + 1}" if len(questions) > 1 else row.id
    return replace(row, id=name, values={**row.values, QUESTION: questions[number]})


def rows_asked(ids: Iterable[str], num_questions: int, left: list[str]) -> Iterator[str]:
    """From the ids that `with_questions` gave to those of the rows of which all has been asked; the rest is `left`."""
    for name in ids:
        left.append(name)
        if len(left) == num_questions:
            left.clear()
            yield name.rpartition("#")[0] if num_questions > 1 else name


# ---- rows -> prompts


class Encoder(Protocol):
    """What turns prompts into tokens."""

    is_instruct: bool

    def encode(self, prompt: Prompt, max_new_tokens: int) -> EncodedPrompt | RowError: ...


class PictureOpener(Protocol):
    """Opens pictures, from several threads at once."""

    def prepare(self, source: Any) -> Any | RowError: ...


@dataclass(frozen=True)
class Preparation:
    """A row -> what the model takes, or why there is nothing. Safe in many threads.

    `on_shots_dropped` is told the id of a row that is too long for all the shots.
    """

    options: AskOptions
    encoder: Encoder
    pictures: PictureOpener
    shots: Sequence[Shot]
    max_new_tokens: int
    on_shots_dropped: Callable[[str], None]

    def __call__(self, row: InputRow) -> EncodedPrompt | RowError:
        opened = open_pictures(row, self.pictures)
        if isinstance(opened, RowError):
            return opened
        return self.encoded(row, opened, self.shots)

    def encoded(self, row: InputRow, opened: Sequence[Any], shots: Sequence[Shot]) -> EncodedPrompt | RowError:
        """The row's prompt behind as many of the shots as the model has room for; the furthest go first."""
        for kept in without_furthest(shots):
            prompt = build_prompt(
                self.options.prompts, self.options.fields_of(row), opened, kept, self.encoder.is_instruct
            )
            if isinstance(prompt, RowError):
                return prompt
            encoded = self.encoder.encode(prompt, self.max_new_tokens)
            if not (isinstance(encoded, RowError) and encoded.code == "prompt_too_long"):
                break
            if kept:
                self.on_shots_dropped(row.id)
        return encoded


def open_pictures(row: InputRow, pictures: PictureOpener) -> list[Any] | RowError:
    """All pictures of a row, or what is wrong with the first that cannot be used."""
    opened = []
    for source in row.sources:
        picture = pictures.prepare(source)
        if isinstance(picture, RowError):
            return picture
        opened.append(picture)
    return opened


def default_finish(task: str, prefix: str = "", suffix: str = "", stop_words: Sequence[str] | None = None) -> Finish:
    """Texts end where the published protocol ends them, or at the caller's own words."""
    words = TASKS[task].cut_words if stop_words is None else (*stop_words, *TASKS[task].banned_words)
    return Finish(tuple(words), prefix, suffix)
