"""Paths on stdin -> rows: the path is the id. Without an image root a path may lead anywhere: the user named it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, BinaryIO

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.image_paths import Say, open_root, read_image
from idefics_cli.readers.source import ALL, Source, Span
from idefics_cli.rows import NO_VALUES, ImageSource, InputRow, ReadOptions
from idefics_cli.storage.filenames import escape_name
from idefics_cli.storage.files import split_stream


class PathList(Source):
    """The paths on `stdin`, which come once.

    Reads up to the first path when it is made, so that an empty stdin is known before a model is loaded.
    """

    prefix, is_streaming = "-:", True
    identity: Mapping[str, Any] = {"kind": "stdin"}

    def __init__(self, stdin: BinaryIO | None, options: ReadOptions, say: Say) -> None:
        if stdin is None:
            raise InputError("stdin is closed: pipe paths into `-`, one per line")
        self._stdin, self._null = stdin, options.null
        records = _records(stdin, options.null)
        first = next(records, b"")
        if first == b"":
            raise InputError("no paths on stdin: pipe paths into `-`, one per line (or separated by NUL, with --null)")
        if first and b"\0" in first:
            raise InputError("the paths on stdin are separated by NUL: add -0/--null")
        self._resolve = open_root(None, options, say)
        self._records = chain([first], records)
        self._taken = 0

    def restart(self) -> None:
        if not self._stdin.seekable():
            raise InputError("the paths on stdin are not those that the rows were made of: give these, or add --update")
        self._stdin.seek(0)
        self._records, self._taken = _records(self._stdin, self._null), 0

    def rows(self, span: Span) -> Iterator[InputRow]:
        assert span == ALL, span
        for record in self._remaining():
            yield self._row(self._taken - 1, record)

    def resolve(self, value: object) -> ImageSource | RowError:
        return read_image(value, self._resolve)

    def _remaining(self) -> Iterator[bytes | None]:
        for record in self._records:
            self._taken += 1
            yield record
        self.size = self._taken

    def _row(self, number: int, record: bytes | None) -> InputRow:
        if record is None:
            return InputRow(number, "", None, (), NO_VALUES, RowError("row_invalid", "the path is longer than 64 MB"))
        path = os.fsdecode(record)
        name = escape_name(path)
        source = self._resolve(path)
        error = source if isinstance(source, RowError) else None
        return InputRow(number, name, name, (source,) if error is None else (), NO_VALUES, error)


def _records(stdin: BinaryIO, null: bool) -> Iterator[bytes | None]:
    """Paths as soon as they have come; empty ones are skipped.

    Reads below the stream's buffer where there is one: a thread that waits inside a buffered read holds a lock which
    the interpreter needs when it ends.
    """
    pieces = split_stream(getattr(stdin, "raw", stdin), b"\0" if null else b"\n")
    if not null:
        pieces = (piece and piece.removesuffix(b"\r") for piece in pieces)
    return (piece for piece in pieces if piece != b"")
