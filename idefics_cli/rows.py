"""A row of the input and where its images are, and the options of reading and of images. Imports nothing heavy."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeAlias

from idefics_cli.errors import IdeficsError, RowError
from idefics_cli.validation import Help

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

    def identity(self) -> bytes:
        """What changes with the file, as far as its store tells."""
        try:
            found = self.filesystem.info(self.key)
        except (OSError, ValueError):
            return b"none"
        return repr([found.get("size"), found.get("ETag"), str(found.get("mtime"))]).encode()


class BoundPath(type(Path())):  # type: ignore[misc]  # what Path makes on this system
    """A local file that has to lie below the real folder `below` when it is opened, whatever its links are by then."""

    below: str = ""

    @classmethod
    def within(cls, below: str, *parts: str) -> BoundPath:
        path = cls(*parts)
        path.below = below
        return path

    def __reduce__(self) -> tuple[Any, ...]:  # to the processes that open it
        return BoundPath.within, (self.below, str(self))


ImageSource: TypeAlias = Path | bytes | RemoteFile


@dataclass(frozen=True, slots=True)
class InputRow:
    """One row of the input.

    `index` is its place among all rows of all inputs, before `--shard` and `--limit`. `id` is unique among rows
    without the error `duplicate_id`.
    `image` is what people are shown of the image: its path as it was given, or None for bare bytes; of several images,
    a JSON list of these. Neither holds a lone surrogate. `sources` are the row's images in order; where images are
    optional, the reason may stand there why they cannot be used. `values` are the columns that were asked for; one that
    this row lacks is None. `error` says why a row is bad. `asked` is the row's question where each input row is asked
    several, `earlier` its result row from an earlier run.
    """

    index: int
    id: str
    image: str | None
    sources: tuple[ImageSource | RowError, ...]
    values: Mapping[str, Any]
    error: RowError | None = None
    asked: str | None = None
    earlier: Mapping[str, Any] | None = None


def parse_keep(text: str) -> tuple[str, ...] | Literal["all"]:
    if text == "all":
        return "all"
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise IdeficsError(f"--keep {text!r} has an empty name: separate column names by commas, as in a,b")
    return tuple(dict.fromkeys(names))


def parse_shard(text: str) -> tuple[int, int]:
    """`auto` is what the scheduler says; `auto/N` where it does not say how many tasks there are."""
    parts = text.split("/")
    if parts[0] == "auto" and len(parts) < 3:
        place, number = _shard_of_task()
        parts = [str(place), parts[1] if len(parts) == 2 else "" if number is None else str(number)]
        if not parts[1]:
            raise IdeficsError("the scheduler does not tell how many tasks there are: add it, as auto/8")
    if len(parts) == 2 and all(part.isascii() and part.isdigit() for part in parts):
        place, number = int(parts[0]), int(parts[1])
        if 1 <= place <= number:
            return place, number
        if place == 0 < number:
            raise IdeficsError(f"invalid shard {text!r}: shards are counted from 1, as 1/{number} for the first")
    raise IdeficsError(f"invalid shard {text!r}: expected I/N with 1 <= I <= N, or auto")


# What schedulers tell a task of an array: its number, the first and the last one's, and the step between them.
TASK_VARIABLES = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_STEP"),
    ("LSB_JOBINDEX", None, "LSB_JOBINDEX_END", "LSB_JOBINDEX_STEP"),
    ("SGE_TASK_ID", "SGE_TASK_FIRST", "SGE_TASK_LAST", "SGE_TASK_STEPSIZE"),
    ("PBS_ARRAY_INDEX", None, None, None),
    ("PBS_ARRAYID", None, None, None),
)
KUBERNETES_INDEX = "JOB_COMPLETION_INDEX"  # from 0


def _shard_of_task() -> tuple[int, int | None]:
    """Which task of an array this process is, counted from 1, and of how many."""
    for own, *others in TASK_VARIABLES:
        if (index := _number_in(own)) is None or (own == "LSB_JOBINDEX" and index == 0):  # a job that is not an array
            continue
        first, last, step = (name and _number_in(name) for name in others)
        first, step = 1 if first is None else first, step or 1
        if own == "SLURM_ARRAY_TASK_ID" and (count := _number_in("SLURM_ARRAY_TASK_COUNT")) is not None:
            if last is not None and last != first + (count - 1) * step:
                raise IdeficsError(
                    f"the array's {count} tasks, from {first} to {last}, are not numbered evenly: make it one from 1 to"
                    f" {count}"
                )
            last = first + (count - 1) * step
        return (index - first) // step + 1, None if last is None else (last - first) // step + 1
    if (index := _number_in(KUBERNETES_INDEX)) is not None:
        return index + 1, None
    raise IdeficsError("no scheduler's variables here (SLURM, PBS, LSF, ...): say which, as --shard 1/8")


def _number_in(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdigit() else None


def parse_frame(text: str) -> int | Literal["middle"]:
    if text == "middle":
        return "middle"
    number = "1" if text == "first" else text
    if not (number.isascii() and number.isdigit() and 0 < int(number) < 10**9):
        raise IdeficsError(f"invalid frame {text!r}: expected first, middle or a number from 1 on")
    return int(number)


def parse_delimiter(text: str) -> str:
    delimiter = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(delimiter) != 1 or delimiter in '"\r\n\0':
        raise IdeficsError(f"invalid delimiter {text!r}: expected one character, such as ; or tab")
    return delimiter


def parse_encoding(text: str) -> str:
    try:
        "a".encode(text)  # raises LookupError too for what is no encoding of texts
        return codecs.lookup(text).name
    except (LookupError, ValueError) as error:
        raise IdeficsError(f"unknown encoding {text!r}: use a name such as cp1252, latin-1 or utf-16") from error


@dataclass(frozen=True)
class DelimitedOptions:
    """How CSV and TSV are read."""

    delimiter: Annotated[
        str | None,
        Help("Of CSV, as ; or tab", metavar="C|tab", parse=parse_delimiter, default="what splits the header"),
    ] = None
    encoding: Annotated[
        str | None,
        Help("Of CSV, as cp1252", metavar="NAME", parse=parse_encoding, default="utf-8, or by its mark"),
    ] = None


@dataclass(frozen=True)
class ReadOptions:
    """Which rows are read, and which of their columns.

    Every manifest must have `columns` (of a tuple's names the first that is there is read) and `keep`, the columns to
    pass through ("all": every one but those of id and image). Texts in `list_columns` and in columns of images may be
    lists. `shard` is (I, N), 1 <= I <= N: the I-th of N contiguous ranges. `limit` counts the rows of the shard.
    Without an `image_column`, images are in the first of `usual_image_columns` that a manifest has, else in the only
    column that looks like images. With `allow_no_image` a row may be without. `needs_image` False: rows have images
    only where `image_column` names them; None: also where one of the usual columns is there, and the reason why one
    cannot be used stands in its place among the row's sources. Without `needs_id` ids are numbers.
    """

    recursive: Annotated[bool, Help("Leave sub-folders out", flags=("--no-recursive",))] = True
    null: Annotated[bool, Help("Paths on stdin end with NUL, not with a line break", flags=("-0", "--null"))] = False
    stdin: Annotated[
        Literal["paths", "jsonl"] | None,
        Help("What stdin holds", metavar="paths|jsonl", default="jsonl where it begins with {, else paths"),
    ] = None
    image_column: Annotated[
        str | None,
        Help(
            "Column of images; several as a,b or image_*; or a path of columns, as val/{image_id:012d}.jpg",
            metavar="NAME",
            default="image, else the only one of images",
            panel="Images",
        ),
    ] = None
    allow_no_image: Annotated[bool, Help("Ask about rows without an image too, in text alone", panel="Images")] = False
    usual_image_columns: tuple[str, ...] = ("image", "images")
    id_column: Annotated[str | None, Help("Column of the ids", metavar="NAME", default="id, else the row's number")] = (
        None
    )
    image_root: Annotated[
        str | None,
        Help(
            "Folder of a manifest's images; no path may lead out of it",
            metavar="FOLDER",
            default="the manifest's folder",
            panel="Images",
        ),
    ] = None
    follow_links: Annotated[
        bool, Help("Follow links that lead out of their folder, and to folders", panel="Images")
    ] = False
    json_key: Annotated[
        str | None, Help("Where a .json file has its list of rows", metavar="KEY", default="the only list of objects")
    ] = None
    delimited: DelimitedOptions = field(default_factory=DelimitedOptions)
    columns: tuple[str | tuple[str, ...], ...] = ()
    list_columns: tuple[str, ...] = ()
    keep: Annotated[
        tuple[str, ...] | Literal["all"],
        Help("Columns of the manifest that the output has too", metavar="A,B|all", parse=parse_keep),
    ] = ()
    limit: Annotated[int | None, Help("Only the first N rows", min=1, max=sys.maxsize)] = None
    shard: Annotated[
        tuple[int, int] | None,
        Help(
            "Only the I-th of N ranges of rows; auto: as SLURM, PBS, LSF or Kubernetes says",
            metavar="I/N|auto",
            parse=parse_shard,
        ),
    ] = None
    needs_image: bool | None = True
    needs_id: bool = True

    def __post_init__(self) -> None:
        assert self.limit is None or self.limit > 0, f"limit {self.limit}"
        if self.shard is not None:
            parse_shard("{}/{}".format(*self.shard))


@dataclass(frozen=True)
class ImageOptions:
    """How images are decoded.

    `max_pixels` is width x height, `max_bytes` the file's length. With `draft` a JPEG may be decoded at a half, a
    quarter or an eighth of its size, where that is still far more than is asked for. An image that takes longer than
    `decode_timeout` seconds is given up. `workers` None: one process per processor, at most MAX_WORKERS. With
    `allow_truncated` a file may end early. Of an animated image, or a TIFF of many pages, `frame` is taken.
    """

    max_pixels: Annotated[int, Help("Larger images are error rows", min=1, max=10**12)] = 64_000_000
    draft: Annotated[bool, Help("Large JPEGs at reduced size: faster, nearly the same texts")] = False
    decode_timeout: Annotated[
        float, Help("Images that take longer to decode are error rows", metavar="SECONDS", min=0.1, max=86_400.0)
    ] = 30.0
    workers: Annotated[
        int | None,
        Help("Processes that decode images", min=1, default=f"one for each processor, at most {MAX_WORKERS}"),
    ] = None
    max_bytes: int = 256 * 1024 * 1024
    allow_truncated: Annotated[bool, Help("Take what there is of a file that ends early")] = False
    frame: Annotated[
        int | Literal["middle"],
        Help(
            "Which frame of an animated image, or page of a TIFF: first, middle or a number from 1",
            metavar="WHICH",
            default="first",
            parse=parse_frame,
        ),
    ] = 1

    def __post_init__(self) -> None:
        parse_frame(str(self.frame))

    @property
    def num_workers(self) -> int:
        return self.workers or min(MAX_WORKERS, os.cpu_count() or 1)
