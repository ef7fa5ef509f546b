"""Inputs -> rows: files, folders, manifests and paths on stdin, in order, each with an id that no other row has.

`open_inputs` checks everything that was named before it gives a row, so that a user's mistake is an `InputError` while
nothing has been loaded yet; damage further on is raised after the rows before it. A bad row is a row with an `error`.
No image is opened here, nothing is fetched from the web, and nothing is known of models or outputs.
"""

from __future__ import annotations

import json
import posixpath
import sys
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

from idefics_cli.columns import json_text
from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.folder import FileListing, list_file, list_folder, refuse_equal_ids
from idefics_cli.readers.image_paths import Say, said_once
from idefics_cli.readers.jsonl import open_json_lines
from idefics_cli.readers.manifest import Manifest, is_manifest, manifest_kind, open_manifest, require_image
from idefics_cli.readers.parts import folder_parts, parts_of_one_kind, saved_dataset
from idefics_cli.readers.stdin_paths import PathList
from idefics_cli.readers.stdin_rows import json_lines_on
from idefics_cli.readers.table import Chunk, NoRows, Record
from idefics_cli.rows import NO_VALUES, ImageSource, InputRow, ReadOptions
from idefics_cli.storage.filenames import is_hidden, listed, shown
from idefics_cli.storage.files import File, find_all, place
from idefics_cli.storage.unique_ids import UniqueIds

if TYPE_CHECKING:
    import pyarrow as pa

PARTS_AT_ONCE = 8  # opened before the first row is read: each is a few requests on a remote file system

# What one INPUT, or one part of it, holds. `size` is None while it is not known: at the end of `rows` it is. `prefix`
# makes a row's number unique among inputs, `rows_before` counts the rows of the input's parts before it. `identity` is
# equal while the input is unchanged. `rows` gives every `step`-th row from number `start` on, with its number as index,
# and "" as id where it has none.
Source: TypeAlias = FileListing | PathList | Manifest


def open_inputs(
    inputs: Sequence[str],
    options: ReadOptions,
    stdin: BinaryIO | None = None,
    say: Say = str,
) -> Inputs:
    """Check all `inputs` and give their rows.

    Each is the path or address of an image file, a manifest, or a folder or pattern of either, or `-` for paths on
    `stdin`. `say` is told which files are read where that is open, and once that paths are read in another spelling.
    Raises InputError for what is missing, unreadable, empty or of no known kind, and for two rows with one id where
    only files and folders are named; otherwise the second of the two is a bad row.
    """
    if list(inputs).count("-") > 1:
        raise InputError("`-` is named twice, but stdin can be read only once: name it once")
    return Inputs([_open(name, len(inputs) > 1, options, stdin, say) for name in inputs], options)


def _open(name: str, among_others: bool, options: ReadOptions, stdin: BinaryIO | None, say: Say) -> Sequence[Source]:
    """What one INPUT holds, in order."""
    if name == "-":
        lines, paths = (None, None) if stdin is None else json_lines_on(stdin, options.stdin, options.null)
        if lines is None:
            return [PathList(paths, options, say)]
        return [Manifest(lines, open_json_lines(lines, False), "-:" if among_others else "", options, say)]
    shown_name, files = place(name).name, find_all(name)
    prefix = f"{shown_name}:" if among_others else ""
    manifests = [file for file in files if is_manifest(file.name) and not file.is_folder]
    if manifests and len(manifests) < len(files):
        raise InputError(f"{shown_name} matches {manifests[0].name} and files of other kinds: name those of one kind")
    if len(manifests) > 1:
        return _open_parts(shown_name, parts_of_one_kind(shown_name, manifests, say), prefix, options, say)
    if manifests:
        return [open_manifest(manifests[0], prefix, options, say)]
    sources: list[Source] = []
    for file in files:
        if file.is_folder:
            sources += _open_folder(file, prefix, options, say)
        else:
            require_image(file)
            sources.append(list_file(file))
    return sources


def _open_folder(folder: File, prefix: str, options: ReadOptions, say: Say) -> Sequence[Source]:
    names = sorted(posixpath.basename(info["name"]) for info in folder.entries())
    if parts := saved_dataset(folder, names):
        return _open_parts(folder.name, parts, prefix, options, say)
    images = list_folder(folder, options)
    if images is None:
        if parts := folder_parts(folder, options.recursive, say):
            return _open_parts(folder.name, parts, prefix, options, say)
        hint = "" if options.recursive else " (--no-recursive leaves its sub-folders out)"
        raise InputError(f"no images in {folder.name}{hint}, and no manifests: name a folder of images")
    beside = [name for name in names if is_manifest(name) and not is_hidden(name) and manifest_kind(name) != "json"]
    beside = [name for name in beside if f"{name}.run" not in names]  # results of a run
    if beside:
        say(f"{folder.name}: its images are read, and not {listed(beside[:3])}, which can be named as an INPUT.")
    return [images]


def _open_parts(name: str, files: Sequence[File], prefix: str, options: ReadOptions, say: Say) -> Sequence[Source]:
    """Those without rows, as Spark writes them, are passed over."""
    once = said_once(say)

    def open_part(file: File) -> Manifest | NoRows:
        try:
            return open_manifest(file.found(), prefix, options, once, is_first=file is files[0])
        except NoRows as error:
            return error

    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        parts = list(pool.map(open_part, files))
    found = [part for part in parts if isinstance(part, Manifest)]
    if not found:
        raise NoRows(f"{name} holds no rows: all of its {len(files)} files are empty")
    return found


class Inputs:
    """The rows of one run, and what is known of them in advance.

    `rows` gives them once; `total` is how many will come, where that is known; `is_streaming`: some may be long in
    coming. `identity` says what the inputs are: equal as long as they are unchanged. `passthrough` are the columns that
    are passed through, in order, with their Arrow types (None where a manifest declares none). `are_manifests` tells
    the inputs with columns from the others.
    """

    def __init__(self, inputs: Sequence[Sequence[Source]], options: ReadOptions) -> None:
        sources = [source for one in inputs for source in one]
        self._sources = sources
        self._files = [source for source in sources if isinstance(source, Manifest) and not source.is_streaming]
        self._firsts = [
            number for number, one in zip(accumulate(map(len, inputs), initial=0), inputs, strict=False) for _ in one
        ]
        self.are_manifests = [isinstance(one[0], Manifest) for one in inputs]
        self._shard = options.shard or (1, 1)
        self._limit = sys.maxsize if options.limit is None else options.limit
        self._kept = self._limit
        self.is_streaming = any(source.is_streaming for source in sources)
        self.total = self._count()
        self.identity = [dict(source.identity) for source in sources]
        self.passthrough = _merged([source.passthrough for source in sources])
        self._begin()

    def _begin(self) -> None:
        self._starts = [0]  # the index of the first row of each source that has been reached
        self._ids = self._ids_to_remember()
        self._remaining = self._limit
        self.rows = self._walk()

    def restarted(self) -> Iterator[InputRow]:
        """`rows` from the first on, again where some have been read."""
        if self._remaining < self._limit or len(self._starts) > 1:
            for source in self._sources:
                if isinstance(source, PathList):
                    source.restart()
            self._begin()
        return self.rows

    def keep_to(self, number: int) -> None:
        """Of the pass-through columns so many rows are wanted, whatever has come after them since."""
        self._kept = number

    def is_manifest(self, index: int) -> bool:
        """Whether the row of this index, which has been read, stands in a manifest."""
        return isinstance(self._sources[bisect(self._starts, index) - 1], Manifest)

    def resolve(self, value: object, index: int = 0) -> ImageSource | RowError:
        """An image value that stands in the row of this `index` -> what opens it."""
        return self._sources[bisect(self._starts, index) - 1].resolve(value)

    def _walk(self) -> Iterator[InputRow]:
        """The rows of the shard up to the limit."""
        for source, first in zip(self._sources, self._firsts, strict=True) if self._remaining else ():
            offset = self._starts[-1]
            source.rows_before = offset - self._starts[first]
            for row in source.rows(self._first(offset), self._shard[1]):
                self._remaining -= 1
                yield self._placed(row, source, offset)
                if not self._remaining:
                    return
            assert source.size is not None, "a source knows its size at its end"
            self._starts.append(offset + source.size)

    def _first(self, offset: int) -> int:
        """The first number that is in the shard, in the source whose rows begin at `offset`."""
        place, step = self._shard
        return (place - 1 - offset) % step

    def _count(self) -> int | None:
        sizes = [source.size for source in self._sources]
        if None in sizes:
            return None
        place, step = self._shard
        total = len(range(place - 1, sum(sizes), step))
        return min(total, self._limit)

    # ---- pass-through columns, in a second pass

    def passthrough_rows(self) -> Iterator[Record]:
        """The pass-through columns of each row of `rows`, from the first on, as values that `json_text` takes.

        Raises InputError, as `passthrough_batches` does, where an input has changed since it was opened.
        """
        for chunk in self._chunks():
            for record in _records(chunk):
                yield {name: record.get(name) for name in self.passthrough}

    def passthrough_batches(self) -> Iterator[pa.RecordBatch]:
        """The same as Arrow: declared columns as their file holds them, others with a type inferred over all rows.

        All batches have one schema, and there is at least one.
        """
        import pyarrow as pa

        from idefics_cli.readers.undeclared_types import inferred_types

        undeclared = [name for name, of in self.passthrough.items() if of is None]
        inferred = inferred_types(lambda: map(_json_records, self._chunks()), undeclared)
        schema = pa.schema([(name, of or inferred[name]) for name, of in self.passthrough.items()])
        yield pa.RecordBatch.from_arrays([pa.nulls(0, field.type) for field in schema], schema=schema)
        for chunk in self._chunks():
            yield pa.RecordBatch.from_arrays([_column(chunk, field) for field in schema], schema=schema)

    def _chunks(self) -> Iterator[Chunk]:
        self._require_unchanged()
        remaining, offset = min(self._limit, self._kept), 0
        for source in self._sources:
            for chunk in self._source_chunks(source, self._first(offset), remaining):
                yield chunk[:remaining]
                remaining = max(0, remaining - len(chunk))
                if not remaining:
                    return
            offset += source.size or 0
        self._require_unchanged()

    def _source_chunks(self, source: Source, start: int, most: int) -> Iterator[Chunk]:
        """A source other than a manifest has no columns; one of unknown size was left at the limit, `most` rows on."""
        if isinstance(source, Manifest):
            yield from source.chunks(start, self._shard[1])
        else:
            yield [NO_VALUES] * (most if source.size is None else len(range(start, source.size, self._shard[1])))

    def _require_unchanged(self) -> None:
        """Rows that have been added do no harm."""
        for manifest in self._files:
            if not manifest.still_holds():
                raise InputError(
                    f"{manifest.identity['name']} changed while the run was under way: restore it and run the same"
                    " command again, or add --update"
                )

    def changed_names(self) -> list[str]:
        """Of the manifests that are not, under their names, what has been read."""
        return [manifest.identity["name"] for manifest in self._files if manifest.has_changed]

    # ---- ids

    def _ids_to_remember(self) -> UniqueIds | None:
        """None where no two rows can have one id. Of files and folders all ids are compared here and now."""
        if all(isinstance(source, FileListing) for source in self._sources):
            if len(self._sources) > 1:
                refuse_equal_ids(self._sources)
            return None
        is_numbered = all(isinstance(source, Manifest) and source.is_numbered for source in self._sources)
        return None if is_numbered and not self._firsts[-1] else UniqueIds()

    def _placed(self, row: InputRow, source: Source, offset: int) -> InputRow:
        """The row with its index and id among all rows."""
        index = offset + row.index
        row_id = row.id or f"{source.prefix}#{source.rows_before + row.index}"
        if self._ids is not None:
            while not row.id and row_id in self._ids:
                row_id = f"#{row_id}"
            first = self._ids.add(row_id, index)
            if first is not None:
                error = RowError("duplicate_id", f"row {index + 1} has the id of row {first + 1}, {shown(row_id)}")
                row = replace(row, sources=(), error=error)
        return row if (index, row_id) == (row.index, row.id) else replace(row, index=index, id=row_id)


def _merged(columns: Sequence[Mapping[str, pa.DataType | None]]) -> dict[str, pa.DataType | None]:
    """The columns of all inputs; None where their types differ."""
    merged: dict[str, pa.DataType | None] = {}
    for name, of in (item for one in columns for item in one.items()):
        merged[name] = of if merged.get(name, of) == of else None
    return merged


def _records(chunk: Chunk) -> Iterable[Record]:
    if isinstance(chunk, list):
        return chunk
    from idefics_cli.readers.parquet import python_rows

    return python_rows(chunk, range(chunk.num_rows))


def _json_records(chunk: Chunk) -> list[Record]:
    """As values that come from JSON."""
    if isinstance(chunk, list):
        return chunk
    rows = ({name: record.get(name) for name in chunk.schema.names} for record in _records(chunk))
    return [json.loads(json_text(row)) for row in rows]


def _column(chunk: Chunk, field: pa.Field) -> pa.Array:
    import pyarrow as pa

    from idefics_cli.readers.undeclared_types import inferred_array

    is_arrow = isinstance(chunk, pa.RecordBatch)
    if is_arrow and field.name in chunk.schema.names and chunk.schema.field(field.name).type == field.type:
        return chunk.column(field.name)
    values = [record.get(field.name) for record in _json_records(chunk)]
    return inferred_array(values, field.type) if values.count(None) < len(values) else pa.nulls(len(values), field.type)
