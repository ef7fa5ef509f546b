"""Inputs -> rows: files, folders, manifests and paths on stdin, in order, each with an id that no other row has.

`open_inputs` looks at everything that was named before it gives back a row, so that a user's mistake is an `InputError`
while nothing has been loaded yet; what shows itself only further on is raised behind the rows before it. A bad row is a
row with an `error`. No image is opened here beyond the first bytes that tell an image without a telling name,
nothing is fetched from the web, and nothing is known of models or outputs.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, BinaryIO, TypeVar

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.folder import list_file, list_folder, list_remote_file, list_remote_folder
from idefics_cli.readers.manifest import is_manifest, open_manifest
from idefics_cli.readers.stdin_paths import PathList
from idefics_cli.rows import ImageSource, InputRow, ReadOptions, RemoteFile, Source
from idefics_cli.storage.filenames import escape_name, shown, unescape_name
from idefics_cli.storage.files import LocalFile, RemoteInput, cannot_read, is_remote, open_remote, refuse_irregular
from idefics_cli.storage.unique_ids import SeenIds

__all__ = [
    "ImageSource",
    "InputRow",
    "Inputs",
    "ReadOptions",
    "RemoteFile",
    "escape_name",
    "open_inputs",
    "unescape_name",
]

Item = TypeVar("Item", bound=tuple)  # its first field is the row's number within its input


def open_inputs(inputs: Sequence[str], options: ReadOptions, stdin: BinaryIO | None = None) -> Inputs:
    """Look at all `inputs` and give their rows.

    Each is the path or address of an image file, a folder or a manifest, or `-` for paths on `stdin`. Raises InputError
    for what is missing, unreadable, empty or of no known kind, and for two rows with one id: at once where only files
    and folders are named; otherwise from the iterator, when the second of the two comes.
    """
    if list(inputs).count("-") > 1:
        raise InputError("`-` is named twice, but stdin can be read once: name it once")
    found = Inputs([_open(name, len(inputs) > 1, options, stdin) for name in inputs], options)
    found.again = lambda: open_inputs(inputs, options, stdin)
    found.passthrough = found.kept
    return found


def _open(name: str, among_others: bool, options: ReadOptions, stdin: BinaryIO | None) -> Source:
    if name == "-":
        return PathList(stdin, options.null, options.image_root)
    if is_remote(name):
        return _open_remote(name, among_others, options)
    try:
        status = os.stat(name)
    except (OSError, ValueError) as error:
        raise cannot_read(escape_name(name), error, "check the path") from error
    if stat.S_ISDIR(status.st_mode):
        return list_folder(name, options.recursive)
    refuse_irregular(escape_name(name), status.st_mode)
    if is_manifest(name):
        return open_manifest(LocalFile(name, status.st_size), among_others, options)
    return list_file(name)


def _open_remote(address: str, among_others: bool, options: ReadOptions) -> Source:
    from pyarrow.fs import FileType

    place = open_remote(address)
    try:
        info = place.filesystem.get_file_info(place.key)
    except OSError as error:
        raise cannot_read(place.name, error, "check the address and your access to it") from error
    if info.type == FileType.Directory:
        return list_remote_folder(place, options.recursive)
    if info.type == FileType.NotFound:
        raise InputError(f"{place.name}: nothing is there; check the address")
    if is_manifest(place.name):
        return open_manifest(RemoteInput(place, info.size), among_others, options)
    return list_remote_file(place)


class Inputs:
    """The rows of one run, which come once, and what is known of them beforehand.

    `rows` gives them; `total` is how many will come, where that is known; `is_streaming`: some may be long in coming.
    `identity` says what the inputs are: equal as long as they are unchanged. `kept` are the columns that are passed
    through, in order, with their Arrow types (None where rows may differ).
    """

    def __init__(self, sources: Sequence[Source], options: ReadOptions) -> None:
        self._sources = sources
        self._shard = options.shard or (1, 1)
        self._limit = options.limit
        self._current = 0  # the source that is read
        self._next = 0  # the number of its row that has not been looked at
        self._starts = [0]  # the index of the first row of each source that has been reached
        self._passed = 0
        self._seen = self._ids_to_remember()
        self.is_streaming = any(source.is_streaming for source in sources)
        self.total = self._count()
        self.identity = [dict(source.identity) for source in sources]
        self.kept = _merged([source.kept for source in sources])
        self.rows: Iterator[InputRow] = self._rows()

    def pass_over(self, ids: Iterable[str]) -> None:
        """Pass over one row for each of `ids`, which an earlier run has given out, without its images.

        Raises InputError where the rows now are others, or fewer. To be called before `rows` is asked for its first.
        """
        found = islice(self._walk(lambda source, start, step: source.names(start, step)), self._limit)
        for old in ids:
            index, source, (number, name) = next(found, (None, None, (None, None)))
            if index is None:
                raise InputError(
                    f"the input ends behind {self._passed} rows, but the unfinished output goes on with {shown(old)}:"
                    " bring the old input back, or start anew with --overwrite"
                )
            new = self._give_id(source, number, name, index)
            if new != old:
                raise InputError(
                    f"row {index + 1} of the input is now {shown(new)}, but {shown(old)} in the unfinished output:"
                    " bring the old input back, or start anew with --overwrite"
                )
            self._passed += 1

    def skip(self, count):
        for index, source, (number, name) in islice(
            self._walk(lambda source, start, step: source.names(start, step)), count
        ):
            self._passed += 1
            yield InputRow(index, self._give_id(source, number, name, index), None, (), {})

    def passthrough_rows(self):
        for row in self.again().rows:
            yield {name: row.values.get(name) for name in self.passthrough}

    def passthrough_batches(self):
        import pyarrow as pa

        rows = list(self.passthrough_rows())
        yield from pa.Table.from_pylist(rows).to_batches()

    def peek(self) -> InputRow | None:
        """The row that `rows` gives next, None behind the last. Waits for it, where rows are long in coming."""
        row = next(self.rows, None)
        if row is not None:
            self.rows = chain([row], self.rows)
        return row

    def resolve(self, value: object, index: int = 0) -> ImageSource | RowError:
        """An image value that stands in the row of this `index` -> what opens it."""
        reached = [start for start in self._starts if start <= index]
        return self._sources[len(reached) - 1].resolve(value)

    def _rows(self) -> Iterator[InputRow]:
        remaining = None if self._limit is None else self._limit - self._passed
        entries = self._walk(lambda source, start, step: source.entries(start, step))
        for index, source, (number, name, image, images, values, error) in islice(entries, remaining):
            yield InputRow(index, self._give_id(source, number, name, index), image, images, values, error)

    def _walk(self, read: Callable[[Source, int, int], Iterator[Item]]) -> Iterator[tuple[int, Source, Item]]:
        """What `read` gives for the rows of the shard, from where the walk before has stopped."""
        place, step = self._shard
        while self._current < len(self._sources):
            source, offset = self._sources[self._current], self._starts[-1]
            start = self._next + (place - 1 - offset - self._next) % step
            for item in read(source, start, step):
                self._next = item[0] + 1
                yield offset + item[0], source, item
            assert source.size is not None, "a source knows its size at its end"
            self._current, self._next = self._current + 1, 0
            self._starts.append(offset + source.size)

    def _count(self) -> int | None:
        sizes = [source.size for source in self._sources]
        if None in sizes:
            return None
        place, step = self._shard
        total = len(range(place - 1, sum(sizes), step))
        return total if self._limit is None else min(total, self._limit)

    # Ids

    def _ids_to_remember(self) -> SeenIds | None:
        """None where no two rows can have one id. Of files and folders all ids are looked at here and now."""
        if len(self._sources) == 1 and self._sources[0].distinct:
            return None
        if not all(source.listed for source in self._sources):
            return SeenIds()
        self._refuse_equal_names()
        return None

    def _refuse_equal_names(self) -> None:
        seen: dict[str, int] = {}
        offset = 0
        for source in self._sources:
            for number, name in source.names(0, 1):
                index = offset + number
                first = seen.setdefault(name, index)
                if first != index:
                    raise InputError(
                        f"rows {first + 1} ({self._image(first)}) and {index + 1} ({self._image(index)}) have one id,"
                        f" {name}: name each image once, and of folders that hold equal names the folder above them, or"
                        " give each a run of its own"
                    )
            offset += source.size

    def _image(self, index: int) -> str | None:
        for source in self._sources:
            if index < source.size:
                return next(source.entries(index, 1)).image
            index -= source.size
        raise AssertionError(f"no row {index} behind the last")

    def _give_id(self, source: Source, number: int, name: str | None, index: int) -> str:
        if self._seen is None:
            return source.fallback_name(number) if name is None else name
        if name is None:
            name = source.fallback_name(number)
            while name in self._seen:
                name = f"#{name}"
        first = self._seen.add(name, index)
        if first is not None:
            raise InputError(
                f"rows {first + 1} and {index + 1} have one id, {shown(name)}: give each row an id of its own, name"
                " another column with --id-column, or read each input in a run of its own"
            )
        return name


def _merged(columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns of all inputs; None where their types differ."""
    merged: dict[str, Any] = {}
    for name, kind in (item for one in columns for item in one.items()):
        merged[name] = kind if merged.get(name, kind) == kind else None
    return merged
