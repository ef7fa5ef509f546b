"""CSV and TSV: a line of column names, then rows, in UTF-8; quoted as spreadsheets and pandas do.

A quoted field may hold line breaks. A record that cannot be read (a quote that is not closed, text behind a closing
quote, a field of more than csv's own limit) costs its first line alone: the line is a bad row, and reading goes on with
the line behind it. So a stray quote never swallows the rows that follow. Blank lines are no rows.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.jsonl import BYTE_ORDER_MARK
from idefics_cli.readers.table import SAMPLE_BYTES, SAMPLE_ROWS, Record, image_columns
from idefics_cli.storage.filenames import IMAGE_SUFFIX, shown
from idefics_cli.storage.files import MAX_PIECE_BYTES, InputFile, open_stream, split_stream


class DelimitedTable:
    image_column = None
    id_column = None

    def __init__(self, file: InputFile, compressed: bool, delimiter: str) -> None:
        self.size: int | None = None
        self._file = file
        self._compressed = compressed
        self._delimiter = delimiter
        self.columns = self._header()
        sample = list(self._sample())
        if not sample:
            raise InputError(f"{file.name} holds a header but no rows: name a manifest that holds some")
        self.images = image_columns(self.columns, [row for row in sample if not isinstance(row, RowError)])

    def type_of(self, column: str) -> Any:
        import pyarrow

        return pyarrow.string()

    def may_hold_images(self, column: str) -> bool:
        return True

    def records(self, start: int, step: int, columns: Sequence[str]) -> Iterator[tuple[int, Record | RowError]]:
        for number, fields in islice(enumerate(self._rows()), start, None, step):
            yield number, self._record(*fields)

    def _record(self, line_number: int, fields: list[str] | RowError) -> Record | RowError:
        if isinstance(fields, RowError):
            return fields
        if len(fields) != len(self.columns):
            return RowError(
                "row_invalid", f"line {line_number} has {len(fields)} fields, but there are {len(self.columns)} columns"
            )
        return dict(zip(self.columns, fields, strict=True))

    def _rows(self) -> Iterator[tuple[int, list[str] | RowError]]:
        """What comes behind the header."""
        size = -1
        with open_stream(self._file, self._compressed) as stream:
            records = read_delimited(split_stream(stream, b"\n"), self._delimiter)
            for size, record in enumerate(records):
                if size > 0:
                    yield record
        self.size = size

    def _sample(self) -> Iterator[Record | RowError]:
        num_bytes = 0
        for line_number, fields in islice(self._rows(), SAMPLE_ROWS):
            yield self._record(line_number, fields)
            num_bytes += sum(map(len, fields)) if isinstance(fields, list) else 0
            if num_bytes > SAMPLE_BYTES:
                return

    def _header(self) -> list[str]:
        with open_stream(self._file, self._compressed) as stream:
            _, header = next(read_delimited(split_stream(stream, b"\n"), self._delimiter), (0, None))
        if header is None:
            raise InputError(f"{self._file.name} holds only blank lines: name a manifest that holds rows")
        if isinstance(header, RowError):
            raise InputError(f"{self._file.name} cannot be read: {header.message}; save it as UTF-8 with a header")
        if any(IMAGE_SUFFIX.search(name) for name in header):
            raise InputError(
                f"{self._file.name} has no header: its first line, {shown(self._delimiter.join(header))}, looks like a"
                " row; put a line of column names above it"
            )
        repeated = [name for name in header if header.count(name) > 1]
        if repeated:
            raise InputError(f"{self._file.name} has two columns named {shown(repeated[0])}: rename one of them")
        return header


def read_delimited(lines: Iterator[bytes | None], delimiter: str) -> Iterator[tuple[int, list[str] | RowError]]:
    """The number of each record's first line, and its fields or why it has none."""
    feed = _Lines(lines)
    while True:
        try:
            for fields in csv.reader(feed, delimiter=delimiter, strict=True):
                if not fields:
                    feed.done()
                    continue
                line_number, broken = feed.done()
                yield line_number, broken or fields
            return
        except (csv.Error, _TooLong) as error:
            yield feed.line_number, RowError("row_invalid", f"line {feed.line_number} is not CSV: {error}")
            feed.retry()


class _TooLong(Exception):
    """A line, or a record of several, that is longer than what is held."""

    def __str__(self) -> str:
        return "longer than 64 MB"


class _Lines:
    """Lines for csv.reader, which takes one more whenever a quote is open: those of the record under way are kept."""

    def __init__(self, lines: Iterator[bytes | None]) -> None:
        self._lines = lines
        self._waiting: deque[bytes | None] = deque()
        self._record: list[bytes | None] = []
        self._num_bytes = 0
        self._broken = False
        self.line_number = 1  # of the record's first line

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._lines)
        self._record.append(line)
        self._num_bytes += len(line or b"")
        if line is None or self._num_bytes > MAX_PIECE_BYTES:
            raise _TooLong
        if self.line_number == 1 and len(self._record) == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        try:
            return line.decode() + "\n"
        except UnicodeDecodeError:
            self._broken = True
            return line.decode(errors="replace") + "\n"

    def done(self) -> tuple[int, RowError | None]:
        """The record is complete: the number of its first line, and why it is bad if its text is."""
        line_number, broken = self.line_number, self._broken
        self._forget(len(self._record))
        error = RowError("row_invalid", f"line {line_number} is not UTF-8") if broken else None
        return line_number, error

    def retry(self) -> None:
        """The record cannot be read: all its lines but the first come again."""
        self._waiting.extendleft(reversed(self._record[1:]))
        self._forget(1)

    def _forget(self, num_lines: int) -> None:
        self.line_number += num_lines
        self._record.clear()
        self._num_bytes = 0
        self._broken = False
