"""A manifest of any format -> entries: which column holds the image, which the id, and what else was asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.image_paths import Root, open_root, read_image, read_images, shown_images
from idefics_cli.readers.table import OWN_ERROR, Record, Table
from idefics_cli.rows import NO_VALUES, Entry, ImageSource, ReadOptions
from idefics_cli.storage.filenames import is_utf8, shown
from idefics_cli.storage.files import InputFile, file_digest

MANIFEST_NAME = re.compile(
    r"\.(?:(?P<kind>parquet|jsonl|ndjson|csv|tsv|tar)(?:\.(?P<packed>gz|bz2|xz|zst))?|(?P<tgz>tgz))$", re.IGNORECASE
)
MAX_ID_CHARACTERS = 10_000


def is_manifest(name: str) -> bool:
    """Whether a file of this name is a table or an archive of rows."""
    return MANIFEST_NAME.search(name) is not None


def open_manifest(file: InputFile, among_others: bool, options: ReadOptions) -> Manifest:
    """Look at a manifest. Raises InputError where it is broken as a whole, or lacks a column that was asked for."""
    if file.size == 0:
        raise InputError(f"{file.name} is empty: name a manifest that holds rows")
    table = _open_table(file)
    layout = _lay_out(file.name, table, options)
    return Manifest(file, table, layout, f"{file.name}:" if among_others else "", options.image_root)


def _open_table(file: InputFile) -> Table:
    match = MANIFEST_NAME.search(file.name)
    assert match, f"{file.name} is no manifest"
    kind = (match["kind"] or "tar").lower()
    packed = "gz" if match["tgz"] else (match["packed"] or "").lower()
    if packed not in ("", "gz") or (packed and kind == "parquet"):
        raise InputError(f"{file.name}: cannot be read packed like this; unpack it first")
    # Imported here so that a run over other inputs does without.
    if kind == "parquet":
        from idefics_cli.readers.parquet import ParquetTable

        return ParquetTable(file)
    if kind == "tar":
        from idefics_cli.readers.webdataset import ArchiveTable

        return ArchiveTable(file, packed == "gz")
    if kind in ("csv", "tsv"):
        from idefics_cli.readers.csv import DelimitedTable

        return DelimitedTable(file, packed == "gz", "," if kind == "csv" else "\t")
    from idefics_cli.readers.jsonl import JsonLinesTable

    return JsonLinesTable(file, packed == "gz")


# Columns


@dataclass(frozen=True)
class Layout:
    """The columns that are read: the image's, the id's (None: the row's number), and those given on as values."""

    image: str | None
    id: str | None
    values: tuple[str, ...]
    kept: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for name in (self.image, self.id, *self.values) if name is not None))


def _lay_out(manifest: str, table: Table, options: ReadOptions) -> Layout:
    image = _image_column(manifest, table, options)
    row_id = _id_column(manifest, table, options)
    if options.keep == "all":
        kept = tuple(name for name in table.columns if name not in (image, row_id))
    else:
        kept = tuple(dict.fromkeys(options.keep))
    for name in (*options.columns, *kept):
        _require(manifest, table, name)
    return Layout(image, row_id, tuple(dict.fromkeys((*options.columns, *kept))), kept)


def _require(manifest: str, table: Table, column: str) -> None:
    if column not in table.columns:
        raise InputError(f"{manifest} has no column {shown(column)}: name one of {_listed(table.columns)}")


def _listed(columns: object) -> str:
    return ", ".join(map(shown, columns)) or "none at all"


def _id_column(manifest: str, table: Table, options: ReadOptions) -> str | None:
    if options.id_column is not None:
        _require(manifest, table, options.id_column)
        return options.id_column
    if not options.needs_id:
        return None
    return table.id_column or ("id" if "id" in table.columns else None)


def _image_column(manifest: str, table: Table, options: ReadOptions) -> str | None:
    column = options.image_column
    if table.image_column is not None:
        return table.image_column if options.needs_image or column else None
    if column is None and not options.needs_image:
        return None
    usual = (name for name in options.usual_image_columns if name in table.columns)
    column = column or next(usual, None) or _only_image_column(manifest, table)
    _require(manifest, table, column)
    if not table.may_hold_images(column):
        raise InputError(
            f"{manifest}: column {shown(column)} holds {table.type_of(column)}, no images; name another with"
            f" --image-column: {_listed(table.columns)}"
        )
    return column


def _only_image_column(manifest: str, table: Table) -> str:
    if len(table.images) == 1:
        return table.images[0]
    if table.images:
        raise InputError(
            f"{manifest} has several columns that may hold the image: choose with --image-column among"
            f" {_listed(table.images)}"
        )
    raise InputError(
        f"{manifest} has no column that seems to hold images: name one with --image-column; there are"
        f" {_listed(table.columns)}"
    )


# Rows


class Manifest:
    """The rows of one manifest."""

    listed = False
    is_streaming = False

    def __init__(self, file: InputFile, table: Table, layout: Layout, prefix: str, image_root: str | None) -> None:
        self.distinct = layout.id is None
        self.kept = {name: table.type_of(name) for name in layout.kept}
        self._file = file
        self._table = table
        self._layout = layout
        self._prefix = prefix
        self._root: Root = open_root(file.folder, image_root)

    @property
    def size(self) -> int | None:
        return self._table.size

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        return {
            "kind": "manifest",
            "name": self._file.name,
            "bytes": self._file.size,
            "digest": file_digest(self._file),
        }

    def entries(self, start: int, step: int) -> Iterator[Entry]:
        for number, record in self._table.records(start, step, self._layout.columns):
            yield self._entry(number, record)

    def names(self, start: int, step: int) -> Iterator[tuple[int, str | None]]:
        columns = [] if self._layout.id is None else [self._layout.id]
        for number, record in self._table.records(start, step, columns):
            yield number, self._name(number, record)

    def fallback_name(self, number: int) -> str:
        return f"{self._prefix}#{number}"

    def resolve(self, value: object) -> ImageSource | RowError:
        return read_image(value, self._root)

    def _name(self, number: int, record: Record | RowError) -> str | None:
        if self._layout.id is None:
            return f"{self._prefix}{number}"
        return None if isinstance(record, RowError) else id_text(record.get(self._layout.id))

    def _entry(self, number: int, record: Record | RowError) -> Entry:
        name = self._name(number, record)
        if isinstance(record, RowError):
            return Entry(number, name, None, (), error=record)
        wanted = self._layout.values
        values = {column: record.get(column) for column in wanted} if wanted else NO_VALUES
        image, sources, error = self._images(record)
        failure = record.get(OWN_ERROR)
        if isinstance(failure, RowError):
            error = failure
        elif name is None:
            error = RowError("row_invalid", f"no id: column {shown(self._layout.id)} holds no usable text here")
        return Entry(number, name, image, sources, values, error)

    def _images(self, record: Record) -> tuple[str | None, tuple[ImageSource, ...], RowError | None]:
        if self._layout.image is None:
            return None, (), None
        value = record.get(self._layout.image)
        sources = read_images(value, self._root)
        if isinstance(sources, RowError):
            return shown_images(value), (), sources
        return shown_images(value), sources, None


def id_text(value: object) -> str | None:
    """An id as text, or None where the value gives none: null, empty, endless, a list, or not to be written."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, bytes):
        text = value.decode(errors="surrogateescape")
    elif value is None or isinstance(value, list | dict | tuple) or value != value:
        return None
    else:
        text = str(value)
    return text if 0 < len(text) <= MAX_ID_CHARACTERS and is_utf8(text) else None
