"""A cell of references (right answers, captions) -> texts. Knows no files and no scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from idefics_cli.errors import InputError
from idefics_cli.storage.filenames import listed

STRUCT_FIELDS = ("answer", "caption", "text")  # where a reference that is a struct keeps its words


def references_of(value: Any, place: str = "this row") -> list[str]:
    """The references in a cell: a text, a list of texts, the datasets library's structs (a list of them, or one that
    holds lists). An empty cell, or one of nulls only, gives none."""
    if isinstance(value, Mapping):
        return references_of(_words(value, place), place)
    if not isinstance(value, (list, tuple)):
        value = [value]
    words = (_words(item, place) if isinstance(item, Mapping) else item for item in value)
    return [_text(word, place) for word in words if word is not None]


def _words(struct: Mapping[str, Any], place: str) -> Any:
    for name in STRUCT_FIELDS:
        if name in struct:
            return struct[name]
    raise InputError(f"{place}: a reference has the fields {listed(struct)}: it needs {' or '.join(STRUCT_FIELDS)}")


def _text(value: Any, place: str) -> str:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise InputError(f"{place}: a reference is {type(value).__name__}, not text: name another --answers-column")
