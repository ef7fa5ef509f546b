"""Parquet: read a few rows at a time, so that neither the file nor its row groups decide the memory.

What does decide it is the largest page, which Arrow holds packed, unpacked and, where it is a dictionary, once more. So
pages are looked at before they are read, and those that unpack to far more than the file could hold are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.oldvalues import ends_at_nanoseconds, python_values
from idefics_cli.readers.table import OWN_ERROR, SAMPLE_ROWS, Record, image_columns
from idefics_cli.storage.filenames import shown
from idefics_cli.storage.files import InputFile, cannot_read

if TYPE_CHECKING:
    from pyarrow.parquet import ColumnChunkMetaData, ParquetFile

BATCH_ROWS = 1024
BATCH_BYTES = 4 << 20
WORST_BATCH_BYTES = 64 << 20  # where each value is as long as the dictionary that it stands in
LARGE_ROW_BYTES = 4096
BOMB_BYTES = 256 << 20
BOMB_RATIO = 100
LIST_VALUE_BYTES = 16  # what each value of a list takes once it is unpacked, at least
PAGE_HEADER_BYTES = 64
PAGE_HEADER_FIELD = 0x15  # "the next field, a number of 32 bits" in Thrift's compact protocol

Batches: TypeAlias = Iterator[tuple[int, pa.RecordBatch]]


class ParquetTable:
    image_column = None
    id_column = None

    def __init__(self, file: InputFile) -> None:
        self._file = file
        with self._open() as parquet:
            self._schema = parquet.schema_arrow
            self.size: int = parquet.metadata.num_rows
        self.columns: Sequence[str] = self._schema.names
        repeated = [name for name in self.columns if self.columns.count(name) > 1]
        if repeated:
            raise InputError(f"{file.name} has two columns named {shown(repeated[0])}: rename one of them")
        if self.size == 0:
            raise InputError(f"{file.name} holds no rows: name a manifest that holds some")

    @cached_property
    def images(self) -> Sequence[str]:
        """By type where one tells: bytes, or structs of bytes and path. Else by the first values."""
        typed = [name for name in self.columns if _is_bytes(_item_type(self.type_of(name)))]
        if typed:
            return typed
        texts = [name for name in self.columns if self.may_hold_images(name)]
        return image_columns(texts, [record for _, record in islice(self.records(0, 1, texts), SAMPLE_ROWS)])

    def type_of(self, column: str) -> pa.DataType:
        return self._schema.field(column).type

    def may_hold_images(self, column: str) -> bool:
        kind = _item_type(self.type_of(column))
        return _is_bytes(kind) or _is_text(kind) or pa.types.is_fixed_size_binary(kind) or pa.types.is_null(kind)

    def records(self, start: int, step: int, columns: Sequence[str]) -> Iterator[tuple[int, Record]]:
        if not columns:
            yield from ((number, {}) for number in range(start, self.size, step))
            return
        with self._open() as parquet:
            for offset, batch in self._batches(parquet, start, columns):
                first = start - offset if start > offset else (start - offset) % step
                places = range(first, batch.num_rows, step)
                for place, record in zip(places, _records(batch, places, columns, offset), strict=True):
                    yield offset + place, record

    def _open(self) -> ParquetFile:
        """A context. `pre_buffer` and reading without a buffer would each hold whole row groups."""
        with self._refusing():
            return pq.ParquetFile(
                self._file.open_native(),
                pre_buffer=False,
                buffer_size=self._file.buffer_bytes,
                page_checksum_verification=True,
            )

    def _batches(self, parquet: ParquetFile, start: int, columns: Sequence[str]) -> Batches:
        """Pieces that fit into memory, each with the number of its first row, from the row group of row `start` on.

        Raises InputError behind a row group of fewer rows than it declares: Arrow passes over what it does not find.
        """
        offset = 0
        for group in range(parquet.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            if offset + num_rows > start:
                yield from self._group_batches(parquet, group, offset, columns)
            offset += num_rows
        self._require_rows(self.size, offset)

    def _group_batches(self, parquet: ParquetFile, group: int, offset: int, columns: Sequence[str]) -> Batches:
        row_bytes, worst_bytes = self._look_at_pages(parquet, group, columns)
        batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes, WORST_BATCH_BYTES // worst_bytes))
        declared, held = parquet.metadata.row_group(group).num_rows, 0
        with self._refusing():
            batches = parquet.iter_batches(batch_rows, row_groups=[group], columns=list(columns), use_threads=False)
        while (batch := self._next(batches)) is not None:
            yield offset + held, batch
            held += batch.num_rows
            del batch
            if row_bytes > LARGE_ROW_BYTES:
                pa.default_memory_pool().release_unused()  # what is kept for later would be pages of megabytes
        self._require_rows(declared, held)

    def _require_rows(self, declared: int, held: int) -> None:
        if declared != held:
            raise InputError(
                f"{self._file.name} declares {declared} rows where it holds {held}: fetch or make it again"
            )

    def _next(self, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
        with self._refusing():
            return next(batches, None)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Whatever Arrow finds wrong with the file is the user's to mend."""
        try:
            yield
        except (pa.ArrowException, OSError, MemoryError) as error:
            raise cannot_read(self._file.name, error, "fetch or make it again") from error

    # Bombs

    def _look_at_pages(self, parquet: ParquetFile, group: int, columns: Sequence[str]) -> tuple[int, int]:
        """How many bytes a row takes in the mean, and at worst (both at least 1), by what is said of the row group.

        Raises InputError where a page unpacks to far more than it is packed to.
        """
        metadata = parquet.metadata.row_group(group)
        chunks = [metadata.column(i) for i in range(metadata.num_columns)]
        mean, worst = 1, 1
        with closing(self._file.open_native()) as file:
            for i, chunk in enumerate(chunks):
                if not any(_lies_in(chunk, name) for name in columns):
                    continue
                pages = self._pages(file, chunk)
                is_list = parquet.metadata.schema.column(i).max_repetition_level > 0
                values = LIST_VALUE_BYTES * chunk.num_values if is_list else 0
                self._refuse_bomb(chunk, max(chunk.total_uncompressed_size, values, *pages))
                mean += max(chunk.total_uncompressed_size, values) // max(metadata.num_rows, 1)
                worst += pages.dictionary
        return mean, worst

    def _pages(self, file: Any, chunk: ColumnChunkMetaData) -> _PageSizes:
        with self._refusing():
            dictionary = _page_size(file, chunk.dictionary_page_offset) if chunk.has_dictionary_page else 0
            return _PageSizes(dictionary or 0, _page_size(file, chunk.data_page_offset))

    def _refuse_bomb(self, chunk: ColumnChunkMetaData, num_bytes: int) -> None:
        packed = max(chunk.total_compressed_size, 1)
        if num_bytes > BOMB_BYTES and num_bytes > BOMB_RATIO * packed:
            raise InputError(
                f"{self._file.name}: column {shown(chunk.path_in_schema)} unpacks from {packed:,} bytes to"
                f" {num_bytes:,}, which no column of images does; write it anew, in row groups of fewer rows"
            )


class _PageSizes(NamedTuple):
    """Unpacked bytes of a column's dictionary and of its first page; 0 where there is none."""

    dictionary: int
    first: int


def _page_size(file: Any, offset: int | None) -> int:
    """What the page at `offset` unpacks to, by its header (type, unpacked and packed size, …); 0 where it has none."""
    if offset is None or offset < 0:
        return 0
    file.seek(offset)
    header = iter(file.read(PAGE_HEADER_BYTES))
    numbers = [_read_number(header) for _ in range(2)]
    return numbers[1] if None not in numbers else 0


def _read_number(header: Iterator[int]) -> int | None:
    """Thrift's compact protocol: seven bits a byte, least first, the sign in the lowest."""
    if next(header, None) != PAGE_HEADER_FIELD:
        return None
    value, shift = 0, 0
    for byte in header:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1)
    return None


def _lies_in(chunk: ColumnChunkMetaData, column: str) -> bool:
    return chunk.path_in_schema == column or chunk.path_in_schema.startswith(f"{column}.")


# Values


def _records(batch: pa.RecordBatch, places: range, columns: Sequence[str], offset: int) -> Iterator[Record]:
    """The rows of a batch at these places."""
    arrays = [batch.column(batch.schema.get_field_index(name)) for name in columns]
    if places != range(batch.num_rows):
        arrays = [array.take(pa.array(places, pa.int64())) for array in arrays]
    try:
        values = [python_values(array) if ends_at_nanoseconds(array.type) else array.to_pylist() for array in arrays]
    except (ValueError, OverflowError, pa.ArrowException):
        yield from (_record(arrays, i, columns, offset + place) for i, place in enumerate(places))
        return
    for row in zip(*values, strict=True):
        yield dict(zip(columns, row, strict=True))


def _record(arrays: Sequence[pa.Array], place: int, columns: Sequence[str], number: int) -> Record:
    """One row alone, of a batch that holds what has no Python value: text that is not UTF-8, the year 300,000."""
    record: dict[str, Any] = {}
    for name, array in zip(columns, arrays, strict=True):
        try:
            record[name] = _value(array, place)
        except (ValueError, OverflowError, pa.ArrowException) as error:
            message = f"row {number + 1} cannot be read: column {shown(name)}: {error}"
            record[OWN_ERROR] = RowError("row_invalid", message)
    return record


def _value(array: pa.Array, place: int) -> Any:
    """The value there; what counts nanoseconds as `python_values` has it, a moment as ISO text."""
    if not (pa.types.is_timestamp(array.type) or ends_at_nanoseconds(array.type)):
        return array[place].as_py()
    (value,) = python_values(array.slice(place, 1))
    return value.replace(" ", "T", 1) if isinstance(value, str) else value  # durations' numbers have no blank


def _item_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's images, which may come in lists."""
    if isinstance(kind, pa.BaseExtensionType):
        return _item_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return kind.value_type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return _item_type(kind.value_type) if is_list or pa.types.is_list_view(kind) else kind


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name in ("bytes", "path") for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
