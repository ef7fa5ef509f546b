"""What every format of manifest is to the reader: named columns, and records in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from idefics_cli.columns import list_in
from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.image_paths import holds_image
from idefics_cli.readers.source import ALL, Place, Span
from idefics_cli.storage.filenames import IMAGE_SUFFIX, WEB_ADDRESS, shown
from idefics_cli.storage.files import File, open_stream

if TYPE_CHECKING:
    import pyarrow as pa

Record: TypeAlias = Mapping[str, Any]
Read: TypeAlias = "Callable[[BinaryIO, Sequence[str] | None, Span], Iterator[Callable[[], Record | RowError]]]"
Enter: TypeAlias = Callable[[BinaryIO], Iterator[tuple[int, int]]]
Chunk: TypeAlias = "pa.RecordBatch | Sequence[Record]"  # rows as Arrow, or one by one

SAMPLE_ROWS = 100
SAMPLE_BYTES = 16 << 20
CHUNK_ROWS = 1_000
CHUNK_CHARACTERS = 4 << 20

# Columns of the formats themselves. OWN_ERROR says why a record is bad although its id is known; a record whose id
# cannot be known is a RowError itself.
OWN_IMAGES = "\0images"
OWN_ID = "\0stem"
OWN_ERROR = "\0error"


class NoRows(InputError):
    """A manifest of its kind, in which there are no rows."""


class Table:
    """A manifest that has been checked: it is of its kind, and its columns are known.

    `size` is the number of records, None until it is known: at the end of `records` it is. `images` are the columns
    that seem to hold images. `is_text`: every value is a text, empty where there is none. `image_column` and
    `id_column` are the format's own, where it has any.
    """

    size: int | None = None
    is_text = False
    columns: Sequence[str]
    images: Sequence[str]
    image_column: str | None = None
    id_column: str | None = None

    def type_of(self, column: str) -> pa.DataType | None:
        """The column's Arrow type; None where it may differ from row to row."""
        return None

    def check(self) -> None:
        """Raises InputError for what is wrong further on and can be found quickly."""

    def may_hold_images(self, column: str) -> bool:
        return True

    def places(self, first: int, step: int) -> Iterator[Place]:
        """As those of a `Source`."""
        assert self.size is not None, "its size is known by its metadata"
        return map(Place, range(first, self.size, step))

    def records(self, span: Span, columns: Sequence[str]) -> Iterator[tuple[int, Record | RowError]]:
        """The records of the span, each with its number and at least these of its columns."""
        raise NotImplementedError

    def chunks(self, span: Span, columns: Sequence[str]) -> Iterator[Chunk]:
        """The same records in bounded chunks of just these columns, as Arrow where the format has it.

        A bad record has no values.
        """
        chunk: list[Record] = []
        size = 0
        for _, record in self.records(span, columns):
            chunk.append({} if isinstance(record, RowError) else {name: record.get(name) for name in columns})
            size += sum(len(value if isinstance(value, str) else str(value)) for value in chunk[-1].values())
            if len(chunk) == CHUNK_ROWS or size > CHUNK_CHARACTERS:
                yield chunk
                chunk, size = [], 0
        yield chunk


class StreamTable(Table):
    """A manifest that is read forwards, whose format is `read`: its bytes -> a function for each record that makes it,
    given the columns that are wanted. `columns` None: they are those of the first records.

    `enter`, if the format can be entered in its middle: its bytes -> where each record begins, as byte and line. Then
    `read` may be given the bytes of a span. `ends_sharply`: it is to find no bytes after these; else it reads on where
    it must, as for what is wrong with a record whose quotes stay open.
    """

    ends_sharply = False

    def __init__(
        self,
        file: File,
        compressed: bool,
        read: Read,
        columns: Sequence[str] | None = None,
        own: tuple[str, ...] = (),
        enter: Enter | None = None,
    ) -> None:
        self.image_column, self.id_column = own or (None, None)
        self._file, self._compressed, self._read = file, compressed, read
        self._enter = None if compressed else enter
        self.is_text = columns is not None
        sample = self._sample()
        found = dict.fromkeys(name for record in sample for name in record)
        self.columns = columns or [name for name in found if name not in (OWN_ID, OWN_IMAGES, OWN_ERROR)]
        self.images = image_columns(self.columns, sample)

    def type_of(self, column: str) -> pa.DataType | None:
        if not self.is_text:
            return None
        import pyarrow as pa

        return pa.string()

    def places(self, first: int, step: int) -> Iterator[Place]:
        number = -1
        with open_stream(self._file, self._compressed) as stream:
            entries = self._enter(stream) if self._enter else ((0, 1) for _ in self._read(stream, (), ALL))
            for number, entry in enumerate(entries):
                if number >= first and (number - first) % step == 0:
                    yield Place(number, *entry)
        self.size = number + 1

    def records(self, span: Span, columns: Sequence[str]) -> Iterator[tuple[int, Record | RowError]]:
        begin, most = span.begin, span.most
        if most is not None and most <= begin.row:
            return
        first = begin.row if begin.entry else 0
        number = first - 1
        with open_stream(self._file, self._compressed, begin.entry, span.end_entry, not self.ends_sharply) as stream:
            for number, make in enumerate(self._read(stream, columns, span), first):
                if number >= begin.row:
                    yield number, make()
                if number + 1 == most:
                    return
        if most is None:
            self.size = number + 1

    def _sample(self) -> list[Record]:
        """The first records without bad ones and images. Raises InputError where they tell no columns."""
        records: list[Record | RowError] = []
        most = 1 if self._file.comes_slowly else SAMPLE_ROWS
        with open_stream(self._file, self._compressed) as stream:
            for make in islice(self._read(stream, None, ALL), most):
                records.append(make())
                if stream.tell() > SAMPLE_BYTES:
                    break
            else:
                self.size = len(records) if len(records) < most else None
        if not records:
            raise NoRows(f"{self._file.name} holds no rows: name a manifest with rows")
        good = [record for record in records if not isinstance(record, RowError)]
        if not good and not self.is_text:
            raise InputError(f"{self._file.name} cannot be read: {records[0].message}; write one object per line")
        return good


def with_lists(record: Record, columns: Iterable[str], is_text: bool) -> Record:
    """With the lists that stand as texts in these columns.

    In a table of texts, which has no other lists, a text that only begins like one is bad, unless it names an image.
    """
    texts = {name: text for name in columns if isinstance(text := record.get(name), str)}
    found = {name: list_in(text) for name, text in texts.items() if not IMAGE_SUFFIX.search(text)}
    bad = next((name for name, value in found.items() if isinstance(value, RowError)), None)
    if bad is not None and is_text:
        return {OWN_ERROR: RowError("row_invalid", f"column {shown(bad)}: {found[bad].message}"), **record}
    return {**record, **{name: value for name, value in found.items() if not isinstance(value, RowError)}}


def image_columns(columns: Iterable[str], sample: Sequence[Record]) -> list[str]:
    """The columns whose first values look like images; web addresses only where there are no others."""
    known = {name: [value for record in sample if (value := record.get(name)) not in (None, "")] for name in columns}
    found = [name for name, values in known.items() if values and all(map(_looks_like_image, values))]
    return [name for name in found if not any(map(_is_web_address, known[name]))] or found


def _looks_like_image(value: object) -> bool:
    value = list_in(value)
    if isinstance(value, str):
        return IMAGE_SUFFIX.search(value) is not None or holds_image(value)
    if isinstance(value, Mapping):
        return "bytes" in value or "path" in value
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return bool(value) and all(map(_looks_like_image, value))
    return isinstance(value, bytes)


def _is_web_address(value: object) -> bool:
    return isinstance(value, str) and WEB_ADDRESS.match(value) is not None
