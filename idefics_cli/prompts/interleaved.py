"""A manifest's free prompt -> `Prompt`: a list of texts and images, or a conversation in transformers' chat format, as
OpenAI's API takes it, or as LLaVA's files hold it.

An image is bytes, a struct, or a string for which `is_image` is true, and becomes an `ImageItem` that others load. The
row's own images stand where the prompt has a place for them. Special tokens in texts stay words: `<image>` is a place
only beside images, and every place holds one image. This module opens nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from idefics_cli.errors import RowError
from idefics_cli.prompts.templates import END_OF_UTTERANCE, Prompt, SpecialToken, merge_texts
from idefics_cli.storage.filenames import listed

SOURCE_FIELDS = ("image", "url", "image_url")
PLACE = "<image>"
PLACE_ON_A_LINE = re.compile(f"\n?{PLACE}\n?")  # as LLaVA's files write it, whose models never see the break
SPEAKERS = {"human": "user", "gpt": "assistant"}  # in LLaVA's files
LABELS = {"user": "User:", "assistant": "Assistant:"}


@dataclass(frozen=True)
class ImageItem:
    """An image within a manifest's prompt: a path, bytes, or the datasets library's struct of both; or the id of its
    row in a file of embeddings; or, with neither, the next one of the row's own images."""

    source: Any = None
    embedding: str | None = None


NEXT_IMAGE = ImageItem()
ReadText = Callable[[str, bool], Sequence["str | ImageItem"]]  # a string, and whether it may be an image's path


def interleaved_prompt(
    value: Any, num_images: int = 0, is_image: Callable[[str], bool] = lambda text: False, is_example: bool = False
) -> Prompt | RowError:
    """The prompt that a cell holds, or a RowError that says what is wrong where.

    The row's own `num_images` images take its places in order: `<image>` in a text, and images without a source. Where
    the prompt shows no image at all, they stand before it, or before the user's first words. The answer at the end of a
    conversation that `is_example` is left out.
    """
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        return RowError("row_invalid", f"the prompt must be a list of texts and images, not {_kind(value)}")

    def read_text(text: str, may_be_image: bool) -> Sequence[str | ImageItem]:
        if may_be_image and is_image(text):
            return [ImageItem(text)]
        parts = text.split(PLACE) if num_images else [text]
        return [each for part in parts for each in (part, NEXT_IMAGE)][:-1]

    try:
        prompt = _written(items, read_text, is_example)
        if num_images and not any(isinstance(item, ImageItem) for item in prompt):
            prompt = _written(_with_places(items, num_images), read_text, is_example)
    except ValueError as error:  # its text is the end of a sentence
        return RowError("row_invalid", f"the prompt {error}")
    places = sum(item is NEXT_IMAGE for item in prompt)
    if places and places != num_images:
        return RowError("row_invalid", f"the prompt has {places} places for images, and the row {num_images} of them")
    return prompt


def _written(items: Sequence[Any], read_text: ReadText, is_example: bool) -> Prompt:
    if not _is_chat(items):
        return merge_texts(each for item in items for each in _read(item, read_text))
    messages = list(map(_message, items))
    while is_example and len(messages) > 1 and messages[-1].get("role") == "assistant":
        messages.pop()
    return _chat_prompt(messages, read_text)


def _is_chat(items: Sequence[Any]) -> bool:
    return any(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in items)


def _message(item: Any) -> Mapping[str, Any]:
    """`{"role", "content"}`, which LLaVA calls `{"from", "value"}`."""
    if not isinstance(item, Mapping):
        return {}
    if item.get("from") is None:
        return item
    speaker, text = item["from"], item.get("value")
    content = PLACE_ON_A_LINE.sub(PLACE, text) if isinstance(text, str) else text
    return {"role": SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker, "content": content}


def _with_places(items: Sequence[Any], number: int) -> Sequence[Any]:
    """With places for so many images before a list, or before the first words of the user."""
    places = [{"type": "image"}] * number
    if not _is_chat(items):
        return [*places, *items]
    messages = list(map(_message, items))
    first = next(number for number, message in enumerate(messages) if message.get("role") == "user")
    content = messages[first]["content"]
    words = [content] if isinstance(content, str) else content
    return [*messages[:first], {"role": "user", "content": [*places, *words]}, *messages[first + 1 :]]


def _chat_prompt(messages: Sequence[Mapping[str, Any]], read_text: ReadText) -> Prompt:
    """`[{"role", "content"}...]` as IDEFICS's instruct models were trained on, up to the next answer."""
    turns = [_turn(message, read_text, first=number == 0) for number, message in enumerate(messages)]
    if messages[-1]["role"] != "user":
        raise ValueError(f"ends with a message of the {messages[-1]['role']}: the last one must be the user's")
    return merge_texts((*(item for turn in turns for item in turn), LABELS["assistant"]))


def _turn(message: Mapping[str, Any], read_text: ReadText, first: bool) -> Prompt:
    role, content = message.get("role"), message.get("content")
    if role not in tuple(LABELS) and not (role == "system" and first):
        raise ValueError(f"has a message of {role!r}: use user and assistant, and system for the first one")
    items = [content] if isinstance(content, str) else content
    if not isinstance(items, list | tuple):
        raise ValueError(f"has a message whose content is {_kind(content)}")
    written = merge_texts(each for item in items for each in _read(item, read_text))
    if not written:
        raise ValueError(f"has an empty message of the {role}")
    if role == "system":
        return (*written, "\n")
    blank = " " if isinstance(written[0], str) else ""
    return (LABELS[role], blank, *written, END_OF_UTTERANCE, "\n")


def _read(item: Any, read_text: ReadText) -> Sequence[str | ImageItem | SpecialToken]:
    """A text or an image. Of a struct's fields those count that are not null, as Parquet gives all of them."""
    if isinstance(item, str):
        return read_text(item, True)
    if isinstance(item, bytes):
        return [ImageItem(item)]
    if isinstance(item, SpecialToken):
        return [item]
    if not isinstance(item, Mapping):
        raise ValueError(f"holds {_kind(item)}: texts are strings, images bytes or structs")
    text, source, embedding = item.get("text"), _source(item), item.get("embedding")
    if isinstance(text, str) and source is None:
        return read_text(text, False)
    if text is None and source is not None:
        return [ImageItem(source)]
    if text is None and isinstance(embedding, str):
        return [ImageItem(embedding=embedding)]
    if text is None and item.get("type") in ("image", "image_url"):
        return [NEXT_IMAGE]
    raise ValueError(f"holds a struct of {listed(map(str, item))}: it needs either a text or an image")


def _source(struct: Mapping[str, Any]) -> Any:
    named = next((struct[name] for name in SOURCE_FIELDS if _holds_something(struct.get(name))), None)
    if isinstance(named, Mapping) and _holds_something(named.get("url")):  # OpenAI's {"image_url": {"url"}}
        return named["url"]
    stored = {name: struct[name] for name in ("bytes", "path") if struct.get(name) is not None}
    return stored or None if named is None else named


def _holds_something(value: Any) -> bool:
    """Where there is nothing, Parquet may give a struct of nulls."""
    return any(part is not None for part in value.values()) if isinstance(value, Mapping) else value is not None


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"[:80]
