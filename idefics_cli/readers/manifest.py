"""A manifest of any format -> rows: which column holds the image, which the id, and what else was asked for."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from idefics_cli.columns import MAX_COLUMNS
from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.csv import open_delimited
from idefics_cli.readers.folder import IMAGE_SIGNATURE
from idefics_cli.readers.image_columns import image_columns_of, is_empty, require_column
from idefics_cli.readers.image_paths import Say, open_root, read_image, read_images, shown_images
from idefics_cli.readers.json_array import open_json
from idefics_cli.readers.jsonl import open_json_lines
from idefics_cli.readers.source import Place, Source, Span
from idefics_cli.readers.stdin_rows import StdinFile
from idefics_cli.readers.table import OWN_ERROR, Chunk, NoRows, Record, Table, with_lists
from idefics_cli.readers.webdataset import Archive
from idefics_cli.rows import NO_VALUES, ImageSource, InputRow, ReadOptions
from idefics_cli.storage.filenames import IMAGE_SUFFIX, is_utf8, shown
from idefics_cli.storage.files import File, file_digest, local_file

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST_NAME = re.compile(
    r"\.(?:(?P<kind>parquet|arrow|feather|ipc|jsonl|ndjson|json|csv|tsv|tar)(?:\.(?P<packed>gz|bz2|xz|zst))?|(?P<tgz>tgz))$",
    re.IGNORECASE,
)
ARROW_KINDS = ("arrow", "feather", "ipc")
MAX_ID_CHARACTERS = 10_000

# Files that are not read: their suffixes, how they begin, what they are, and what to do instead.
BEGINNING_BYTES = 512
NO_BEGINNING = rb"(?!)"
OTHER_KINDS = (
    ("xlsx|xlsm|xls|ods", NO_BEGINNING, "a spreadsheet: save it as CSV"),
    ("zip|7z|rar", rb"PK\x03\x04|7z\xbc\xaf|Rar!", "an archive: unpack it, as `unzip` does, and name the folder"),
    ("txt|lst|list", NO_BEGINNING, "a text: where it is a list of paths, give it on stdin, `- < list.txt`"),
    ("html?|mhtml|xhtml", rb"\s*<(!doctype|html|\?xml)", "a web page: save the images in it, and name those"),
    ("pdf", rb"%PDF-", "a document: make images of its pages, as `pdftoppm -png` does"),
    ("mp4|m4v|mov|avi|mkv|webm", rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI", "a video: save frames of it as images"),
    ("gz|bz2|xz|zst", rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "packed: unpack it, or name it as in rows.jsonl.gz"),
    ("pqt?|parq", rb"PAR1", "a table in Parquet: name it with the suffix .parquet"),
    (NO_BEGINNING.decode(), rb"ARROW1", "a table in Arrow: name it with the suffix .arrow"),
    (NO_BEGINNING.decode(), rb".{257}ustar", "a tar archive: name it with the suffix .tar"),
    (NO_BEGINNING.decode(), rb"\s*[{\[]", "JSON, it seems: name it with the suffix .jsonl or .json"),
    (".*", rb"", "of no known kind: name images, folders of them, manifests (.parquet, .jsonl, .csv, ...), or `-`"),
)


def is_manifest(name: str) -> bool:
    """Whether a file of this name is a table or an archive of rows."""
    return MANIFEST_NAME.search(name) is not None


def manifest_kind(name: str) -> str:
    """Its suffix, without what it is packed with."""
    match = MANIFEST_NAME.search(name)
    assert match, name
    return (match["kind"] or "tar").lower()


def require_image(file: File) -> None:
    """Raises InputError for a file that neither its name nor its first bytes tell to be an image."""
    if IMAGE_SUFFIX.search(file.name):
        return
    if file.size == 0:
        raise InputError(f"{file.name} is empty: name an image, a folder or a manifest")
    with file.open() as stream:
        beginning = stream.read(BEGINNING_BYTES)
    if not IMAGE_SIGNATURE.match(beginning):
        raise InputError(f"{file.name} is not an image. It is {other_kind(beginning, file.name)}")


def other_kind(beginning: bytes, name: str = "") -> str:
    """What a file is that is not read, and what to do instead: as its suffix tells, else its first bytes."""
    suffix = posixpath.splitext(name)[1][1:]
    by_suffix = (kind for suffixes, _, kind in OTHER_KINDS[:-1] if re.fullmatch(suffixes, suffix, re.IGNORECASE))
    by_bytes = (kind for _, start, kind in OTHER_KINDS if re.match(start, beginning, re.IGNORECASE | re.DOTALL))
    return next(chain(by_suffix, by_bytes))


def open_manifest(file: File, prefix: str, options: ReadOptions, say: Say, is_first: bool = True) -> Manifest:
    """`prefix` begins the ids that are numbers. Only the first of several parts is gone through.

    Raises InputError where the manifest is unreadable as a whole, or lacks a column that was asked for.
    """
    if file.size == 0:
        raise NoRows(f"{file.name} is empty: name a manifest with rows")
    file = file.held()
    table = open_table(file, options)
    if is_first:
        table.check()
    return Manifest(file, table, prefix, options, say)


def open_table(file: File, options: ReadOptions) -> Table:
    """Raises InputError where the manifest is unreadable as a whole."""
    kind, match = manifest_kind(file.name), MANIFEST_NAME.search(file.name)
    packed = "gz" if match["tgz"] else (match["packed"] or "").lower()
    if packed not in ("", "gz") or (packed and kind in ("parquet", *ARROW_KINDS)):
        raise InputError(f"{file.name} cannot be read compressed like this: unpack it first")
    table = _table(file, kind, packed == "gz", options)
    if len(table.columns) > MAX_COLUMNS:
        raise InputError(f"{file.name} has {len(table.columns):,} columns, more than {MAX_COLUMNS:,}: leave some out")
    repeated = [column for column, times in Counter(table.columns).items() if times > 1]
    if repeated:
        raise InputError(f"{file.name} has two columns named {shown(repeated[0])}: rename one of them")
    return table


def _table(file: File, kind: str, compressed: bool, options: ReadOptions) -> Table:
    if kind == "parquet":
        from idefics_cli.readers.parquet import ParquetTable  # imports pyarrow

        return ParquetTable(file)
    if kind in ARROW_KINDS:
        from idefics_cli.readers.arrow import ArrowTable

        return ArrowTable(file)
    if kind == "tar":
        return Archive(file, compressed)
    if kind in ("csv", "tsv"):
        return open_delimited(file, compressed, "," if kind == "csv" else "\t", options.delimited)
    if kind == "json":
        return open_json(file, compressed, options.json_key)
    return open_json_lines(file, compressed)


class Manifest(Source):
    """The rows of one manifest; those without an id column have their number as id."""

    def __init__(self, file: File, table: Table, prefix: str, options: ReadOptions, say: Say) -> None:
        self.prefix, self.is_streaming = prefix, isinstance(file, StdinFile)
        self._file, self._table = file, table
        self.identity: dict[str, Any] = {"kind": "stdin"}
        if not self.is_streaming:
            self.identity = _identity(file)
        self._images = image_columns_of(file.name, table, options)
        self._id = _id_column(file.name, table, options)
        self.is_numbered = self._id is None  # no two rows can have one id
        own = (*self._images.own, self._id)
        keep = [name for name in table.columns if name not in own] if options.keep == "all" else options.keep
        columns = [name if isinstance(name, str) else _first_of(name, table) for name in options.columns]
        for name in (*columns, *keep):
            require_column(file.name, table, name)
        self.passthrough: dict[str, pa.DataType | None] = {name: _stored_type(table, name) for name in keep}
        ids = () if self._id is None else (self._id,)
        self.chosen = {"images": self._images.names, "ids": ids, "prompts": tuple(columns), "kept": tuple(keep)}
        self._lists = [name for name in (*self._images.own, *options.list_columns) if name in table.columns]
        self._values = list(dict.fromkeys((*columns, *keep)))
        self._resolve = open_root(file.parent, options, say)
        self._allow_no_image = options.allow_no_image or self._images.are_optional

    @property
    def size(self) -> int | None:
        return self._table.size

    def still_holds(self) -> bool:
        """Whether what it held is there, whatever has been added since; of a file."""
        return self._holds(self._file, self.identity["bytes"])

    def is_unchanged(self) -> bool:
        """Whether the file of its name is still the same."""
        return self._holds(local_file(self._file.path) if self._file.is_local else self._file, None)

    def _holds(self, file: File, size: int | None) -> bool:
        try:
            return file.info()["size"] >= self.identity["bytes"] and _identity(file, size) == self.identity
        except InputError:
            return False

    def rows(self, span: Span) -> Iterator[InputRow]:
        columns = *self._images.names, self._id, *self._values
        wanted = list(dict.fromkeys(name for name in columns if name is not None))
        for number, record in self._table.records(span, wanted):
            yield self._row(number, record)

    def chunks(self, span: Span, most: int) -> Iterator[Chunk]:
        return self._table.chunks(span, list(self.passthrough))

    def places(self, first: int, step: int) -> Iterator[Place]:
        return self._table.places(first, step)

    def resolve(self, value: object) -> ImageSource | RowError:
        return read_image(value, self._resolve)

    def _row(self, number: int, record: Record | RowError) -> InputRow:
        if isinstance(record, RowError):
            return InputRow(number, "", None, (), NO_VALUES, record)
        row_id = "" if self._id is None else id_text(record.get(self._id))
        record = with_lists(record, self._lists, self._table.is_text)
        value = self._images.value(record)
        sources = self._sources(value)
        values = {name: record.get(name) for name in self._values} if self._values else NO_VALUES
        error = self._error(record, row_id)
        if isinstance(sources, RowError):
            sources, error = ((sources,), error) if self._images.are_optional else ((), error or sources)
        return InputRow(number, row_id, shown_images(value), sources, values, error)

    def _sources(self, value: Any) -> tuple[ImageSource, ...] | RowError:
        if not self._images.names or (self._allow_no_image and is_empty(value)):
            return ()
        return value if isinstance(value, RowError) else read_images(value, self._resolve)

    def _error(self, record: Record, row_id: str) -> RowError | None:
        failure = record.get(OWN_ERROR)
        if isinstance(failure, RowError):
            return failure
        has_id = row_id or self.is_numbered
        return None if has_id else RowError("row_invalid", f"no id: column {shown(self._id)} holds no usable text here")


def _identity(file: File, size: int | None = None) -> dict[str, Any]:
    """Of its first `size` bytes."""
    size = file.info()["size"] if size is None else size
    return {"kind": "manifest", "name": file.name, "bytes": size, "digest": file_digest(file, size)}


# ---- columns


def _first_of(names: tuple[str, ...], table: Table) -> str:
    return next((name for name in names if name in table.columns), names[0])


def _stored_type(table: Table, column: str) -> pa.DataType | None:
    """None, too, where a result cannot have the column's type."""
    of = table.type_of(column)
    if of is None:
        return None
    from idefics_cli.readers.undeclared_types import in_parquet  # imports pyarrow

    return in_parquet(of)


def _id_column(manifest: str, table: Table, options: ReadOptions) -> str | None:
    if options.id_column is not None:
        require_column(manifest, table, options.id_column)
        return options.id_column
    if not options.needs_id:
        return None
    return table.id_column or ("id" if "id" in table.columns else None)


def id_text(value: object) -> str:
    """An id as text; empty where the value gives none: null, too long, a list, or not to be encoded."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, bytes):
        text = value.decode(errors="surrogateescape")
    elif value is None or isinstance(value, list | dict | tuple) or value != value:
        return ""
    else:
        text = str(value)
    return text if len(text) <= MAX_ID_CHARACTERS and is_utf8(text) else ""
