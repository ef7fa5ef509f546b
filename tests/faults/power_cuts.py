"""What a run changes on the disk, call by call, and what a power cut at any moment may leave of it.

An fsync of a file holds its bytes, one of a folder the names in it. Of what came later any prefix may be there, and
names without bytes or bytes without names.
"""

from __future__ import annotations

import ast
import fcntl
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

Change: TypeAlias = tuple[Any, ...]  # its kind; then the number of a file, or a path
Disk: TypeAlias = dict[str, bytes | str]  # by path: a file's bytes, or a link's target
BYTES, NAMES = ("write", "size"), ("new", "link", "rename", "unlink")


class Recorder:
    """Writes what happens to the files in `folders` to `log`, a line for each change, what is there first."""

    def __init__(self, log: str, folders: Sequence[str]) -> None:
        self._real: dict[str, Callable[..., Any]] = {}
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._folders = [os.path.realpath(folder) for folder in folders]
        self._numbers: dict[tuple[int, int], int] = {}  # of files, by what the system calls them
        self._unused = count()
        self._using = threading.RLock()

    def install(self) -> None:
        self._real = {name: getattr(os, name) for name in ("open", "write", "fsync", "ftruncate", "rename", "unlink")}
        self._real["symlink"] = os.symlink
        for folder in self._folders:
            for path in sorted(Path(folder).iterdir()):
                with open(path, "rb") as file:
                    number = self._number_new(file.fileno(), str(path))
                    self._add("write", number, 0, file.read())
                    self._add("held", number)
            self._add("held names", folder)
        self._add("begun")
        for name in self._real:
            setattr(os, name, self._stand_in(getattr(self, f"_{name}")))

    def _stand_in(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*arguments: Any, **options: Any) -> Any:
            with self._using:
                return call(*arguments, **options)

        return locked

    def _add(self, *change: Any) -> None:
        self._real["write"](self._log, f"{change!r}\n".encode())

    def _name(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path of a file in one of the folders."""
        folder, name = os.path.split(os.fsdecode(path))
        within = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        folder = os.path.realpath(os.path.join(within, folder))
        return os.path.join(folder, name) if folder in self._folders else None

    def _number_new(self, file: int, name: str) -> int:
        about = os.fstat(file)
        self._numbers[about.st_dev, about.st_ino] = number = next(self._unused)  # the system may use its own again
        self._add("new", name, number)
        return number

    def _number(self, file: int) -> int | None:
        about = os.fstat(file)
        return self._numbers.get((about.st_dev, about.st_ino))

    # ---- calls of the system

    def _open(self, path: Any, flags: int, *mode: int, dir_fd: int | None = None) -> int:
        name = self._name(path, dir_fd) if flags & os.O_CREAT else None
        is_new = name is not None and not os.path.lexists(name)
        file = self._real["open"](path, flags, *mode, dir_fd=dir_fd)
        if is_new:
            self._number_new(file, name)
        return file

    def _write(self, file: int, data: Any) -> int:
        number, start = self._number(file), 0
        if number is not None:
            is_appended = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_APPEND
            start = os.lseek(file, 0, os.SEEK_END if is_appended else os.SEEK_CUR)
        written = self._real["write"](file, data)
        if number is not None:
            self._add("write", number, start, bytes(data[:written]))
        return written

    def _ftruncate(self, file: int, size: int) -> None:
        self._real["ftruncate"](file, size)
        if (number := self._number(file)) is not None:
            self._add("size", number, size)

    def _fsync(self, file: int) -> None:
        self._real["fsync"](file)
        if (number := self._number(file)) is not None:
            self._add("held", number)
        elif (folder := os.readlink(f"/proc/self/fd/{file}")) in self._folders:
            self._add("held names", folder)

    def _rename(self, old: Any, new: Any) -> None:
        self._real["rename"](old, new)
        if name := self._name(new):
            self._add("rename", name, self._name(old))

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        name = self._name(path, dir_fd)
        self._real["unlink"](path, dir_fd=dir_fd)
        if name:
            self._add("unlink", name)

    def _symlink(self, target: str, path: Any, *, dir_fd: int | None = None) -> None:
        name = self._name(path, dir_fd)
        self._real["symlink"](target, path, dir_fd=dir_fd)
        if name:
            self._add("link", name, target)


def changes_in(log: Path) -> list[Change]:
    return [ast.literal_eval(line) for line in log.read_text().splitlines()]


def disk_of(changes: Iterable[Change]) -> Disk:
    names: dict[str, int | str] = {}
    files: dict[int, bytearray] = defaultdict(bytearray)
    for kind, *about in changes:
        if kind in ("new", "link"):
            names[about[0]] = about[1]
        elif kind == "rename":
            names[about[0]] = names.pop(about[1])
        elif kind == "unlink":
            del names[about[0]]
        elif kind == "write":
            number, start, data = about
            files[number] += bytes(max(0, start - len(files[number])))
            files[number][start : start + len(data)] = data
        elif kind == "size":
            del files[about[0]][about[1] :]
    return {name: each if isinstance(each, str) else bytes(files[each]) for name, each in names.items()}


def disk_on(folders: Iterable[Path]) -> Disk:
    paths = [path for folder in folders for path in folder.iterdir()]
    return {str(path): os.readlink(path) if path.is_symlink() else path.read_bytes() for path in paths}


def disks_after_power_cuts(changes: Sequence[Change]) -> list[Disk]:
    """Each that a power cut at any moment may leave, once."""
    found = {}
    for end in range(changes.index(("begun",)), len(changes) + 1):
        for left in _left(changes[:end]):
            disk = disk_of(left)
            found[tuple(sorted(disk.items()))] = disk
    return list(found.values())


def _left(done: Sequence[Change]) -> Iterator[list[Change]]:
    """What may be left of these changes."""
    held = _held(done)
    later = [index for index, (kind, *_) in enumerate(done) if index not in held and kind in BYTES + NAMES]

    def of(more: Collection[int]) -> list[Change]:
        chosen = held.union(more)
        return [change for index, change in enumerate(done) if index in chosen]

    for number in range(len(later) + 1):
        yield of(later[:number])
    yield of([index for index in later if done[index][0] in NAMES])
    yield of([index for index in later if done[index][0] in BYTES])
    # Sizes without bytes, and a part of the last bytes.
    without = {index: (*done[index][:3], bytes(len(done[index][3]))) for index in later if done[index][0] == "write"}
    yield [without.get(index, change) for index, change in enumerate(done)]
    if done[-1][0] == "write":
        kind, number, start, data = done[-1]
        for size in {1, len(data) // 3, len(data) // 2, len(data) - 1} - {0}:
            yield [*done[:-1], (kind, number, start, data[:size])]


def _held(done: Sequence[Change]) -> set[int]:
    held: set[int] = set()
    files: set[int] = set()
    folders: set[str] = set()
    for index in reversed(range(len(done))):
        kind, *about = done[index]
        if kind == "held":
            files.add(about[0])
        elif kind == "held names":
            folders.add(about[0])
        elif (kind in BYTES and about[0] in files) or (kind in NAMES and os.path.dirname(about[0]) in folders):
            held.add(index)
    return held
