"""Which columns of a manifest hold a row's images: one, several (`left,right`, `image_*`), or a path made of columns.

`val2014/COCO_val2014_{image_id:012d}.jpg` is such a path. Knows no paths of files and opens nothing.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.table import Record, Table
from idefics_cli.rows import ReadOptions
from idefics_cli.storage.filenames import listed, shown

NOTHING = (None, "", b"", [], ())


@dataclass(frozen=True)
class ImageColumns:
    """`names` are the columns that are read. With `parts` (a plain text, the column after it, and its format) they are
    put into a path. `are_optional`: no row needs an image. `are_either`: the first that is not empty has them all."""

    names: tuple[str, ...] = ()
    parts: tuple[tuple[str, str | None, str | None], ...] = ()
    are_optional: bool = False
    are_either: bool = False

    @property
    def own(self) -> tuple[str, ...]:
        """The columns that are nothing but images."""
        return () if self.parts else self.names

    def value(self, record: Record) -> Any:
        """The row's image, or a list of its images without the empty ones, or what is wrong with its path."""
        if self.parts:
            return self._path(record)
        if len(self.names) < 2:
            return record.get(self.names[0]) if self.names else None
        values = [record.get(name) for name in self.names]
        if self.are_either:
            return next((value for value in values if not is_empty(value)), None)
        lists = (value if isinstance(value, list | tuple) else [value] for value in values)
        return [value for one in lists for value in one if not is_empty(value)]

    def _path(self, record: Record) -> str | RowError | None:
        if any(is_empty(record.get(name)) for name in self.names):
            return None
        try:
            return "".join(text + _formatted(record, name, spec) for text, name, spec in self.parts)
        except (ValueError, TypeError, OverflowError) as error:
            return RowError("row_invalid", f"the path in --image-column cannot be made: {error}")


def _formatted(record: Record, name: str | None, spec: str | None) -> str:
    """CSV holds numbers as text, and pandas whole ones as floats where some are missing."""
    if name is None:
        return ""
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{shown(name)} holds {type(value).__name__}")
    if (isinstance(value, float) and value.is_integer()) or (isinstance(value, str) and spec and spec[-1] in "dx"):
        value = int(value)
    return format(value, spec or "")


def is_empty(value: Any) -> bool:
    """Whether there is no image: null, nothing, or a struct of these."""
    if isinstance(value, Mapping):
        return all(each in NOTHING for each in value.values())
    return value in NOTHING


def image_columns_of(manifest: str, table: Table, options: ReadOptions) -> ImageColumns:
    """Raises InputError where a column that was named is not there or holds no images, and where one must be named."""
    named, needs_image = options.image_column, options.needs_image
    if needs_image is False and named is None:
        return ImageColumns()
    if table.image_column is not None:
        return ImageColumns((table.image_column,), are_optional=needs_image is None)
    if named is not None:
        columns = _columns(table, named)
        for name in columns.names:
            require_column(manifest, table, name)
    else:
        usual = (_columns(table, each) for each in options.usual_image_columns)
        there = [each for each in usual if set(each.names) <= set(table.columns)]
        if needs_image is None:
            names = (each.names[0] for each in there if _without_images(table, each) is None)
            return ImageColumns(tuple(names), are_optional=True, are_either=True)
        columns = next(iter(there), ImageColumns())
        if not columns.names and not (options.allow_no_image and not table.images):
            columns = ImageColumns((_only_image_column(manifest, table),))
    wrong = _without_images(table, columns)
    if wrong is not None:
        raise InputError(
            f"{manifest}: column {shown(wrong)} is of type {table.type_of(wrong)}, which holds no images; name"
            f" another one with --image-column: {listed(table.columns)}"
        )
    return columns


def _columns(table: Table, text: str) -> ImageColumns:
    """Those that `text` names, whether the table has them or not. Raises InputError for a stray brace."""
    if text in table.columns:
        return ImageColumns((text,))
    if "{" not in text:
        names = (name for each in text.split(",") for name in _matching(table, each.strip()) or [each.strip()])
        return ImageColumns(tuple(dict.fromkeys(names)))
    try:
        parts = tuple((plain, name, spec) for plain, name, spec, _ in string.Formatter().parse(text))
    except ValueError as error:
        raise InputError(f"--image-column {shown(text)} has a brace on its own: write {{name}} for a column") from error
    names = tuple(dict.fromkeys(name for _, name, _ in parts if name is not None))
    return ImageColumns(names or (text,), parts)


def _matching(table: Table, pattern: str) -> list[str]:
    """In the order of the numbers within them: `image_2` before `image_10`."""
    found = [name for name in table.columns if fnmatchcase(name, pattern)]
    return sorted(found, key=lambda name: [part.zfill(20) for part in re.split(r"(\d+)", name)])


def _without_images(table: Table, columns: ImageColumns) -> str | None:
    return next((name for name in columns.own if not table.may_hold_images(name)), None)


def _only_image_column(manifest: str, table: Table) -> str:
    if len(table.images) == 1:
        return table.images[0]
    found = "several columns that may hold the image" if table.images else "no column that looks like images"
    raise InputError(f"{manifest} has {found}: name it with --image-column: {listed(table.images or table.columns)}")


def require_column(manifest: str, table: Table, column: str) -> None:
    if column not in table.columns:
        raise InputError(f"{manifest} has no column {shown(column)}: name one of {listed(table.columns)}")
