"""Local files that are opened without waiting: regular ones only. Imports nothing heavy, for the image workers."""

from __future__ import annotations

import io
import os
import stat

KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}


class IrregularFile(OSError):
    """A folder, FIFO, socket or device, which is not opened."""


def open_regular(path: str) -> io.FileIO:
    """A local file, unbuffered. Raises IrregularFile or another OSError, and ValueError for an impossible name."""
    # Checked before opening, since opening a FIFO or a device already has effects; and after, since the name may by
    # then belong to another file.
    _require_regular(os.stat(path).st_mode)
    return open(path, "rb", buffering=0, opener=_open_without_waiting)


def _open_without_waiting(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    try:
        _require_regular(os.fstat(descriptor).st_mode)
    except IrregularFile:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise IrregularFile(f"is a {KINDS.get(stat.S_IFMT(mode), 'device')}: only regular files are opened")
