"""JSON lines: one object per line, in UTF-8. Any other line is a bad row; blank lines are skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.table import SAMPLE_BYTES, SAMPLE_ROWS, Record, chunked, columns_of, image_columns
from idefics_cli.storage.filenames import is_utf8
from idefics_cli.storage.files import File, open_stream, split_stream

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DECODER = json.JSONDecoder(parse_constant=lambda name: None)


class JsonLinesTable:
    """Its columns are those of the first rows."""

    image_column = None
    id_column = None

    def __init__(self, file: File, compressed: bool) -> None:
        self.size: int | None = None
        self._file = file
        self._compressed = compressed
        sample = self._sample()
        self.columns = columns_of(sample)
        self.images = image_columns(self.columns, sample)

    def type_of(self, column: str) -> None:
        return None

    def may_hold_images(self, column: str) -> bool:
        return True

    def records(self, start: int, step: int, columns: Sequence[str]) -> Iterator[tuple[int, Record | RowError]]:
        for number, (line_number, line) in islice(enumerate(self._lines()), start, None, step):
            yield number, parse_object(line, f"line {line_number}")

    def chunks(self, start: int, step: int, columns: Sequence[str]) -> Iterator[list[Record]]:
        return chunked(self.records(start, step, columns), columns)

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        """The lines that are not blank, with their numbers; None for one that is too long to be held."""
        size = 0
        with open_stream(self._file, self._compressed) as stream:
            for line_number, line in enumerate(split_stream(stream, b"\n"), 1):
                if line_number == 1 and line is not None:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if line is None or (not line.isspace() and line):
                    size += 1
                    yield line_number, line
        self.size = size

    def _sample(self) -> list[Record]:
        objects: list[Record] = []
        failure, num_bytes = None, 0
        for line_number, line in islice(self._lines(), SAMPLE_ROWS):
            record = parse_object(line, f"line {line_number}")
            if isinstance(record, RowError):
                failure = failure or record
            else:
                objects.append(record)
            num_bytes += len(line or b"")
            if num_bytes > SAMPLE_BYTES and objects:
                break
        if not objects:
            reason = failure.message if failure else "there are only blank lines"
            raise InputError(f"{self._file.name} is not JSON lines: {reason}; write one object per line")
        return objects


def parse_object(text: bytes | None, place: str) -> Record | RowError:
    """A JSON object; `place` says in messages where it stands. NaN and infinities, which JSON lacks, are null."""
    if text is None:
        return RowError("row_invalid", f"{place} is longer than 64 MB")
    try:
        value = DECODER.decode(text.decode())
    except RecursionError:
        return RowError("row_invalid", f"{place} is nested too deeply")
    except UnicodeDecodeError as error:
        return RowError("row_invalid", f"{place} is not valid UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return RowError("row_invalid", f"{place} is not valid JSON at character {error.pos + 1}: {error.msg}")
    except ValueError as error:  # a number of more digits than Python reads
        return RowError("row_invalid", f"{place} cannot be read: {error}")
    if not isinstance(value, dict):
        return RowError("row_invalid", f"{place} is a {type(value).__name__}, not an object")
    if b"\\u" in text and not is_utf8(json.dumps(value, ensure_ascii=False)):
        return RowError("row_invalid", f"{place} holds half of a surrogate pair, which UTF-8 cannot hold")
    return value
