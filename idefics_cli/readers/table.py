"""What every format of manifest is to the reader: named columns, and records that come once each, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from idefics_cli.errors import RowError
from idefics_cli.storage.filenames import IMAGE_SUFFIX, WEB_ADDRESS

Record: TypeAlias = Mapping[str, Any]

SAMPLE_ROWS = 100
SAMPLE_BYTES = 1 << 20

# Columns of the formats' own, which hardly a field is called. `OWN_ERROR` is there in a record that has its id but is
# bad all the same; one whose id cannot be known is an error itself.
OWN_IMAGES = "\0images"
OWN_ID = "\0stem"
OWN_ERROR = "\0error"


class Table(Protocol):
    """A manifest that has been looked at: it is what it says it is, and its columns are known.

    `size` is the number of records, None until it is known; at the end of `records` it is. `images` are the columns
    that seem to hold images. `image_column` and `id_column` are the format's own, where it has such.
    """

    size: int | None
    columns: Sequence[str]
    images: Sequence[str]
    image_column: str | None
    id_column: str | None

    def type_of(self, column: str) -> Any:
        """The column's Arrow type; None where it may differ from row to row."""
        ...

    def may_hold_images(self, column: str) -> bool: ...

    def records(self, start: int, step: int, columns: Sequence[str]) -> Iterator[tuple[int, Record | RowError]]:
        """Every `step`-th record from number `start` on, with its number and at least these of its columns."""
        ...


def columns_of(sample: Iterable[Record]) -> list[str]:
    """The names of all columns, in the order in which they first come."""
    return list(dict.fromkeys(name for record in sample for name in record))


def image_columns(columns: Iterable[str], sample: Sequence[Record]) -> list[str]:
    """The columns whose first values look like images; those on the web only where there are no others."""
    found = [name for name in columns if _all_images(record.get(name) for record in sample)]
    local = [name for name in found if not any(_is_on_the_web(record.get(name)) for record in sample)]
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


def _is_on_the_web(value: object) -> bool:
    return isinstance(value, str) and WEB_ADDRESS.match(value) is not None
