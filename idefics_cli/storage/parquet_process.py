"""Parquet files are looked at in a limited process first.

It opens each file, reads all that its footer says and the first pages (all pages of a small file, and of a large one
the pages that it is asked for).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from idefics_cli.errors import InputError
from idefics_cli.storage.files import BUFFER_BYTES, File, cannot_read, local_file
from idefics_cli.storage.limited_process import complaint

LOOK_SECONDS = 60.0
SMALL_BYTES = 16 << 20
LEAST_BYTES_PER_SECOND = 2 << 20


class Pages(NamedTuple):
    """All pages of some columns in these row groups, which have `num_bytes`. So many rows fit into memory."""

    groups: range
    columns: Sequence[str]
    rows: int
    num_bytes: int


def require_sound(file: File, remedy: str = "fetch or make it again", pages: Pages | None = None) -> None:
    """Raises InputError for a file that Arrow cannot open, or on which it ends its process; or on these `pages`."""
    seconds = LOOK_SECONDS + (pages.num_bytes if pages else 0) / LEAST_BYTES_PER_SECOND
    found = complaint("Arrow", _look, _from_anywhere(file), pages, seconds=seconds)
    if found:
        raise cannot_read(file.name, ValueError(found), remedy)


def _from_anywhere(file: File) -> File:
    """The process may have another working folder."""
    return local_file(os.path.abspath(file.path)) if file.is_local else file


def _look(file: File, pages: Pages | None) -> str:
    """What is wrong with the file as a whole. What is wrong with a page, its reader says, where it is needed."""
    import pyarrow.parquet as pq

    try:
        with file.open() as stream:
            parquet = pq.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER_BYTES)
            if pages is not None:
                _read_pages(parquet, pages)
                return ""
            for number in range(parquet.num_row_groups):
                group = parquet.metadata.row_group(number)
                for column in map(group.column, range(group.num_columns)):
                    str(column.path_in_schema)
            str(parquet.schema_arrow.metadata)
            is_small = stream.seek(0, os.SEEK_END) <= SMALL_BYTES
            with suppress(Exception):
                for _ in parquet.iter_batches(1024 if is_small else 1, use_threads=False):
                    if not is_small:
                        break
    except InputError:  # it cannot be opened, as its reader will say
        return ""
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def _read_pages(parquet: Any, pages: Pages) -> None:
    with suppress(Exception):
        for _ in parquet.iter_batches(
            pages.rows, row_groups=list(pages.groups), columns=list(pages.columns), use_threads=False
        ):
            pass
