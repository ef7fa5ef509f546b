"""Reader -> prepare threads -> model -> rows in input order -> writer.

A few threads take rows from the reader and prepare them (images opened, prompts made), the caller's thread runs the
model and writes. The model takes what is ready and never waits while it has work; results come back in any order and
leave in the order of the input. A row is read only when there is space for it in the window between the oldest row that
is not written and the newest. A bad row is a row with an error; an exception is a bug, a user's mistake or a signal,
and is raised after the rows before it are written. Knows no network, no files and no terminal.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from idefics_cli.engine.prompt_source import IterableSource
from idefics_cli.errors import IdeficsError, InputError, RowError
from idefics_cli.result import Outcome, Result, error_of
from idefics_cli.rows import InputRow

if TYPE_CHECKING:
    from idefics_cli.engine.prompt_source import PromptSource

PATIENCE = 0.2  # seconds that an idle model waits for a fuller batch
MAX_BYTES_IN_FLIGHT = 512 << 20  # of images and texts that their rows hold; with more, no further row is read
IDS_PER_CODE = 3
FIRST_ROWS = 64
REMEDIES = {  # by code, where no row's own message has one
    "image_missing": "name the folder of the images with --image-root, or another column with --image-column",
    "image_unreadable": "name the column of the images with --image-column",
    "image_too_large": "allow more with --max-pixels",
    "prompt_too_long": "shorten the prompts, or show fewer shots",
}

Prepared: TypeAlias = Any  # what the model takes for one row
Finished: TypeAlias = Outcome | Mapping[str, Any]  # what a row leaves with; a mapping is its earlier result


@dataclass(frozen=True)
class Steps:
    """A row -> what the model takes (in several threads at once), and from that to results, in the model's thread.

    `decode` gives (number of the prompt in the order taken, result) in the order of finishing.
    """

    prepare: Callable[[InputRow], Prepared | RowError]
    decode: Callable[[PromptSource], Iterator[tuple[int, Outcome]]]


@dataclass(frozen=True)
class FlowOptions:
    """`batch_size`: rows that the model works on at a time; `workers`: prepare threads.

    `rows_at_once` are read by a thread that has come to read: it costs less than one by one, and is for readers whose
    rows do not come from outside one by one. Unless the `first_rows_may_fail`, or `max_errors` says how many may, a run
    whose first FIRST_ROWS rows all fail with one code is a mistake.
    """

    batch_size: int
    workers: int
    max_errors: int | None = None
    rows_at_once: int = 1
    first_rows_may_fail: bool = False

    def __post_init__(self) -> None:
        assert min(self.batch_size, self.workers, self.rows_at_once) > 0, self

    @property
    def first_rows_matter(self) -> bool:
        return self.max_errors is None and not self.first_rows_may_fail

    @property
    def window(self) -> int:
        """Rows in flight: the model looks a few batches ahead for prompts of one length, while others are prepared."""
        return 8 * self.batch_size + 2 * self.workers

    @property
    def step(self) -> int:
        """Rows read at once: a part of the window, so that the rest is in work meanwhile."""
        return min(self.rows_at_once, max(1, self.window // 8))


@dataclass
class RunStats:
    """What has come out so far; up to date whenever a row has been written.

    `resumed` of the `rows` had been finished by an earlier run; `safe` are known to have reached the output. `failed`
    counts them by error code, `failed_ids` names the first of each. The model waited for images in `seconds_waited` of
    the `seconds`. `stopped_early`: after as many failed rows as `max_errors` allows.
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
        """How many rows have an error."""
        return self.failed.total()

    @property
    def rate(self) -> float:
        """Rows per second, without those of earlier runs."""
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

    def reset(self) -> None:
        vars(self).update(vars(RunStats()))

    def add_earlier(self, row: Mapping[str, Any]) -> None:
        """A result row of an earlier run."""
        self.add(row["id"], row["error"].split(":", 1)[0] if row["error"] else None)
        self.resumed += 1


def run_rows(
    rows: Iterator[InputRow],
    steps: Steps,
    write: Callable[[InputRow, Finished], None],
    options: FlowOptions,
    stats: RunStats,
    on_row: Callable[[Finished], None],
) -> None:
    """Write one row for each of `rows`, in order, and keep `stats`. A row with an earlier result leaves with that.

    `on_row` is called with what each row has left with, once it is written; what it raises ends the run. After
    `max_errors` failed rows (those of earlier runs not counted) the run ends with `stats.stopped_early`. Raises
    FirstRowsFailed.
    """
    started, failed_before = time.perf_counter(), stats.num_failed

    def leave(row: InputRow, finished: Finished) -> None:
        write(row, finished)
        error = None
        if isinstance(finished, Mapping):
            stats.add_earlier(finished)
        else:
            error = error_of(finished)
            stats.add(row.id, error.code if error else None)
        stats.seconds, stats.seconds_waited = time.perf_counter() - started, flow.seconds_waited
        on_row(finished)
        if error is not None and stats.num_failed - failed_before == options.max_errors:
            stats.stopped_early = True
            raise _EnoughErrors
        if options.first_rows_matter and error and stats.rows == stats.failed[error.code] == FIRST_ROWS:
            raise _all_failed(error)

    flow = RowFlow(rows, steps.prepare, leave, options)
    try:
        with flow:
            try:
                for number, result in steps.decode(flow):
                    flow.settle(number, result)
            except Exception as error:
                if flow.is_leaving or isinstance(error, IdeficsError):
                    raise
                _settle_one_by_one(flow, steps.decode, error)
    except _EnoughErrors:
        return
    flow.require_all_written()


def _settle_one_by_one(flow: RowFlow, decode: Callable[..., Iterator[tuple[int, Outcome]]], error: Exception) -> None:
    """After a bug in the middle of a batch: its rows that come out alone are kept, up to the one that does not."""
    traceback.clear_frames(error.__traceback__)  # they hold what the batch had in memory
    for number, prompt in flow.taken():
        for _, result in decode(IterableSource([prompt])):
            flow.settle(number, result)
    raise error


def flowed(rows: Iterator[InputRow], steps: Steps, options: FlowOptions) -> Iterator[tuple[InputRow, Finished]]:
    """Each of `rows` with its result, in order, for one who takes them as they come: the model works only meanwhile.

    Where the model would wait while there are rows to hand out, its stream ends, and another begins after them.
    """
    left: deque[tuple[InputRow, Finished]] = deque()

    def leave(row: InputRow, finished: Finished) -> bool:
        left.append((row, finished))
        return True

    def handed_out() -> Iterator[tuple[InputRow, Finished]]:
        while left:
            yield left.popleft()

    with RowFlow(rows, steps.prepare, leave, options) as flow:
        while not flow.is_over:
            taken_before, counts = flow.num_taken, flow.counts
            try:
                for number, result in steps.decode(flow):
                    flow.settle(taken_before + number, result)
                    yield from handed_out()
            except Exception:
                yield from handed_out()
                raise
            assert flow.counts != counts, f"the model forgets rows: {counts}"
            yield from handed_out()


class FirstRowsFailed(InputError):
    """All of the first rows have failed with one code, and so would all the others."""


def _all_failed(error: RowError) -> FirstRowsFailed:
    remedy = REMEDIES.get(error.code)
    return FirstRowsFailed(
        f"the first {FIRST_ROWS} rows all failed with {error}{f'; {remedy}' if remedy else ''}. Fix that and run the"
        " command again, or say with --max-errors N how many rows may fail"
    )


class _EnoughErrors(Exception):
    """`max_errors` rows have failed."""


class RowFlow:
    """Rows on their way: read and prepared by threads, taken and settled by the thread that runs the model.

    `leave` gets every row with its result, in input order, in the model's thread, inside `take` and `settle`. Where it
    says True, the model does not wait for prompts before the row is handed on. A context: on leaving it, whatever is
    still under way is dropped.
    """

    def __init__(
        self,
        rows: Iterator[InputRow],
        prepare: Callable[[InputRow], Prepared | RowError],
        leave: Callable[[InputRow, Finished], bool | None],
        options: FlowOptions,
    ) -> None:
        self.seconds_waited = 0.0
        self._rows, self._prepare, self._leave, self._options = rows, prepare, leave, options
        self._reading = threading.Lock()  # the reader is asked by one thread at a time
        self._unprepared: deque[tuple[int, InputRow]] = deque()  # places and rows that no thread has taken up
        lock = threading.Lock()  # guards all below
        self._changed, self._has_space = threading.Condition(lock), threading.Condition(lock)
        self._ready: deque[tuple[int, InputRow, Prepared]] = deque()  # places, rows and prompts not taken yet
        self._taken: dict[int, tuple[int, InputRow, Prepared]] = {}  # by the number of the prompt
        self.is_leaving = False  # what is raised then is not the model's
        self._finished: dict[int, tuple[InputRow, Finished] | BaseException] = {}  # by place; or what stands for a row
        self._num_read = self._num_preparing = self.num_taken = self._num_left = self._num_bytes = 0
        self._wanted = 1  # so many ready prompts are worth waking the model's thread for
        self._has_ended = False

    def __enter__(self) -> RowFlow:
        for number in range(self._options.workers):
            # Daemons: one may be waiting for a path on stdin that never comes.
            threading.Thread(target=self._work, name=f"prepare-{number}", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()
        self._unprepared.clear()

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
                self._taken[self.num_taken] = place, row, prompt
                self.num_taken += 1
                taken.append(prompt)
        return taken

    def settle(self, number: int, result: Result) -> None:
        """The result of the prompt that was taken as the `number`-th, from 0."""
        place, row, _ = self._taken.pop(number)
        with self._changed:
            self._finished[place] = row, result
        self._let_leave()

    def taken(self) -> list[tuple[int, Prepared]]:
        """Numbers and prompts that are not settled, in the order of the rows."""
        return [(number, prompt) for number, (_, _, prompt) in sorted(self._taken.items(), key=lambda each: each[1][0])]

    def require_all_written(self) -> None:
        assert self._num_left == self._num_read, f"{self._num_read} rows came in and {self._num_left} went out"

    def _wait_for_prompts(self, enough: int) -> None:
        """Until a batch is ready; a smaller one does not wait for rows that are slow to come."""
        started = time.perf_counter()
        deadline: float | None = None
        while True:
            is_handing_on = self._let_leave()
            with self._changed:
                self._wanted = enough if self._ready else 1
                if self._ready and deadline is None:
                    deadline = time.perf_counter() + PATIENCE
                left = None if deadline is None else deadline - time.perf_counter()
                has_waited = left is not None and left <= 0
                if len(self._ready) >= enough or self._nothing_comes() or has_waited or is_handing_on:
                    break
                if self._num_left not in self._finished:
                    self._changed.wait(left)
        self.seconds_waited += time.perf_counter() - started

    def _nothing_comes(self) -> bool:
        """No row is being read or prepared any more, and none waits to leave."""
        return self._has_ended and not self._num_preparing and self._num_left not in self._finished

    @property
    def counts(self) -> tuple[int, int]:
        """Of rows that the model has taken, and that have left."""
        return self.num_taken, self._num_left

    @property
    def is_over(self) -> bool:
        """All rows have left."""
        with self._changed:
            return self._has_ended and self._num_left == self._num_read and self._num_left not in self._finished

    def _let_leave(self) -> bool:
        """All finished rows whose turn it is, and whether one of them is to be handed on. Raises an exception when its
        turn has come."""
        is_handing_on = False
        while True:
            with self._changed:
                finished = self._finished.pop(self._num_left, None)
                if finished is None:
                    return is_handing_on
                self.is_leaving = True
                if isinstance(finished, BaseException):
                    raise finished
                self._num_left += 1
                self._num_bytes -= _num_bytes(finished[0])
                if self._can_read():
                    self._has_space.notify()
            is_handing_on |= bool(self._leave(*finished))
            self.is_leaving = False

    # ---- the threads' side

    def _work(self) -> None:
        while (read := self._next_row()) is not None:
            place, row = read
            try:
                finished = row.earlier or row.error
                prepared = finished or self._prepare(row)
            except BaseException as error:  # raised in the model's thread when the row's turn has come
                self._fail(place, error, num_preparing=1)
                return
            self._put(place, row, prepared, is_finished=finished is not None or isinstance(prepared, RowError))

    def _next_row(self) -> tuple[int, InputRow] | None:
        """The next row and its place; None at the end."""
        while self._unprepared or not self._has_ended:
            with suppress(IndexError):  # another thread was faster; a lock here would be contended for every row
                return self._unprepared.popleft()
            with self._reading:
                if not self._unprepared and not self._has_ended:
                    self._read()
        return None

    def _read(self) -> None:
        """As many rows as are read at once, when there is space for them."""
        with self._has_space:
            self._has_space.wait_for(lambda: self._has_ended or self._can_read())
        for _ in range(self._options.step):
            try:
                row = None if self._has_ended else next(self._rows, None)
            except BaseException as error:  # comes after the rows before it
                self._fail(self._num_read, error)
                return
            if row is None:
                self._end()
                return
            with self._changed:
                self._unprepared.append((self._num_read, row))
                self._num_read += 1
                self._num_preparing += 1
                self._num_bytes += _num_bytes(row)
            if self._num_bytes > MAX_BYTES_IN_FLIGHT:
                return

    def _can_read(self) -> bool:
        """Whether the window has space for as many rows as are read at once."""
        space = self._options.window - (self._num_read - self._num_left)
        return space >= self._options.step and self._num_bytes <= MAX_BYTES_IN_FLIGHT

    def _put(self, place: int, row: InputRow, prepared: Any, is_finished: bool) -> None:
        with self._changed:
            self._num_preparing -= 1
            if is_finished:
                self._finished[place] = row, prepared
            else:
                self._ready.append((place, row, prepared))
            is_end = self._has_ended and not self._num_preparing
            if is_end or len(self._ready) == self._wanted or place == self._num_left:
                self._changed.notify()

    def _fail(self, place: int, error: BaseException, num_preparing: int = 0) -> None:
        with self._changed:
            self._num_preparing -= num_preparing
            self._finished[place] = error
        self._end()

    def _end(self) -> None:
        """No further row is read."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()
            self._has_space.notify_all()


def _num_bytes(row: InputRow) -> int:
    return _size(row.sources) + _size(row.values)


def _size(value: Any) -> int:
    """Of texts and bytes, in memory."""
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, str):
        return sys.getsizeof(value)  # up to four bytes for each character
    if hasattr(value, "getbands"):  # a Pillow image
        return 4 * value.width * value.height
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(map(_size, value))
