"""CSV and TSV: a line of column names, then rows, in UTF-8; quoted as spreadsheets and pandas do.

What csv refuses is one bad row that names its lines. So a quote that is never closed costs the lines up to the next
quote, or up to csv's limit for a field (128 KB), and reading continues after them. Blank lines are skipped.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import BinaryIO

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.jsonl import BYTE_ORDER_MARK
from idefics_cli.readers.table import NoRows, Record, StreamTable
from idefics_cli.storage.filenames import IMAGE_SUFFIX, is_utf8, shown
from idefics_cli.storage.files import MAX_PIECE_BYTES, File, open_stream, split_stream

TOO_LONG = "\udcff"  # stands for a line that is too long to be held; no valid line holds it


def open_delimited(file: File, compressed: bool, delimiter: str) -> StreamTable:
    with open_stream(file, compressed) as stream:
        _, header = next(read_delimited(split_stream(stream, b"\n"), delimiter, file.name), (0, None))
    columns = _checked_header(file.name, header, delimiter)

    def read(stream: BinaryIO, wanted: Sequence[str] | None) -> Iterator[Callable[[], Record | RowError]]:
        records = read_delimited(split_stream(stream, b"\n"), delimiter, file.name)
        return (partial(_record, columns, *record) for record in islice(records, 1, None))

    return StreamTable(file, compressed, read, columns)


def _checked_header(name: str, header: list[str] | RowError | None, delimiter: str) -> list[str]:
    if header is None:
        raise NoRows(f"{name} holds only blank lines: name a manifest with rows")
    if isinstance(header, RowError):
        raise InputError(f"{name} cannot be read: {header.message}; save it as UTF-8 with a header")
    if any(map(IMAGE_SUFFIX.search, header)):
        raise InputError(f"{name} has no header, but {shown(delimiter.join(header))}: add a line of column names")
    return header


def _record(columns: Sequence[str], line_number: int, fields: list[str] | RowError) -> Record | RowError:
    if isinstance(fields, RowError):
        return fields
    if len(fields) != len(columns):
        return RowError("row_invalid", f"line {line_number} has {len(fields)} fields, but {len(columns)} columns")
    return dict(zip(columns, fields, strict=True))


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
