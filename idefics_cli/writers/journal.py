"""The journal of a run, `F.part`: an append-only file that holds the run's settings and every row that is finished.

Its first line is the settings, then one line for each row in input order, and after the last row of a run a line that
says so. Every line is JSON and closes with the CRC-32 of what stands before it, so that a changed byte is noticed. Rows
are written many at a time with one `write`, and count as done when `fsync` has returned. A line that a kill has torn is
cut off when the journal is opened again; anything else that cannot be read is refused by file and line, and left alone.

The file is locked by the kernel for as long as it is open. This module knows lines, not what rows mean.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from idefics_cli.columns import json_text
from idefics_cli.errors import OutputError
from idefics_cli.storage.filenames import escape_name

HEADER_KEY, END_KEY = "idefics_run", "idefics_end"
HEADER_START, END_START = (b'{"' + key.encode() for key in (HEADER_KEY, END_KEY))
CHECK_LENGTH = len(b', "crc32": "01234567"}')  # stands in the place of a line's closing brace
BLOCK_BYTES = 1 << 16


def checked(text: bytes) -> bytes:
    """A JSON object as a line of the journal."""
    return b'%s, "crc32": "%08x"}\n' % (text[:-1], zlib.crc32(text))


def unchecked(line: bytes) -> bytes | None:
    """The JSON object that `checked` made the line of (whose end may have been stripped), or None: it was changed."""
    line = line.removesuffix(b"\n")
    text = line[:-CHECK_LENGTH] + b"}"
    return text if checked(text)[:-1] == line else None


class Journal:
    """Opened and locked, its torn tail cut. With `discard` it is as a new one, and what it holds goes when it begins.

    `header` is None for a new one. `summary` is what `end` was told when a run had written all its rows, else None.
    Raises OutputError where the file cannot be opened, locked, read or written, or is not a journal.
    """

    def __init__(self, path: Path, *, discard: bool = False) -> None:
        self.path = path
        self._file = _open_locked(path)
        self._size = 0
        self.header: dict[str, Any] | None = None
        self.summary: dict[str, Any] | None = None
        try:
            with _refusing(path, "read", "check the disk, or name another output"):
                self._require_own()
                if not discard:
                    self._cut_torn_tail()
                if self._size:
                    self._read_ends()
        except BaseException:
            self._release()
            raise

    # ---- what is there

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows so far, in order. Raises OutputError at a line that was changed."""
        return map(json.loads, self.texts())

    def texts(self) -> Iterator[bytes]:
        """The same as JSON objects, a line each, without their ends."""
        with _refusing(self.path, "read", "check the disk, or name another output"), open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                text = self._unchecked(line, number)
                if number > 1 and not text.startswith(END_START):
                    yield text

    def _unchecked(self, line: bytes, number: int) -> bytes:
        text = unchecked(line)
        if text is None:
            raise OutputError(
                f"{shown_path(self.path)} was changed in line {number}: restore the line from a copy, or discard the"
                " file with --overwrite"
            )
        return text

    def _require_own(self) -> None:
        """A file that does not begin as a journal does is the user's own: nothing of it is touched."""
        is_file = stat.S_ISREG(os.fstat(self._file).st_mode)
        if not is_file or not HEADER_START.startswith(os.pread(self._file, len(HEADER_START), 0)):
            raise OutputError(
                f"{shown_path(self.path)} is not a file of this program, and would be written to: move it away, or name"
                " another output"
            )

    def _cut_torn_tail(self) -> None:
        """What stands after the last whole line was torn by a kill; it has to go before anything is appended."""
        size = os.fstat(self._file).st_size
        self._size = _end_of_last_line(self._file, size)
        if self._size < size:
            os.ftruncate(self._file, self._size)

    def _read_ends(self) -> None:
        with open(self.path, "rb") as file:
            self.header = json.loads(self._unchecked(file.readline(), 1))[HEADER_KEY]
        last = unchecked(self._last_line())
        if last is not None and last.startswith(END_START):
            self.summary = json.loads(last)[END_KEY]

    def _last_line(self) -> bytes:
        start = _end_of_last_line(self._file, self._size - 1)
        return os.pread(self._file, self._size - start, start)

    # ---- writing

    def begin(self, header: Mapping[str, Any]) -> None:
        """Say durably what run a new journal is of. What had to be discarded goes now."""
        assert self._size == 0, f"{self.path} has {self._size} bytes"
        with self._writing():
            os.ftruncate(self._file, 0)
        self._append(checked(json_text({HEADER_KEY: header})))
        self.header = dict(header)
        with self._writing():
            sync_folder(self.path.parent)

    def append(self, texts: Sequence[bytes]) -> None:
        """Rows as JSON objects, durably, with one write; when it fails, none of them is there."""
        self._append(b"".join(map(checked, texts)))

    def end(self, summary: Mapping[str, Any]) -> None:
        """Say durably that all rows are there."""
        self._append(checked(json_text({END_KEY: summary})))
        self.summary = dict(summary)

    def _append(self, data: bytes) -> None:
        rest = data
        try:
            with self._writing():
                while rest:
                    rest = rest[os.write(self._file, rest) :]
                os.fsync(self._file)
        except BaseException:  # a signal among them: a line may be torn
            with suppress(OSError):  # then it is cut when the file is opened again
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)

    def _writing(self) -> AbstractContextManager[None]:
        return _refusing(self.path, "write", "free some space or use another disk, and run the same command again")

    # ---- the end

    def remove(self) -> None:
        """The file is of no more use."""
        self.path.unlink(missing_ok=True)
        self._release()

    def close(self) -> None:
        """Let go of the file; one without any rows goes."""
        if self._file < 0:
            return
        is_empty = os.fstat(self._file).st_size == 0
        if is_empty or (self._size and self._last_line().startswith(HEADER_START)):
            self.path.unlink(missing_ok=True)
        self._release()

    def _release(self) -> None:
        file, self._file = self._file, -1
        os.close(file)  # frees the lock


@contextmanager
def _refusing(path: Path, act: str, remedy: str) -> Iterator[None]:
    """Raise OutputError for what the system does not do."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot {act} {shown_path(path)}: {reason(error)}; {remedy}") from error


def _end_of_last_line(file: int, size: int) -> int:
    """How many of the first `size` bytes are whole lines."""
    end = size
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _open_locked(path: Path) -> int:
    with _refusing(path, "write", "name an output that can be written"):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        with _refusing(path, "lock", "name an output on another file system"):
            _lock(file, path)
    except BaseException:
        os.close(file)
        raise
    return file


def _lock(file: int, path: Path) -> None:
    """The file that is locked must still have the name: another run may have removed it in between."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_same = os.path.samestat(os.fstat(file), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        is_same = False
    if not is_same:
        raise OutputError(f"another run is writing {shown_path(path)}: wait for it, or name another output")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: OSError) -> str:
    return error.strerror or str(error)


def shown_path(path: Path) -> str:
    return escape_name(str(path))
