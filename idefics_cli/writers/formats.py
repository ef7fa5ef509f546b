"""The forms of a finished result file, JSON lines, CSV, Parquet and VQAv2's: written whole, and read back.

A run's own columns come from the texts of its journal, those passed through from a second pass over the inputs. What
run made a file is recorded in `F.jsonl.run` beside it: a line of settings, one with the digest of each row (of what
decided it), and the file's bytes. A Parquet file has the settings in its own metadata, too. This module knows neither
journals nor runs.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import secrets
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeVar

from idefics_cli.columns import Column, arrow_array, arrow_type, encodable, json_text, strict_json, tensor_values
from idefics_cli.errors import InputError, OutputError
from idefics_cli.storage.filenames import escape_name
from idefics_cli.storage.regular_file import open_regular

if TYPE_CHECKING:
    import pyarrow as pa

VQAV2 = "vqav2"
METADATA_KEY = b"idefics_run"
SEAL_KEY, ZEROS, FOOTER_END = b"idefics_crc32", b"00000000", b"\0\0\0\0PAR1"
SEAL = SEAL_KEY + bytes([0x18, len(ZEROS)])  # as the footer holds it, the checksum after it
SETTINGS, NUM_ROWS, FAILED = "settings", "rows", "failed"
DIGEST, DIGEST_LENGTH = "digest", 24
DIGEST_START = b', "%s": "' % DIGEST.encode()  # begins the last member of a row's text, where it has one
CONTENT, CONTENT_BYTES = "content", 100
BLOCK_BYTES, MAX_FOOTER_BYTES = 1 << 20, 64 << 20
CHUNK_ROWS, CHUNK_BYTES = 1_000, 16 << 20
READ_ROWS = 64  # latents are large
ROW_GROUP_ROWS, ROW_GROUP_BYTES = 100_000, 64 << 20

Item = TypeVar("Item")
Texts: TypeAlias = Callable[[], Iterator[bytes]]  # the rows as JSON objects, from the first at each call


@dataclass(frozen=True)
class Passthrough:
    """The columns that come from the inputs as they are. `names` are theirs, and what the result calls them.

    `rows` and `batches` each give them for all rows of the inputs, one of which is `rows_each` of the result.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    rows: Callable[[], Iterator[Mapping[str, Any]]] = lambda: iter(())
    batches: Callable[[], Iterator[pa.RecordBatch]] = lambda: iter(())
    rows_each: int = 1

    def shown(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values under the names that the result has for them."""
        return {shown_as: values.get(name) for name, shown_as in self.names.items()}

    def added_to(self, texts: Iterator[bytes]) -> Iterator[bytes]:
        """The result's rows as JSON, these columns last."""
        if not self.names:
            yield from texts
            return
        added = (json_text(self.shown(values)) for values in self.rows() for _ in range(self.rows_each))
        for text, more in zip_longest(texts, added):
            if text is None or more is None:
                raise _other_rows()
            yield b"%s, %s" % (text[:-1], more[1:])

    def tables(self) -> Iterator[pa.Table]:
        """A few of the result's rows at a time, at least one table."""
        import numpy as np
        import pyarrow as pa

        for batch in self.batches():
            table = pa.Table.from_batches([batch]).select(list(self.names)).rename_columns(list(self.names.values()))
            if self.rows_each == 1:
                yield table
                continue
            for start in range(0, max(1, table.num_rows), max(1, CHUNK_ROWS // self.rows_each)):
                piece = table.slice(start, max(1, CHUNK_ROWS // self.rows_each))
                yield piece.take(np.arange(piece.num_rows).repeat(self.rows_each))


def _other_rows() -> InputError:
    return InputError("the inputs changed while the run was under way: restore them and run the same command again")


class JsonLines:
    """`F.jsonl`, and `F.jsonl.run` beside it, which records the file's bytes too."""

    def write(
        self, path: Path, texts: Texts, columns: Sequence[Column], passthrough: Passthrough, run: Mapping[str, Any]
    ) -> None:
        """A whole file, durably, in place of what is there."""
        with _recorded(path, run) as (file, without_digests):
            self.write_to(file, texts, without_digests(texts()), columns, passthrough, run)

    def write_to(
        self,
        file: Any,
        texts: Texts,
        rows: Iterator[bytes],
        columns: Sequence[Column],
        passthrough: Passthrough,
        run: Mapping[str, Any],
    ) -> None:
        """`rows` are the texts without digests."""
        for piece in self._pieces(rows, columns, passthrough):
            file.write(piece)

    def _pieces(self, texts: Iterator[bytes], columns: Sequence[Column], passthrough: Passthrough) -> Iterator[bytes]:
        """What the file holds, about a row at a time."""
        return (strict_json(text) + b"\n" for text in passthrough.added_to(texts))

    def run_of(self, path: Path) -> dict[str, Any] | None:
        """What run made the file; None where it has been changed since, or is not a result."""
        with suppress(FileNotFoundError, ValueError):
            record, content = _read_record(path)
            if content == content_of(path):
                return record
        return None

    def digests(self, path: Path) -> Iterator[str]:
        """Those of the rows, as far as they are known."""
        with suppress(FileNotFoundError), open(record_name(path), "rb") as beside:
            number = json.loads(beside.readline())[NUM_ROWS]
            yield from (line.strip().decode() for line in islice(beside, number))

    def rows(self, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """These columns of each row."""
        with open(path, "rb") as file:
            for line in file:
                row = json.loads(line)
                yield {name: row[name] for name in columns}


class Csv(JsonLines):
    """`F.csv`: where there is no value, a cell is empty; lists and structs are JSON."""

    VALUES: Mapping[str, Callable[[str], Any]] = {"score": float, "tokens": int, "candidates": json.loads}
    EMPTY_TEXTS = ("caption", "answer", "text")  # may be empty where there is no error

    def _pieces(self, texts: Iterator[bytes], columns: Sequence[Column], passthrough: Passthrough) -> Iterator[bytes]:
        names = [*(column.name for column in columns), *passthrough.names.values()]
        yield _csv_line(names)
        for text in passthrough.added_to(texts):
            row = json.loads(strict_json(text))
            yield _csv_line([row.get(name) for name in names])

    def rows(self, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                yield {name: self._value(name, row) for name in columns}

    def _value(self, name: str, row: Mapping[str, str]) -> Any:
        is_text = name in self.EMPTY_TEXTS and not row.get("error")
        return self.VALUES.get(name, str)(row[name]) if row[name] or is_text else None


class VqaV2(JsonLines):
    """`F.json`, an array of `question_id` and `answer` as VQAv2's evaluation takes it; one that failed is empty."""

    def _pieces(self, texts: Iterator[bytes], columns: Sequence[Column], passthrough: Passthrough) -> Iterator[bytes]:
        yield b"["
        for number, row in enumerate(map(json.loads, texts)):
            row_id = row["id"]
            is_number = row_id.isdecimal() and str(int(row_id)) == row_id
            submitted = {"question_id": int(row_id) if is_number else row_id, "answer": row["answer"] or ""}
            yield b"%s\n%s" % (b"," if number else b"", json_text(submitted))
        yield b"\n]\n"

    def rows(self, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """What the file holds of them; an empty answer counts as failed."""
        for row in json.loads(path.read_bytes()):
            error = None if row["answer"] else "row_invalid: an earlier run has no answer"
            known = {"id": str(row["question_id"]), "answer": row["answer"], "error": error}
            yield {name: known.get(name) for name in columns}


class Counted:
    """A file that is written from its start; `check` is the CRC-32 of what has been written."""

    def __init__(self, file: Any) -> None:
        self._file, self.check = file, 0

    def write(self, data: Any) -> int:
        self.check = zlib.crc32(data, self.check)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class SealedFile(Counted):
    """A Parquet file that is written: its footer holds the CRC-32 of all of it, with zeros in that place."""

    _place = -1

    def write(self, data: Any) -> int:
        found = bytes(data).rfind(SEAL + ZEROS)
        if found >= 0:
            self._place = self.tell() + found + len(SEAL)
        return super().write(data)

    def seal(self) -> None:
        assert self._place >= 0, "the footer has a place for the checksum"
        self._file.seek(self._place)
        self._file.write(b"%08x" % self.check)


def is_sealed(path: Path) -> bool:
    """Whether a Parquet file is, byte for byte, as `SealedFile` has written it."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(FOOTER_END)))
        length = min(size, int.from_bytes(file.read(4), "little") + len(FOOTER_END), MAX_FOOTER_BYTES)
        file.seek(size - length)
        found = file.read().rfind(SEAL)
        if found < 0:
            return False
        file.seek(0)
        check = _check_of(file, size - length + found + len(SEAL))
        seal = file.read(len(ZEROS))
        return seal == b"%08x" % _check_of(file, size, zlib.crc32(ZEROS, check))


class Parquet(JsonLines):
    """`F.parquet`: typed columns, zstd, row groups of up to 64 MB."""

    def write_to(
        self,
        file: Any,
        texts: Texts,
        rows: Iterator[bytes],
        columns: Sequence[Column],
        passthrough: Passthrough,
        run: Mapping[str, Any],
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        own = pa.schema([(column.name, arrow_type(column, _example(column, texts))) for column in columns])
        tables = passthrough.tables()
        first = next(tables) if passthrough.names else None
        schema = pa.schema(
            [*own, *(() if first is None else first.schema)], {METADATA_KEY: json_text(run), SEAL_KEY: ZEROS}
        )
        writing = {"compression": "zstd", "write_page_checksum": True}
        sealed = SealedFile(file)
        with pq.ParquetWriter(sealed, schema, **writing) as writer:
            joined = _joined(_own_tables(rows, columns, own), first, tables, schema)
            for group in gathered(joined, ROW_GROUP_ROWS, ROW_GROUP_BYTES, len, lambda table: table.nbytes):
                table = pa.concat_tables(group)
                writer.write_table(table, row_group_size=max(1, table.num_rows))
        sealed.seal()

    def run_of(self, path: Path, is_whole: bool = False) -> dict[str, Any] | None:
        """`is_whole`: the file is taken for unchanged, without reading all of it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not (is_whole or is_sealed(path)):
            return None
        with open(path, "rb") as file, suppress(pa.ArrowException, OSError, ValueError):
            found = pq.read_metadata(file)
            record = json.loads((found.metadata or {}).get(METADATA_KEY, b"null"))
            with suppress(FileNotFoundError):  # not every copy has it beside
                if _read_record(path)[1][0] != file.seek(0, os.SEEK_END):
                    return None
            if is_record(record) and found.num_rows == record[NUM_ROWS]:
                return record
        return None

    def rows(self, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=READ_ROWS, columns=list(columns), use_threads=False):
                values = [
                    tensor_values(each) if isinstance(each.type, pa.FixedShapeTensorType) else each.to_pylist()
                    for each in batch.select(list(columns)).columns
                ]
                yield from (dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True))


FORMATS = {".jsonl": JsonLines, ".ndjson": JsonLines, ".parquet": Parquet, ".csv": Csv}


def format_of(path: Path, name: str | None = None) -> JsonLines:
    """The format of this `name`, else the one that the path's suffix says."""
    found = {".json": VqaV2} if name == VQAV2 else FORMATS
    if path.suffix.lower() not in found:
        usual = "name a result file that ends in .jsonl, .parquet or .csv, or - for stdout"
        of_vqav2 = "--format vqav2 writes one JSON array: name a file that ends in .json"
        raise OutputError(f"{escape_name(str(path))}: {of_vqav2 if name == VQAV2 else usual}")
    return found[path.suffix.lower()]()


def _csv_line(values: Sequence[Any]) -> bytes:
    line = io.StringIO()
    csv.writer(line).writerow(json_text(each).decode() if isinstance(each, list | dict) else each for each in values)
    return encodable(line.getvalue()).encode()


# ---- files and their records


def record_name(path: Path) -> Path:
    return path.with_name(path.name + ".run")


@contextmanager
def replacing(path: Path, mark: str = "") -> Iterator[BinaryIO]:
    """A new file, which gets the name `path` when it is on the disk; what cannot be finished is removed.

    Its name is one that none can foresee, so that no link or pipe of others is there. The `mark` is in it: what a kill
    has left is found by that.
    """
    temporary = path.with_name(f".idefics-{mark or mark_of(path)}-{secrets.token_hex(8)}.tmp")
    file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with open(file, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(file)
        os.rename(temporary, path)
    finally:
        with suppress(OSError):  # then the next run removes it
            temporary.unlink(missing_ok=True)


@contextmanager
def _recorded(path: Path, run: Mapping[str, Any]) -> Iterator[tuple[Counted, Callable[..., Iterator[bytes]]]]:
    """A new file with its record; and what takes the digests from the texts of its rows, and records these."""
    with replacing(path) as file, replacing(record_name(path)) as beside:
        counted = Counted(file)
        beside.write(json_text(run) + b"\n")

        def without_digests(texts: Iterator[bytes]) -> Iterator[bytes]:
            for text in texts:
                own, start, digest = text.rpartition(DIGEST_START)
                beside.write(digest[-DIGEST_LENGTH - 2 : -2] + b"\n")
                yield own + b"}" if start else text

        yield counted, without_digests
        beside.write(json_text({CONTENT: [file.seek(0, os.SEEK_END), counted.check]}) + b"\n")


def _read_record(path: Path) -> tuple[dict[str, Any], list[int]]:
    """The run that made the file, and what is known of the file's bytes. Raises ValueError where it is no record."""
    with _open_record(record_name(path)) as beside:
        record = json.loads(beside.readline())
        beside.seek(max(0, beside.seek(0, os.SEEK_END) - CONTENT_BYTES))
        last = json.loads((beside.read().splitlines() or [b""])[-1])
    if not is_record(record) or not isinstance(last, dict) or not isinstance(last.get(CONTENT), list):
        raise ValueError(f"{record_name(path)} is not a record")
    return record, last[CONTENT]


def mark_of(path: Path) -> str:
    """Of whatever is written for this output."""
    name = os.path.join(os.path.realpath(path.parent), path.name)
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def remove_leftovers(folder: Path, *marks: str) -> None:
    """What killed runs have left of new files with these marks. No other run may be writing them."""
    starts = tuple(f".idefics-{mark}-" for mark in marks)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(starts) and entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)


def content_of(path: Path) -> list[int]:
    """Length and CRC-32 of a file, which show whether it is the one that was written."""
    with open(path, "rb", buffering=0) as file:
        check = _check_of(file, sys.maxsize)
        return [file.tell(), check]


def _check_of(file: BinaryIO, num_bytes: int, check: int = 0) -> int:
    """The CRC-32 of so many bytes, or as many as there are, after those that it is known of."""
    while num_bytes and (block := file.read(min(num_bytes, BLOCK_BYTES))):
        check, num_bytes = zlib.crc32(block, check), num_bytes - len(block)
    return check


def _open_record(path: Path) -> BinaryIO:
    """Pipes are not waited for."""
    return io.BufferedReader(open_regular(str(path)))


def is_of_others(path: Path) -> bool:
    """Whether there is a file that is not a record."""
    with suppress(ValueError, RecursionError, FileNotFoundError), _open_record(path) as file:
        return not is_record(json.loads(file.readline()))
    return os.path.lexists(path)


def is_record(record: Any) -> bool:
    """Whether this, which may be any JSON, has the form of what is recorded of a run."""
    if not isinstance(record, dict) or not isinstance(record.get(SETTINGS), dict):
        return False
    failed = record.get(FAILED)
    counts = [record.get(NUM_ROWS), *(failed.values() if isinstance(failed, dict) else [None])]
    return all(type(count) is int and count >= 0 for count in counts)


# ---- rows and tables


def row_chunks(texts: Iterator[bytes]) -> Iterator[list[dict[str, Any]]]:
    """As many rows at a time as take little memory."""
    return (list(map(json.loads, chunk)) for chunk in gathered(texts, CHUNK_ROWS, CHUNK_BYTES, lambda text: 1, len))


def gathered(
    items: Iterable[Item], most_rows: int, most_bytes: int, rows: Callable[[Item], int], size: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """Items together until they have so many rows or bytes."""
    group: list[Item] = []
    num_rows = num_bytes = 0
    for item in items:
        group.append(item)
        num_rows, num_bytes = num_rows + rows(item), num_bytes + size(item)
        if num_rows >= most_rows or num_bytes >= most_bytes:
            yield group
            group, num_rows, num_bytes = [], 0, 0
    if group:
        yield group


def _example(column: Column, texts: Texts) -> Any:
    """The first value of a column of latents."""
    values = (json.loads(text)[column.name] for text in texts()) if column.kind == "latents" else iter(())
    return next((value for value in values if value is not None), None)


def _own_tables(texts: Iterator[bytes], columns: Sequence[Column], schema: pa.Schema) -> Iterator[pa.Table]:
    import pyarrow as pa

    for rows in row_chunks(texts):
        values = ([row.get(column.name) for row in rows] for column in columns)
        yield pa.Table.from_arrays(list(map(arrow_array, columns, values, schema.types)), schema=schema)


def _joined(
    own: Iterator[pa.Table], held: pa.Table | None, more: Iterator[pa.Table], schema: pa.Schema
) -> Iterator[pa.Table]:
    """The own tables, with the columns of `held` and `more` (whose tables have other lengths), if there are any."""
    import pyarrow as pa

    if held is None:
        yield from own
        return
    for table in own:
        while held.num_rows < table.num_rows:
            if (further := next(more, None)) is None:
                raise _other_rows()
            held = pa.concat_tables([held, further])
        columns = [*table.columns, *held.slice(0, table.num_rows).columns]
        yield pa.Table.from_arrays(columns, schema=schema)
        held = held.slice(table.num_rows)
    if held.num_rows or any(further.num_rows for further in more):
        raise _other_rows()
