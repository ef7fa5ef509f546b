"""Official templates, shots and questions -> `Prompt`: texts, pictures and special tokens in their order.

A prompt is a tuple of items: a `str` is text and nothing but text, whatever words it holds; a `SpecialToken` is the
tokenizer's token of that name; anything else is a picture, and is passed on untouched. This module knows neither tokens
nor pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SpecialToken:
    """One of the tokenizer's special tokens, by its name. In a text the same name is only words."""

    name: str


Prompt = tuple[Any, ...]
END_OF_UTTERANCE = SpecialToken("<end_of_utterance>")
QUESTION = "{question}"


@dataclass(frozen=True)
class Shot:
    """A worked example: picture (None: a text-only shot), answer or caption, and the question if the template asks one.

    The query is a shot without an answer.
    """

    image: Any | None
    answer: str = ""
    question: str = ""


@dataclass(frozen=True)
class Template:
    """How shots are written: `before_image`, picture, `before_answer`, " answer", `after_answer`; `prefix` stands once.

    `{question}` in `before_answer` stands for the shot's question.
    """

    prefix: str
    before_image: str
    before_answer: Prompt
    after_answer: Prompt

    def shot(self, shot: Shot) -> Prompt:
        """A shot with its answer, as it stands before the query."""
        return (*self.query(shot), f" {shot.answer}", *self.after_answer)

    def query(self, shot: Shot) -> Prompt:
        """The same as far as the model is shown it: up to the answer."""
        picture = () if shot.image is None else (shot.image,)
        return (self.before_image, *picture, *(_ask(item, shot.question) for item in self.before_answer))


CAPTION = Template("", "Image:", ("Caption:",), ("\n",))
QUESTION_ANSWER = Template(
    "Instruction: provide an answer to the question. Use the image to answer.\n",
    "Image:",
    ("Question: {question} Answer:",),
    ("\n",),
)
VIZWIZ = Template(
    "Task: Answer the questions based on the image when possible, otherwise say unanswerable.\n",
    "Image:",
    ("Question: {question} Answer:",),
    ("\n",),
)
INSTRUCT_CAPTION = Template(
    "",
    "User:",
    ("Describe the image briefly.", END_OF_UTTERANCE, "\nAssistant:"),
    (END_OF_UTTERANCE, "\n"),
)
INSTRUCT_QUESTION = Template(
    "",
    "User:",
    (QUESTION, END_OF_UTTERANCE, "\nAssistant:"),
    (END_OF_UTTERANCE, "\n"),
)


def caption_prompt(image: Any, instruct: bool) -> Prompt:
    """The official captioning prompt without shots, of the base or the instruct model."""
    return few_shot_prompt(INSTRUCT_CAPTION if instruct else CAPTION, (), Shot(image))


def question_prompt(image: Any, question: str, instruct: bool) -> Prompt:
    """The official prompt for one question without shots, of the base or the instruct model."""
    return few_shot_prompt(INSTRUCT_QUESTION if instruct else QUESTION_ANSWER, (), Shot(image, question=question))


def few_shot_prompt(template: Template, shots: Sequence[Shot], query: Shot) -> Prompt:
    """Prefix, `shots` in their order, then `query` (a shot without an answer); no white space at either end."""
    assert not query.answer, f"the query is not to hold its answer: {query.answer!r}"
    examples = (item for shot in shots for item in template.shot(shot))
    return strip(merge_texts((template.prefix, *examples, *template.query(query))))


def merge_texts(items: Iterable[Any]) -> Prompt:
    """The items with neighbouring texts joined and empty ones left out."""
    merged: list[Any] = []
    for item in items:
        if isinstance(item, str) and merged and isinstance(merged[-1], str):
            merged[-1] += item
        elif item != "":
            merged.append(item)
    return tuple(merged)


def strip(prompt: Prompt) -> Prompt:
    """The prompt without white space at its two ends; between its items nothing changes."""
    items = list(prompt)
    if items and isinstance(items[0], str):
        items[0] = items[0].lstrip()
    if items and isinstance(items[-1], str):
        items[-1] = items[-1].rstrip()
    return merge_texts(items)


def _ask(item: str | SpecialToken, question: str) -> str | SpecialToken:
    return item.replace(QUESTION, question) if isinstance(item, str) else item
