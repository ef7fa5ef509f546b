"""JSON lines on stdin: what they are told from paths by, and a file that stands for them.

A pipe can be read once. So that its columns are known before a row is given, what has come is kept and read again; of a
long stream, only that.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from fsspec import AbstractFileSystem

from idefics_cli.errors import InputError
from idefics_cli.readers.folder import IMAGE_SIGNATURE
from idefics_cli.readers.jsonl import BYTE_ORDER_MARK
from idefics_cli.storage.files import File, LocalFiles

KEPT_BYTES = 32 << 20
LOOKED_AT_BYTES = 512
CONTROL = re.compile(rb"[\x01-\x08\x0b\x0c\x0e-\x1f]")


class Replayed(io.RawIOBase):
    """A stream that can be begun again while little of it has been read, or where it can seek."""

    def __init__(self, stream: BinaryIO) -> None:
        # Below the buffer: a thread that waits inside a buffered read holds a lock, and waits for more than has come.
        self._stream: BinaryIO = getattr(stream, "raw", stream)
        self._owner = stream  # whose end closes the other
        self.can_seek = self._stream.seekable()
        self._begin = self._stream.tell() if self.can_seek else 0
        self._kept, self._place, self._is_whole = bytearray(), 0, True

    def again(self) -> Replayed:
        if self.can_seek:
            self._stream.seek(self._begin)
        elif not self._is_whole:
            raise InputError("stdin can be read only once: save it as a file, and name that")
        self._place = 0
        return self

    def read(self, size: int = -1) -> bytes:
        data = bytes(self._kept[self._place : self._place + size]) or self._stream.read(size) or b""
        if not self.can_seek and self._is_whole and self._place == len(self._kept):
            self._kept += data
        self._place += len(data)
        if self._place > KEPT_BYTES:
            self._kept, self._is_whole = bytearray(), False
        return data

    def tell(self) -> int:
        return self._place

    def close(self) -> None:
        """It stays open for whoever begins again."""


@dataclass(frozen=True)
class StdinFile(File):
    name: str = "stdin"
    path: str = "-"
    filesystem: AbstractFileSystem = field(default_factory=LocalFiles)
    stream: Any = None  # Replayed

    @property
    def parent(self) -> None:
        """Paths may lead anywhere, as those that stand on stdin themselves."""

    @property
    def comes_slowly(self) -> bool:
        return not self.stream.can_seek

    def open(self) -> Any:
        return self.stream.again()


def json_lines_on(stdin: BinaryIO, kind: str | None, null: bool) -> tuple[StdinFile | None, BinaryIO]:
    """The file of JSON lines where they are on stdin, and the stream of paths where these are.

    Raises InputError where neither is.
    """
    stream = Replayed(stdin)
    beginning = b"" if kind == "jsonl" or null else stream.read(LOOKED_AT_BYTES)
    if IMAGE_SIGNATURE.match(beginning) or CONTROL.search(beginning):
        what = "an image" if IMAGE_SIGNATURE.match(beginning) else "binary data"
        raise InputError(f"stdin holds {what}, not paths or JSON lines: save it as a file, and name that")
    text = beginning.removeprefix(BYTE_ORDER_MARK).lstrip()
    if kind is None and re.match(rb"\[\s*(\{|$)", text):
        raise InputError("stdin holds a JSON array: make lines of it, `jq -c '.[]'`")
    is_lines = kind == "jsonl" or (kind is None and text.startswith(b"{"))
    stream.again()
    return (StdinFile(stream=stream) if is_lines else None), (stdin if stream.can_seek else stream)
