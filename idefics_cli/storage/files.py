"""Files of bytes, here or on any file system that pyarrow opens: found, opened, read in pieces.

Here, only regular files are opened, and none is waited for. Whatever keeps a named file from being read, then or half
way through, is an `InputError` that names it. Nothing is known of rows or images.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from idefics_cli.errors import InputError
from idefics_cli.storage.filenames import REMOTE_ADDRESS, WEB_ADDRESS, escape_name, shown_address

READ_BYTES = 1 << 18
BUFFER_BYTES = 1 << 20
REMOTE_BUFFER_BYTES = 4 << 20
DIGEST_BYTES = 1 << 20
MAX_PIECE_BYTES = 64 << 20


class InputFile(Protocol):
    """A file that was named. `name` is how it was named, for people and ids."""

    name: str
    buffer_bytes: int

    @property
    def size(self) -> int: ...

    def open(self) -> BinaryIO:
        """Its bytes from the start, seekable."""
        ...

    def open_native(self) -> Any:
        """The same as a file of pyarrow's."""
        ...


@dataclass(frozen=True)
class LocalFile:
    path: str
    size: int
    buffer_bytes: int = BUFFER_BYTES

    @property
    def name(self) -> str:
        return escape_name(self.path)

    @property
    def folder(self) -> str:
        return os.path.dirname(self.path)

    def open(self) -> BinaryIO:
        try:
            # Looked at before it is opened, since opening a FIFO or a device already does something to it.
            refuse_irregular(self.name, os.stat(self.path).st_mode)
            return open(self.path, "rb", buffering=self.buffer_bytes, opener=self._open_regular)
        except OSError as error:
            raise cannot_read(self.name, error, "check the file and its permissions") from error

    def open_native(self) -> Any:
        import pyarrow

        with self.open() as file:  # named by its number, since pyarrow takes no name that is not UTF-8
            return pyarrow.OSFile(f"/dev/fd/{file.fileno()}")

    def _open_regular(self, path: str, flags: int) -> int:
        """Looks again, since the name may have come to mean another file, and does not wait meanwhile."""
        descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InputError(f"{self.name} is no regular file any more: read it again")
        return descriptor


def refuse_irregular(name: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise InputError(f"{name} is no regular file: name image files, folders, manifests or `-`")


def cannot_read(name: str, error: Exception, remedy: str) -> InputError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return InputError(f"cannot read {name}: {reason}; {remedy}")


# On other file systems


@dataclass(frozen=True)
class RemoteFolder:
    """A folder, or what may be one, on a file system of pyarrow's; `name` is its address without anything secret."""

    filesystem: Any  # pyarrow.fs.FileSystem
    key: str
    name: str

    def child(self, path: str) -> tuple[str, str]:
        """Key and name of what lies at `path` below this folder."""
        return f"{self.key.rstrip('/')}/{path}", f"{self.name.rstrip('/')}/{escape_name(path)}"


@dataclass(frozen=True)
class RemoteInput:
    """A manifest on a file system of pyarrow's."""

    place: RemoteFolder
    size: int
    buffer_bytes: int = REMOTE_BUFFER_BYTES

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def folder(self) -> RemoteFolder:
        key, name = self.place.key.rpartition("/")[0], self.name.rpartition("/")[0]
        return RemoteFolder(self.place.filesystem, key, name)

    def open(self) -> BinaryIO:
        return io.BufferedReader(self.open_native(), self.buffer_bytes)

    def open_native(self) -> Any:
        try:
            return self.place.filesystem.open_input_file(self.place.key)
        except OSError as error:
            raise cannot_read(self.name, error, "check the address and your access to it") from error


def is_remote(name: str) -> bool:
    """Whether `name` is an address for pyarrow. Raises InputError for one on the web."""
    if WEB_ADDRESS.match(name):
        raise InputError(
            f"{shown_address(name)}: nothing is fetched from the web; download it first, for example with img2dataset"
        )
    return REMOTE_ADDRESS.match(name) is not None


def open_remote(address: str) -> RemoteFolder:
    """Whatever lies at an address such as `s3://bucket/photos`; nothing is asked of it yet."""
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem

    name = shown_address(address)
    try:
        filesystem, key = FileSystem.from_uri(address)
    except (ArrowException, OSError, ValueError) as error:
        reason = str(error).replace(address, name)
        raise InputError(
            f"cannot open {name}: {reason}; name an address that pyarrow opens, as s3:// or gs://"
        ) from None
    return RemoteFolder(filesystem, key, name)


# Streams


class CheckedStream:
    """A stream that ends in an `InputError` where its file, or the compression around it, is broken."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name

    def read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except EOFError as error:
            raise InputError(f"{self._name} is cut off inside its compressed bytes: fetch or make it again") from error
        except (OSError, ValueError, zlib.error) as error:
            raise cannot_read(self._name, error, "fetch or make it again") from error

    def seek(self, position: int) -> int:
        try:
            return self._stream.seek(position)
        except EOFError as error:
            raise InputError(f"{self._name} is cut off inside its compressed bytes: fetch or make it again") from error
        except (OSError, ValueError, zlib.error) as error:
            raise cannot_read(self._name, error, "fetch or make it again") from error

    def tell(self) -> int:
        return self._stream.tell()

    def __enter__(self) -> CheckedStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()


def open_stream(file: InputFile, compressed: bool) -> CheckedStream:
    """The bytes of `file`, unpacked where it is `compressed` with gzip."""
    stream = file.open()
    return CheckedStream(gzip.GzipFile(fileobj=stream, mode="rb") if compressed else stream, file.name)


def split_stream(stream: BinaryIO | CheckedStream, separator: bytes) -> Iterator[bytes | None]:
    """The pieces between separators as soon as they have come, the one behind the last separator unless it is empty.

    None stands for a piece of more than 64 MB, which is never held.
    """
    parts: list[bytes] = []
    size = 0
    while chunk := stream.read(READ_BYTES):
        *pieces, rest = chunk.split(separator)
        for piece in pieces:
            yield _joined(parts, size, piece) if size else piece
            parts, size = [], 0
        size += len(rest)
        if rest and size <= MAX_PIECE_BYTES:
            parts.append(rest)
    if size:
        yield _joined(parts, size, b"")


def _joined(parts: list[bytes], size: int, last: bytes) -> bytes | None:
    return None if size + len(last) > MAX_PIECE_BYTES else b"".join([*parts, last])


def file_digest(file: InputFile) -> str:
    """A digest of the first and the last megabyte: enough to tell a changed file, and quick for a large one."""
    digest = hashlib.sha256()
    with open_stream(file, compressed=False) as stream:
        digest.update(stream.read(DIGEST_BYTES))
        if file.size > DIGEST_BYTES:
            stream.seek(max(DIGEST_BYTES, file.size - DIGEST_BYTES))
            digest.update(stream.read(DIGEST_BYTES))
    return digest.hexdigest()
