"""Local files, opened without waiting and only where they are regular. Imports nothing heavy: image workers use it."""

from __future__ import annotations

import fcntl
import io
import json
import os
import stat
import sys
from functools import partial
from typing import Any

POINTER_BYTES = 1024  # Git LFS and git-annex write no longer ones
POINTERS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer: run `git lfs pull`",
    b"/annex/objects/": "a git-annex pointer: run `git annex get`",
}
MAX_JSON_BYTES = 16 << 20
KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFLNK: "link"}


class IrregularFile(OSError):
    """A folder, FIFO, socket or device, which is not opened; or a file outside the folder where it has to be."""


def open_regular(path: str, below: str | None = None, *, follow: bool = True) -> io.FileIO:
    """A local file, unbuffered; `below` is the real path of a folder that it has to be in. Without `follow`, no link.

    Raises IrregularFile or another OSError, and ValueError for an impossible name.
    """
    # Checked before opening, since opening a FIFO or a device already has effects; and after, since the name may by
    # then belong to another file.
    _require_regular(os.stat(path, follow_symlinks=follow).st_mode)
    return open(path, "rb", buffering=0, opener=partial(_open_checked, below, 0 if follow else os.O_NOFOLLOW))


def real_path(descriptor: int) -> str:
    """Where the open file is now, without links."""
    if sys.platform == "darwin":
        return os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
    return os.readlink(f"/proc/self/fd/{descriptor}")


def real_folder(path: str) -> str:
    """Where a folder is now, as `real_path` has it. Raises OSError."""
    descriptor = os.open(path or ".", os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY))
    try:
        return real_path(descriptor)
    finally:
        os.close(descriptor)


def lfs_pointer(head: bytes) -> str | None:
    """What a file that begins like this is, where it only stands for the real one, and how to get that."""
    return next((remedy for start, remedy in POINTERS.items() if head.startswith(start)), None)


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a local file. Raises OSError, or ValueError for another content and for more than 16 MB."""
    with open_regular(os.fspath(path)) as file:
        if os.fstat(file.fileno()).st_size > MAX_JSON_BYTES:
            raise ValueError(f"has more than {MAX_JSON_BYTES >> 20} MB")
        data = file.readall()
    if pointer := lfs_pointer(data):
        raise ValueError(f"is {pointer}")
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("is nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return value


def _open_checked(below: str | None, more: int, path: str, flags: int) -> int:
    descriptor = os.open(path, flags | more | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _require_regular(os.fstat(descriptor).st_mode)
        # Of what is open now: a folder on the way may have been replaced by a link since the path was looked at.
        if below is not None and not real_path(descriptor).startswith(f"{below.rstrip('/')}/"):
            raise IrregularFile("leads out of its folder, which --follow-links allows")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise IrregularFile(f"is a {KINDS.get(stat.S_IFMT(mode), 'device')}: only regular files are opened")
