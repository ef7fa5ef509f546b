"""The two forms of a finished result file, JSON lines and Parquet: written whole from a journal's rows, and read back.

What run made a result is kept beside its rows: in a Parquet file's own metadata, and for `F.jsonl` in `F.jsonl.run`.
Nothing here renames or locks anything; this module knows neither journals nor runs.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from idefics_cli.columns import (
    Column,
    arrow_type,
    from_json,
    inferred_array,
    inferred_types,
    json_text,
    python_values,
    result_type,
    strict_json,
    tensor_type,
)
from idefics_cli.errors import OutputError
from idefics_cli.storage.filenames import escape_name

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

JSONL_SUFFIXES, PARQUET_SUFFIXES = (".jsonl", ".ndjson"), (".parquet",)
METADATA_KEY = b"idefics_run"
SETTINGS, NUM_ROWS, FAILED = "settings", "rows", "failed"
RECORD_KEYS = {SETTINGS, NUM_ROWS, FAILED}
OF_BYTES = "of_bytes"
BLOCK_BYTES = 1 << 20
CHUNK_ROWS, CHUNK_BYTES = 1_000, 16 << 20
ROW_GROUP_BYTES = 64 << 20
ROW_GROUP_ROWS = 100_000


@dataclass(frozen=True)
class Rows:
    """Rows as JSON objects; `texts()` starts anew at each call."""

    texts: Any  # Callable[[], Iterator[bytes]]

    def chunks(self) -> Iterator[list[dict[str, Any]]]:
        """As many rows at a time as take little memory."""
        chunk: list[dict[str, Any]] = []
        num_bytes = 0
        for text in self.texts():
            chunk.append(json.loads(text))
            num_bytes += len(text)
            if len(chunk) == CHUNK_ROWS or num_bytes >= CHUNK_BYTES:
                yield chunk
                chunk, num_bytes = [], 0
        if chunk:
            yield chunk


class Format(Protocol):
    """`write` makes a whole file, and `before_rename` puts beside its final name what belongs there. `run_of` tells
    what run made the file that is there, None where it was changed since; `texts` reads it back. `in_the_way` are files
    beside it that somebody else has made, where no run is under way, and that would be written over."""

    def write(self, target: Path, rows: Rows, columns: Sequence[Column], run: Mapping[str, Any]) -> None: ...

    def before_rename(self, target: Path, path: Path, run: Mapping[str, Any]) -> None: ...

    def run_of(self, path: Path) -> dict[str, Any] | None: ...

    def texts(self, path: Path) -> Iterator[bytes]: ...

    def in_the_way(self, path: Path) -> Iterator[Path]: ...


def format_of(path: Path) -> Format:
    suffix = path.suffix.lower()
    if suffix in JSONL_SUFFIXES:
        return JsonLines()
    if suffix in PARQUET_SUFFIXES:
        return Parquet()
    raise OutputError(
        f"{escape_name(str(path))}: results are JSON lines or Parquet: name a file that ends in .jsonl or .parquet, or"
        " - for stdout"
    )


class JsonLines:
    """`F.jsonl`, and `F.jsonl.run` beside it, which also tells the bytes that it speaks of."""

    def write(self, target: Path, rows: Rows, columns: Sequence[Column], run: Mapping[str, Any]) -> None:
        with _synced(target) as file:
            for text in rows.texts():
                file.write(strict_json(text) + b"\n")

    def before_rename(self, target: Path, path: Path, run: Mapping[str, Any]) -> None:
        record = record_name(path)
        with temporary_file(record) as temporary:
            with _synced(temporary) as file:
                file.write(json_text({**run, OF_BYTES: _content(target)}) + b"\n")
            temporary.rename(record)

    def run_of(self, path: Path) -> dict[str, Any] | None:
        with suppress(FileNotFoundError, ValueError):  # no record, or none that can be read: nothing is known
            record = json.loads(record_name(path).read_bytes())
            if _is_record(record) and record.get(OF_BYTES) == _content(path):
                return record
        return None

    def texts(self, path: Path) -> Iterator[bytes]:
        with open(path, "rb") as file:
            for line in file:
                yield line.rstrip(b"\n")

    def in_the_way(self, path: Path) -> Iterator[Path]:
        record = record_name(path)
        yield from existing(temporary_name(path), temporary_name(record))
        for there in existing(record):
            with suppress(ValueError, RecursionError):
                if _is_record(json.loads(there.read_bytes())):
                    continue
            yield there


def record_name(path: Path) -> Path:
    return path.with_name(path.name + ".run")


def _content(path: Path) -> list[int]:
    """Length and CRC-32 of a file, which tell whether it is the one that was written."""
    check = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            check = zlib.crc32(block, check)
        return [file.tell(), check]


class Parquet:
    """`F.parquet`: typed columns, zstd, row groups of up to 64 MB."""

    def write(self, target: Path, rows: Rows, columns: Sequence[Column], run: Mapping[str, Any]) -> None:
        import pyarrow.parquet as pq

        schema = arrow_schema(columns, rows).with_metadata({METADATA_KEY: json_text(run)})
        writing = {"compression": "zstd", "write_page_checksum": True}
        with _synced(target) as file, pq.ParquetWriter(file, schema, **writing) as writer:
            for table in _row_groups((_batch(chunk, columns, schema) for chunk in rows.chunks()), schema):
                writer.write_table(table, row_group_size=max(1, table.num_rows))

    def before_rename(self, target: Path, path: Path, run: Mapping[str, Any]) -> None:
        """The record is inside the file."""

    def run_of(self, path: Path) -> dict[str, Any] | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with open(path, "rb") as file, suppress(pa.ArrowException, OSError, ValueError):
            found = pq.read_metadata(file)
            record = json.loads((found.metadata or {}).get(METADATA_KEY, b"null"))
            if _is_record(record) and found.num_rows == record[NUM_ROWS]:
                return record
        return None  # nothing is known of a file that is no result

    def texts(self, path: Path) -> Iterator[bytes]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_rows_at_once(file.metadata), use_threads=False):
                values = [python_values(column) for column in batch.columns]
                for row in zip(*values, strict=True):
                    yield json_text(dict(zip(batch.schema.names, row, strict=True)))

    def in_the_way(self, path: Path) -> Iterator[Path]:
        return existing(temporary_name(path))


def _rows_at_once(metadata: pq.FileMetaData) -> int:
    """As many as take `CHUNK_BYTES` in the mean."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    row_bytes = sum(group.total_byte_size for group in groups) // max(1, metadata.num_rows)
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES // max(1, row_bytes)))


def existing(*paths: Path) -> Iterator[Path]:
    return (path for path in paths if os.path.lexists(path))


def temporary_name(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A name beside `path` for what is to be renamed to it; what still has it at the end is gone, and holds no room."""
    temporary = temporary_name(path)
    try:
        yield temporary
    finally:
        with suppress(OSError):  # then the next run writes over it
            temporary.unlink(missing_ok=True)


@contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    """A file to be written, which is on the disk when the context ends."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _is_record(record: object) -> bool:
    return isinstance(record, dict) and record.keys() >= RECORD_KEYS


def arrow_schema(columns: Sequence[Column], rows: Rows) -> pa.Schema:
    """Undeclared columns get the type that all their values have."""
    import pyarrow as pa

    undeclared = [column.name for column in columns if column.type is None]
    found = inferred_types(rows.chunks, undeclared) if undeclared else {}
    found |= {column.name: _latents_type(column, rows) for column in columns if column.type == "latents"}
    return pa.schema([(column.name, _type_of(column, found)) for column in columns])


def _latents_type(column: Column, rows: Rows) -> pa.DataType:
    return tensor_type(row.get(column.name) for chunk in rows.chunks() for row in chunk)


def _type_of(column: Column, found: Mapping[str, pa.DataType]) -> pa.DataType:
    if column.name in found:
        return found[column.name]
    return arrow_type(column.type) if isinstance(column.type, str) else result_type(column.type)


def _batch(rows: list[dict[str, Any]], columns: Sequence[Column], schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    arrays = []
    for column, field in zip(columns, schema, strict=True):
        values = [row.get(column.name) for row in rows]
        if column.type is None:
            arrays.append(inferred_array(values, field.type))
        else:
            arrays.append(pa.array([from_json(value, field.type) for value in values], field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _row_groups(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """Batches gathered to row groups of sensible size; one without rows where there are none."""
    import pyarrow as pa

    gathered: list[pa.RecordBatch] = []
    num_rows = num_bytes = 0
    for batch in batches:
        gathered.append(batch)
        num_rows, num_bytes = num_rows + batch.num_rows, num_bytes + batch.nbytes
        if num_rows >= ROW_GROUP_ROWS or num_bytes >= ROW_GROUP_BYTES:
            yield pa.Table.from_batches(gathered, schema)
            gathered, num_rows, num_bytes = [], 0, 0
    if gathered:
        yield pa.Table.from_batches(gathered, schema)
