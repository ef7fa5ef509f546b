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
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from idefics_cli.columns import json_text
from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.folder import FileListing, list_file, list_folder, refuse_equal_ids
from idefics_cli.readers.image_paths import Say, said_once
from idefics_cli.readers.jsonl import open_json_lines
from idefics_cli.readers.manifest import Manifest, is_manifest, manifest_kind, open_manifest, require_image
from idefics_cli.readers.parts import folder_parts, parts_of_one_kind, saved_dataset
from idefics_cli.readers.source import Place, Source, Span
from idefics_cli.readers.stdin_paths import PathList
from idefics_cli.readers.stdin_rows import json_lines_on
from idefics_cli.readers.table import Chunk, NoRows, Record
from idefics_cli.rows import ImageSource, InputRow, ReadOptions
from idefics_cli.storage.filenames import is_hidden, listed, shown
from idefics_cli.storage.files import File, find_all, place
from idefics_cli.storage.unique_ids import UniqueIds

if TYPE_CHECKING:
    import pyarrow as pa

PARTS_AT_ONCE = 8  # opened before the first row is read: each is a few requests on a remote file system


class Cut(NamedTuple):
    """Where the rows of all inputs may be cut: the `index` of the row that comes then, the number of its source, how
    many rows of the same input lie in sources before that, and its place there."""

    index: int = 0
    source: int = 0
    before: int = 0
    place: Place = Place()


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
    opened = Inputs([_open(name, len(inputs) > 1, options, stdin, say) for name in inputs], options)
    return opened if options.shard is None else opened.part(*opened.shard(*options.shard))


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
    are passed through, in order, with their Arrow types (None where a manifest declares none), `chosen` all that are
    read, by their role. `are_manifests` tells the inputs with columns from the others.
    """

    def __init__(self, inputs: Sequence[Sequence[Source]], options: ReadOptions) -> None:
        self._sources = [source for one in inputs for source in one]
        self._firsts = [
            number for number, one in zip(accumulate(map(len, inputs), initial=0), inputs, strict=False) for _ in one
        ]
        self.are_manifests = [isinstance(one[0], Manifest) for one in inputs]
        self._limit = sys.maxsize if options.limit is None else options.limit
        self._kept = self._limit
        self.is_streaming = any(source.is_streaming for source in self._sources)
        self.identity = [dict(source.identity) for source in self._sources]
        self.chosen = {role: names for source in self._sources for role, names in source.chosen.items() if names}
        self.passthrough = _merged([source.passthrough for source in self._sources])
        self._begin, self._end, self._num_rows = Cut(), None, None
        self._is_watched = True
        self.may_repeat_ids = self._compare_ids()
        self._restart()

    def _restart(self) -> None:
        self._starts = [
            self._begin.index - self._begin.place.row
        ]  # the index of each source's first row, as far as known
        self._ids = UniqueIds() if self.may_repeat_ids else None
        self._has_begun = False
        self.rows = self._walk()

    def restarted(self) -> Iterator[InputRow]:
        """`rows` from the first on, again where some have been read."""
        if self._has_begun:
            for source in self._sources:
                source.restart()
            self._restart()
        return self.rows

    def keep_to(self, number: int) -> None:
        """Of the pass-through columns so many rows are wanted, whatever has come after them since."""
        self._kept = number

    def is_manifest(self, index: int) -> bool:
        """Whether the row of this index, which has been read, stands in a manifest."""
        return isinstance(self._source_of(index), Manifest)

    def resolve(self, value: object, index: int = 0) -> ImageSource | RowError:
        """An image value that stands in the row of this `index` -> what opens it."""
        return self._source_of(index).resolve(value)

    def _source_of(self, index: int) -> Source:
        return self._sources[bisect(self._starts, index) - 1]

    def _walk(self) -> Iterator[InputRow]:
        """The rows up to the limit."""
        self._has_begun, remaining = True, self._limit
        for number, source, span in self._spans():
            for row in source.rows(span):
                yield self._placed(row, number)
                remaining -= 1
                if not remaining:
                    return

    def _spans(self) -> Iterator[tuple[int, Source, Span]]:
        """Each source with its number and what is read of it. When the next one is asked for, its size is known."""
        for number, source in enumerate(self._sources):
            if number == len(self._starts):
                assert self._sources[number - 1].size is not None, "a source knows its size at its end"
                self._starts.append(self._starts[-1] + self._sources[number - 1].size)
            yield number, source, self._span_of(number)

    def _span_of(self, number: int) -> Span:
        is_last = number == len(self._sources) - 1
        return Span(Place() if number else self._begin.place, self._end.place if self._end and is_last else None)

    @property
    def total(self) -> int | None:
        if self._num_rows is not None:
            return min(self._limit, self._num_rows)
        sizes = [source.size for source in self._sources]
        return None if None in sizes else min(self._limit, sum(sizes))

    # ---- ranges

    def part(self, begin: Cut, end: Cut) -> Inputs:
        """The rows between two cuts; nothing else is read for them."""
        part = Inputs.__new__(Inputs)
        vars(part).update(vars(self))
        beyond = end.source > begin.source and end.place.row == 0  # it begins a source of which nothing is wanted
        last = end.source - beyond
        part._sources = self._sources[begin.source : last + 1]
        part._firsts = [max(0, first - begin.source) for first in self._firsts[begin.source : last + 1]]
        part._begin, part._end, part._num_rows = begin, None if beyond else end, end.index - begin.index
        part._restart()
        return part

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which reads these rows and nothing else."""
        assert self._num_rows is not None, "a part"
        sources = [source.narrowed(self._span_of(number)) for number, source in enumerate(self._sources)]
        state = {name: value for name, value in vars(self).items() if name not in ("rows", "identity", "_ids")}
        return state | {"_sources": sources, "_is_watched": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._restart()

    def cuts(self, rows_each: int) -> Iterator[Cut]:
        """Where the rows begin, where they may be cut into ranges of about so many rows, and where they end."""
        yield (last := Cut())
        for number, source, _ in self._spans():
            start = self._starts[number]
            before = start - self._input_start(number)
            for found in source.places(max(0, rows_each - (start - last.index)), rows_each):
                cut = Cut(start + found.row, number, before, found)
                if cut.index >= self._limit:
                    yield cut._replace(index=self._limit, place=found._replace(row=self._limit - start))
                    return
                if cut.index > last.index:
                    yield (last := cut)
            if start + source.size >= self._limit:
                break
        end = min(self._limit, start + source.size)
        yield Cut(end, number, before, Place(end - start))

    def shard(self, place: int, number: int) -> tuple[Cut, Cut]:
        """The bounds of the `place`-th of so many ranges of nearly equal length."""
        if self.is_streaming:
            raise InputError("--shard needs to know how many rows there are: save stdin as a file, and name that")
        for _, source, _ in self._spans():
            if source.size is None:
                deque(source.places(sys.maxsize, 1), maxlen=0)
        size = sum(source.size for source in self._sources)
        return self._cut_at(size * (place - 1) // number), self._cut_at(size * place // number)

    def _cut_at(self, index: int) -> Cut:
        numbers = [number for number, _, _ in self._spans()]
        number = max(0, bisect(self._starts, index, hi=len(numbers)) - 1)
        start = self._starts[number]
        found = next(self._sources[number].places(index - start, 1), Place(index - start))
        return Cut(index, number, start - self._input_start(number), found)

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
        remaining = min(self._limit, self._kept)
        for _, source, span in self._spans():
            for chunk in source.chunks(span, remaining):
                yield chunk[:remaining]
                remaining = max(0, remaining - len(chunk))
                if not remaining:
                    return
        self._require_unchanged()

    @property
    def _files(self) -> list[Manifest]:
        return [source for source in self._sources if isinstance(source, Manifest) and not source.is_streaming]

    def _require_unchanged(self) -> None:
        """Rows that have been added do no harm."""
        for manifest in self._files if self._is_watched else ():
            if not manifest.still_holds():
                raise InputError(
                    f"{manifest.identity['name']} changed while the run was under way: restore it and run the same"
                    " command again, or add --update"
                )

    def changed_names(self) -> list[str]:
        """Of the manifests that are not, under their names, what has been read."""
        return [manifest.identity["name"] for manifest in self._files if not manifest.is_unchanged()]

    # ---- ids

    def _compare_ids(self) -> bool:
        """Whether two rows can have one id. Of files and folders all ids are compared here and now."""
        if all(isinstance(source, FileListing) for source in self._sources):
            if len(self._sources) > 1:
                refuse_equal_ids(self._sources)
            return False
        return self._firsts[-1] > 0 or not all(source.is_numbered for source in self._sources)

    def _placed(self, row: InputRow, number: int) -> InputRow:
        """The row with its index and id among all rows."""
        source, index = self._sources[number], self._starts[number] + row.index
        row_id, is_made = row.id, not (row.id or source.is_numbered)
        if not row_id:
            row_id = f"{source.prefix}{'#' * is_made}{index - self._input_start(number)}"
        if self._ids is not None:
            while is_made and row_id in self._ids:
                row_id = f"#{row_id}"
            first = self._ids.add(row_id, index)
            if first is not None:
                error = RowError("duplicate_id", f"row {index + 1} has the id of row {first + 1}, {shown(row_id)}")
                row = replace(row, sources=(), error=error)
        return row if (index, row_id) == (row.index, row.id) else replace(row, index=index, id=row_id)

    def _input_start(self, number: int) -> int:
        """The index of the first row of the input that this source is of."""
        first = self._firsts[number]
        return self._starts[first] - (0 if first else self._begin.before)


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
    try:
        return inferred_array(values, field.type)
    except NotImplementedError:  # of what Python has no values
        if values.count(None) < len(values):
            raise
        return pa.nulls(len(values), field.type)
