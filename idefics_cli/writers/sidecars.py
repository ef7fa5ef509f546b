"""Texts beside the images, a file each: what is there before a row is done, and what is written once its row is safe.

The text of `a.jpg` is in `a.txt`; where another image in the folder has the same stem, in `a.jpg.txt`, so that no two
share a file. A file is there whole or not at all, and only regular ones are read or replaced. An empty one counts as
none: a power cut may leave it so.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import Counter
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias

from idefics_cli.errors import OutputError, RowError
from idefics_cli.storage.filenames import IMAGE_SUFFIX, escape_name, shown
from idefics_cli.storage.regular_file import IrregularFile, open_regular
from idefics_cli.storage.unique_ids import UniqueIds
from idefics_cli.writers.formats import remove_leftovers, replacing
from idefics_cli.writers.journal import refusing, shown_path, sync_folder

FOLDERS_KEPT = 64  # whose listings the names are made from, and which are made durable together
LONGEST_TEXT = 1 << 20  # bytes

Existing: TypeAlias = Literal["error", "skip", "overwrite", "append", "prepend"]


class SidecarWriter:
    """`existing` is what becomes of a file that holds another text and is not of this run, `suffix` the files' own.

    What a killed run with this `mark` has left half written is removed: that of its output. Raises OutputError for a
    file that may not go, or cannot be read or written.
    """

    def __init__(self, existing: Existing = "error", suffix: str = ".txt", mark: str = "") -> None:
        self.existing, self.suffix, self._mark = existing, suffix, mark or secrets.token_hex(8)
        self._rows = UniqueIds()  # by the files that have their texts
        self._folder = lru_cache(FOLDERS_KEPT)(self._look_into)
        self._using = threading.RLock()  # rows are read and written by different threads
        self._unsynced: set[Path] = set()

    def before(self, image: Path, row: int, done: str | None = None) -> str | RowError | None:
        """What is known before the `row` of this index is done: the text to be kept in its place, or what keeps any
        from being written; None: nothing. One that is `done` has that text already, unless somebody has corrected it,
        or gets it later."""
        with _refusing(image), self._using:
            target = self._target(image)
            if len(os.fsencode(target.name)) > self._folder(image.parent)[2]:
                return RowError("row_invalid", f"the name of its text, {shown(target.name)}, is too long: shorten it")
            first = self._first_row(target, row)
            there = None if first != row else read_text(target)
        if not there or (done is not None and self._has(there, _data(done))):
            return None
        if self.existing == "error":
            raise _exists(target)
        text = _text(there)
        return text if self.existing == "skip" and text != done else None

    def write(self, image: Path, text: str, row: int) -> None:
        """The text of a row that is safe. Written again it changes nothing."""
        data = _data(text)
        with _refusing(image), self._using:
            target = self._target(image)
            there = read_text(target)
            first = self._first_row(target, row)
            if there and first != row and not self._has(there, data):
                raise OutputError(
                    f"rows {first + 1} and {row + 1} show one image and have different texts, but {shown_path(target)}"
                    " holds one: leave --sidecar out"
                )
            if not there or not (self._has(there, data) or self.existing == "skip"):
                self._replace(target, self._joined(there, data, target))

    def close(self) -> None:
        """Make the names durable."""
        while self._unsynced:
            folder = self._unsynced.pop()
            with _refusing(folder):
                sync_folder(folder)

    def _target(self, image: Path) -> Path:
        shared = self._folder(image.parent)[1]
        return image.with_name(f"{image.name if image.stem in shared else image.stem}{self.suffix}")

    def _look_into(self, folder: Path) -> tuple[Path, frozenset[str], int]:
        """Its one name that no other spelling has, the stems of several images in it, and how long names may be."""
        remove_leftovers(folder, self._mark)
        return folder.resolve(), shared_stems(folder), os.pathconf(folder, "PC_NAME_MAX")

    def _first_row(self, target: Path, row: int) -> int:
        """The row that the file has had from this run."""
        first = self._rows.add(escape_name(str(self._folder(target.parent)[0] / target.name)), row)
        return row if first is None else first

    def _has(self, there: bytes, data: bytes) -> bool:
        """Whether the text is there, perhaps written by a run that was killed, or by an editor without a line break."""
        if self.existing == "append":
            return there == data or there.endswith(b"\n" + data)
        return there.startswith(data) if self.existing == "prepend" else there.removesuffix(b"\n") + b"\n" == data

    def _joined(self, there: bytes | None, data: bytes, target: Path) -> bytes:
        if not there or self.existing == "overwrite":
            return data
        if self.existing == "error":
            raise _exists(target)
        if self.existing == "prepend":
            return data + there
        return there + (b"" if there.endswith(b"\n") else b"\n") + data

    def _replace(self, target: Path, data: bytes) -> None:
        with replacing(target, self._mark) as file:
            file.write(data)
        if len(self._unsynced) >= FOLDERS_KEPT:
            self.close()
        self._unsynced.add(target.parent)


def _refusing(image: Path) -> AbstractContextManager[None]:
    return refusing("write a text beside", image, ", or leave --sidecar out")


def _data(text: str) -> bytes:
    return text.encode(errors="replace") + b"\n"


def _text(data: bytes) -> str:
    """What a file says, without the mark and the line break that an editor on Windows may have added."""
    return data.decode("utf-8-sig", errors="replace").removesuffix("\n").removesuffix("\r")


def read_text(path: Path) -> bytes | None:
    """What a text file holds; None where there is none. Raises OutputError for what is not one."""
    try:
        with open_regular(str(path), follow=False) as file:
            data = file.read(LONGEST_TEXT + 1)
    except FileNotFoundError:
        return None
    except IrregularFile as error:
        raise _not_a_text(path) from error
    if len(data) > LONGEST_TEXT:
        raise _not_a_text(path)
    return data


def _exists(path: Path) -> OutputError:
    return OutputError(
        f"{shown_path(path)} exists already: move it away, or say what is to become of such files with"
        " --sidecar-existing skip, overwrite, append or prepend"
    )


def _not_a_text(path: Path) -> OutputError:
    return OutputError(
        f"{shown_path(path)} is a link, a pipe or longer than a text can be: move it away, or leave --sidecar out"
    )


def shared_stems(folder: Path) -> frozenset[str]:
    """The stems in a folder that stand for several images: of two images, or the whole name of another one."""
    names = [name for name in os.listdir(folder) if IMAGE_SUFFIX.search(name)]
    stems = Counter(Path(name).stem for name in names)
    return frozenset(stem for stem, count in stems.items() if count > 1) | (stems.keys() & set(names))
