"""Files and folders, local and remote, behind fsspec's interface: found, listed, opened, read in pieces.

Whatever keeps a named file from being read, then or half way through, is an `InputError` that names it. Knows nothing
of rows or images.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import os
import posixpath
import re
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, ClassVar

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from idefics_cli.columns import MAX_ROW_BYTES
from idefics_cli.errors import InputError
from idefics_cli.storage.filenames import REMOTE_ADDRESS, address_refusal, escape_name, is_hidden, shown_address
from idefics_cli.storage.regular_file import POINTER_BYTES, lfs_pointer, open_regular

READ_BYTES = 1 << 18
BUFFER_BYTES = 2 << 20
DIGEST_BYTES = 1 << 20
MAX_PIECE_BYTES = MAX_ROW_BYTES
MOST_HELD = 100
PATTERN = re.compile(r"[*?[]")
GOOGLE = re.compile(r"gc?s://", re.IGNORECASE)
GOOGLE_SECONDS = 10  # of tries within one call


class LocalFiles(LocalFileSystem):
    """The local file system: names are taken literally (no `~`, no `file:`), and only regular files are opened."""

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return os.fspath(path)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> BinaryIO:
        assert mode == "rb", mode
        return open_regular(path)


class HeldFile(LocalFiles):
    """One local file, opened once: whatever has its name by then, its bytes are read."""

    cachable = False
    held: ClassVar[weakref.WeakSet[io.FileIO]] = weakref.WeakSet()

    def __init__(self, path: str) -> None:
        super().__init__()
        self._file = open_regular(path)
        self.held.add(self._file)

    def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            self._file.close()

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        found = os.fstat(self._file.fileno())
        return {"name": path, "type": "file", "size": found.st_size, "mtime": found.st_mtime, "ino": found.st_ino}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> BinaryIO:
        return Positioned(self._file.fileno(), self)


class Positioned(io.RawIOBase):
    """The bytes of an open file from its start, whatever place it is read at elsewhere. `owner` keeps it open."""

    def __init__(self, file: int, owner: Any = None) -> None:
        self._file, self._owner, self._place = file, owner, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: os.fstat(self._file).st_size}[whence]
        self._place = max(0, start + place)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        number = os.preadv(self._file, [buffer], self._place)
        self._place += number
        return number


class Range(io.RawIOBase):
    """The bytes of a stream from `begin` on. No read goes beyond `end`; with `may_go_on` a further one may."""

    def __init__(self, stream: Any, begin: int, end: int | None, may_go_on: bool) -> None:
        self._stream, self._begin = stream, begin
        self._size = stream.seek(0, os.SEEK_END)
        self._end, self._may_go_on = self._size if end is None else end, may_go_on
        stream.seek(begin)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: self._begin, os.SEEK_CUR: self._stream.tell(), os.SEEK_END: self._size}[whence]
        return self._stream.seek(max(self._begin, start + place)) - self._begin

    def readinto(self, buffer: Any) -> int:
        left = self._end - self._stream.tell()
        data = self._stream.read(len(buffer) if left <= 0 and self._may_go_on else max(0, min(len(buffer), left)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


@dataclass(frozen=True)
class File:
    """A file or folder. `name` is its path or address for people and ids, without anything secret; `path` is its path
    within the file system."""

    name: str
    path: str
    filesystem: AbstractFileSystem
    size: int | None = None
    is_folder: bool = False

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFiles)

    @property
    def comes_slowly(self) -> bool:
        """Whether a row may be long in coming, and those before it are not to wait for it."""
        return False

    @property
    def parent(self) -> File | None:
        return File(posixpath.dirname(self.name), posixpath.dirname(self.path), self.filesystem)

    def child(self, path: str) -> File:
        """What lies at the relative `path` below this folder."""
        return File(posixpath.join(self.name, escape_name(path)), posixpath.join(self.path, path), self.filesystem)

    def info(self) -> dict[str, Any]:
        """What fsspec knows of it as it is now, among others its `size` and `type`."""
        with refusing(self.name, OSError, ValueError):
            return self.filesystem.info(self.path)

    def found(self) -> File:
        """The same, as the file system knows it. Raises InputError where there is no such file or folder."""
        info = self.info()
        if info["type"] not in ("file", "directory"):
            raise InputError(f"{self.name} is not a regular file: name image files, folders, manifests or `-`")
        return replace(self, size=info["size"], is_folder=info["type"] == "directory")

    def held(self) -> File:
        """The same, kept open for as long as it is needed, if it is local and not too many are."""
        if not self.is_local or len(HeldFile.held) >= MOST_HELD:
            return self
        with refusing(self.name, OSError):
            return replace(self, filesystem=HeldFile(self.path))

    def entries(self) -> list[dict[str, Any]]:
        """The same of what lies in this folder."""
        with refusing(self.name, OSError):
            return self.filesystem.ls(self.path, detail=True)

    def open(self, buffer_bytes: int = BUFFER_BYTES) -> BinaryIO:
        """Its bytes from the start, seekable."""
        with refusing(self.name, OSError):
            stream = io.BufferedReader(self.filesystem.open(self.path, "rb"), buffer_bytes)
            pointer = lfs_pointer(stream.peek(1)) if (self.size or 0) <= POINTER_BYTES else None
        if pointer:
            raise InputError(f"{self.name} is {pointer}")
        return stream

    def open_range(self, begin: int, end: int | None, may_go_on: bool) -> BinaryIO:
        """The bytes from `begin` up to `end`, seekable within these. No others are read unless they are asked for."""
        with refusing(self.name, OSError):
            found = Range(self.filesystem.open(self.path, "rb"), begin, end, may_go_on)
            return found if may_go_on else io.BufferedReader(found, BUFFER_BYTES)


def local_file(path: str) -> File:
    return File(escape_name(path), path, LocalFiles())


def place(name: str) -> File:
    """The file or folder of this path or address, which may not exist. Raises InputError for what is never opened."""
    if refusal := address_refusal(name):
        raise InputError(refusal)
    if REMOTE_ADDRESS.match(name):
        return _remote_place(name)
    return local_file(name)


def _remote_place(address: str) -> File:
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem

    name = shown_address(address)
    try:
        filesystem, path = FileSystem.from_uri(_with_patience(address))
    except (ArrowException, OSError, ValueError) as error:
        reason = str(error).replace(address, name)
        raise InputError(f"cannot open {name}: {reason}; use an address of pyarrow's, as s3:// or gs://") from None
    return File(name, path, ArrowFSWrapper(filesystem, skip_instance_cache=True))


def _with_patience(address: str) -> str:
    """Google's client tries for a quarter of an hour, in which no signal is heard, where its address sets no limit."""
    if not GOOGLE.match(address) or "retry_limit_seconds=" in address:
        return address
    return f"{address}{'&' if '?' in address else '?'}retry_limit_seconds={GOOGLE_SECONDS}"


def find(name: str) -> File:
    """The file or folder of this path or address. Raises InputError where there is none."""
    return place(name).found()


def find_all(name: str) -> list[File]:
    """What `find` finds; or, where nothing has this name and it is a pattern (`*`, `?`, `[ab]`), the files that match
    it, in the order of their names. Raises InputError where there are none."""
    pattern = place(name)
    if not PATTERN.search(pattern.path) or pattern.filesystem.exists(pattern.path):
        return [find(name)]
    if pattern.is_local:
        files = [local_file(path) for path in sorted(glob.glob(pattern.path, recursive=True))]
    else:
        before = pattern.name.removesuffix(pattern.path)
        with refusing(pattern.name, OSError):
            paths = sorted(pattern.filesystem.glob(pattern.path))
        files = [File(before + escape_name(path), path, pattern.filesystem) for path in paths]
    files = [file for file in files if not is_hidden(posixpath.basename(file.path))]
    if not files:
        raise InputError(f"no file matches {pattern.name}: check the pattern, and quote it against the shell")
    return [file.found() for file in files]


def walk(
    folder: File, recursive: bool, follow_links: bool = False, closed: Callable[[str, InputError], None] | None = None
) -> Iterator[tuple[str, bool]]:
    """The POSIX paths, relative to `folder`, of all files and links in it, and whether each is a regular file.

    In no order. Hidden and system files are left out. Links to folders are followed with `follow_links`, but never
    round. `closed` is told of local sub-folders that cannot be listed; without it, one raises InputError.
    """
    folders = [("", (os.path.realpath(folder.path),))]
    while folders:
        below, way = folders.pop()
        try:
            entries = (folder.child(below) if below else folder).entries()
        except InputError as error:
            if closed is None or not below or not folder.is_local:
                raise
            closed(below, error)
            continue
        for info in entries:
            name = posixpath.basename(info["name"])
            path = posixpath.join(below, name)
            if is_hidden(name):
                continue
            target = _target_type(info["name"]) if follow_links and info.get("islink") else info["type"]
            if target != "directory":
                yield path, target == "file"
            elif recursive:
                real = os.path.realpath(info["name"]) if follow_links else ""
                if real not in way:
                    folders.append((path, (*way, real) if follow_links else ()))


def _target_type(link: str) -> str:
    return "directory" if os.path.isdir(link) else "file" if os.path.isfile(link) else "other"


def cannot_read(name: str, error: Exception, remedy: str) -> InputError:
    reason = getattr(error, "strerror", None) or str(error).partition(" error_info=")[0] or type(error).__name__
    return InputError(f"cannot read {name}: {reason.removesuffix('.')}; {remedy}")


@contextmanager
def refusing(
    name: str, *kinds: type[Exception], remedy: str = "check the name and your access to it"
) -> Iterator[None]:
    """Errors of these kinds become one line of how `name` cannot be read."""
    try:
        yield
    except kinds as error:
        raise cannot_read(name, error, remedy) from error


# ---- streams


@contextmanager
def open_stream(
    file: File, compressed: bool, begin: int = 0, end: int | None = None, may_go_on: bool = False
) -> Iterator[BinaryIO]:
    """The bytes of `file`, unpacked where it is `compressed` with gzip; an InputError where it is damaged. Else those
    from `begin` up to `end`, and on where that is asked for."""
    with (
        refusing(file.name, EOFError, OSError, zlib.error, remedy="fetch or make it again"),
        file.open() if begin == 0 and end is None else file.open_range(begin, end, may_go_on) as raw,
        gzip.GzipFile(fileobj=raw, mode="rb") if compressed else raw as stream,
    ):
        yield stream


def split_stream(stream: BinaryIO, separator: bytes) -> Iterator[bytes | None]:
    """The pieces between separators as soon as they have come; the last one may be without a separator.

    None stands for a piece of more than 64 MB, which is never held.
    """
    return (piece for _, piece in placed_pieces(stream, separator))


def placed_pieces(stream: BinaryIO, separator: bytes) -> Iterator[tuple[int, bytes | None]]:
    """The same, each with the place of its first byte."""
    parts: list[bytes] = []
    place = size = 0
    while chunk := stream.read(READ_BYTES):
        *pieces, rest = chunk.split(separator)
        for piece in pieces:
            yield place, _joined(parts, size, piece) if size else piece
            place += size + len(piece) + 1
            parts, size = [], 0
        size += len(rest)
        if rest and size <= MAX_PIECE_BYTES:
            parts.append(rest)
    if size:
        yield place, _joined(parts, size, b"")


def _joined(parts: list[bytes], size: int, last: bytes) -> bytes | None:
    return None if size + len(last) > MAX_PIECE_BYTES else b"".join([*parts, last])


def file_digest(file: File, size: int | None = None) -> str:
    """A digest of the first and the last megabyte: enough to notice a changed file, and quick for a large one. `size`:
    only so many bytes are looked at."""
    digest = hashlib.sha256()
    with open_stream(file, compressed=False) as stream:
        size = stream.seek(0, os.SEEK_END) if size is None else size
        for start in sorted({0, max(0, size - DIGEST_BYTES)}):
            stream.seek(start)
            digest.update(stream.read(min(DIGEST_BYTES, size - start)))
    return digest.hexdigest()
