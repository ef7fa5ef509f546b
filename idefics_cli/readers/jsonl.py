"""JSON lines: one object per line, in UTF-8. Any other line is a bad row; blank lines are skipped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

from idefics_cli.columns import MAX_DEPTH, MAX_VALUES, is_deeper
from idefics_cli.errors import RowError
from idefics_cli.readers.source import Span
from idefics_cli.readers.table import Record, StreamTable
from idefics_cli.storage.filenames import is_utf8
from idefics_cli.storage.files import File, placed_pieces

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DECODER = json.JSONDecoder(parse_constant=lambda name: None)


def open_json_lines(file: File, compressed: bool) -> StreamTable:
    return StreamTable(file, compressed, _read, enter=_enter)


def _read(stream: BinaryIO, columns: Sequence[str] | None, span: Span) -> Iterator[Callable[[], Record | RowError]]:
    return (partial(parse_object, line, f"line {number}") for _, number, line in _lines(stream, span.begin.line))


def _enter(stream: BinaryIO) -> Iterator[tuple[int, int]]:
    return ((place, number) for place, number, _ in _lines(stream, 1))


def _lines(stream: BinaryIO, first: int) -> Iterator[tuple[int, int, bytes | None]]:
    """The place, number and text of each line that is not blank."""
    for number, (place, line) in enumerate(placed_pieces(stream, b"\n"), first):
        if number == 1 and line is not None:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line is None or (not line.isspace() and line):
            yield place, number, line


def parse_object(text: bytes | None, place: str) -> Record | RowError:
    """A JSON object; `place` says in messages where it stands. NaN and infinities, which JSON lacks, are null."""
    if text is None:
        return RowError("row_invalid", f"{place} is longer than 64 MB")
    if text.count(b",") > MAX_VALUES:
        return RowError("row_invalid", f"{place} holds more than {MAX_VALUES:,} values")
    try:
        decoded = text.decode()
        value = DECODER.decode(decoded)
    except RecursionError:
        return _too_deep(place)
    except UnicodeDecodeError as error:
        return RowError("row_invalid", f"{place} is not valid UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return RowError("row_invalid", f"{place} is not valid JSON at character {error.pos + 1}: {error.msg}")
    except ValueError as error:  # a number of more digits than Python reads
        return RowError("row_invalid", f"{place} cannot be read: {error}")
    return checked_object(value, decoded, place)


def checked_object(value: Any, text: str, place: str) -> Record | RowError:
    """A value that was read from this text, if it is an object that UTF-8 can hold."""
    if not isinstance(value, dict):
        return RowError("row_invalid", f"{place} is a {type(value).__name__}, not an object")
    if text.count("[") + text.count("{") > MAX_DEPTH and is_deeper(value):
        return _too_deep(place)
    if not is_utf8(text):
        return RowError("row_invalid", f"{place} is not valid UTF-8")
    if "\\u" in text and not is_utf8(json.dumps(value, ensure_ascii=False)):
        return RowError("row_invalid", f"{place} holds half of a surrogate pair, which UTF-8 cannot hold")
    return value


def _too_deep(place: str) -> RowError:
    return RowError("row_invalid", f"{place} is nested more than {MAX_DEPTH} deep")
