"""A manifest's free prompt -> `Prompt`: a list of texts and images, or a conversation in transformers' chat format.

A string is text, always, never a path. An image is bytes or a struct, and comes out as an `ImageItem` that is yet to be
loaded. This module opens nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from idefics_cli.errors import RowError
from idefics_cli.prompts.templates import END_OF_UTTERANCE, Prompt, merge_texts

SOURCE_FIELDS = ("image", "url")
LABELS = {"user": "User:", "assistant": "Assistant:"}


@dataclass(frozen=True)
class ImageItem:
    """An image within a manifest's prompt: a path, bytes, or the datasets library's struct of both; or the id of its
    row in a file of embeddings."""

    source: Any = None
    embedding: str | None = None


def interleaved_prompt(value: Any) -> Prompt | RowError:
    """The prompt that a cell holds; what is no prompt is a RowError that says what is wrong where."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        return RowError("row_invalid", f"the prompt is no list of texts and images but {_kind(value)}")
    is_chat = any(isinstance(item, Mapping) and "role" in item for item in items)
    try:
        return chat_prompt(items) if is_chat else merge_texts(_item(item) for item in items)
    except _Malformed as error:
        return RowError("row_invalid", f"the prompt {error}")


class _Malformed(Exception):
    """What is wrong with a prompt, as the end of a sentence about it."""


def chat_prompt(messages: Sequence[Any]) -> Prompt:
    """`[{"role", "content"}...]` as IDEFICS's instruct models were taught conversations, up to the next answer."""
    *earlier, last = [_message(message, first=number == 0) for number, message in enumerate(messages)]
    if last[0] != "user":
        raise _Malformed(f"ends with a message of the {last[0]}: the last one is to be the user's")
    turns = [item for turn in (*earlier, last) for item in _turn(*turn)]
    return merge_texts((*turns, LABELS["assistant"]))


def _turn(role: str, content: Prompt) -> Prompt:
    if role == "system":
        return (*content, "\n")
    blank = " " if isinstance(content[0], str) else ""
    return (LABELS[role], blank, *content, END_OF_UTTERANCE, "\n")


def _message(message: Any, first: bool) -> tuple[str, Prompt]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in tuple(LABELS) and not (role == "system" and first):
        raise _Malformed(f"has a message of {role!r}: user and assistant speak, and a system message stands first")
    content = message.get("content")
    items = [content] if isinstance(content, str) else content
    if not isinstance(items, list | tuple):
        raise _Malformed(f"has a message whose content is {_kind(content)}")
    written = merge_texts(_item(item) for item in items)
    if not written:
        raise _Malformed(f"has an empty message of the {role}")
    return role, written


def _item(item: Any) -> str | ImageItem:
    """A text or an image. Of a struct's fields those count that are not null, as Parquet gives all of them."""
    if isinstance(item, str):
        return item
    if isinstance(item, bytes):
        return ImageItem(item)
    if not isinstance(item, Mapping):
        raise _Malformed(f"holds {_kind(item)}: texts are strings, images bytes or structs")
    text, source = item.get("text"), _source(item)
    if isinstance(text, str) and source is None:
        return text
    if text is None and source is not None:
        return ImageItem(source)
    if text is None and isinstance(item.get("embedding"), str):
        return ImageItem(embedding=item["embedding"])
    raise _Malformed(f"holds a struct of {', '.join(map(repr, item)) or 'nothing'}: it needs either a text or an image")


def _source(struct: Mapping[str, Any]) -> Any:
    named = next((struct[name] for name in SOURCE_FIELDS if _holds_something(struct.get(name))), None)
    if named is not None:
        return named
    stored = {name: struct[name] for name in ("bytes", "path") if struct.get(name) is not None}
    return stored or None


def _holds_something(value: Any) -> bool:
    """A struct of nulls is what Parquet may give where there is none."""
    return any(part is not None for part in value.values()) if isinstance(value, Mapping) else value is not None


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"[:80]
