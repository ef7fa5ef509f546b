"""The journal of a run, `F.part`: an append-only file that holds the run's settings and every row that is finished.

Its first line is the settings, then one line for each row in input order, and after the last row of a run a line that
says so. Every line is JSON and closes with its number and a CRC-32 of what stands before it, which goes on from that of
the line before: a changed byte, a lost line and two that are swapped are noticed. Rows are written many at a time with
one `write`, and count as done when `fsync` has returned. A line that a kill has torn is cut off when the journal is
opened again; anything else that cannot be read is refused by file and line, and left alone.

The file is locked for as long as it is open, and read and written through one descriptor: whatever takes its name
meanwhile is another file, which ends the run. This module knows lines, and of rows that they have an `id` and an
`error`.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from idefics_cli.columns import json_text
from idefics_cli.errors import OutputError
from idefics_cli.storage.filenames import escape_name
from idefics_cli.storage.files import Positioned
from idefics_cli.writers.owner import NOT_SUPPORTED, Owner

HEADER_KEY, END_KEY = "idefics_run", "idefics_end"
HEADER_START, END_START = (b'{"' + key.encode() for key in (HEADER_KEY, END_KEY))
NUMBER_START = b', "line": '
BLOCK_BYTES = 1 << 16
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def checked(text: bytes, number: int, check: int) -> tuple[bytes, int]:
    """A JSON object as the line of this number after one with this check; and its own check."""
    check = zlib.crc32(text, check)
    return b'%s%s%d, "crc32": "%08x"}\n' % (text[:-1], NUMBER_START, number, check), check


def unchecked(line: bytes, number: int, check: int) -> tuple[bytes, int] | None:
    """The JSON object that `checked` made the line of, and its check; or None: something was changed."""
    text = line[: line.rfind(NUMBER_START)] + b"}"
    expected, check = checked(text, number, check)
    return (text, check) if line == expected else None


class Journal:
    """Opened and locked, its torn tail cut. With `discard` it is as a new one, and what it holds goes when it begins.

    `header` is None for a new one. `summary` is what `end` was told when a run had written all its rows, else None:
    rows that come after it are those of a run that does more. `last_text` is the last row that was there at first.
    Raises OutputError where the file cannot be opened, locked, read or written, is not a journal or was changed.
    """

    def __init__(self, path: Path, *, discard: bool = False) -> None:
        self.path = path
        self._file, self._owner = _open_locked(path)
        self._size = self._num_lines = self._check = 0
        self._has_begun = False
        self.header: dict[str, Any] | None = None
        self.summary: dict[str, Any] | None = None
        self.last_text: bytes | None = None
        try:
            with refusing("read", path):
                self._require_own()
                if not discard:
                    self._cut_torn_tail()
                    self._read()
        except BaseException:
            self._release()
            raise

    # ---- what is there

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows so far, in order. Raises OutputError at what `append` was never given."""
        for number, text in enumerate(self.texts(), start=2):
            row = self._parsed(text, number)
            if not (isinstance(row.get("id"), str) and isinstance(row.get("error", 0), str | None)):
                raise self._changed(number)
            yield row

    def texts(self) -> Iterator[bytes]:
        """The same as JSON objects, a line each, without their ends.

        Raises OutputError where any of what was written is not there, or not under this name.
        """
        number = check = 0
        with refusing("read", self.path):
            for line in self._lines():
                number, text, check = line
                if number > 1 and not text.startswith(END_START):
                    yield text
        if (number, check) != (self._num_lines, self._check):
            raise self._changed(number + 1)
        self.require_unchanged()

    def _lines(self) -> Iterator[tuple[int, bytes, int]]:
        """The number of each line, its object, and its check."""
        check = 0
        for number, line in enumerate(io.BufferedReader(Positioned(self._file), BLOCK_BYTES), start=1):
            found = unchecked(line, number, check)
            if found is None:
                raise self._changed(number)
            text, check = found
            yield number, text, check

    def _changed(self, number: int) -> OutputError:
        return OutputError(
            f"{shown_path(self.path)} was changed in line {number}: restore the line from a copy, or discard the file"
            " with --overwrite"
        )

    def _parsed(self, text: bytes, number: int) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self._changed(number)
        return value

    def _require_own(self) -> None:
        """A file that does not begin as a journal does is the user's own: nothing of it is touched."""
        about = os.fstat(self._file)
        if not stat.S_ISREG(about.st_mode) or not self._begins_as_own(about.st_size):
            raise OutputError(
                f"{shown_path(self.path)} is not a file of this program, and would be written to: move it away, or name"
                " another output"
            )

    def _begins_as_own(self, size: int) -> bool:
        """A power cut may leave zeros where the first line was being written."""
        head = os.pread(self._file, BLOCK_BYTES, 0).rstrip(b"\0")[: len(HEADER_START)]
        return HEADER_START.startswith(head) and (head == HEADER_START or size <= BLOCK_BYTES)

    def _cut_torn_tail(self) -> None:
        """What stands after the last whole line was torn by a kill; it has to go before anything is appended."""
        size = os.fstat(self._file).st_size
        self._size = _end_of_last_line(self._file, size)
        if self._size < size:
            os.ftruncate(self._file, self._size)

    def _read(self) -> None:
        """The settings, whether all rows are there, and where the next line goes."""
        for number, text, check in self._lines():
            if number == 1:
                self.header = self._parsed(text, 1).get(HEADER_KEY)
            if not isinstance(self.header, dict):
                raise self._changed(number)
            self.summary = self._parsed(text, number).get(END_KEY) if text.startswith(END_START) else None
            if text.startswith(END_START) and not isinstance(self.summary, dict):
                raise self._changed(number)
            if number > 1 and self.summary is None:
                self.last_text = text
            self._num_lines, self._check = number, check

    def _require_held(self) -> None:
        """Raise OutputError where others have taken the file away, or its lock."""
        if not _has_name(self._file, self.path):
            raise OutputError(
                f"{shown_path(self.path)} was removed, moved or replaced while this run was writing it: put it back and"
                " run the same command again"
            )
        if not self._owner.is_held():
            raise OutputError(
                f"{shown_path(self._owner.path)}, which locks {shown_path(self.path)}, was removed or taken over by"
                " another run: wait for that, and run the same command again"
            )

    def require_unchanged(self) -> None:
        """Raise OutputError, too, where others have written to the file."""
        self._require_held()
        if os.fstat(self._file).st_size != self._size:
            raise OutputError(
                f"{shown_path(self.path)} was changed by another program while this run was writing it: run the same"
                " command again, alone"
            )

    # ---- writing

    def begin(self, header: Mapping[str, Any]) -> None:
        """Say durably what run a new journal is of. What had to be discarded goes now."""
        assert self._size == 0, f"{self.path} has {self._size} bytes"
        with self._writing():
            self._require_held()
            os.ftruncate(self._file, 0)
        self.append([json_text({HEADER_KEY: header})])
        self.header, self._has_begun = dict(header), True
        with self._writing():
            sync_folder(self.path.parent)

    def append(self, texts: Iterable[bytes]) -> None:
        """Rows as JSON objects, durably, with one write; when it fails, none of them is there."""
        check, lines = self._check, []
        for text in texts:
            line, check = checked(text, self._num_lines + len(lines) + 1, check)
            lines.append(line)
        self._append(b"".join(lines))
        self._num_lines, self._check = self._num_lines + len(lines), check

    def end(self, summary: Mapping[str, Any]) -> None:
        """Say durably that all rows are there."""
        self.append([json_text({END_KEY: summary})])
        self.summary = dict(summary)

    def _append(self, data: bytes) -> None:
        rest = data
        with self._writing():
            self.require_unchanged()
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
        return refusing("write", self.path)

    # ---- the end

    def remove(self) -> None:
        """The file is of no more use. One that has taken its name stays."""
        try:
            with refusing("remove", self.path):
                if _has_name(self._file, self.path):
                    self.path.unlink(missing_ok=True)
        finally:
            self._release()

    def close(self) -> None:
        """Let go of the file; one that is empty, or was begun here and has no rows, goes."""
        if self._file < 0:
            return
        if os.fstat(self._file).st_size == 0 or (self._has_begun and self._num_lines == 1):
            self.remove()
        else:
            self._release()

    def _release(self) -> None:
        file, self._file = self._file, -1
        self._owner.release()
        os.close(file)  # frees the lock


@contextmanager
def refusing(act: str, path: Path, also: str = "") -> Iterator[None]:
    """Raise OutputError for what the system does not do; `also` is said after the remedy."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot {act} {shown_path(path)}: {reason(error)}; {remedy(error)}{also}") from error


def remedy(error: OSError) -> str:
    """What to do about an output that cannot be read or written."""
    if error.errno in NO_SPACE:
        return "free some space or use another disk, and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "name an output that can be written"
    if error.errno in NOT_SUPPORTED:
        return "name an output on another file system"
    return "check the disk and run the same command again, or name another output"


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


def _open_locked(path: Path) -> tuple[int, Owner]:
    """The file, and what locks it where the kernel does not."""
    with refusing("write", path):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        with refusing("lock", path):
            return file, _lock(file, path)
    except BaseException:
        os.close(file)
        raise


def _lock(file: int, path: Path) -> Owner:
    """The file that is locked must still have the name: another run may have removed it in between."""
    in_use = OutputError(f"another run is writing {shown_path(path)}: wait for it, or name another output")
    is_locked = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise in_use from None
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        is_locked = False
    owner = Owner(path, file, is_locked)
    if not _has_name(file, path):
        owner.release()
        raise in_use
    return owner


def _has_name(file: int, path: Path) -> bool:
    """Whether the open file is the one of this name."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samestat(os.fstat(file), os.lstat(path))
    return False


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the file system can; some of a network have them so without it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def reason(error: OSError) -> str:
    return error.strerror or str(error)


def shown_path(path: Path) -> str:
    return escape_name(str(path))
