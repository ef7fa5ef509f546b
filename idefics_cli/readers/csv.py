"""CSV and TSV: a line of column names, then rows, quoted as spreadsheets and pandas do.

Read as UTF-8, or as the byte order mark says. Where the usual delimiter leaves the header whole, the beginning of the
file tells another one; so it does whether quotes are letters, as they often are in TSV. What csv refuses is one bad row
that names its line, and reading continues with the line after it: a quote that is never closed costs its own line.
Blank lines are skipped.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

from idefics_cli.columns import MAX_ROW_BYTES
from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.jsonl import BYTE_ORDER_MARK
from idefics_cli.readers.source import Span
from idefics_cli.readers.table import NoRows, Record, StreamTable
from idefics_cli.rows import DelimitedOptions
from idefics_cli.storage.filenames import IMAGE_SUFFIX, is_utf8, shown
from idefics_cli.storage.files import File, open_stream, placed_pieces, refusing, split_stream

SNIFFED_BYTES, SNIFFED_RECORDS = 256 << 10, 100
REREAD_BYTES = 1 << 30  # in all; from then on a bad record costs all of its lines
LINE_BYTES = 32  # what a line costs beside its text
DELIMITERS = ",;\t|"
END = b"\n"  # which no line holds
TOO_LONG = "longer than 64 MB"
UTF8 = "utf-8"
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
SEPARATOR_LINE = re.compile(r'\ufeff?"?sep=([^"\r\n])"?\r?\n', re.IGNORECASE)  # Excel's own

csv.field_size_limit(MAX_ROW_BYTES)


class Dialect(NamedTuple):
    delimiter: str
    quoting: int = csv.QUOTE_MINIMAL
    encoding: str = UTF8
    first_record: int = 0


def open_delimited(file: File, compressed: bool, delimiter: str, options: DelimitedOptions) -> StreamTable:
    with open_stream(file, compressed) as stream:
        dialect = _sniffed(file.name, stream.read(SNIFFED_BYTES), delimiter, options)
    form = _Delimited(file.name, dialect)
    with open_stream(file, compressed) as stream:
        _, header = next(form.records(stream, dialect.first_record), (0, None))
    form = form._replace(columns=_checked_header(file.name, header, dialect.delimiter))
    enter = form.enter if dialect.encoding == UTF8 else None
    return StreamTable(file, compressed, form.read, form.columns, enter=enter)


class _Delimited(NamedTuple):
    name: str
    dialect: Dialect
    columns: Sequence[str] = ()

    def read(
        self, stream: BinaryIO, wanted: Sequence[str] | None, span: Span
    ) -> Iterator[Callable[[], Record | RowError]]:
        skipped = 0 if span.begin.entry else self.dialect.first_record + 1
        records = self.records(stream, skipped, span.begin.line)
        return (partial(_record, self.columns, *record) for record in records)

    def records(self, stream: BinaryIO, skipped: int, line: int = 1) -> Iterator[tuple[int, list[str] | RowError]]:
        lines = split_stream(_as_utf8(stream, self.name, self.dialect.encoding), b"\n")
        return islice(read_delimited(lines, self.dialect, line), skipped, None)

    def enter(self, stream: BinaryIO) -> Iterator[tuple[int, int]]:
        """Lines are read ahead of records, as far as a quote stays open."""
        places: deque[int] = deque()

        def lines() -> Iterator[bytes | None]:
            for place, line in placed_pieces(stream, b"\n"):
                places.append(place)
                yield line

        first = 1  # the number of the line at the first of the places
        for number, _ in islice(read_delimited(lines(), self.dialect), self.dialect.first_record + 1, None):
            for _ in range(number - first):
                places.popleft()
            first = number
            yield places[0], number


# ---- what kind of CSV it is


def _sniffed(name: str, beginning: bytes, usual: str, options: DelimitedOptions) -> Dialect:
    mark = next((encoding for mark, encoding in MARKS.items() if beginning.startswith(mark)), None)
    encoding = options.encoding or mark or UTF8
    is_cut = len(beginning) == SNIFFED_BYTES
    if encoding == UTF8:
        _require_utf8(name, beginning, is_cut)
    with refusing(name, UnicodeError, remedy="name its encoding with --encoding, as utf-16-le without a mark"):
        text = codecs.getincrementaldecoder(encoding)("replace").decode(beginning)
    lines = text.removeprefix("\ufeff").encode(errors="replace").split(b"\n")
    lines = lines[:-1] if is_cut and len(lines) > 1 else lines
    separator = SEPARATOR_LINE.match(text)
    first = 0 if separator is None else 1
    lines = lines[first:]
    named = options.delimiter or (separator and separator[1])
    fitting = Dialect(named or usual)
    if named is None and _fit(lines, fitting)[0] < 2:
        fits = [(_fit(lines, Dialect(each)), Dialect(each)) for each in DELIMITERS if each != usual]
        most_bad = _fit(lines, fitting)[1]  # a header of one column may hold any sign
        splitting = [(bad, other) for (columns, bad), other in fits if columns > 1 and bad <= most_bad]
        fitting = min(splitting, default=(0, fitting))[1]
    unquoted = fitting._replace(quoting=csv.QUOTE_NONE)
    if fitting.delimiter == "\t" and _fit(lines, unquoted)[1] < _fit(lines, fitting)[1]:
        fitting = unquoted
    return fitting._replace(encoding=encoding, first_record=first)


def _fit(lines: Sequence[bytes], dialect: Dialect) -> tuple[int, int]:
    """How many columns the header has, and how many of the first records have another number of fields."""
    records = islice(read_delimited(iter(lines), dialect), SNIFFED_RECORDS)
    sizes = [0 if isinstance(fields, RowError) else len(fields) for _, fields in records]
    return (sizes[0], sum(size != sizes[0] for size in sizes)) if sizes else (0, 0)


def _require_utf8(name: str, beginning: bytes, is_cut: bool) -> None:
    """A file where some lines hold UTF-8 has bad rows at worst; one where none does is of another encoding."""
    lines = beginning.split(b"\n")
    told = [line for line in (lines[:-1] if is_cut else lines) if not line.isascii()]
    if b"\0" in lines[0] or (told and not any(is_utf8(line.decode(errors="surrogateescape")) for line in told)):
        example = "utf-16-le" if b"\0" in lines[0] else "cp1252"
        raise InputError(f"{name} is not valid UTF-8: name its encoding, as in --encoding {example}")


def _as_utf8(stream: BinaryIO, name: str, encoding: str) -> Any:
    """What `read` gives of it in UTF-8; bytes that the encoding lacks stay, and are not valid."""
    if encoding == UTF8:
        return stream
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")

    def read(size: int) -> bytes:
        with refusing(name, UnicodeError, remedy="name its encoding with --encoding"):
            text = ""
            while not text and (data := stream.read(size)):
                text = decoder.decode(data)
            return (text or decoder.decode(b"", final=True)).encode(errors="surrogateescape")

    return SimpleNamespace(read=read)


def _checked_header(name: str, header: list[str] | RowError | None, delimiter: str) -> list[str]:
    if header is None:
        raise NoRows(f"{name} holds only blank lines: name a manifest with rows")
    if isinstance(header, RowError):
        raise InputError(f"{name} cannot be read: {header.message}; save it as UTF-8 with a header")
    if any(map(IMAGE_SUFFIX.search, header)):
        raise InputError(f"{name} has no header, but {shown(delimiter.join(header))}: add a line of column names")
    return header


# ---- records


def _record(columns: Sequence[str], line_number: int, fields: list[str] | RowError) -> Record | RowError:
    if isinstance(fields, RowError):
        return fields
    if len(fields) != len(columns):
        return RowError("row_invalid", f"line {line_number} has {len(fields)} fields, but {len(columns)} columns")
    return dict(zip(columns, fields, strict=True))


def read_delimited(
    lines: Iterator[bytes | None], dialect: Dialect, number: int = 1
) -> Iterator[tuple[int, list[str] | RowError]]:
    """The number of each record's first line, from this `number` on, and its fields or why it is bad."""
    held, end = bytearray(), 0  # the lines from the record's first one on, and how far they have been read
    num_lines = 0  # how many the record has so far; `number` is its first one's
    is_next_too_long, budget = False, REREAD_BYTES

    def texts() -> Iterator[str]:
        nonlocal end, num_lines, is_next_too_long
        while True:
            if end < len(held):
                text = bytes(held[end : held.index(b"\n", end) + 1])
            elif is_next_too_long or (line := next(lines, END)) is None:
                is_next_too_long = num_lines > 0  # then it is a record of its own
                num_lines = num_lines or 1
                raise csv.Error(TOO_LONG)
            elif line is END:
                return
            else:
                text = line + b"\n" if number + num_lines > 1 else line.removeprefix(BYTE_ORDER_MARK) + b"\n"
                held.extend(text)
            num_lines += 1
            end += len(text)
            if end > MAX_ROW_BYTES:
                raise csv.Error(TOO_LONG)
            yield text.decode(errors="surrogateescape")

    def reader() -> Iterator[list[str]]:
        return csv.reader(texts(), delimiter=dialect.delimiter, quoting=dialect.quoting, strict=True)

    reading = reader()
    while True:
        try:
            fields = next(reading)
        except StopIteration:
            return
        except csv.Error as error:
            last = number + num_lines - 1
            if budget > 0:
                budget -= end + LINE_BYTES * num_lines
                end, num_lines, last = held.find(b"\n") + 1, 1, number
            yield number, RowError("row_invalid", f"{_lines(number, last)} not valid CSV: {error}; check the quotes")
            reading = reader()  # the texts of the one before have ended, where they ended within a record
        else:
            if fields:
                valid = is_utf8("".join(fields))
                yield number, fields if valid else RowError("row_invalid", _not_valid(number, dialect.encoding))
        del held[:end]
        number, end, num_lines = number + num_lines, 0, 0


def _not_valid(line_number: int, encoding: str) -> str:
    remedy = ": name the file's encoding, as in --encoding cp1252" if encoding == UTF8 else ""
    return f"line {line_number} is not valid {encoding.upper()}{remedy}"


def _lines(first: int, last: int) -> str:
    return f"line {first} is" if first == last else f"lines {first} to {last} are"
