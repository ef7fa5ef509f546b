"""Arrow: IPC files (Feather), and streams as the datasets library writes them, a record batch at a time.

What decides the memory is the largest batch, so one that claims or unpacks to more than 512 MB is refused. Batches are
validated before they are looked at, since offsets that lie would be followed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, TypeAlias

import pyarrow as pa

from idefics_cli.errors import InputError
from idefics_cli.readers.parquet import BATCH_BYTES, BATCH_ROWS, WORST_BATCH_BYTES, TypedTable, within
from idefics_cli.readers.source import ALL, Place, Span
from idefics_cli.readers.table import NoRows
from idefics_cli.storage.files import File

MAGIC = b"ARROW1"
CONTINUES = b"\xff" * 4  # before the length of a message
MAX_BATCH_BYTES = 512 << 20
REPEATING = ("dictionary<", "_view", "run_end_encoded<")  # types whose rows may share one long value
DICTIONARY, RECORD_BATCH = 2, 3  # kinds of messages

Reader: TypeAlias = pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader


class ArrowTable(TypedTable):
    _remedy = "fetch or make it again, as Arrow IPC or Feather 2"

    def __init__(self, file: File) -> None:
        self._file = file
        with self._open() as reader:
            self._schema = reader.schema
        with self._refusing():
            str(self._schema.remove_metadata())  # in which all names are decoded
            self.columns = self._schema.names
        if not self.columns or next(self._batches(ALL, ()), None) is None:
            raise NoRows(f"{file.name} holds no rows: name a manifest with rows")

    def places(self, first: int, step: int) -> Iterator[Place]:
        """A file can be entered at each batch; a stream is read from its beginning."""
        with self._open() as reader:
            can_enter = isinstance(reader, pa.ipc.RecordBatchFileReader)
            number = 0
            for place, batch in enumerate(_batches_of(reader, 0)):
                entry = (place, number) if can_enter and place else (0, 1)
                start = max(first, number + (first - number) % step)
                yield from (Place(row, *entry) for row in range(start, number + batch.num_rows, step))
                number += batch.num_rows
        self.size = number

    def _batches(self, span: Span, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        begin, claimed = span.begin, 8 * max(self._file.info()["size"], 1024)
        number = begin.line if begin.entry else 0
        with self._open() as reader:
            batches = _batches_of(reader, begin.entry)
            while (batch := self._next(batches, columns)) is not None:
                if number + batch.num_rows > claimed:
                    raise InputError(f"{self._file.name} claims more rows than it has bits: fetch or make it again")
                rows_each = _rows_each(batch)
                for offset in range(0, batch.num_rows, rows_each):
                    yield from within(span, number + offset, batch.slice(offset, rows_each))
                number += batch.num_rows
                if span.most is not None and number >= span.most:
                    return
        self.size = number

    def _next(self, batches: Iterator[pa.RecordBatch], columns: Sequence[str]) -> pa.RecordBatch | None:
        with self._refusing():
            batch = next(batches, None)
            if batch is not None:
                batch = batch.select(list(columns))
                batch.validate(full=True)
            return batch

    @contextmanager
    def _open(self) -> Iterator[Reader]:
        with self._file.open() as file:
            is_file = file.read(len(MAGIC)) == MAGIC
            file.seek(0)
            with self._refusing():
                source = pa.PythonFile(_Bounded(file, self._file.name), mode="r")
                options = pa.ipc.IpcReadOptions(use_threads=False)
                reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source, options=options)
            yield reader


def _batches_of(reader: Reader, first: int) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        return map(reader.get_batch, range(first, reader.num_record_batches))
    return iter(reader)


def _rows_each(batch: pa.RecordBatch) -> int:
    """How many rows are made into Python's values at once."""
    if any(word in str(field.type) for field in batch.schema for word in REPEATING):
        return max(1, min(BATCH_ROWS, WORST_BATCH_BYTES // max(batch.get_total_buffer_size(), 1)))
    return max(1, min(BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(batch.nbytes, 1)))


class _Bounded:
    """A stream of messages for Arrow, in which no length that a message claims is believed before it is checked."""

    closed = False

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self.seek, self.tell = file.seek, file.tell
        self._length = self._message = b""

    def read(self, size: int) -> bytes:
        """In a stream come a message's length, the message, and its body; in a file all of them together."""
        self._require(size)
        data = self._file.read(size)
        if size == 4:
            self._length, self._message = data, b""
        elif self._message:
            self._require(_unpacked_bytes(self._message, data))
        elif self._length == size.to_bytes(4, "little"):
            self._message = data
        elif data.startswith(CONTINUES):
            end = 8 + int.from_bytes(data[4:8], "little")
            self._require(_unpacked_bytes(data[8:end], data[end:]))
        return data

    def _require(self, size: int) -> None:
        if size > MAX_BATCH_BYTES:
            raise InputError(
                f"{self._name} holds a record batch of {size:,} bytes, too many for memory: write it in smaller batches"
                " or as Parquet"
            )


def _unpacked_bytes(message: bytes, body: bytes) -> int:
    """What the buffers of a batch or dictionary unpack to, by the lengths that they begin with; 0 where none is packed.

    The message is a flatbuffer: tables begin with the distance to a list of where their fields are.
    """

    def read(form: str, place: int) -> int:
        return struct.unpack_from(form, message, place)[0]

    def field(table: int, number: int) -> int | None:
        places = table - read("<i", table)
        place = read("<H", places + 4 + 2 * number) if 4 + 2 * number < read("<H", places) else 0
        return table + place if place else None

    def target(place: int | None) -> int:
        return 0 if place is None else place + read("<I", place)

    try:
        root = target(0)
        kind, batch = field(root, 1), target(field(root, 2))
        kind = 0 if kind is None else message[kind]
        if kind == DICTIONARY:
            batch = target(field(batch, 1))
        if kind not in (DICTIONARY, RECORD_BATCH) or field(batch, 3) is None:
            return 0
        buffers = target(field(batch, 2))
        pairs = struct.iter_unpack("<qq", message[buffers + 4 : buffers + 4 + 16 * read("<I", buffers)])
        return sum(max(0, struct.unpack_from("<q", body, offset)[0]) for offset, size in pairs if size > 0)
    except (struct.error, IndexError):  # Arrow says what is wrong with it
        return 0
