"""A folder of numbered parts, local or remote: `part-NNNNN.jsonl` or `.parquet`, and `_run.json`, which says of what.

A part is there whole or not at all: on this machine it is named when it is on the disk, elsewhere it is sent whole from
a local file, and an object is complete or does not exist. What begins with `_` is not a part. Knows no rows.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from idefics_cli.errors import OutputError
from idefics_cli.storage.files import File, place, refusing

RUN, SUMMARY = "_run.json", "_summary.json"
PART = re.compile(r"part-(\d{5,})\.(jsonl|parquet)")
TEMPORARY = re.compile(r"\.idefics-(.+)-[0-9a-f]{16}\.tmp")
BOUNDS_BYTES = 120  # of each line of bounds, so that any is found without those before it
MAX_HEADER_BYTES = 16 << 20
PYARROWS_REMEDY = " To create buckets"  # names an option that is not ours


class UnitFolder:
    """`header` is what `begin` was told, None before that."""

    def __init__(self, folder: File | str) -> None:
        found = place(folder) if isinstance(folder, str) else folder
        self.place = replace(found, name=found.name.rstrip("/") or "/", path=found.path.rstrip("/") or "/")
        self.name = self.place.name
        self.header: dict[str, Any] | None = None
        self._bounds_at = 0
        self.look()

    def make(self) -> None:
        with self._writing():
            if self.place.is_local:
                os.makedirs(self.place.path, exist_ok=True)
            else:
                self.place.filesystem.makedirs(self.place.path, exist_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = (error.strerror or str(error)).partition(PYARROWS_REMEDY)[0].removesuffix(".")
            raise OutputError(
                f"cannot write to {self.name}: {reason}; fix that and run the same command again"
            ) from error

    # ---- the run

    def look(self) -> bool:
        """Whether a run has begun here, now that its header has been read."""
        if self.header is None and self._exists(RUN):
            with self.place.child(RUN).open() as file:
                line = file.readline(MAX_HEADER_BYTES)
                self._bounds_at = len(line)
            try:
                self.header = json.loads(line + b"]}")["idefics_units"]
            except (ValueError, KeyError, TypeError):
                raise OutputError(
                    f"{self.name}/{RUN} is not as this program leaves it: restore it, or name another folder"
                ) from None
        return self.header is not None

    def begin(self, header: Mapping[str, Any], bounds: Iterator[tuple[int, ...]]) -> None:
        """Say what run this is, and where its units begin and the last one ends."""
        with tempfile.TemporaryFile() as spool:
            number = -1
            for number, each in enumerate(bounds):
                spool.write(b",\n" * (number > 0) + json.dumps(each).encode().ljust(BOUNDS_BYTES - 2))
            assert number > 0, "there is a unit"
            spool.seek(0)
            with self.written(RUN) as file:
                about = {"idefics_units": {**header, "units": number}, "bounds": []}
                file.write(json.dumps(about).encode().removesuffix(b"]}") + b"\n")
                while data := spool.read(1 << 20):
                    file.write(data)
                file.write(b"\n]}\n")
        self.look()

    @property
    def num_units(self) -> int:
        assert self.header is not None
        return self.header["units"]

    def bounds(self, first: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Of each of these units, where it begins and ends."""
        begin = None
        with self.place.child(RUN).open() as file:
            file.seek(self._bounds_at + BOUNDS_BYTES * first)
            for _ in range(first, stop + 1):
                end = tuple(json.loads(file.read(BOUNDS_BYTES).rstrip(b",\n ]}") + b"]"))
                if begin is not None:
                    yield begin, end
                begin = end

    # ---- parts

    def part_name(self, number: int) -> str:
        """In the order of their names, they are in the order of their numbers."""
        width = max(5, len(str(self.num_units - 1)))
        return f"part-{number:0{width}d}.{self.header['format']}"

    def done(self) -> bytearray:
        """1 for each unit whose part is there."""
        done = bytearray(self.num_units)
        for name in self.names():
            if (found := PART.fullmatch(name)) and int(found[1]) < len(done) and name == self.part_name(int(found[1])):
                done[int(found[1])] = 1
        return done

    def part(self, number: int) -> File:
        return self.place.child(self.part_name(number))

    # ---- files

    def names(self) -> Iterator[str]:
        with refusing(self.name, OSError), suppress(FileNotFoundError):
            if self.place.is_local:
                with os.scandir(self.place.path) as entries:
                    yield from (entry.name for entry in entries)
            else:
                found = self.place.filesystem.ls(self.place.path, detail=True)
                yield from (posixpath.basename(each["name"]) for each in found)

    def _exists(self, name: str) -> bool:
        with refusing(self.name, OSError):
            return self.place.filesystem.exists(self.place.child(name).path)

    @contextmanager
    def written(self, name: str) -> Iterator[Any]:
        """A new local file, which is there under this name, on the disk, when all has been written to it."""
        path = self.place.child(name).path
        with self._writing(), self._new_here(name, path) if self.place.is_local else self._new_elsewhere(path) as file:
            yield file

    @contextmanager
    def _new_here(self, name: str, path: str) -> Iterator[Any]:
        temporary = os.path.join(self.place.path, f".idefics-{name}-{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "xb+") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
        finally:
            with suppress(OSError):
                os.unlink(temporary)
        folder = os.open(self.place.path, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # some file systems of a network have names durable without it
            os.fsync(folder)
        os.close(folder)

    @contextmanager
    def _new_elsewhere(self, path: str) -> Iterator[Any]:
        """A nameless file is sent in one call: what a signal raises comes after it, and completes no half of one."""
        from pyarrow.fs import LocalFileSystem, copy_files

        with tempfile.TemporaryFile() as file:
            yield file
            file.flush()
            copy_files(f"/dev/fd/{file.fileno()}", path, LocalFileSystem(), self.place.filesystem.fs)

    def clear(self) -> None:
        """Take away what an earlier run has left, what it was first."""
        for name in sorted(self.names(), key=lambda name: name != RUN):
            if name in (RUN, SUMMARY) or PART.fullmatch(name) or TEMPORARY.fullmatch(name):
                self.remove(name)
        self.header = None

    def remove(self, name: str) -> None:
        with self._writing(), suppress(FileNotFoundError):
            if self.place.is_local:
                os.unlink(self.place.child(name).path)
            else:
                self.place.filesystem.rm_file(self.place.child(name).path)

    def touch(self, name: str) -> None:
        """An empty file, whose time is now."""
        with self._writing():
            if self.place.is_local:
                path = self.place.child(name).path
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666))
                os.utime(path)
                return
        with self.written(name):
            """Empty."""

    def remove_leftovers(self, first: int | None = None, stop: int | None = None) -> None:
        """What killed processes have left of these units, or of all. None of them may be at work."""
        for name in list(self.names()):
            found = TEMPORARY.fullmatch(name)
            part = found and PART.fullmatch(found[1])
            if found and (first is None or (part and first <= int(part[1]) < stop)):
                self.remove(name)

    def written_at(self, name: str) -> float:
        """When the file was written, by the clock of its file system."""
        found = self.place.child(name).info().get("mtime") or 0
        return found.timestamp() if hasattr(found, "timestamp") else float(found)


def unfinished(folder: UnitFolder) -> str | None:
    """What is missing of a run that has begun in a folder."""
    missing = folder.done().count(0) if folder.header else 0
    remedy = "run the command that made it again, or name the parts"
    return f"{folder.name} lacks {missing} of its {folder.num_units} parts: {remedy}" if missing else None
