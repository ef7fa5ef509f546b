"""Reader -> prepare threads -> model -> rows in input order -> writer.

A few threads take rows from the reader and prepare them (images opened, prompts made), the caller's thread runs the
model and writes. The model takes what is ready and is never made to wait while it has work; results come back in any
order and leave in the order of the input. Everything in flight is bounded: no row is read before there is room for it
in the window between the oldest row that is not written and the newest. A bad row is a row with an error; an exception
is a bug, a user's mistake or a stop, and goes through with the rows before it written. This module knows no network, no
files and no terminal: it is given functions.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from idefics_cli.engine.prompt_source import PromptSource
from idefics_cli.errors import RowError
from idefics_cli.result import Outcome, Result, error_of
from idefics_cli.rows import InputRow

PATIENCE = 0.2  # seconds that an idle model waits for a fuller batch
IDS_PER_CODE = 3

Prepared = Any  # what the model takes for one row


@dataclass(frozen=True)
class Stages:
    """What is done with a row, one function for each step.

    `prepare` may be called from several threads at once, `decode` gives (number of the prompt in the order taken,
    result) in the order of finishing, `write` gets rows in input order.
    """

    prepare: Callable[[InputRow], Prepared | RowError]
    decode: Callable[[PromptSource], Iterator[tuple[int, Result]]]
    write: Callable[[InputRow, Outcome], None]


@dataclass(frozen=True)
class FlowOptions:
    """`batch_size`: rows that the model works on at a time; `workers`: prepare threads; `window`: rows in flight.

    `rows_at_once` are read by a thread that has come to read. It costs less than one by one, and is for readers that
    never wait for somebody to send a row.
    """

    batch_size: int
    workers: int
    max_errors: int | None = None
    windows_ahead: int = 8
    rows_at_once: int = 1

    def __post_init__(self) -> None:
        assert self.batch_size > 0 and self.workers > 0, f"{self.batch_size} rows per batch, {self.workers} workers"
        assert self.rows_at_once > 0, f"{self.rows_at_once} rows at once"

    @property
    def window(self) -> int:
        """The model looks a few batches ahead for prompts of one length, while others are prepared and written."""
        return self.windows_ahead * self.batch_size + 2 * self.workers

    @property
    def step(self) -> int:
        """So many rows are read, and their room given back, at once: a part of the window, so that work goes on."""
        return min(self.rows_at_once, max(1, self.window // 8))


@dataclass
class RunStats:
    """What has come out so far; up to date whenever a row has been written.

    `resumed` of the `rows` had been finished by an earlier run; `safe` are known to have reached the output.
    """

    rows: int = 0
    resumed: int = 0
    safe: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    failed_ids: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_waited: float = 0.0
    stopped_early: bool = False

    @property
    def num_failed(self) -> int:
        return self.failed.total()

    @property
    def rate(self) -> float:
        """Rows per second, those of earlier runs left out."""
        return (self.rows - self.resumed) / self.seconds if self.seconds else 0.0

    @property
    def waited_share(self) -> float:
        """The part of the time in which the model waited for images."""
        return self.seconds_waited / self.seconds if self.seconds else 0.0

    def add(self, row_id: str, code: str | None) -> None:
        self.rows += 1
        if code is not None:
            self.failed[code] += 1
            ids = self.failed_ids.setdefault(code, [])
            if len(ids) < IDS_PER_CODE:
                ids.append(row_id)


def run_rows(
    rows: Iterator[InputRow], stages: Stages, options: FlowOptions, stats: RunStats, on_row: Callable[[], None]
) -> None:
    """Write one row for each of `rows`, in order, and keep `stats`.

    `on_row` is called after each row written; what it raises ends the run. After `max_errors` failed rows (those that
    earlier runs wrote not counted) the run ends with `stats.stopped_early`. What `rows` raises is raised behind the
    rows before it.
    """
    started, failed_before = time.perf_counter(), stats.num_failed

    def leave(row: InputRow, outcome: Outcome) -> None:
        error = error_of(outcome)
        stages.write(row, outcome)
        stats.add(row.id, error.code if error else None)
        stats.seconds, stats.seconds_waited = time.perf_counter() - started, flow.seconds_waited
        on_row()
        if error is not None and stats.num_failed - failed_before == options.max_errors:
            stats.stopped_early = True
            raise _EnoughErrors

    flow = RowFlow(rows, stages.prepare, leave, options)
    try:
        with flow:
            for number, result in stages.decode(flow):
                flow.settle(number, result)
    except _EnoughErrors:
        return
    flow.require_all_written()


class _EnoughErrors(Exception):
    """`max_errors` rows have failed."""


class RowFlow:
    """Rows on their way: read and prepared by threads, taken and settled by the thread that runs the model.

    `leave` gets every row with its outcome, in input order, in the model's thread, inside `take` and `settle`. A
    context: on leaving it, whatever is still under way is dropped.
    """

    def __init__(
        self,
        rows: Iterator[InputRow],
        prepare: Callable[[InputRow], Prepared | RowError],
        leave: Callable[[InputRow, Outcome], None],
        options: FlowOptions,
    ) -> None:
        self.seconds_waited = 0.0
        self._rows, self._prepare, self._leave, self._options = rows, prepare, leave, options
        self._reading = threading.Lock()  # the reader is asked by one thread at a time
        self._room = threading.Semaphore(options.window)
        self._room_to_give = 0
        self._read_rows: deque[tuple[int, InputRow]] = deque()  # places and rows that no thread has taken up
        self._changed = threading.Condition()  # guards all below
        self._ready: deque[tuple[int, InputRow, Prepared]] = deque()  # places, rows and prompts not taken yet
        self._taken: dict[int, tuple[int, InputRow]] = {}  # by the number of the prompt
        self._finished: dict[int, tuple[InputRow, Outcome] | BaseException] = {}  # by place; a failure stands for a row
        self._num_read = self._num_preparing = self._num_taken = self._num_left = 0
        self._wanted = 1  # so many ready prompts are worth waking the model's thread for
        self._has_ended = False

    def __enter__(self) -> RowFlow:
        for number in range(self._options.workers):
            # Daemons: one may be waiting for a path on stdin that never comes.
            threading.Thread(target=self._work, name=f"prepare-{number}", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._has_ended = True
        self._read_rows.clear()
        self._room.release()  # one thread may wait for it

    # ---- the model's side

    def take(self, most: int, wait: bool) -> list[Prepared]:
        """Up to `most` prepared rows. With `wait`, at least one or, at the end of all rows, none."""
        if wait:
            self._wait_for_prompts(min(most, self._options.batch_size))
        self._let_leave()
        taken = []
        with self._changed:
            while self._ready and len(taken) < most:
                place, row, prompt = self._ready.popleft()
                self._taken[self._num_taken] = place, row
                self._num_taken += 1
                taken.append(prompt)
        return taken

    def settle(self, number: int, result: Result) -> None:
        """The result of the prompt that was taken as the `number`-th, from 0."""
        place, row = self._taken.pop(number)
        with self._changed:
            self._finished[place] = row, result
        self._let_leave()

    def require_all_written(self) -> None:
        assert self._num_left == self._num_read, f"{self._num_read} rows came in and {self._num_left} went out"

    def _wait_for_prompts(self, enough: int) -> None:
        """Until a batch is ready; a smaller one is not held back for rows that are slow to come."""
        started = time.perf_counter()
        deadline: float | None = None
        while True:
            self._let_leave()
            with self._changed:
                self._wanted = enough if self._ready else 1
                if self._ready and deadline is None:
                    deadline = time.perf_counter() + PATIENCE
                left = None if deadline is None else deadline - time.perf_counter()
                if len(self._ready) >= enough or self._nothing_comes() or (left is not None and left <= 0):
                    break
                if self._num_left not in self._finished:
                    self._changed.wait(left)
        self.seconds_waited += time.perf_counter() - started

    def _nothing_comes(self) -> bool:
        """No row is being read or prepared any more, and none waits to leave."""
        return self._has_ended and not self._num_preparing and self._num_left not in self._finished

    def _let_leave(self) -> None:
        """All finished rows whose turn it is. Raises a failure when its turn has come."""
        while True:
            with self._changed:
                if self._num_left not in self._finished:
                    return
                finished = self._finished.pop(self._num_left)
            if isinstance(finished, BaseException):
                raise finished
            self._num_left += 1
            self._give_room()
            self._leave(*finished)

    def _give_room(self) -> None:
        """Room for one more row, given several at a time: each time may wake a thread."""
        self._room_to_give += 1
        if self._room_to_give >= self._options.step or self._num_left == self._num_read:
            self._room.release(self._room_to_give)
            self._room_to_give = 0

    # ---- the threads' side

    def _work(self) -> None:
        while (read := self._next_row()) is not None:
            place, row = read
            try:
                prepared = row.error or self._prepare(row)
            except BaseException as error:  # raised in the model's thread when the row's turn has come
                self._fail(place, error)
                return
            self._put(place, row, prepared)

    def _next_row(self) -> tuple[int, InputRow] | None:
        """The next row and its place; None at the end."""
        while not self._has_ended or self._read_rows:
            with suppress(IndexError):  # another thread was faster
                return self._read_rows.popleft()
            with self._reading:
                if not self._has_ended and not self._read_rows:
                    self._read()
        return None

    def _read(self) -> None:
        """Rows for which there is room, at least one but at the end."""
        self._room.acquire()
        for number in range(self._options.step):
            if number and not self._room.acquire(blocking=False):
                return
            try:
                row = None if self._has_ended else next(self._rows, None)  # it may have ended while there was no room
            except BaseException as error:  # stands behind the rows before it
                self._fail(self._num_read, error, was_preparing=False)
                row = None
            if row is None:
                self._end()
                return
            with self._changed:
                self._num_read += 1
                self._num_preparing += 1
            self._read_rows.append((self._num_read - 1, row))

    def _end(self) -> None:
        with self._changed:
            self._has_ended = True
            self._changed.notify()

    def _put(self, place: int, row: InputRow, prepared: Prepared | RowError) -> None:
        with self._changed:
            self._num_preparing -= 1
            if isinstance(prepared, RowError):
                self._finished[place] = row, prepared
            else:
                self._ready.append((place, row, prepared))
            is_end = self._has_ended and not self._num_preparing
            if is_end or len(self._ready) == self._wanted or place == self._num_left:
                self._changed.notify()

    def _fail(self, place: int, error: BaseException, was_preparing: bool = True) -> None:
        with self._changed:
            self._num_preparing -= was_preparing
            self._finished[place] = error
            self._has_ended = True
            self._changed.notify()
