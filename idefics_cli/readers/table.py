"""What every format of manifest is to the reader: named columns, and records in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from idefics_cli.errors import RowError
from idefics_cli.storage.filenames import IMAGE_SUFFIX, WEB_ADDRESS

if TYPE_CHECKING:
    import pyarrow as pa

Record: TypeAlias = Mapping[str, Any]
Chunk: TypeAlias = "pa.RecordBatch | Sequence[Record]"  # rows as Arrow, or as values that JSON can hold

SAMPLE_ROWS = 100
SAMPLE_BYTES = 1 << 20
CHUNK_ROWS = 1_000
CHUNK_CHARACTERS = 4 << 20

# Columns of the formats themselves. OWN_ERROR says why a record is bad although its id is known; a record whose id
# cannot be known is a RowError itself.
OWN_IMAGES = "\0images"
OWN_ID = "\0stem"
OWN_ERROR = "\0error"


class Table(Protocol):
    """A manifest that has been checked: it is of its kind, and its columns are known.

    `size` is the number of records, None until it is known: at the end of `records` it is. `images` are the columns
    that seem to hold images. `image_column` and `id_column` are the format's own, where it has any.
    """

    size: int | None
    columns: Sequence[str]
    images: Sequence[str]
    image_column: str | None
    id_column: str | None

    def type_of(self, column: str) -> pa.DataType | None:
        """The column's Arrow type; None where it may differ from row to row."""
        ...

    def may_hold_images(self, column: str) -> bool: ...

    def records(self, start: int, step: int, columns: Sequence[str]) -> Iterator[tuple[int, Record | RowError]]:
        """Every `step`-th record from number `start` on, with its number and at least these of its columns."""
        ...

    def chunks(self, start: int, step: int, columns: Sequence[str]) -> Iterator[Chunk]:
        """The same records in bounded chunks of just these columns, as Arrow where the format has it."""
        ...


def chunked(records: Iterable[tuple[int, Record | RowError]], columns: Sequence[str]) -> Iterator[list[Record]]:
    """`chunks` of a table without Arrow; a bad record has no values."""
    chunk: list[Record] = []
    size = 0
    for _, record in records:
        chunk.append({} if isinstance(record, RowError) else {name: record.get(name) for name in columns})
        size += sum(len(value) if isinstance(value, str) else len(str(value)) for value in chunk[-1].values())
        if len(chunk) == CHUNK_ROWS or size > CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def columns_of(sample: Iterable[Record]) -> list[str]:
    """The names of all columns, in the order of their first appearance."""
    return list(dict.fromkeys(name for record in sample for name in record))


def image_columns(columns: Iterable[str], sample: Sequence[Record]) -> list[str]:
    """The columns whose first values look like images; web addresses only where there are no others."""
    found = [name for name in columns if _all_images(record.get(name) for record in sample)]
    local = [name for name in found if not any(_is_web_address(record.get(name)) for record in sample)]
    return local or found


def _all_images(values: Iterable[object]) -> bool:
    known = [value for value in values if value not in (None, "")]
    return bool(known) and all(map(_looks_like_image, known))


def _looks_like_image(value: object) -> bool:
    if isinstance(value, str):
        return IMAGE_SUFFIX.search(value) is not None
    if isinstance(value, Mapping):
        return "bytes" in value or "path" in value
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return bool(value) and all(map(_looks_like_image, value))
    return isinstance(value, bytes)


def _is_web_address(value: object) -> bool:
    return isinstance(value, str) and WEB_ADDRESS.match(value) is not None
