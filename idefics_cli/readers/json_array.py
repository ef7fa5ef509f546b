"""`.json` files: an array of objects, or one object with a list of them, as COCO and VQAv2 have. JSON lines too, which
Spark and the datasets library also give this suffix.

Read forwards, a value at a time. None may be longer than 64 MB, and one that is not valid ends the manifest, since
nothing tells where the next one begins.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.jsonl import DECODER, checked_object, open_json_lines
from idefics_cli.readers.source import Span
from idefics_cli.readers.table import Record, StreamTable
from idefics_cli.storage.filenames import listed, shown
from idefics_cli.storage.files import MAX_PIECE_BYTES, READ_BYTES, File, open_stream

SPACE = re.compile(r"[ \t\r\n\ufeff]*")
LONGEST_TOKEN = 12  # so near the end of what has been read, a value may fail for lack of the rest


def open_json(file: File, compressed: bool, key: str | None) -> StreamTable:
    """Raises InputError where there is no list of objects, or where there are several and no `key` names one."""
    with open_stream(file, compressed) as stream:
        values = _Values(stream, file.name)
        is_array = values.peek() == "["
        kinds = _kinds_of_members(values) if values.peek() not in ("[", "") else {}
        is_lines = not is_array and (values.peek() != "" or not {dict, list}.intersection(kinds.values()))
    if is_lines:
        return open_json_lines(file, compressed)
    chosen = None if is_array else _chosen_list(file.name, kinds, key)

    def read(stream: BinaryIO, columns: Sequence[str] | None, span: Span) -> Iterator[Callable[[], Record | RowError]]:
        for number, (value, text) in enumerate(_Values(stream, file.name).rows(chosen), 1):
            yield partial(checked_object, value, text, f"row {number}")

    return StreamTable(file, compressed, read)


def _kinds_of_members(values: _Values) -> dict[str, type | None]:
    """By key: list for a list of objects, dict for an object, None for other values."""
    kinds: dict[str, type | None] = {}
    for key in values.members():
        if values.peek() == "[":
            is_objects = {type(value) for value, _ in values.elements()} == {dict}
            kinds.setdefault(key, list if is_objects else None)
        else:
            kinds.setdefault(key, dict if isinstance(values.value()[0], dict) else None)
    return kinds


def _chosen_list(name: str, kinds: dict[str, type | None], key: str | None) -> str:
    lists = [each for each, kind in kinds.items() if kind is list]
    if key in lists or (key is None and len(lists) == 1):
        return key or lists[0]
    if lists:
        found = "several lists" if key is None else f"no list of objects called {shown(key)}"
        raise InputError(f"{name} has {found}: name one with --json-key: {listed(lists)}")
    raise InputError(
        f"{name} is an object without a list of objects: where its values are the rows, as in GQA, make lines of them,"
        f" `jq -c 'to_entries[] | {{id: .key}} + .value' IN.json > OUT.jsonl`"
    )


class _Values:
    """The JSON values of a stream, one after the other, in bounded memory."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name = stream, name
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text, self._at, self._number, self._has_ended = "", 0, 0, False

    def rows(self, key: str | None) -> Iterator[tuple[Any, str]]:
        """The values of the array, or of the list that has this key, each with its text."""
        if key is None:
            yield from self.elements()
            if self.peek():
                raise self._refused("there is more after the end of the array")
            return
        for each in self.members():
            if each == key:
                yield from self.elements()
                return
            self.value()

    def members(self) -> Iterator[str]:
        """The keys of an object; whoever is given one reads its value before the next."""
        for _ in self._items("{", "}"):
            key, _ = self.value()
            if not isinstance(key, str):
                raise self._refused("a key is not a text")
            self._take(":")
            yield key

    def elements(self) -> Iterator[tuple[Any, str]]:
        return (self.value() for _ in self._items("[", "]"))

    def _items(self, begin: str, end: str) -> Iterator[None]:
        self._take(begin)
        if self.peek() == end:
            self._take(end)
            return
        yield
        while self._take("," + end) == ",":
            yield

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            self._at = SPACE.match(self._text, self._at).end()
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def value(self) -> tuple[Any, str]:
        """The next value and its text. What comes after it has been read, too: a number might be longer."""
        self.peek()
        self._number += 1
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
                if self._has_ended or SPACE.match(self._text, end).end() < len(self._text):
                    text, self._at = self._text[self._at : end], end
                    return value, text
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - LONGEST_TOKEN
                if self._has_ended or not is_cut:
                    raise self._refused(error.msg) from error
            except RecursionError:
                raise self._refused("nested too deeply") from None
            except ValueError as error:  # a number of more digits than Python reads
                raise self._refused(str(error)) from error
            if len(self._text) - self._at > MAX_PIECE_BYTES:
                raise self._refused("longer than 64 MB")
            self._read()

    def _take(self, expected: str) -> str:
        found = self.peek()
        if not found or found not in expected:
            where = shown(found) if found else "the file ends"
            raise self._refused(f"{where} instead of {' or '.join(map(shown, expected))}")
        self._at += 1
        return found

    def _read(self) -> bool:
        """As much again as is held, so that a long value is not begun too often. False at the end."""
        held = self._text[self._at :]
        data = self._stream.read(max(READ_BYTES, len(held)))
        self._has_ended = not data
        self._text, self._at = held + self._decode(data, self._has_ended), 0
        return not self._has_ended

    def _refused(self, reason: str) -> InputError:
        return InputError(f"{self._name} is not valid JSON near its value {self._number:,}: {reason}; write it again")
