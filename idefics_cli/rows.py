"""What readers give: a row, and where its images are. And what they are asked: which rows, and what of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from idefics_cli.errors import RowError

MAX_WORKERS = 8
NO_VALUES: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class RemoteFile:
    """An image on a file system of pyarrow's. Nothing is opened before `read`, which many threads may call."""

    path: str  # for people: the address, without anything secret
    filesystem: Any  # pyarrow.fs.FileSystem
    key: str  # the path within the file system

    def read(self, max_bytes: int) -> bytes:
        """The first `max_bytes` bytes. Raises FileNotFoundError or another OSError."""
        with self.filesystem.open_input_stream(self.key, compression=None) as stream:
            return stream.read(max_bytes)


ImageSource: TypeAlias = Path | bytes | RemoteFile


@dataclass(frozen=True, slots=True)
class InputRow:
    """One row of the input.

    `index` is its place among all rows of all inputs, before `--shard` and `--limit`. `id` is unique in the run and,
    like `image`, holds no lone surrogate. `image` is what people are shown of the image: its path as it was given, or
    None for bare bytes; of several images, a JSON list of these. `sources` are the row's images in order, usually
    one. `values` are the columns that were asked for, empty for plain files; a column that this row lacks is None.
    A row that is already known to be bad carries its `error`; `asked` is what the run asks about it, where all rows are
    asked the same; `earlier` is its result from an earlier run, where that is to be kept.
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
    """Which rows are read, and what of them.

    `columns` must exist in every manifest; `keep` are those to pass through ("all": every one but those of id and
    image). `shard` is (I, N), 1 <= I <= N: the rows whose index is I - 1 modulo N. `limit` counts the rows that come,
    behind the shard. Where no `image_column` is named, images are in the first of `usual_image_columns` that a
    manifest has, else in its only column that may hold them. Without `needs_image` a row has images only where
    `image_column` names them; without `needs_id` the rows of manifests are known by their numbers.
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


class Entry(NamedTuple):
    """A row before it has its place in the run. `number` counts from 0 within its input.

    Without a `name` the row has no id of its own (its error says why), and is given one.
    """

    number: int
    name: str | None
    image: str | None
    sources: tuple[ImageSource, ...]
    values: Mapping[str, Any] = NO_VALUES
    error: RowError | None = None


class Source(Protocol):
    """What one INPUT holds.

    `size` is the number of rows, None while it is not known; it is known once `entries` or `names` have come to their
    end. `distinct` says that no two rows can have one id. `listed` says that all ids are at hand without reading,
    `is_streaming` that a row may come only when somebody sends it.
    """

    size: int | None
    distinct: bool
    listed: bool
    is_streaming: bool
    identity: Mapping[str, Any]
    kept: Mapping[str, Any]

    def entries(self, start: int, step: int) -> Iterator[Entry]:
        """Every `step`-th row from number `start` on."""
        ...

    def names(self, start: int, step: int) -> Iterator[tuple[int, str | None]]:
        """Number and name of the rows that `entries` would give, without their images."""
        ...

    def fallback_name(self, number: int) -> str:
        """What a row without an id of its own is called."""
        ...

    def resolve(self, value: object) -> ImageSource | RowError:
        """One image value of this input's rows -> what opens it."""
        ...
