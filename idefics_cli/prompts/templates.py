"""Official templates, own texts, shots and questions -> `Prompt`: texts, images and special tokens in their order.

In a prompt a `str` is always text, whatever words it holds; a `SpecialToken` is the tokenizer's token of that name;
anything else is an image, passed on untouched. This module knows neither tokens nor pixels.
"""

from __future__ import annotations

import functools
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Annotated, Any

from idefics_cli.errors import IdeficsError, RowError
from idefics_cli.storage.filenames import listed
from idefics_cli.validation import Help


@dataclass(frozen=True)
class SpecialToken:
    """One of the tokenizer's special tokens, by its name. In a text the same name is only words."""

    name: str


Prompt = tuple[Any, ...]
END_OF_UTTERANCE = SpecialToken("<end_of_utterance>")
IMAGE_FIELD = "image"
TEXT_ONLY_SHOTS = 2


@dataclass(frozen=True)
class Shot:
    """A worked example: its image (or several, or none), question, and answer or caption.

    `fields` are the texts of further fields of the prompt. The query is a shot without an answer.
    """

    image: Any = ()
    question: str | None = None
    answer: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def images(self) -> Prompt:
        several = isinstance(self.image, tuple | list)
        return tuple(self.image) if several else () if self.image is None else (self.image,)

    @property
    def texts(self) -> Mapping[str, str]:
        """Of the template's fields."""
        return self.fields if self.question is None else {"question": self.question, **self.fields}


@dataclass(frozen=True)
class Template:
    """How shots and the query are written. `prefix` stands once, before all of them.

    In `text`, `{image}` stands for the images, `{name}` for the field of that name, and `{{`, `}}` for braces. What a
    field holds is text, never read as a template again. The answer follows; with `instruct` as the assistant's turn.
    """

    text: str
    instruct: bool = False
    prefix: str = ""

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields, images among them, as often as they stand there."""
        return tuple(name for _, name in parse_text(self.text) if name is not None)

    @property
    def opening(self) -> str:
        """What the query begins with, up to its first field."""
        return ("User:" if self.instruct else "") + parse_text(self.text)[0][0]

    def shot(self, shot: Shot) -> Prompt:
        """A shot with its answer, as it stands before the query."""
        return (*self.query(shot), f" {shot.answer}", *([END_OF_UTTERANCE] if self.instruct else []), "\n")

    def query(self, shot: Shot) -> Prompt:
        """The same up to the answer."""
        assert self.takes(len(shot.images)), f"{len(shot.images)} images for {self.fields}"
        images, at_each = iter(shot.images), None if self.fields.count(IMAGE_FIELD) == 1 else 1
        asked: list[Any] = []
        for text, name in parse_text(self.text):
            asked.append(text)
            if name == IMAGE_FIELD:
                asked += islice(images, at_each)
            elif name is not None:
                asked.append(shot.texts.get(name, ""))  # a caption that was written as a shot has no question
        return ("User:", *asked, END_OF_UTTERANCE, "\nAssistant:") if self.instruct else tuple(asked)

    def takes(self, num_images: int) -> bool:
        """Whether so many images have a place: one at each `{image}`, all at the only one, or none at all."""
        marks = self.fields.count(IMAGE_FIELD)
        return num_images in (0, marks) or marks == 1


@functools.lru_cache
def parse_text(text: str) -> tuple[tuple[str, str | None], ...]:
    """Stretches of plain text, each with the name of the field after it, or None. Raises IdeficsError."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise IdeficsError(f"the prompt {text!r} has a brace on its own: write {{{{ or }}}} for a brace") from error
    if any(name == "" or spec or conversion for _, name, spec, conversion in parsed):
        raise IdeficsError(f"the prompt {text!r} has more than a column's name in its braces: write {{name}}")
    return tuple((plain, name) for plain, name, _, _ in parsed)


CAPTION = Template("Image:{image}Caption:")
QUESTION_ANSWER = Template(
    "Image:{image}Question: {question} Answer:",
    prefix="Instruction: provide an answer to the question. Use the image to answer.\n",
)
VIZWIZ = replace(
    QUESTION_ANSWER,
    prefix="Task: Answer the questions based on the image when possible, otherwise say unanswerable.\n",
)
INSTRUCT_CAPTION = Template("{image}Describe the image briefly.", instruct=True)
INSTRUCT_QUESTION = Template("{image}{question}", instruct=True)
TEMPLATES = {
    "caption": CAPTION,
    "vqa": QUESTION_ANSWER,
    "vizwiz": VIZWIZ,
    "instruct-caption": INSTRUCT_CAPTION,
    "instruct-vqa": INSTRUCT_QUESTION,
}


@dataclass(frozen=True)
class PublishedTask:
    """How the model was prompted for a task when its published figures were measured.

    The text ends at the first of `stop_words`, and at a line break. `banned_words` are never decoded. Without shots,
    base models are shown `text_only_shots`, written for this project, unless there is a pool to take them from.
    """

    stop_words: tuple[str, ...]
    max_new_tokens: int
    text_only_shots: tuple[Shot, ...]
    banned_words: tuple[str, ...] = ("\n", "\n\n")

    @property
    def cut_words(self) -> tuple[str, ...]:
        """Where the text ends: stop words, and banned words where decoding could not keep them out."""
        return (*self.stop_words, *self.banned_words)


TASKS = {
    "caption": PublishedTask(
        ("Caption", "Description", "User", "Image", "task", END_OF_UTTERANCE.name),
        30,
        (
            Shot(answer="a man riding a bicycle down a quiet street"),
            Shot(answer="two dogs playing with a ball in the grass"),
        ),
    ),
    "vqa": PublishedTask(
        ("Question", "User", "Image", "task", "What", "Who", "When", "Where", "Why", "How", END_OF_UTTERANCE.name),
        15,
        (
            Shot(question="What color is the bus?", answer="red"),
            Shot(question="How many people are there?", answer="2"),
        ),
    ),
}


@dataclass(frozen=True)
class PromptOptions:
    """How a row becomes a prompt. `task` is a name in TASKS; `template` one in TEMPLATES, by default the official one
    for the task and the kind of model; `text` is an own text in its place. `bare`: no shots of any kind.

    Raises IdeficsError for pairs that contradict each other.
    """

    task: str
    template: Annotated[
        str | None,
        Help(
            "An official prompt: caption, vqa, vizwiz, instruct-caption, instruct-vqa",
            metavar="NAME",
            default="the model's own",
        ),
    ] = None
    text: Annotated[
        str | None,
        Help(
            "A prompt of your own: {image} stands for the images, {name} for a column",
            metavar="TEXT",
            flags=("--prompt",),
        ),
    ] = None
    num_shots: int = 0
    bare: Annotated[bool, Help("No examples, not even the two of the published zero-shot prompt")] = False

    def __post_init__(self) -> None:
        assert self.task in TASKS, f"unknown task {self.task!r}"
        if self.template is not None and self.text is not None:
            raise IdeficsError(f"--template {self.template} and --prompt exclude each other: leave one of them out")
        if self.num_shots < 0:
            raise IdeficsError(f"{self.num_shots} shots cannot be shown: use a number from 0 on")
        if self.bare and self.num_shots:
            raise IdeficsError("--bare asks for no shots: leave --shots and --num-shots out, or --bare")


@functools.lru_cache
def choose_template(options: PromptOptions, instruct: bool) -> Template:
    """The user's own text, the template that was named, or the official one for the task and the kind of model.

    Without an `{image}` in an own text, the images stand before it. Raises IdeficsError for stray braces, and for a
    template that is unknown, or is not for this task or this kind of model.
    """
    if options.text is not None:
        own = Template(options.text, instruct)
        return own if IMAGE_FIELD in own.fields else Template(f"{{{IMAGE_FIELD}}}{options.text}", instruct)
    name = options.template or ("instruct-" if instruct else "") + options.task
    if name not in TEMPLATES:
        raise IdeficsError(f"unknown template {name!r}: use one of {listed(TEMPLATES)}, or --prompt TEXT")
    template = TEMPLATES[name]
    if template.instruct and not instruct:
        raise IdeficsError(f"the template {name!r} is for instruct models, this is a base model: use {options.task!r}")
    if options.task == "vqa" and "question" not in template.fields:
        raise IdeficsError(f"the template {name!r} asks no question: use {options.task!r}")
    return template


def leading_shots(options: PromptOptions, pool: Sequence[Shot], instruct: bool) -> tuple[Shot, ...]:
    """The shots before every query where all rows share them: the first `num_shots` of the pool.

    With 0 shots a base model and an official template get the published "0-shot": two shots without their images, the
    pool's first or the task's own. Raises IdeficsError when the pool is too small.
    """
    if options.num_shots > len(pool):
        raise IdeficsError(f"there are {len(pool)} shots for --num-shots {options.num_shots}: lower it")
    if options.num_shots or options.bare or instruct or options.text is not None:
        return tuple(pool[: options.num_shots])
    texts = pool[:TEXT_ONLY_SHOTS] or TASKS[options.task].text_only_shots
    return tuple(replace(shot, image=()) for shot in texts)


def build_prompt(
    options: PromptOptions, fields: Mapping[str, Any], images: Sequence[Any], shots: Sequence[Shot], instruct: bool
) -> Prompt | RowError:
    """The prompt of a row with these `fields` and `images`, after `shots` in their order.

    A field that is empty or not text, or images without a place, are a RowError. Raises IdeficsError as
    `choose_template` does, and for a field that no row has.
    """
    template = choose_template(options, instruct)
    names = [name for name in template.fields if name != IMAGE_FIELD]
    missing = next((name for name in names if name not in fields), None)
    if missing is not None:
        raise IdeficsError(
            f"the prompt has a field {missing!r}, and the rows have {listed(fields)}: name one of these, or write "
            "{{ and }} for braces"
        )
    texts = {name: field_text(name, fields[name]) for name in names}
    for text in texts.values():
        if isinstance(text, RowError):
            return text
    if not template.takes(len(images)):
        places = template.fields.count(IMAGE_FIELD)
        return RowError("row_invalid", f"{len(images)} images for the {places} places in the prompt")
    return few_shot_prompt(template, shots, Shot(tuple(images), fields=texts))


def field_text(name: str, value: Any) -> str | RowError:
    """The text of a manifest's cell: itself, or a number's digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    found = "is empty" if value is None else f"holds {type(value).__name__}, not text"
    return RowError("row_invalid", f"the column {name!r} {found}")


def few_shot_prompt(template: Template, shots: Sequence[Shot], query: Shot) -> Prompt:
    """Prefix, `shots` in their order, then `query` (a shot without an answer); no white space at either end."""
    assert not query.answer, f"the query is not to hold its answer: {query.answer!r}"
    return strip((*_before_query(template, shots), *template.query(query)))


def _before_query(template: Template, shots: Sequence[Shot]) -> Prompt:
    return (template.prefix, *(item for shot in shots for item in template.shot(shot)))


def shared_start(template: Template, shots: Sequence[Shot]) -> Prompt:
    """What all prompts with these shots begin with, up to the query's first field; nothing without prefix and shots."""
    if not template.prefix and not shots:
        return ()
    return strip((*_before_query(template, shots), template.opening, None))[:-1]  # the None keeps white space before it


def shot_answer(task: str, references: Sequence[str]) -> str:
    """What a shot with several references shows: the most common answer, the first of equals; the first caption."""
    assert references, "a shot has at least one answer"
    return Counter(references).most_common(1)[0][0] if task == "vqa" else references[0]


def merge_texts(items: Iterable[Any]) -> Prompt:
    """The items with neighbouring texts joined and empty ones left out."""
    merged: list[Any] = []
    for item in items:
        if isinstance(item, str) and merged and isinstance(merged[-1], str):
            merged[-1] += item
        elif not (isinstance(item, str) and item == ""):
            merged.append(item)
    return tuple(merged)


def strip(prompt: Prompt) -> Prompt:
    """The prompt, merged, without white space at its two ends."""
    items = list(merge_texts(prompt))
    if items and isinstance(items[0], str):
        items[0] = items[0].lstrip()
    if items and isinstance(items[-1], str):
        items[-1] = items[-1].rstrip()
    return merge_texts(items)
