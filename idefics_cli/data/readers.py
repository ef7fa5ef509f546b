"""Inputs -> rows: image files, folders and paths on stdin, in order, each with an id that no other row has.

`open_inputs` looks at everything that was named before it gives back a row, so that a user's mistake is an `InputError`
while nothing has been loaded yet. A bad row is a row with an `error`. No picture is opened here beyond the first bytes
that tell a picture without a telling name, nothing is fetched, and nothing is known of models or outputs.

Folders are walked without following links to folders: what such a link leads to inside the folder is listed under its
own path anyway, and what lies outside has not been asked for. A link to a file is a row like any other while it stays
inside the folder, and an `image_not_allowed` row when it leads out.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from idefics_cli.errors import InputError, RowError

# Every common image format, those too that this program cannot decode: such a file becomes an error row with a reason.
IMAGE_SUFFIX = re.compile(
    r"""\.(
    apng|avifs?|bmp|bw|cur|dds|dib|eps|fits?|gif|hei[cf]|hif|icns|ico|j2[ck]|jfif|jp2|jpc|jpe?g?|jpf|jpx|jxl|mpo|msp
    |pbm|pcx|pfm|pgm|png|pnm|ppm|psd|qoi|ras|rgba?|sgi|svg|tga|tiff?|webp|wmf|xbm|xpm
    )$""",
    re.VERBOSE | re.IGNORECASE,
)
IMAGE_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM.{4}\0\0\0\0|II\*\0|MM\0\*|RIFF.{4}WEBP|.{4}ftyp(avif|heic|mif1)", re.DOTALL
)
SIGNATURE_BYTES = 16

MANIFEST_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".tar")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
SYSTEM_NAMES = frozenset(
    {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "system volume information", "@eadir"}
)

WEB_ADDRESS = re.compile(r"(https?|ftp)://|(data|file):", re.IGNORECASE)
REMOTE_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)

# What an escaped byte looks like in an id: a byte that is not UTF-8, or a backslash that would read as such an escape.
ESCAPED_BYTE = re.compile(r"\\x(5c|[89a-f][0-9a-f])")
SURROGATES = range(0xDC80, 0xDD00)  # how os.fsdecode carries the bytes 0x80 to 0xff of a name that is not UTF-8

READ_BYTES = 1 << 16


@dataclass(frozen=True)
class InputRow:
    """One picture to describe.

    `id` is unique in the run and, like `image`, holds no lone surrogate; `source` is what opens the picture.
    A row that is already known to be bad carries its `error`.
    """

    index: int
    id: str
    image: str
    source: Path | bytes | str
    error: RowError | None = None


@dataclass(frozen=True)
class Inputs:
    """The rows of one run: an iterator that can be used once, and their number where it is known beforehand."""

    rows: Iterator[InputRow]
    total: int | None


@dataclass(frozen=True)
class _Entry:
    """A row before it has its place in the run; `name` is the id and `path` the image, both as the system has them."""

    name: str
    path: str
    source: Path | str
    error: RowError | None = None


@dataclass(frozen=True)
class _Listing:
    """What one INPUT holds. `entries()` starts anew at each call, except that of stdin (`total` None)."""

    entries: Callable[[], Iterator[_Entry]] = field(repr=False)
    total: int | None


def escape_name(name: str) -> str:
    """A name from the file system as text that JSON and Parquet hold; `unescape_name` gives the name back.

    Names that are UTF-8 stay as they are. A byte that is not UTF-8 becomes `\\xNN`; a backslash of the name itself that
    would read as such an escape becomes `\\x5c`, so that no two names ever share a text.
    """
    escaped = ESCAPED_BYTE.sub(lambda match: r"\x5c" + match.group()[1:], name)
    if not escaped.isascii():
        escaped = "".join(rf"\x{ord(c) - 0xDC00:02x}" if ord(c) in SURROGATES else c for c in escaped)
    return escaped


def unescape_name(text: str) -> str:
    """The name that `escape_name` made `text` from; `os.fsencode` of it gives the name's bytes."""

    def restore(match: re.Match[str]) -> str:
        byte = int(match.group(1), 16)
        return chr(byte) if byte < 0x80 else chr(0xDC00 + byte)

    return ESCAPED_BYTE.sub(restore, text)


def open_inputs(
    inputs: Sequence[str],
    *,
    recursive: bool = True,
    null: bool = False,
    stdin: BinaryIO | None = None,
    limit: int | None = None,
) -> Inputs:
    """Look at all `inputs` (file and folder paths, or `-` for paths on `stdin`) and give their rows.

    Raises InputError for what is missing, unreadable, empty or not an image file or folder, and for two rows with one
    id: at once, unless stdin is among the inputs; then from the iterator, when the second of the two comes.
    `limit` keeps the first so many rows.
    """
    assert limit is None or limit > 0, f"limit {limit}"
    if list(inputs).count("-") > 1:
        raise InputError("`-` is named twice, but stdin can be read once: name it once")
    listings = [_listing(name, recursive=recursive, null=null, stdin=stdin) for name in inputs]
    sizes = [listing.total for listing in listings]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    if total is not None and len(listings) > 1:
        for _ in _numbered(listings):  # a run over the names alone, which finds two rows with one id
            pass
    return Inputs(_limited(_numbered(listings), limit), total if limit is None else _smaller(total, limit))


def read_inputs(
    inputs: Sequence[str], *, recursive: bool = True, null: bool = False, stdin: BinaryIO | None = None
) -> Iterator[InputRow]:
    """The rows of `open_inputs`, for callers that need no count."""
    return open_inputs(inputs, recursive=recursive, null=null, stdin=stdin).rows


def _smaller(total: int | None, limit: int) -> int | None:
    return None if total is None else min(total, limit)


def _limited(rows: Iterator[InputRow], limit: int | None) -> Iterator[InputRow]:
    """The first `limit` rows, without asking for the one behind them (stdin may be slow to give it)."""
    if limit is None:
        yield from rows
        return
    for row in rows:
        yield row
        if row.index + 1 == limit:
            return


def _numbered(listings: Iterable[_Listing]) -> Iterator[InputRow]:
    seen: dict[str, tuple[int, str]] = {}
    entries = chain.from_iterable(listing.entries() for listing in listings)
    for index, entry in enumerate(entries):
        row = InputRow(index, escape_name(entry.name), escape_name(entry.path), entry.source, entry.error)
        first = seen.setdefault(row.id, (index, row.image))
        if first[0] != index:
            raise InputError(
                f"rows {first[0] + 1} ({first[1]}) and {index + 1} ({row.image}) have one id, {row.id}: name each image"
                " once, and of folders that hold equal names the folder above them, or give each a run of its own"
            )
        yield row


def _listing(name: str, *, recursive: bool, null: bool, stdin: BinaryIO | None) -> _Listing:
    if name == "-":
        return _stdin_listing(stdin, null)
    shown = escape_name(name)
    _refuse_address(name, shown)
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError) as error:
        raise InputError(_cannot("read", shown, error, "check the path")) from error
    if stat.S_ISDIR(mode):
        return _folder_listing(name, recursive)
    _refuse_file(name, shown, mode)
    return _Listing(lambda: iter([_Entry(name, name, Path(name))]), 1)


def _cannot(verb: str, shown: str, error: Exception, remedy: str) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return f"cannot {verb} {shown}: {reason}; {remedy}"


def _refuse_address(name: str, shown: str) -> None:
    if WEB_ADDRESS.match(name):
        raise InputError(f"{shown}: nothing is fetched from the web; download it first, for example with img2dataset")
    if REMOTE_ADDRESS.match(name):
        raise InputError(f"{shown}: this version reads local image files, folders and `-`; copy it here first")


def _refuse_file(name: str, shown: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise InputError(f"{shown} is no regular file: name image files, folders or `-`")
    if _is_manifest(name):
        raise InputError(
            f"{shown}: this version reads image files, folders and `-` (paths from stdin), no tables or archives;"
            " pipe the paths in, a line each"
        )
    if not os.access(name, os.R_OK):
        raise InputError(f"cannot read {shown}: permission denied; change its permissions or leave it out")


def _is_manifest(name: str) -> bool:
    lowered = name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        lowered = lowered.removesuffix(suffix)
    return lowered.endswith((*MANIFEST_SUFFIXES, ".tgz"))


# Folders


def _folder_listing(folder: str, recursive: bool) -> _Listing:
    names = sorted(_walk(folder, recursive))
    if not names:
        hint = "" if recursive else " (its sub-folders are left out by --no-recursive)"
        raise InputError(f"no images in {escape_name(folder)}{hint}: name a folder that holds some")
    root = os.path.realpath(folder)
    return _Listing(lambda: (_folder_entry(folder, root, name) for name in names), len(names))


def _walk(folder: str, recursive: bool) -> Iterator[str]:
    """POSIX paths, relative to `folder`, of the images in it, in no order. Hidden and system files are passed over."""
    waiting = [""]
    while waiting:
        below = waiting.pop()
        for entry in _scan(os.path.join(folder, below)):
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_NAMES:
                continue
            if entry.is_dir(follow_symlinks=False):
                if recursive:
                    waiting.append(f"{below}{entry.name}/")
            elif _looks_like_image(entry):
                yield below + entry.name


def _scan(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        remedy = "make it readable, or name the folders beside it one by one"
        raise InputError(_cannot("list the folder", escape_name(folder), error, remedy)) from error


def _looks_like_image(entry: os.DirEntry[str]) -> bool:
    """By its name; where the name says nothing, a regular file's first bytes decide."""
    if IMAGE_SUFFIX.search(entry.name):
        return True
    if not entry.is_file(follow_symlinks=False):
        return False
    try:
        with open(entry.path, "rb", buffering=0) as file:
            return IMAGE_SIGNATURE.match(file.read(SIGNATURE_BYTES)) is not None
    except OSError:
        return False  # neither its name nor its bytes speak for a picture


def _folder_entry(folder: str, root: str, name: str) -> _Entry:
    path = os.path.join(folder, name)
    return _Entry(name, path, Path(path), _link_error(path, root))


def _link_error(path: str, root: str) -> RowError | None:
    if not os.path.islink(path):
        return None
    target = os.path.realpath(path)
    if os.path.commonpath([root, target]) == root:
        return None
    return RowError("image_not_allowed", "a link that leads out of the folder; name its target as an INPUT of its own")


# Paths on stdin


def _stdin_listing(stdin: BinaryIO | None, null: bool) -> _Listing:
    """Reads up to the first path, so that an empty stdin is known before a model is loaded."""
    if stdin is None:
        raise InputError("stdin is closed: pipe paths into `-`, a line each")
    records = _records(stdin, b"\0" if null else b"\n")
    first = next(records, None)
    if first is None:
        raise InputError("no paths on stdin: pipe paths into `-`, a line each (or separated by NUL, with --null)")
    if b"\0" in first:
        raise InputError("the paths on stdin are separated by NUL: add -0/--null")
    return _Listing(lambda: map(_stdin_entry, chain([first], records)), None)


def _stdin_entry(record: bytes) -> _Entry:
    path = os.fsdecode(record)
    error = RowError("row_invalid", "the path holds a NUL byte") if b"\0" in record else None
    return _Entry(path, path, path, error)


def _records(stream: BinaryIO, separator: bytes) -> Iterator[bytes]:
    """The pieces between separators, as soon as they have come; empty ones are passed over.

    Reads below the stream's buffer where there is one: a thread that waits inside a buffered read holds a lock which
    the interpreter wants when it ends.
    """
    source = getattr(stream, "raw", stream)
    rest = b""
    while chunk := source.read(READ_BYTES):
        *pieces, rest = (rest + chunk).split(separator)
        yield from filter(None, map(_without_return if separator == b"\n" else bytes, pieces))
    yield from filter(None, [_without_return(rest) if separator == b"\n" else rest])


def _without_return(line: bytes) -> bytes:
    return line.removesuffix(b"\r")
