"""Where finished rows go as they come: a stream, a run's journal, text files beside the images.

Rows come in order, from one thread; a row is a mapping. This module knows nothing of images or models.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from idefics_cli.columns import json_text, strict_json
from idefics_cli.errors import OutputError, StreamClosed
from idefics_cli.storage.filenames import IMAGE_SUFFIX, escape_name
from idefics_cli.storage.unique_ids import UniqueIds
from idefics_cli.writers.journal import Journal, reason, shown_path

COMMIT_SECONDS = 0.5  # how long a finished row waits at most for others to be written with
COMMIT_ROWS = 1_000
FOLDERS_KEPT = 64  # whose listings the sidecars' names are made from


class StreamWriter:
    """JSON lines on an open stream, flushed row by row; `num_safe` rows are out. `write` raises StreamClosed."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.num_safe = stream, 0

    def write(self, row: Mapping[str, Any]) -> None:
        write_through(self.stream, strict_json(json_text(row)) + b"\n")
        self.num_safe += 1

    def close(self) -> None:
        """Every row has been flushed."""


def write_through(stream: BinaryIO, data: bytes) -> None:
    """Whole lines to stdout, flushed. Raises StreamClosed, or OutputError where they cannot be written."""
    try:
        stream.write(data)
        stream.flush()
    except BrokenPipeError as error:
        raise StreamClosed from error
    except OSError as error:
        raise OutputError(f"cannot write to stdout: {reason(error)}; free some space and run again") from error


class JournalWriter:
    """Rows to a journal, many at a time, from a thread of its own: the model does not wait for the disk.

    `num_safe` rows are on the disk; a row is half a second later at most. What goes wrong in the thread is raised by
    the next `write` or by `close`.
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
        finally:  # a signal must not take the file from under the thread
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


RowWriter: TypeAlias = StreamWriter | JournalWriter


class SidecarWriter:
    """The text of a row in `stem.txt` beside its image, whole or not at all.

    Where another image in the folder has the same stem, the name is `stem.ext.txt`, so that no two share a file. A
    file that holds another text is the user's own, unless `overwrite` says that it may go, or another row's of this
    run: then nothing helps.
    """

    def __init__(self, overwrite: bool) -> None:
        self.overwrite = overwrite
        self._rows = UniqueIds()  # by the files that have their texts
        self._folder = lru_cache(FOLDERS_KEPT)(lambda folder: (folder.resolve(), shared_stems(folder)))

    def write(self, image: Path, text: str, row: int) -> None:
        """The text of the `row` of this index. Raises OutputError for a file that may not go, or cannot be written."""
        try:
            folder, shared = self._folder(image.parent)  # by the one name that no other spelling has
            target = image.with_name(f"{image.name if image.stem in shared else image.stem}.txt")
            first = self._rows.add(escape_name(str(folder / target.name)), row)
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
                f"{shown_path(target)} holds another text: move it away and run the same command again; or replace all"
                " such files with --overwrite, which starts the run over"
            )


def shared_stems(folder: Path) -> frozenset[str]:
    """The stems in a folder that stand for several images: of two images, or the whole name of another one."""
    names = [name for name in os.listdir(folder) if IMAGE_SUFFIX.search(name)]
    stems = Counter(Path(name).stem for name in names)
    return frozenset(stem for stem, count in stems.items() if count > 1) | (stems.keys() & set(names))
