"""Paths on stdin -> entries: the path is the id. Without an image root a path may lead anywhere: the user named it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any, BinaryIO

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.image_paths import AnyPlace, Root, open_root, read_image
from idefics_cli.rows import NO_VALUES, Entry, ImageSource
from idefics_cli.storage.filenames import escape_name
from idefics_cli.storage.files import split_stream


class PathList:
    """The paths on `stdin`, which come once: what has been passed over is gone.

    Reads up to the first path when it is made, so that an empty stdin is known before a model is loaded.
    """

    size: int | None = None
    distinct = False
    listed = False
    is_streaming = True
    identity: Mapping[str, Any] = {"kind": "stdin"}
    kept: Mapping[str, Any] = NO_VALUES

    def __init__(self, stdin: BinaryIO | None, null: bool, image_root: str | None) -> None:
        if stdin is None:
            raise InputError("stdin is closed: pipe paths into `-`, a line each")
        records = _records(stdin, null)
        first = next(records, b"")
        if first == b"":
            raise InputError("no paths on stdin: pipe paths into `-`, a line each (or separated by NUL, with --null)")
        if first and b"\0" in first:
            raise InputError("the paths on stdin are separated by NUL: add -0/--null")
        self._root: Root = open_root("", image_root) if image_root is not None else AnyPlace()
        self._records = chain([first], records)
        self._taken = 0

    def entries(self, start: int, step: int) -> Iterator[Entry]:
        for record in islice(self._remaining(), start - self._taken, None, step):
            yield self._entry(self._taken - 1, record)

    def names(self, start: int, step: int) -> Iterator[tuple[int, str | None]]:
        return ((entry.number, entry.name) for entry in self.entries(start, step))

    def fallback_name(self, number: int) -> str:
        return f"-:{number}"

    def resolve(self, value: object) -> ImageSource | RowError:
        return read_image(value, self._root)

    def _remaining(self) -> Iterator[bytes | None]:
        for record in self._records:
            self._taken += 1
            yield record
        self.size = self._taken

    def _entry(self, number: int, record: bytes | None) -> Entry:
        if record is None:
            return Entry(number, None, None, (), error=RowError("row_invalid", "the path is longer than 64 MB"))
        path = os.fsdecode(record)
        name = escape_name(path)
        source = self._root.resolve(path)
        if isinstance(source, RowError):
            return Entry(number, name, name, (), error=source)
        return Entry(number, name, name, (source,))


def _records(stdin: BinaryIO, null: bool) -> Iterator[bytes | None]:
    """Paths as soon as they have come; empty ones are passed over.

    Reads below the stream's buffer where there is one: a thread that waits inside a buffered read holds a lock which
    the interpreter wants when it ends.
    """
    pieces = split_stream(getattr(stdin, "raw", stdin), b"\0" if null else b"\n")
    if not null:
        pieces = (piece and piece.removesuffix(b"\r") for piece in pieces)
    return (piece for piece in pieces if piece != b"")
