"""Where finished rows go as they come: a stream, a run's journal, text files beside the images.

A writer takes rows in order. This module knows nothing of images or models; a row is a mapping.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from idefics_cli.columns import json_text, strict_json
from idefics_cli.errors import OutputError
from idefics_cli.storage.filenames import IMAGE_SUFFIX, escape_name
from idefics_cli.storage.unique_ids import UniqueIds
from idefics_cli.writers.journal import Journal, reason, shown_path

COMMIT_SECONDS = 0.5  # how long a finished row waits at the most for others to be written with
COMMIT_ROWS = 1_000
FOLDERS_KEPT = 64  # whose listings the sidecars' names are made from


class RowWriter(Protocol):
    """`write` once per row, in order; `close` whenever the run ends, with all rows in their place when it returns."""

    @property
    def num_safe(self) -> int:
        """Rows that have reached their place."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class StreamClosed(Exception):
    """Nobody reads the stream any more: no mistake, and nothing left to do."""


class StreamWriter:
    """JSON lines on a stream that is open already and stays so, flushed row by row. `write` raises StreamClosed."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.num_safe = stream, 0

    def write(self, row: Mapping[str, Any]) -> None:
        write_through(self.stream, strict_json(json_text(row)) + b"\n")
        self.num_safe += 1

    def close(self) -> None:
        """Every row has been flushed."""


def write_through(stream: BinaryIO, data: bytes) -> None:
    """Whole lines to stdout, flushed. Raises StreamClosed, or OutputError where there is no room."""
    try:
        stream.write(data)
        stream.flush()
    except BrokenPipeError as error:
        raise StreamClosed from error
    except OSError as error:
        raise OutputError(f"cannot write to stdout: {reason(error)}; make room and run again") from error


class JournalWriter:
    """Rows to a journal, many at a time, from a thread of its own: the model does not wait for the disk.

    A row is in its place half a second later at the most. What goes wrong in the thread is raised by the next `write`
    or by `close`.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal, self.num_safe = journal, 0
        self._texts: list[bytes] = []
        self._error: BaseException | None = None
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def write(self, row: Mapping[str, Any]) -> None:
        text = json_text(row)
        with self._changed:
            while len(self._texts) >= 4 * COMMIT_ROWS and self._error is None:
                self._changed.wait()
            self._raise_error()
            self._texts.append(text)
            if len(self._texts) in (1, COMMIT_ROWS):
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        try:
            self._thread.join()
        finally:  # a stop may not take the file from under the thread
            self._thread.join()
        self._raise_error()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        try:
            while texts := self._next_texts():
                self.journal.append(texts)
                self.num_safe += len(texts)
        except BaseException as error:  # raised where the rows come from
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next_texts(self) -> list[bytes]:
        """What is to be written now; nothing when the writer closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._texts or self._is_closing)
            self._changed.wait_for(lambda: len(self._texts) >= COMMIT_ROWS or self._is_closing, COMMIT_SECONDS)
            texts, self._texts = self._texts, []
            self._changed.notify_all()
        return texts


class SidecarWriter:
    """The text of a row in `stem.txt` beside its image, whole or not at all.

    Where another image in the folder has the same stem, the name is `stem.ext.txt`, so that no two share a file. A
    file that holds another text is somebody's own, unless `overwrite` says that it may go, or another row's of this
    run: then nothing helps. Several threads may write at once: when failed rows are done again, those that read the
    rows in between write their texts.
    """

    def __init__(self, overwrite: bool) -> None:
        self.overwrite = overwrite
        self._one_at_a_time = threading.Lock()
        self._rows = UniqueIds()  # by the files that have their texts
        self._folders: dict[Path, ImageFolder] = {}

    def target(self, image: Path) -> Path:
        is_shared = image.stem in self._folder(image.parent).shared_stems
        return image.with_name(f"{image.name if is_shared else image.stem}.txt")

    def _folder(self, path: Path) -> ImageFolder:
        if path not in self._folders:
            if len(self._folders) >= FOLDERS_KEPT:
                self._folders.clear()
            self._folders[path] = ImageFolder.of(path)
        return self._folders[path]

    def write(self, image: Path, text: str, row: int) -> None:
        """The text of the `row` of this index. Raises OutputError for a file that may not go, or cannot be written."""
        with self._one_at_a_time:
            try:
                target = self.target(image)
                one_name = self._folder(image.parent).path / target.name
                first = self._rows.add(escape_name(str(one_name)), row)
                self._replace(target, text.encode() + b"\n", row if first is None else first, row)
            except OSError as error:
                raise OutputError(
                    f"cannot write a text beside {shown_path(image)}: {reason(error)}; leave --sidecar out"
                ) from error

    def _replace(self, target: Path, data: bytes, first: int, row: int) -> None:
        """`first` is the row that the file has had from this run."""
        if target.exists():
            if target.read_bytes() == data:
                return
            self._require_own(target, first, row)
        temporary = target.with_name(f".{target.name[:200]}.tmp")
        temporary.write_bytes(data)
        temporary.rename(target)

    def _require_own(self, target: Path, first: int, row: int) -> None:
        if first != row:
            raise OutputError(
                f"rows {first + 1} and {row + 1} show one image and have different texts, but {shown_path(target)}"
                " holds one: leave --sidecar out"
            )
        if not self.overwrite:
            raise OutputError(
                f"{shown_path(target)} holds another text: move it away, and the run goes on; or let all such files be"
                " replaced with --overwrite, which begins the run anew"
            )


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images by the one name that no other spelling has, and which stems stand for several of them."""

    path: Path
    shared_stems: frozenset[str]

    @classmethod
    def of(cls, folder: Path) -> ImageFolder:
        return cls(folder.resolve(), shared_stems(folder))


def shared_stems(folder: Path) -> frozenset[str]:
    """The stems in a folder that stand for several images: of two images, or the whole name of another one."""
    names = [name for name in os.listdir(folder) if IMAGE_SUFFIX.search(name)]
    stems = Counter(Path(name).stem for name in names)
    return frozenset(stem for stem, count in stems.items() if count > 1) | (stems.keys() & set(names))
