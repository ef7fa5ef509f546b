"""Checks of arguments, each raising an IdeficsError that says what was expected; and how an option describes itself.

Types and shapes only: this module does not know what a model or an image is. Imports nothing heavy.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from idefics_cli.errors import IdeficsError

Options = TypeVar("Options")


NOTHING: Mapping[str, Any] = {}
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z0-9-]*")


@dataclass(frozen=True)
class Help:
    """How the command line shows a field of options: `num_beams: Annotated[int, Help("Beams", min=1)] = 3`.

    A field without it is not shown: the program sets it. `flags` are its names where they are not the field's own,
    `default` is what help shows in place of the default (False: nothing), `parse` turns what is typed into the value.
    `panel` is where help shows it, if not with the others of its dataclass.
    """

    text: str
    metavar: str | None = None
    min: float | None = None
    max: float | None = None
    flags: tuple[str, ...] = ()
    default: str | bool = True
    parse: Callable[[str], Any] | None = None
    panel: str | None = None


def option_name(field: str, about: Help) -> str:
    """What users type for the field."""
    return about.flags[-1] if about.flags else f"--{field.replace('_', '-')}"


def keyword(field: str, about: Help) -> str:
    """What callers write for it: its option, or what a --no-... turns off."""
    name = option_name(field, about).lstrip("-").replace("-", "_")
    return field if name.startswith("no_") else name


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


def keywords_of(options: type) -> dict[str, tuple[Any, Help]]:
    """The hint and the help of all options in a dataclass, and in those within it, by keyword."""
    found: dict[str, tuple[Any, Help]] = {}
    for name, hint in get_type_hints(options, include_extras=True).items():
        if is_dataclass(hint):
            found |= keywords_of(hint)
        elif (about := help_of(hint)) is not None:
            found[keyword(name, about)] = hint.__origin__, about
    return found


def gathered(options: type[Options], given: Mapping[str, Any], own: Mapping[str, Any] = NOTHING) -> Options:
    """The dataclass with the options in `given`, by keyword; those within it likewise. None is the default.

    `own` are values of fields, also of such that are no options. Raises IdeficsError for a value of another kind.
    """
    hints = get_type_hints(options, include_extras=True)
    values = {name: value for name, value in own.items() if name in hints}
    for name, hint in hints.items():
        about = help_of(hint)
        if is_dataclass(hint):
            values[name] = values.get(name) or gathered(hint, given, own)
        elif about is not None and given.get(word := keyword(name, about)) is not None:
            values[name] = fitting(word, given[word], hint.__origin__, about)
    return options(**values)


def with_keywords(text: str, *options: type) -> str:
    """The text with all options of these dataclasses as callers write them: num_beams for --num-beams."""
    words = _keywords_by_option(options)
    return OPTION.sub(lambda found: words.get(found[0], found[0]), text)


@cache
def _keywords_by_option(options: tuple[type, ...]) -> Mapping[str, str]:
    words: dict[str, str] = {}
    for kind in options:
        for word, (hint, about) in keywords_of(kind).items():
            for flag in about.flags or (option_name(word, about),):
                turns_off = flag.startswith("--no-") and not word.startswith("no_")
                words[flag] = f"{word}=False" if turns_off else f"{word}=True" if hint is bool else word
                words.setdefault(flag.replace("--", "--no-"), f"{word}=False")
    return words


def require_keywords(given: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        near = [name for each in unknown for name in get_close_matches(each, known, 1)]
        raise IdeficsError(f"unknown option {', '.join(unknown)}: use {', '.join(near or sorted(known))}")


def fitting(name: str, value: Any, hint: Any, about: Help) -> Any:
    """The value as the field has it: texts may be as on the command line, and lists stand for tuples."""
    if isinstance(value, str) and about.parse is not None:
        return about.parse(value)
    if isinstance(value, str) and get_origin(hint) is tuple:
        return (value,)
    value = os.fspath(value) if isinstance(value, os.PathLike) else tuple(value) if isinstance(value, list) else value
    if not _is_of(value, hint):
        raise IdeficsError(f"invalid {name} {value!r}: expected {_kinds(hint)}")
    for bound, is_past, words in ((about.min, operator.lt, "at least"), (about.max, operator.gt, "at most")):
        if bound is not None and isinstance(value, Real) and is_past(value, bound):
            raise IdeficsError(f"invalid {name} {value!r}: expected {words} {_number(bound)}")
    return _plain(value)


def _is_of(value: Any, hint: Any) -> bool:
    """Numbers of any library are numbers; which of them will do, others say."""
    if get_origin(hint) is Literal:
        return any(isinstance(value, type(each)) and value == each for each in get_args(hint))
    if get_origin(hint) is tuple:
        first, *others = get_args(hint)
        is_long_enough = isinstance(value, tuple) and (others == [...] or len(value) == 1 + len(others))
        return is_long_enough and all(_is_of(each, first) for each in value)
    if get_args(hint):
        return any(_is_of(value, each) for each in get_args(hint))
    numbers = {int: Integral, float: Real}
    return isinstance(value, numbers.get(hint, hint)) and (hint is bool or not isinstance(value, bool))


def _plain(value: Any) -> Any:
    """Whole numbers, and those in tuples, as Python's own, which JSON holds."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return operator.index(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _kinds(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        is_list = get_args(hint)[-1] is ...
        return f"a list of {_kinds(get_args(hint)[0])}" if is_list else f"({', '.join(map(_kinds, get_args(hint)))})"
    if get_args(hint):
        return " or ".join(map(_kinds, get_args(hint)))
    return {str: "text", bool: "True or False", int: "a whole number", float: "a number"}.get(hint, "None")


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int, where it is any type of whole number (such as numpy's) but a truth value."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise IdeficsError(f"invalid {name} {value!r}: expected a whole number of at least {least}")
    if most is not None and number > most:
        raise IdeficsError(f"invalid {name} {value!r}: expected a whole number of at most {most}")
    return number


def _number(bound: Real) -> str:
    return f"{bound}" if isinstance(bound, int) else f"{bound:g}"


def file_name(what: str, value: Any, expected: str) -> str | None:
    """A text or path as a plain text; None stays. To the system NumPy's texts are bytes."""
    name = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    if name is not None and not isinstance(name, str):
        raise IdeficsError(f"invalid {what} of type {type(value).__name__}: expected {expected}")
    return None if name is None else str(name)


def several(name: str, given: Any, of: str) -> Iterable[Any]:
    """A list or any other iterable, but not a single text, path, image or row."""
    if isinstance(given, str | bytes | bytearray | os.PathLike | Mapping) or not isinstance(given, Iterable):
        raise IdeficsError(f"{name} must be a list, not {type(given).__name__}: write [{of}]")
    return given


def pair(name: str, given: Any, of: str) -> tuple[Any, Any]:
    """The two items of one of them."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise IdeficsError(f"{name} must be a list of pairs, not of {type(given).__name__}: write [({of})]")
    return given[0], given[1]
