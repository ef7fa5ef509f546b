"""Checks of arguments, each raising an IdeficsError that says what was expected; and how an option describes itself.

Types and shapes only: this module does not know what a model or an image is. Imports nothing heavy.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from idefics_cli.errors import IdeficsError


@dataclass(frozen=True)
class Help:
    """How the command line shows a field of options: `num_beams: Annotated[int, Help("Beams", min=1)] = 3`.

    A field without it is not shown: the program sets it. `flags` are its names where they are not the field's own,
    `default` is what help shows in place of the default (False: nothing), `parse` turns what is typed into the value.
    """

    text: str
    metavar: str | None = None
    min: float | None = None
    max: float | None = None
    flags: tuple[str, ...] = ()
    default: str | bool = True
    parse: Callable[[str], Any] | None = None
    envvar: str | None = None


def option_name(field: str, about: Help) -> str:
    """What users type for the field."""
    return about.flags[-1] if about.flags else f"--{field.replace('_', '-')}"


def help_of(hint: Any) -> Help | None:
    """That of a field with this annotation."""
    return next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Help)), None)


def by_option(options: Any) -> dict[str, Any]:
    """The values of all options in a dataclass, and in those within it, by what users type for them."""
    hints = get_type_hints(type(options), include_extras=True)
    values: dict[str, Any] = {}
    for field in fields(options):
        value, about = getattr(options, field.name), help_of(hints[field.name])
        if is_dataclass(value):
            values |= by_option(value)
        elif about is not None:
            name = option_name(field.name, about)
            values[name] = not value if field.default is True and name.startswith("--no-") else value
    return values


def whole_number(name: str, value: Any, least: int) -> int:
    """`value` as an int, where it is any type of whole number (such as numpy's) but a truth value."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise IdeficsError(f"invalid {name} {value!r}: expected a whole number of at least {least}")
    return number


def file_name(what: str, value: Any, expected: str) -> str | None:
    """A text or path as a text; None stays."""
    name = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    if name is not None and not isinstance(name, str):
        raise IdeficsError(f"invalid {what} of type {type(value).__name__}: expected {expected}")
    return name


def several(name: str, given: Any, of: str) -> Iterable[Any]:
    """A list or any other iterable, but not a single text, path or image."""
    if isinstance(given, str | bytes | bytearray | os.PathLike) or not isinstance(given, Iterable):
        raise IdeficsError(f"{name} must be a list, not {type(given).__name__}: write [{of}]")
    return given


def pairs(name: str, given: Any, of: str) -> Iterator[tuple[Any, Any]]:
    """The two items of each pair, as they come."""
    for pair in several(name, given, f"({of})"):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise IdeficsError(f"{name} must be a list of pairs, not of {type(pair).__name__}: write [({of})]")
        yield pair[0], pair[1]
