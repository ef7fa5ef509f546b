"""Parquet: read a few rows at a time, so that neither the file nor its row groups decide the memory.

What does decide it is the largest page. So columns that unpack to far more than their file could hold, by its footer,
are refused before they are read.
"""

from __future__ import annotations

import datetime
import decimal
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.source import ALL, Place, Span
from idefics_cli.readers.table import OWN_ERROR, SAMPLE_ROWS, Chunk, NoRows, Record, Table, image_columns
from idefics_cli.storage.filenames import shown
from idefics_cli.storage.files import BUFFER_BYTES, File, refusing
from idefics_cli.storage.parquet_process import SMALL_BYTES, Pages, require_sound

if TYPE_CHECKING:
    from pyarrow.parquet import ColumnChunkMetaData, ParquetFile

OWN_BUFFER_BYTES = 8 << 10
BATCH_ROWS = 1024
BATCH_BYTES = 4 << 20
WORST_BATCH_BYTES = 64 << 20  # if each value were as long as the dictionary that it is in
BOMB_BYTES = 256 << 20
LOOKED_AT_BYTES = 64 << 20  # of row groups at once, before they are read
BOMB_RATIO = 100
LIST_VALUE_BYTES = 16  # the least that each value of a list takes in memory


class TypedTable(Table):
    """A manifest whose columns have Arrow types. `_batches` gives the rows of a span in pieces that fit into memory,
    with the number of each one's first row."""

    _file: File
    _schema: pa.Schema
    _remedy = "fetch or make it again"

    def _batches(self, span: Span, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        raise NotImplementedError

    def _refusing(self) -> AbstractContextManager[None]:
        """Whatever Arrow finds wrong with the file is the user's to fix."""
        kinds = (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError)
        return refusing(self._file.name, *kinds, remedy=self._remedy)

    @cached_property
    def images(self) -> Sequence[str]:
        """By type where it tells: bytes, or structs of bytes and path. Else by the first values."""
        typed = [name for name in self.columns if _is_bytes(_item_type(self.type_of(name)))]
        if typed:
            return typed
        texts = [name for name in self.columns if self.may_hold_images(name)]
        return image_columns(texts, [record for _, record in islice(self.records(ALL, texts), SAMPLE_ROWS)])

    def type_of(self, column: str) -> pa.DataType:
        return self._schema.field(column).type

    def may_hold_images(self, column: str) -> bool:
        kind = _item_type(self.type_of(column))
        is_text = kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())
        return is_text or _is_bytes(kind) or pa.types.is_fixed_size_binary(kind)

    def records(self, span: Span, columns: Sequence[str]) -> Iterator[tuple[int, Record]]:
        if not columns and self.size is not None:
            yield from ((number, {}) for number in range(self.size)[span.begin.row : span.most])
            return
        for first, batch in self._batches(span, columns or self.columns[:1]):
            numbers = range(first, first + batch.num_rows)
            yield from zip(numbers, python_rows(batch, numbers), strict=True)

    def chunks(self, span: Span, columns: Sequence[str]) -> Iterator[Chunk]:
        if not columns:
            return super().chunks(span, columns)
        return (batch for _, batch in self._batches(span, columns))


def within(span: Span, first: int, batch: pa.RecordBatch) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The rows of a batch that are in the span, if there are any; `first` is the number of its first row."""
    rows = range(first, first + batch.num_rows)
    begin = max(span.begin.row, first)
    end = rows.stop if span.most is None else min(span.most, rows.stop)
    if begin < end:
        yield begin, batch.slice(begin - first, end - begin)


class ParquetTable(TypedTable):
    def __init__(self, file: File) -> None:
        self._file = file
        require_sound(file)
        self._is_small = file.info()["size"] <= SMALL_BYTES  # all of its pages have been looked at
        with self._open() as parquet:
            self._schema = parquet.schema_arrow
            self.size: int = parquet.metadata.num_rows
        self.columns = self._schema.names
        if self.size == 0:
            raise NoRows(f"{file.name} holds no rows: name a manifest with rows")

    def places(self, first: int, step: int) -> Iterator[Place]:
        """At the begin of a row group where one is near: what is in the middle of a group is read from its begin on."""
        with self._open() as parquet:
            groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        bounds = list(accumulate(groups, initial=0))
        while first < self.size:
            near = min(bounds[max(0, bisect(bounds, first) - 1) :][:2], key=lambda bound: abs(bound - first))
            first = near if abs(near - first) <= step // 2 else first
            if first < self.size:
                yield Place(first)
            first += step

    def _batches(self, span: Span, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Raises InputError after a row group of fewer rows than it declares: Arrow skips what it does not find."""
        most = self.size if span.most is None else span.most
        with self._open() as parquet:
            offset = looked_at = 0
            for group in range(parquet.num_row_groups):
                declared = parquet.metadata.row_group(group).num_rows
                if span.begin.row < offset + declared and offset < most:
                    if group >= looked_at:
                        looked_at = self._look_ahead(parquet, group, columns)
                    for number, batch in self._group_batches(parquet, group, offset, columns):
                        yield from within(span, number, batch)
                        if span.most is not None and number + batch.num_rows >= most:
                            return
                        del batch
                offset += declared
            self._require_rows(self.size, offset)

    def _look_ahead(self, parquet: ParquetFile, first: int, columns: Sequence[str]) -> int:
        """Has the pages of row groups from the `first` on looked at, and tells which group is the next one.

        Elsewhere than on this machine they would be fetched twice.
        """
        if not self._file.is_local or self._is_small:
            return parquet.num_row_groups
        num_bytes, rows, group = 0, BATCH_ROWS, first
        while group < parquet.num_row_groups and num_bytes < LOOKED_AT_BYTES:
            rows = min(rows, self._batch_rows(parquet, group, columns))
            num_bytes += parquet.metadata.row_group(group).total_byte_size
            group += 1
        require_sound(self._file, pages=Pages(range(first, group), columns, rows, num_bytes))
        return group

    def _batch_rows(self, parquet: ParquetFile, group: int, columns: Sequence[str]) -> int:
        row_bytes, worst_bytes = self._row_bytes(parquet, group, columns)
        return max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes, WORST_BATCH_BYTES // worst_bytes))

    def _group_batches(
        self, parquet: ParquetFile, group: int, offset: int, columns: Sequence[str]
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        batch_rows = self._batch_rows(parquet, group, columns)
        declared, held = parquet.metadata.row_group(group).num_rows, 0
        batches = parquet.iter_batches(batch_rows, row_groups=[group], columns=list(columns), use_threads=False)
        while True:
            with self._refusing():
                batch = next(batches, None)
            if batch is None:
                break
            yield offset + held, batch.select(list(columns))
            held += batch.num_rows
            del batch
            if batch_rows < BATCH_ROWS:
                pa.default_memory_pool().release_unused()  # which would keep pages of megabytes
        self._require_rows(declared, held)

    def _require_rows(self, declared: int, held: int) -> None:
        if declared != held:
            raise InputError(f"{self._file.name} declares {declared} rows but holds {held}: fetch or make it again")

    @contextmanager
    def _open(self) -> Iterator[ParquetFile]:
        """`pre_buffer` and reading without a buffer would each hold whole row groups. The buffer is Arrow's, which ends
        with the column's bytes."""
        with self._file.open(OWN_BUFFER_BYTES) as file:
            with self._refusing():
                parquet = pq.ParquetFile(
                    file, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True
                )
            yield parquet

    # ---- bombs

    def _row_bytes(self, parquet: ParquetFile, group: int, columns: Sequence[str]) -> tuple[int, int]:
        """How many bytes a row takes on average, and at worst (both at least 1), by the footer.

        Raises InputError where a column unpacks to far more than it is packed to.
        """
        metadata = parquet.metadata.row_group(group)
        mean, worst = 1, 1
        for i in range(metadata.num_columns):
            chunk = metadata.column(i)
            if any(_lies_in(chunk, name) for name in columns):
                is_list = parquet.metadata.schema.column(i).max_repetition_level > 0
                values = LIST_VALUE_BYTES * chunk.num_values if is_list else 0
                unpacked = max(chunk.total_uncompressed_size, values)
                self._refuse_bomb(chunk, unpacked)
                mean += unpacked // max(metadata.num_rows, 1)
                worst += _dictionary_bytes(chunk)
        return mean, worst

    def _refuse_bomb(self, chunk: ColumnChunkMetaData, num_bytes: int) -> None:
        packed = max(chunk.total_compressed_size, 1)
        if num_bytes > BOMB_BYTES and num_bytes > BOMB_RATIO * packed:
            raise InputError(
                f"{self._file.name}: column {shown(chunk.path_in_schema)} unpacks from {packed:,} bytes to"
                f" {num_bytes:,}, too many for memory; write the file again with fewer rows in a row group"
            )


def _lies_in(chunk: ColumnChunkMetaData, column: str) -> bool:
    return chunk.path_in_schema == column or chunk.path_in_schema.startswith(f"{column}.")


def _dictionary_bytes(chunk: ColumnChunkMetaData) -> int:
    """About what the column's dictionary unpacks to: as its place tells, packed like the rest of the column."""
    if not chunk.has_dictionary_page:
        return 0
    packed = max(0, chunk.data_page_offset - chunk.dictionary_page_offset)
    return packed * chunk.total_uncompressed_size // max(chunk.total_compressed_size, 1)


# ---- values


def python_rows(batch: pa.RecordBatch, numbers: range) -> Iterator[Record]:
    """The rows of a batch, which have these numbers in the file."""
    names = batch.schema.names
    try:
        values = [_python_values(array) for array in batch]
    except (ValueError, OverflowError, pa.ArrowException):
        yield from (_record(batch, i, numbers[i]) for i in range(batch.num_rows))
        return
    for row in zip(*values, strict=True):
        yield dict(zip(names, row, strict=True))


def _record(batch: pa.RecordBatch, place: int, number: int) -> Record:
    """One row alone, of a batch that holds what has no Python value: text that is not UTF-8, the year 300,000."""
    record: dict[str, Any] = {}
    for name, array in zip(batch.schema.names, batch, strict=True):
        try:
            (record[name],) = _python_values(array.slice(place, 1))
        except (ValueError, OverflowError, pa.ArrowException) as error:
            message = f"row {number + 1} cannot be read: column {shown(name)}: {error}"
            record[OWN_ERROR] = RowError("row_invalid", message)
    return record


def _python_values(array: pa.Array) -> list[Any]:
    """`to_pylist`, but what counts nanoseconds as text: ISO, moments with a zone in UTC; durations in microseconds."""
    if pa.types.is_timestamp(array.type) and array.type.unit == "ns":
        moments = array.cast(pa.timestamp("ns", "UTC")) if array.type.tz else array
        return [text and text.replace(" ", "T") for text in moments.cast(pa.string()).to_pylist()]
    if array.type == pa.time64("ns"):
        return array.cast(pa.string()).to_pylist()
    if array.type != pa.duration("ns"):
        return array.to_pylist()
    return [None if count is None else _microseconds(count) for count in array.cast(pa.int64()).to_pylist()]


def _microseconds(nanoseconds: int) -> datetime.timedelta | str:
    whole, rest = divmod(nanoseconds, 1000)
    return str(decimal.Decimal(nanoseconds) / 1000) if rest else datetime.timedelta(microseconds=whole)


def _item_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's images, which may come in lists."""
    inner = getattr(kind, "storage_type", None) or getattr(kind, "value_type", None)
    return kind if inner is None else _item_type(inner)


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name in ("bytes", "path") for field in kind)
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())
