from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import FakeCandidate, FakeCaptioner, FakeResult
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.data.images import DEFAULT_LIMITS, ImageLimits
from idefics_cli.data.readers import InputRow
from idefics_cli.errors import InputError, RowError
from idefics_cli.pipeline import PATIENCE, RunOptions, RunStats, caption_images, caption_row

BAD = RowError("image_unreadable", "broken")


class ListWriter:
    """Rows in memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.finished = False

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished = True

    def close(self) -> None: ...


class EchoCaptioner(FakeCaptioner):
    """Its pictures are the rows' sources, its texts the same; a source `bad...` is an error."""

    def prepare_image(self, source: Any, limits: ImageLimits) -> Any | RowError:
        return BAD if source.startswith("bad") else source

    def _describe(self, image: str, num_texts: int) -> FakeResult:
        return FakeResult(image, -1.0, 1)


def row(index: int, source: str | None = None, error: RowError | None = None) -> InputRow:
    name = source or f"row {index}"
    return InputRow(index, name, name, name, error)


def run(
    rows: Iterator[InputRow] | Sequence[InputRow], captioner: FakeCaptioner, **options: Any
) -> tuple[ListWriter, RunStats]:
    writer, stats = ListWriter(), RunStats()
    start(rows, captioner, writer, stats, **options)
    return writer, stats


def start(rows, captioner, writer, stats, *, on_row=lambda: None, **options: Any) -> None:
    options = {"batch_size": 3, "workers": 2, "limits": DEFAULT_LIMITS, **options}
    caption_images(iter(rows), captioner, writer, RunOptions(**options), stats, on_row)


# Rows


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_every_row_comes_out_once_in_order(good: list[bool], batch_size: int, workers: int) -> None:
    rows = [row(i, f"{'good' if is_good else 'bad'} {i}") for i, is_good in enumerate(good)]
    captioner = EchoCaptioner()
    writer, stats = run(rows, captioner, batch_size=batch_size, workers=workers)
    assert [r["id"] for r in writer.rows] == [r.id for r in rows]
    assert [r["caption"] for r in writer.rows] == [
        r.id if is_good else None for r, is_good in zip(rows, good, strict=True)
    ]
    assert writer.finished
    assert (stats.rows, stats.num_failed) == (len(good), good.count(False))
    assert max(captioner.calls, default=0) <= batch_size and sum(captioner.calls) == good.count(True)


def test_pictures_that_are_ready_early_wait_for_their_turn() -> None:
    class Uneven(EchoCaptioner):
        def prepare_image(self, source: Any, limits: ImageLimits) -> Any:
            time.sleep(random.random() / 200)
            return source

    rows = [row(i) for i in range(60)]
    writer, _ = run(rows, Uneven(), workers=8)
    assert [r["id"] for r in writer.rows] == [r.id for r in rows]


def test_batches_are_full() -> None:
    captioner = EchoCaptioner()
    run([row(i, "bad" if i % 2 else None) for i in range(14)], captioner)
    assert captioner.calls == [3, 3, 1]


def test_columns_of_a_row() -> None:
    result = FakeResult("a cat", -0.25, 3, (FakeCandidate("a cat", -0.25, 3), FakeCandidate("cat", float("-inf"), 2)))
    columns = caption_row(InputRow(0, "a.png", "d/a.png", Path("d/a.png")), result, candidates=False)
    assert columns == {
        "id": "a.png",
        "image": "d/a.png",
        "caption": "a cat",
        "score": -0.25,
        "tokens": 3,
        "error": None,
    }
    assert list(columns) == ["id", "image", "caption", "score", "tokens", "error"]
    columns = caption_row(row(0), result, candidates=True)
    assert columns["candidates"] == [
        {"text": "a cat", "score": -0.25, "tokens": 3},
        {"text": "cat", "score": None, "tokens": 2},
    ]


@pytest.mark.parametrize("outcome", [BAD, FakeResult(None, error=BAD)])
def test_columns_of_a_failed_row(outcome: RowError | FakeResult) -> None:
    columns = caption_row(row(0), outcome, candidates=True)
    assert columns["error"] == "image_unreadable: broken"
    assert [columns[key] for key in ("caption", "score", "tokens", "candidates")] == [None] * 4


def test_rows_that_are_known_to_be_bad_are_not_opened() -> None:
    writer, _ = run([row(0, error=RowError("image_not_allowed", "a link"))], EchoCaptioner())
    assert writer.rows[0]["error"] == "image_not_allowed: a link"


def test_statistics_count_by_code_and_keep_the_first_ids() -> None:
    _, stats = run([row(i, f"bad {i}" if i < 5 else None) for i in range(6)], EchoCaptioner(delay=0.01))
    assert dict(stats.failed) == {"image_unreadable": 5}
    assert stats.failed_ids == {"image_unreadable": ["bad 0", "bad 1", "bad 2"]}
    assert stats.rate == pytest.approx(6 / stats.seconds)
    assert 0 <= stats.waited_share <= 1


# Flow


def test_reading_ahead_is_bounded() -> None:
    seen = count()
    ahead: list[int] = []

    def endless() -> Iterator[InputRow]:
        for index in seen:
            ahead.append(index)
            yield row(index)

    def look(images: Sequence[Any]) -> None:
        time.sleep(0.15)
        if len(captioner.calls) == 2:
            raise KeyboardInterrupt

    captioner = EchoCaptioner(before_call=look)
    with pytest.raises(KeyboardInterrupt):
        run(endless(), captioner, batch_size=3, workers=2)
    assert ahead[-1] <= 2 * 3 + (2 * 3 + 2) + 1  # two batches taken, a window that is full, and one row in the hand


def test_rows_are_not_held_back_for_slow_input() -> None:
    more = threading.Event()

    def slow() -> Iterator[InputRow]:
        yield row(0)
        yield row(1, "bad")
        assert more.wait(20 * PATIENCE)
        yield row(2)

    writer, stats = ListWriter(), RunStats()
    start(slow(), EchoCaptioner(), writer, stats, on_row=lambda: stats.rows == 2 and more.set())
    assert more.is_set() and len(writer.rows) == 3


def test_errors_are_not_held_back_for_pictures() -> None:
    rows = (row(i, "bad") for i in count())
    writer, stats = run(rows, EchoCaptioner(), max_errors=100)
    assert len(writer.rows) == 100 and stats.stopped_early


def test_the_share_of_time_spent_waiting() -> None:
    class SlowPictures(EchoCaptioner):
        def prepare_image(self, source: Any, limits: ImageLimits) -> Any:
            time.sleep(0.05)
            return source

    _, stats = run([row(i) for i in range(4)], SlowPictures(), workers=1)
    assert stats.waited_share > 0.8
    _, stats = run([row(i) for i in range(4)], EchoCaptioner(delay=0.1))
    assert stats.waited_share < 0.5


# Ends


def test_enough_errors_end_the_run_early() -> None:
    writer, stats = run([row(i, "bad" if i > 2 else None) for i in range(9)], EchoCaptioner(), max_errors=2)
    assert len(writer.rows) == 5 and stats.stopped_early and not writer.finished


def test_what_the_reader_raises_comes_behind_its_rows() -> None:
    def broken() -> Iterator[InputRow]:
        yield from map(row, range(4))
        raise InputError("two rows with one id")

    writer, stats = ListWriter(), RunStats()
    with pytest.raises(InputError, match="one id"):
        start(broken(), EchoCaptioner(), writer, stats)
    assert len(writer.rows) == stats.rows == 4 and not writer.finished


def test_a_bug_goes_through_and_rows_before_it_are_written() -> None:
    def fail_later(images: Sequence[Any]) -> None:
        if len(captioner.calls) == 2:
            raise ValueError("shapes")

    captioner = EchoCaptioner(before_call=fail_later)
    writer, stats = ListWriter(), RunStats()
    with pytest.raises(ValueError, match="shapes"):
        start(map(row, range(9)), captioner, writer, stats)
    assert [r["id"] for r in writer.rows] == ["row 0", "row 1", "row 2"] and not writer.finished


def test_a_bug_in_a_decode_thread_goes_through() -> None:
    class Broken(EchoCaptioner):
        def prepare_image(self, source: Any, limits: ImageLimits) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run([row(0)], Broken())


def test_no_thread_outlives_a_run() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(
            (row(i) for i in count()),
            EchoCaptioner(before_call=lambda images: (_ for _ in ()).throw(KeyboardInterrupt)),
        )
    deadline = time.monotonic() + 5
    while any(thread.name.startswith(("reader", "decode")) for thread in threading.enumerate()):
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


# Memory


class OutOfMemory(RuntimeError):
    pass


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `torch` whose out-of-memory error is ours."""
    cuda = SimpleNamespace(OutOfMemoryError=OutOfMemory, empty_cache=lambda: None)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


def needs_room(num_rows: int):
    def check(images: Sequence[str]) -> None:
        if len(images) > num_rows or "huge" in images:
            raise OutOfMemory

    return check


@pytest.mark.usefixtures("small_device")
@pytest.mark.parametrize(
    ("room", "calls"), [(8, [8, 8, 4]), (4, [8, 4, 4, 4, 4, 4]), (3, [8, 4, 2, 2, 4, 2, 2] + [2] * 6)]
)
def test_a_batch_that_does_not_fit_is_halved_and_stays_so(room: int, calls: list[int]) -> None:
    captioner = EchoCaptioner(before_call=needs_room(room))
    writer, stats = run(map(row, range(20)), captioner, batch_size=8)
    assert [r["caption"] for r in writer.rows] == [f"row {i}" for i in range(20)]
    assert captioner.calls == calls
    assert stats.batch_size == max(size for size in calls if size <= room)


@pytest.mark.usefixtures("small_device")
def test_only_the_row_that_does_not_fit_alone_fails() -> None:
    captioner = EchoCaptioner(before_call=needs_room(8))
    writer, stats = run([row(i, "huge" if i == 5 else None) for i in range(24)], captioner, batch_size=8)
    assert [r["id"] for r in writer.rows if r["error"]] == ["huge"]
    assert writer.rows[5]["error"].startswith("out_of_memory: ")
    assert [r["caption"] for r in writer.rows if not r["error"]] == [f"row {i}" for i in range(24) if i != 5]
    assert stats.batch_size == 8 and captioner.calls[-2:] == [8, 8]


@pytest.mark.usefixtures("small_device")
def test_other_errors_of_the_device_end_the_run() -> None:
    def fail(images: Sequence[str]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        run([row(0)], EchoCaptioner(before_call=fail))
