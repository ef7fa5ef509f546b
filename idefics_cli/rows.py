"""A row of the input and where its images are, and the options of reading. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from idefics_cli.errors import RowError

MAX_WORKERS = 8
NO_VALUES: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class RemoteFile:
    """An image on another file system. Nothing is opened before `read`, which many threads may call."""

    path: str  # for people: the address, without anything secret
    filesystem: Any  # fsspec.AbstractFileSystem
    key: str  # the path within the file system

    def read(self, max_bytes: int) -> bytes:
        """The first `max_bytes` bytes. Raises FileNotFoundError or another OSError."""
        with self.filesystem.open(self.key, "rb", seekable=False) as file:
            return file.read(max_bytes)


ImageSource: TypeAlias = Path | bytes | RemoteFile


@dataclass(frozen=True, slots=True)
class InputRow:
    """One row of the input.

    `index` is its place among all rows of all inputs, before `--shard` and `--limit`. `id` is unique in the run.
    `image` is what people are shown of the image: its path as it was given, or None for bare bytes; of several images,
    a JSON list of these. Neither holds a lone surrogate. `sources` are the row's images in order. `values` are the
    columns that were asked for; one that this row lacks is None. `error` says why a row is bad. `asked` is the row's
    question where each input row is asked several, `earlier` its result row from an earlier run.
    """

    index: int
    id: str
    image: str | None
    sources: tuple[ImageSource, ...]
    values: Mapping[str, Any]
    error: RowError | None = None
    asked: str | None = None
    earlier: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ReadOptions:
    """Which rows are read, and which of their columns.

    Every manifest must have `columns` and `keep`, the columns to pass through ("all": every one but those of id and
    image); `reads_passthrough` says whether rows' `values` hold these too. `shard` is (I, N), 1 <= I <= N: the rows
    whose index is I - 1 modulo N. `limit` counts the rows of the shard. Without an `image_column`, images are in the
    first of `usual_image_columns` that a manifest has, else in the only column that looks like images. Without
    `needs_image` rows have images only where `image_column` names them; without `needs_id` their ids are their numbers.
    """

    recursive: bool = True
    null: bool = False
    image_column: str | None = None
    usual_image_columns: tuple[str, ...] = ("image",)
    id_column: str | None = None
    image_root: str | None = None
    columns: tuple[str, ...] = ()
    keep: tuple[str, ...] | Literal["all"] = ()
    limit: int | None = None
    shard: tuple[int, int] | None = None
    needs_image: bool = True
    needs_id: bool = True
    reads_passthrough: bool = True

    def __post_init__(self) -> None:
        assert self.limit is None or self.limit > 0, f"limit {self.limit}"
        assert self.shard is None or 1 <= self.shard[0] <= self.shard[1], f"shard {self.shard}"


@dataclass(frozen=True)
class ImageOptions:
    """How images are decoded.

    `max_pixels` is width x height, `max_bytes` the file's length. With `draft` a JPEG may be decoded at a half, a
    quarter or an eighth of its size, where that is still far more than is asked for. An image that takes longer than
    `decode_timeout` seconds is given up. `workers` None: one process per processor, at most MAX_WORKERS. With
    `allow_truncated` a file may end early.
    """

    max_pixels: int = 64_000_000
    draft: bool = False
    decode_timeout: float = 30.0
    workers: int | None = None
    max_bytes: int = 256 * 1024 * 1024
    allow_truncated: bool = False

    @property
    def num_workers(self) -> int:
        return self.workers or min(MAX_WORKERS, os.cpu_count() or 1)
