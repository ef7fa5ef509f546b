"""Where finished rows go as they come: a stream, or a run's journal.

Rows come in order, from one thread; a row is a mapping. This module knows nothing of images or models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, TypeAlias

from idefics_cli.columns import json_text, strict_json
from idefics_cli.errors import OutputError, StreamClosed
from idefics_cli.writers.journal import NO_SPACE, Journal, reason

COMMIT_SECONDS = 0.5  # how long a finished row waits at most for others to be written with
COMMIT_ROWS = 1_000


Then: TypeAlias = Callable[[], None]  # what is to be done once a row is safe


def nothing() -> None: ...


class StreamWriter:
    """JSON lines on an open stream, flushed row by row; `num_safe` rows are out. `write` raises StreamClosed."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.num_safe = stream, 0

    def write(self, row: Mapping[str, Any], then: Then = nothing) -> None:
        write_through(self.stream, strict_json(json_text(row)) + b"\n")
        self.num_safe += 1
        then()

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
        fix = "free some space" if error.errno in NO_SPACE else "see where it leads"
        raise OutputError(f"cannot write to stdout: {reason(error)}; {fix} and run again") from error


class JournalWriter:
    """Rows to a journal, many at a time, from a thread of its own: the model does not wait for the disk.

    `num_safe` rows are on the disk; a row is half a second later at most. What goes wrong in the thread is raised by
    the next `write` or by `close`.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal, self.num_safe = journal, 0
        self._texts: list[tuple[bytes, Then]] = []
        self._error: BaseException | None = None
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def write(self, row: Mapping[str, Any], then: Then = nothing) -> None:
        text = json_text(row)
        with self._changed:
            while len(self._texts) >= 4 * COMMIT_ROWS and self._error is None:
                self._changed.wait()
            self._raise_error()
            self._texts.append((text, then))
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
                self.journal.append([text for text, _ in texts])
                self.num_safe += len(texts)
                for _, then in texts:
                    then()
        except BaseException as error:  # raised where the rows come from
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next_texts(self) -> list[tuple[bytes, Then]]:
        """What is to be written now; nothing when the writer closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._texts or self._is_closing)
            self._changed.wait_for(lambda: len(self._texts) >= COMMIT_ROWS or self._is_closing, COMMIT_SECONDS)
            texts, self._texts = self._texts, []
            self._changed.notify_all()
        return texts


RowWriter: TypeAlias = StreamWriter | JournalWriter
