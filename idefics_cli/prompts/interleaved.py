"""A manifest's free prompt -> `Prompt`: a list of texts and images, or a conversation in transformers' chat format.

A string is text, always, never a path. An image is bytes or a struct, and becomes an `ImageItem` that others load.
This module opens nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from idefics_cli.errors import RowError
from idefics_cli.prompts.templates import END_OF_UTTERANCE, Prompt, merge_texts
from idefics_cli.storage.filenames import listed

SOURCE_FIELDS = ("image", "url")
LABELS = {"user": "User:", "assistant": "Assistant:"}


@dataclass(frozen=True)
class ImageItem:
    """An image within a manifest's prompt: a path, bytes, or the datasets library's struct of both; or the id of its
    row in a file of embeddings."""

    source: Any = None
    embedding: str | None = None


def interleaved_prompt(value: Any) -> Prompt | RowError:
    """The prompt that a cell holds, or a RowError that says what is wrong where."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        return RowError("row_invalid", f"the prompt must be a list of texts and images, not {_kind(value)}")
    is_chat = any(isinstance(item, Mapping) and "role" in item for item in items)
    try:
        return _chat_prompt(items) if is_chat else merge_texts(map(_item, items))
    except ValueError as error:  # its text is the end of a sentence
        return RowError("row_invalid", f"the prompt {error}")


def _chat_prompt(messages: Sequence[Any]) -> Prompt:
    """`[{"role", "content"}...]` as IDEFICS's instruct models were trained on, up to the next answer."""
    turns = [_turn(message, first=number == 0) for number, message in enumerate(messages)]
    if messages[-1]["role"] != "user":
        raise ValueError(f"ends with a message of the {messages[-1]['role']}: the last one must be the user's")
    return merge_texts((*(item for turn in turns for item in turn), LABELS["assistant"]))


def _turn(message: Any, first: bool) -> Prompt:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in tuple(LABELS) and not (role == "system" and first):
        raise ValueError(f"has a message of {role!r}: use user and assistant, and system for the first one")
    content = message.get("content")
    items = [content] if isinstance(content, str) else content
    if not isinstance(items, list | tuple):
        raise ValueError(f"has a message whose content is {_kind(content)}")
    written = merge_texts(map(_item, items))
    if not written:
        raise ValueError(f"has an empty message of the {role}")
    if role == "system":
        return (*written, "\n")
    blank = " " if isinstance(written[0], str) else ""
    return (LABELS[role], blank, *written, END_OF_UTTERANCE, "\n")


def _item(item: Any) -> str | ImageItem:
    """A text or an image. Of a struct's fields those count that are not null, as Parquet gives all of them."""
    if isinstance(item, str):
        return item
    if isinstance(item, bytes):
        return ImageItem(item)
    if not isinstance(item, Mapping):
        raise ValueError(f"holds {_kind(item)}: texts are strings, images bytes or structs")
    text, source, embedding = item.get("text"), _source(item), item.get("embedding")
    if isinstance(text, str) and source is None:
        return text
    if text is None and source is not None:
        return ImageItem(source)
    if text is None and isinstance(embedding, str):
        return ImageItem(embedding=embedding)
    raise ValueError(f"holds a struct of {listed(map(str, item))}: it needs either a text or an image")


def _source(struct: Mapping[str, Any]) -> Any:
    named = next((struct[name] for name in SOURCE_FIELDS if _holds_something(struct.get(name))), None)
    stored = {name: struct[name] for name in ("bytes", "path") if struct.get(name) is not None}
    return stored or None if named is None else named


def _holds_something(value: Any) -> bool:
    """Where there is nothing, Parquet may give a struct of nulls."""
    return any(part is not None for part in value.values()) if isinstance(value, Mapping) else value is not None


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"[:80]
