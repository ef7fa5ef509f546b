"""CSV and TSV: a line of column names, then rows, in UTF-8; quoted as spreadsheets and pandas do.

What csv refuses is one bad row that names its lines. So a quote that is never closed costs the lines up to the next
quote, or up to csv's limit for a field (128 KB), and reading continues after them. Blank lines are skipped.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.jsonl import BYTE_ORDER_MARK
from idefics_cli.readers.table import SAMPLE_BYTES, SAMPLE_ROWS, Record, chunked, image_columns
from idefics_cli.storage.filenames import IMAGE_SUFFIX, is_utf8, shown
from idefics_cli.storage.files import MAX_PIECE_BYTES, File, open_stream, split_stream

TOO_LONG = "\udcff"  # stands for a line that is too long to be held; no valid line holds it


class DelimitedTable:
    image_column = None
    id_column = None

    def __init__(self, file: File, compressed: bool, delimiter: str) -> None:
        self.size: int | None = None
        self._file = file
        self._compressed = compressed
        self._delimiter = delimiter
        self.columns = self._header()
        sample = list(self._sample())
        if not sample:
            raise InputError(f"{file.name} holds a header but no rows: name a manifest with rows")
        self.images = image_columns(self.columns, [row for row in sample if not isinstance(row, RowError)])

    def type_of(self, column: str) -> Any:
        import pyarrow

        return pyarrow.string()

    def may_hold_images(self, column: str) -> bool:
        return True

    def records(self, start: int, step: int, columns: Sequence[str]) -> Iterator[tuple[int, Record | RowError]]:
        for number, fields in islice(enumerate(self._rows()), start, None, step):
            yield number, self._record(*fields)

    def chunks(self, start: int, step: int, columns: Sequence[str]) -> Iterator[list[Record]]:
        return chunked(self.records(start, step, columns), columns)

    def _record(self, line_number: int, fields: list[str] | RowError) -> Record | RowError:
        if isinstance(fields, RowError):
            return fields
        if len(fields) != len(self.columns):
            return RowError(
                "row_invalid", f"line {line_number} has {len(fields)} fields, but there are {len(self.columns)} columns"
            )
        return dict(zip(self.columns, fields, strict=True))

    def _rows(self) -> Iterator[tuple[int, list[str] | RowError]]:
        """The records after the header."""
        size = -1
        for size, record in enumerate(self._all()):
            if size > 0:
                yield record
        self.size = size

    def _all(self) -> Iterator[tuple[int, list[str] | RowError]]:
        with open_stream(self._file, self._compressed) as stream:
            yield from read_delimited(split_stream(stream, b"\n"), self._delimiter, self._file.name)

    def _sample(self) -> Iterator[Record | RowError]:
        num_bytes = 0
        for line_number, fields in islice(self._rows(), SAMPLE_ROWS):
            yield self._record(line_number, fields)
            num_bytes += sum(map(len, fields)) if isinstance(fields, list) else 0
            if num_bytes > SAMPLE_BYTES:
                return

    def _header(self) -> list[str]:
        _, header = next(self._all(), (0, None))
        if header is None:
            raise InputError(f"{self._file.name} holds only blank lines: name a manifest with rows")
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


def read_delimited(
    lines: Iterator[bytes | None], delimiter: str, name: str = "the file"
) -> Iterator[tuple[int, list[str] | RowError]]:
    """The number of each record's first line, and its fields or why it is bad."""
    num_bytes = 0  # of the record that is being read

    def decoded() -> Iterator[str]:
        nonlocal num_bytes
        for number, line in enumerate(lines):
            line = line if number or line is None else line.removeprefix(BYTE_ORDER_MARK)
            num_bytes += len(line or b"")
            if num_bytes > MAX_PIECE_BYTES:
                raise InputError(
                    f"{name}, line {number + 1}: a record is longer than 64 MB: check the quotes before it"
                )
            yield TOO_LONG if line is None else line.decode(errors="surrogateescape") + "\n"

    reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
    while True:
        first, num_bytes = reader.line_num + 1, 0
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, RowError("row_invalid", f"{_lines(first, reader.line_num)} not valid CSV: {error}")
            continue
        if fields:
            valid = is_utf8("".join(fields))
            yield first, fields if valid else RowError("row_invalid", f"line {first} is not valid UTF-8, or too long")


def _lines(first: int, last: int) -> str:
    return f"line {first} is" if first == last else f"lines {first} to {last} are"
