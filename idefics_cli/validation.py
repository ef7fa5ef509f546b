"""What a caller of the Python API has given, or an IdeficsError that says what was meant to be there.

Shapes of arguments only: what an image, a question or a model is, others know.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator
from typing import Any

from idefics_cli.errors import IdeficsError


def whole_number(name: str, value: Any, least: int) -> int:
    """Of any type of whole numbers, such as numpy's; truth values are none."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise IdeficsError(f"{name} is {value!r}: use a whole number from {least} on")
    return number


def model_name(model: Any) -> str:
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else model
    if not isinstance(name, str):
        raise IdeficsError(f"a model is no {type(model).__name__}: give a hub id, a local folder or 'demo', as text")
    return name


def several_images(method: str, images: Any) -> Iterable[Any]:
    """Images, and not one of them."""
    if isinstance(images, str | bytes | bytearray | os.PathLike) or not isinstance(images, Iterable):
        raise IdeficsError(f"{method} takes images, not one image: write [image]")
    return images


def pairs(method: str, given: Any, of: str) -> Iterator[tuple[Any, Any]]:
    """What is in each, as they come."""
    wrong = f"{method} takes pairs of {of}: write [({of})]"
    if not isinstance(given, Iterable):
        raise IdeficsError(f"{wrong}, and not {type(given).__name__}")
    for pair in given:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise IdeficsError(f"{wrong}; one of them is {type(pair).__name__}")
        yield pair[0], pair[1]
