"""A cell of references (right answers, captions) -> texts. Knows no files and no scores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from idefics_cli.errors import InputError
from idefics_cli.storage.filenames import listed

LETTER = re.compile("[A-Za-z]")
NUMBER = re.compile(r"[0-9]{1,4}(\.0)?")  # pandas makes floats of whole numbers where some are missing
STRUCT_FIELDS = ("answer", "caption", "text")  # where a reference that is a struct keeps its words


def references_of(value: Any, place: str = "this row", choices: Any = None) -> list[str]:
    """The references in a cell: a text, a list of texts, the datasets library's structs (a list of them, or one that
    holds lists). An empty cell, or one of nulls only, gives none. Beside a list of `choices` a whole number (of the
    first: 0) or a letter stands for one of these."""
    if isinstance(value, Mapping):
        return references_of(_words(value, place), place, choices)
    if not isinstance(value, (list, tuple)):
        value = [value]
    words = (_words(item, place) if isinstance(item, Mapping) else item for item in value)
    texts = [(word, _text(word, place)) for word in words if word is not None]
    return [_chosen(word, text, choices) if isinstance(choices, list | tuple) else text for word, text in texts]


def _chosen(word: Any, text: str, choices: Sequence[Any]) -> str:
    """A text that is itself among the choices is what it says."""
    if isinstance(word, str) and text in choices:
        return text
    number = ord(text.upper()) - ord("A") if LETTER.fullmatch(text) else -1
    if NUMBER.fullmatch(text):
        number = int(float(text))
    return str(choices[number]) if 0 <= number < len(choices) else text


def _words(struct: Mapping[str, Any], place: str) -> Any:
    for name in STRUCT_FIELDS:
        if name in struct:
            return struct[name]
    raise InputError(f"{place}: a reference has the fields {listed(struct)}: it needs {' or '.join(STRUCT_FIELDS)}")


def _text(value: Any, place: str) -> str:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise InputError(f"{place}: a reference is {type(value).__name__}, not text: name another --answers-column")
