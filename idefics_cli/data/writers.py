"""Rows -> JSON lines: to a stream as they come, or to a file that gets its name when the run has finished.

While a run is under way its rows are in `F.jsonl.part`, which holds whole lines only and is locked by the kernel for as
long as the process lives; `F.jsonl` appears by rename. Everything that can be wrong with an output is found when its
writer is opened, before a model is loaded. This module knows nothing of pictures or models; a row is a mapping.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from idefics_cli.data.readers import escape_name
from idefics_cli.errors import OutputError

JSONL_SUFFIXES = (".jsonl", ".ndjson")


class RowWriter(Protocol):
    """Where rows go: `write` once per row, in order; `finish` behind the last; `close` whenever the run ends."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


def json_line(row: Mapping[str, Any]) -> bytes:
    """One line of UTF-8 JSON. A text with a lone surrogate, which UTF-8 cannot hold, is written with JSON's escapes."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row, allow_nan=False).encode() + b"\n"


class StreamClosed(Exception):
    """Nobody reads the stream any more: no mistake, and nothing left to do."""


class StreamWriter:
    """JSON lines on a stream that is open already, flushed row by row. `write` raises StreamClosed."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream

    def write(self, row: Mapping[str, Any]) -> None:
        try:
            self.stream.write(json_line(row))
            self.stream.flush()
        except BrokenPipeError as error:
            raise StreamClosed from error
        except OSError as error:
            raise OutputError(f"cannot write to stdout: {_reason(error)}; make room and run again") from error

    def finish(self) -> None:
        """Nothing is left to do: every row has been flushed."""

    def close(self) -> None:
        """The stream belongs to the caller and stays open."""


class FileWriter:
    """JSON lines in `path`.part, which `finish` makes durable and renames to `path`.

    Opening raises OutputError when the output could not be written, is there already, or belongs to a run that is under
    way or was stopped; `overwrite` discards what is there, a run under way excepted.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        _check_place(self.path, overwrite)
        self._file = _open_locked(self.part)
        self._size = os.fstat(self._file).st_size  # bytes of whole lines
        if self._size and not overwrite:
            os.close(self._file)
            raise OutputError(
                f"{_shown(self.part)} holds the rows of a run that was stopped: keep it under another name, or discard"
                " it with --overwrite"
            )
        self._truncate(0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one whole line; when that fails (a full disk) the rows before it stay as they are."""
        line = json_line(row)
        try:
            _write_all(self._file, line)
        except OSError as error:
            self._truncate(self._size)
            raise OutputError(
                f"cannot write {_shown(self.part)}: {_reason(error)}; make room, or use another disk"
            ) from error
        self._size += len(line)

    def finish(self) -> None:
        """Give the rows their final name, durably: the file first, then the folder that names it."""
        try:
            os.fsync(self._file)
            self.part.rename(self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise OutputError(f"cannot finish {_shown(self.path)}: {_reason(error)}; check its disk") from error
        finally:
            self._release()

    def close(self) -> None:
        """End a run that did not finish: its rows stay, whole and durable, in the part file; an empty one goes."""
        if self._file < 0:
            return
        try:
            self._truncate(self._size)
            if self._size:
                os.fsync(self._file)
            else:
                self.part.unlink(missing_ok=True)
        finally:
            self._release()

    def _truncate(self, size: int) -> None:
        os.ftruncate(self._file, size)
        self._size = size

    def _release(self) -> None:
        file, self._file = self._file, -1
        os.close(file)  # frees the lock


def open_writer(output: str, *, stdout: BinaryIO | None, overwrite: bool = False) -> StreamWriter | FileWriter:
    """The writer for an `-o` value: `-` is `stdout`, else a path that ends in .jsonl. Raises OutputError."""
    if output != "-":
        return FileWriter(output, overwrite=overwrite)
    if stdout is None:
        raise OutputError("stdout is closed: name a file with -o F.jsonl")
    return StreamWriter(stdout)


def _check_place(path: Path, overwrite: bool) -> None:
    shown = _shown(path)
    if os.path.isdir(path):
        raise OutputError(f"{shown} is a folder: name a file in it, such as {_shown(path / 'captions.jsonl')}")
    if path.suffix.lower() not in JSONL_SUFFIXES:
        raise OutputError(f"{shown}: this version writes JSON lines: name a file that ends in .jsonl, or - for stdout")
    if not os.path.isdir(path.parent):
        raise OutputError(f"there is no folder {_shown(path.parent)} to write {shown} into: make it first")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{shown} exists already: name another output, or replace it with --overwrite")


def _open_locked(part: Path) -> int:
    """Open the part file and lock it, or raise OutputError."""
    shown = _shown(part)
    try:
        file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputError(f"cannot write {shown}: {_reason(error)}; name an output that can be written") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _check_same(file, part)
    except OSError as error:
        os.close(file)
        if isinstance(error, BlockingIOError | FileNotFoundError):
            raise OutputError(f"another run is writing {shown}: wait for it, or name another output") from error
        raise OutputError(f"cannot lock {shown}: {_reason(error)}; name an output on another file system") from error
    return file


def _check_same(file: int, part: Path) -> None:
    """The file that was locked must still bear the name: another run may have renamed it in between."""
    if not os.path.samestat(os.fstat(file), os.stat(part)):
        raise BlockingIOError(f"{part} was replaced")


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _shown(path: Path) -> str:
    return escape_name(str(path))
