"""Reader -> decode threads -> captioner -> rows in input order -> writer.

One thread reads rows, a few prepare pictures, and the caller's thread runs the captioner and writes. Everything in
flight is bounded: a picture is prepared only when there is room for it among those that wait. A bad row is a row with
an error; an exception is a bug, a user's mistake or a stop, and goes through with the rows before it written. This
module knows no network and no terminal: a captioner is anything with the two methods of `Captioner`.
"""

from __future__ import annotations

import math
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from idefics_cli.data.readers import InputRow
from idefics_cli.data.writers import RowWriter
from idefics_cli.errors import RowError

if TYPE_CHECKING:
    from idefics_cli.data.images import ImageLimits
    from idefics_cli.idefics import Result

PATIENCE = 0.2  # seconds that a batch which is not full waits for a further row
STOP_CHECK = 0.1  # seconds after which the reading thread looks whether it is still wanted
IDS_PER_CODE = 3


class Captioner(Protocol):
    """What `Idefics` is to a run; `prepare_image` is called from several threads at once."""

    batch_size: int

    def prepare_image(self, source: Any, limits: ImageLimits) -> Any | RowError: ...

    def caption(self, images: Sequence[Any], **decoding: Any) -> Sequence[Result]: ...


Outcome: TypeAlias = "Result | RowError"


@dataclass(frozen=True)
class RunOptions:
    """How a run goes: rows per call, decode threads, and the number of failed rows that ends it early."""

    batch_size: int
    workers: int
    limits: ImageLimits
    decoding: Mapping[str, Any] = field(default_factory=dict)
    candidates: bool = False
    max_errors: int | None = None

    def __post_init__(self) -> None:
        assert self.batch_size > 0 and self.workers > 0, f"{self.batch_size} rows per batch, {self.workers} workers"


@dataclass
class RunStats:
    """What has come out so far; up to date whenever a row has been written."""

    rows: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    failed_ids: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_waited: float = 0.0
    batch_size: int = 0
    stopped_early: bool = False

    @property
    def num_failed(self) -> int:
        return self.failed.total()

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def waited_share(self) -> float:
        """The part of the time in which the captioner waited for pictures."""
        return self.seconds_waited / self.seconds if self.seconds else 0.0

    def add(self, row: InputRow, error: RowError | None) -> None:
        self.rows += 1
        if error is not None:
            self.failed[error.code] += 1
            ids = self.failed_ids.setdefault(error.code, [])
            if len(ids) < IDS_PER_CODE:
                ids.append(row.id)


def caption_images(
    rows: Iterator[InputRow],
    captioner: Captioner,
    writer: RowWriter,
    options: RunOptions,
    stats: RunStats,
    on_row: Callable[[], None],
) -> None:
    """Write one row for each of `rows`, in order, keep `stats`, and finish the writer.

    `on_row` is called after each row written; what it raises ends the run. After `max_errors` failed rows the run ends
    with `stats.stopped_early`, and the writer is not finished. What `rows` raises is raised behind the rows before it.
    """
    started = time.perf_counter()
    fitting = FittingCaptioner(captioner, options)
    with PictureFeed(rows, lambda row: _prepare(row, captioner, options.limits), options) as feed:
        for batch in feed.batches():
            outcomes = fitting.caption([prepared for _, prepared in batch])
            stats.batch_size = fitting.batch_size
            for (row, _), outcome in zip(batch, outcomes, strict=True):
                writer.write(caption_row(row, outcome, candidates=options.candidates))
                stats.add(row, _error(outcome))
                stats.seconds, stats.seconds_waited = time.perf_counter() - started, feed.seconds_waited
                on_row()
                if stats.num_failed == options.max_errors:
                    stats.stopped_early = True
                    return
    writer.finish()


def _prepare(row: InputRow, captioner: Captioner, limits: ImageLimits) -> Any | RowError:
    return row.error or captioner.prepare_image(row.source, limits)


def _error(outcome: Outcome) -> RowError | None:
    return outcome if isinstance(outcome, RowError) else outcome.error


def caption_row(row: InputRow, outcome: Outcome, *, candidates: bool) -> dict[str, Any]:
    """The columns of one row; a failed one has no text, and a score that is no number is null."""
    error = _error(outcome)
    result = None if isinstance(outcome, RowError) or error else outcome
    columns = {
        "id": row.id,
        "image": row.image,
        "caption": result.text if result else None,
        "score": _number(result.score) if result else None,
        "tokens": result.tokens if result else None,
        "error": str(error) if error else None,
    }
    if candidates:
        columns["candidates"] = _candidate_rows(result) if result else None
    return columns


def _candidate_rows(result: Result) -> list[dict[str, Any]]:
    return [{"text": c.text, "score": _number(c.score), "tokens": c.tokens} for c in result.candidates]


def _number(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None


# Memory


class FittingCaptioner:
    """Calls the captioner with as many images as the device's memory holds.

    When it does not hold a batch, the batch is halved until its parts fit, and later batches stay at what has fitted.
    An image that does not fit even alone is `out_of_memory` and says nothing about the others.
    """

    def __init__(self, captioner: Captioner, options: RunOptions) -> None:
        self.captioner = captioner
        self.decoding = options.decoding
        self.batch_size = options.batch_size

    def caption(self, prepared: Sequence[Any | RowError]) -> list[Outcome]:
        """One outcome per item, in order; what is an error already stays one and costs no call."""
        described = iter(self._caption_all([image for image in prepared if not isinstance(image, RowError)]))
        return [item if isinstance(item, RowError) else next(described) for item in prepared]

    def _caption_all(self, images: list[Any]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        parts = [images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)][::-1]
        fitted, halved, too_large = 0, False, False
        while parts:
            part = parts.pop()
            results = self._attempt(part)
            if results is not None:
                outcomes += results
                fitted = max(fitted, len(part))
            elif len(part) == 1:
                outcomes.append(RowError("out_of_memory", "the device's memory does not hold this row alone"))
                too_large = True
            else:
                half = (len(part) + 1) // 2
                parts += [part[half:], part[:half]]
                halved = True
        if halved and not too_large:
            self.batch_size = fitted
        return outcomes

    def _attempt(self, images: list[Any]) -> list[Result] | None:
        """Results, or None when memory ran out. The exception, which holds the tensors, is gone when this returns."""
        try:
            results = list(self.captioner.caption(images, **self.decoding))
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            results = None
        if results is None:
            sys.modules["torch"].cuda.empty_cache()
        assert results is None or len(results) == len(images), f"{len(results)} results for {len(images)} images"
        return results


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # who has not imported it has raised none of its errors
    return torch is not None and isinstance(error, torch.cuda.OutOfMemoryError)


# Pictures


@dataclass(frozen=True)
class _End:
    """Behind the last row: nothing, or what the reader raised."""

    error: BaseException | None


class PictureFeed:
    """Rows with their pictures prepared ahead, in order, in batches.

    A context: on leaving it, whatever is still under way is dropped.
    """

    def __init__(self, rows: Iterator[InputRow], prepare: Callable[[InputRow], Any], options: RunOptions) -> None:
        self.seconds_waited = 0.0
        self._rows = rows
        self._prepare = prepare
        self._workers = options.workers
        self._batch_size = options.batch_size
        window = 2 * options.batch_size + options.workers
        self._ready: queue.Queue[tuple[InputRow, Future[Any]] | _End] = queue.Queue(window)
        self._dropped = threading.Event()

    def __enter__(self) -> PictureFeed:
        # A daemon: it may be waiting for a path on stdin that never comes.
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._dropped.set()

    def batches(self) -> Iterator[list[tuple[InputRow, Any | RowError]]]:
        """Lists of (row, picture or error) with up to `batch_size` pictures each.

        A batch is not held back for rows that are slow to come, nor an error for pictures behind it.
        """
        batch: list[tuple[InputRow, Any | RowError]] = []
        pictures = 0
        while True:
            item = self._next(PATIENCE if batch else None)
            if isinstance(item, tuple):
                batch.append(item)
                pictures += not isinstance(item[1], RowError)
                if 0 < pictures < self._batch_size and len(batch) < 4 * self._batch_size:
                    continue
            if batch:
                yield batch
            batch, pictures = [], 0
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return

    def _next(self, timeout: float | None) -> tuple[InputRow, Any | RowError] | _End | None:
        """The next row with its picture, the end, or None when no row has come for `timeout` seconds."""
        started = time.perf_counter()
        try:
            item = self._ready.get(timeout=timeout)
            return item if isinstance(item, _End) else (item[0], item[1].result())
        except queue.Empty:
            return None
        finally:
            self.seconds_waited += time.perf_counter() - started

    def _read(self) -> None:
        """The reading thread: rows to the pool, in order, no further ahead than there is room."""
        error: BaseException | None = None
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        try:
            for row in self._rows:
                if not self._put((row, pool.submit(self._prepare, row))):
                    break
        except BaseException as raised:  # handed to the thread that runs the captioner, which raises it
            error = raised
        self._put(_End(error))
        pool.shutdown(wait=False, cancel_futures=self._dropped.is_set())

    def _put(self, item: tuple[InputRow, Future[Any]] | _End) -> bool:
        while not self._dropped.is_set():
            try:
                self._ready.put(item, timeout=STOP_CHECK)
                return True
            except queue.Full:
                continue
        return False
