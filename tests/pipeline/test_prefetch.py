from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import FakeResult
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from idefics_cli.errors import InputError, RowError
from idefics_cli.pipeline import prefetch
from idefics_cli.pipeline.prefetch import PATIENCE, FlowOptions, Outcome, RunStats, Steps, error_of, flowed, run_rows
from idefics_cli.rows import NO_VALUES, InputRow

BAD = RowError("image_unreadable", "broken")


class Model:
    """Echoes prompts, in batches; `shuffled` finishes the rows of a batch in any order."""

    def __init__(self, batch_size: int = 3, shuffled: bool = False, before: Callable[[list], None] = lambda _: None):
        self.batch_size, self.shuffled, self.before = batch_size, shuffled, before
        self.calls: list[int] = []

    def decode(self, source: Any) -> Iterator[tuple[int, FakeResult]]:
        number = 0
        while prompts := source.take(self.batch_size, True):
            self.calls.append(len(prompts))
            self.before(prompts)
            numbered = list(enumerate(prompts, start=number))
            number += len(prompts)
            if self.shuffled:
                random.shuffle(numbered)
            for place, prompt in numbered:
                yield place, FakeResult(prompt, -1.0, 1)


class Ahead(Model):
    """Has prompts in line beside those in work, and takes what is ready meanwhile."""

    def decode(self, source: Any) -> Iterator[tuple[int, FakeResult]]:
        line: list[tuple[int, str]] = []
        number = 0
        while taken := source.take(self.batch_size, wait=True):
            while taken or line:
                line += enumerate(taken, start=number)
                number += len(taken)
                place, prompt = line.pop(random.randrange(len(line)))
                yield place, FakeResult(prompt, -1.0, 1)
                taken = source.take(4 * self.batch_size, wait=False)


def row(index: int, name: str | None = None, error: RowError | None = None) -> InputRow:
    name = name or f"row {index}"
    return InputRow(index, name, name, (name.encode(),), NO_VALUES, error)


def echo(row: InputRow) -> str | RowError:
    return BAD if row.id.startswith("bad") else row.id


class Sink:
    """Rows in memory, and what is counted of them."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, Outcome]] = []
        self.stats = RunStats()

    def write(self, row: InputRow, outcome: Outcome) -> None:
        self.rows.append((row.id, outcome))

    @property
    def ids(self) -> list[str]:
        return [name for name, _ in self.rows]

    @property
    def texts(self) -> list[str | None]:
        return [None if error_of(outcome) else outcome.text for _, outcome in self.rows]


def run(
    rows: Iterable[InputRow],
    model: Any,
    sink: Sink | None = None,
    prepare: Callable[[InputRow], Any] = echo,
    on_row: Callable[[object], None] = lambda finished: None,
    **options: Any,
) -> Sink:
    sink = sink or Sink()
    flow = FlowOptions(**{"batch_size": model.batch_size, "workers": 2, **options})
    run_rows(iter(rows), Steps(prepare, model.decode), sink.write, flow, sink.stats, on_row)
    return sink


# Rows


@given(
    st.lists(st.booleans(), max_size=60),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 20),
    st.sampled_from([Model, Ahead]),
)
@settings(max_examples=100, deadline=None)
def test_every_row_comes_out_once_in_order(
    good: list[bool], batch_size: int, workers: int, rows_at_once: int, kind: type[Model]
) -> None:
    rows = [row(i, f"{'good' if is_good else 'bad'} {i}") for i, is_good in enumerate(good)]
    model = kind(batch_size, shuffled=True)
    sink = run(rows, model, workers=workers, rows_at_once=rows_at_once)
    assert sink.ids == [r.id for r in rows]
    assert sink.texts == [r.id if is_good else None for r, is_good in zip(rows, good, strict=True)]
    assert (sink.stats.rows, sink.stats.num_failed) == (len(good), good.count(False))
    assert max(model.calls, default=0) <= batch_size


def test_images_that_are_ready_early_wait_for_their_turn() -> None:
    def uneven(row: InputRow) -> str:
        time.sleep(random.random() / 200)
        return row.id

    sink = run([row(i) for i in range(60)], Model(shuffled=True), workers=8, prepare=uneven)
    assert sink.ids == sink.texts == [f"row {i}" for i in range(60)]


def test_batches_are_full() -> None:
    model = Model()
    run([row(i, f"bad {i}" if i % 2 else None) for i in range(14)], model)
    assert model.calls == [3, 3, 1]


def test_rows_that_are_known_to_be_bad_are_not_prepared() -> None:
    def never(row: InputRow) -> str:
        raise AssertionError(row)

    sink = run([row(0, error=RowError("image_not_allowed", "a link"))], Model(), prepare=never)
    assert str(sink.rows[0][1]) == "image_not_allowed: a link"


def test_statistics_count_by_code_and_keep_the_first_ids() -> None:
    rows = [row(i, f"bad {i}" if i < 5 else None) for i in range(6)]
    stats = run(rows, Model(before=lambda _: time.sleep(0.01))).stats
    assert dict(stats.failed) == {"image_unreadable": 5}
    assert stats.failed_ids == {"image_unreadable": ["bad 0", "bad 1", "bad 2"]}
    assert stats.rate == pytest.approx(6 / stats.seconds)
    assert 0 <= stats.waited_share <= 1


# Flow


@pytest.mark.parametrize("rows_at_once", [1, 3, 16])
def test_reading_ahead_is_bounded(rows_at_once: int) -> None:
    read: list[int] = []

    def endless() -> Iterator[InputRow]:
        for index in count():
            read.append(index)
            yield row(index)

    sink = Sink()
    furthest: list[int] = []

    def look(finished: object) -> None:
        furthest.append(len(read) - sink.stats.rows)
        if sink.stats.rows == 50:
            raise KeyboardInterrupt

    model = Model(before=lambda _: time.sleep(0.005))
    with pytest.raises(KeyboardInterrupt):
        run(endless(), model, sink, on_row=look, rows_at_once=rows_at_once)
    assert len(sink.rows) == 50
    assert max(furthest) <= FlowOptions(3, 2).window


def test_a_row_that_takes_long_holds_the_others_back_in_bounds() -> None:
    released = threading.Event()
    prepared: list[int] = []

    def prepare(row: InputRow) -> str:
        if row.index == 0:
            assert released.wait(10)
        prepared.append(row.index)
        return row.id

    def release_later() -> None:
        while len(prepared) < FlowOptions(3, 2).window - 1:
            time.sleep(0.01)
        time.sleep(0.05)
        released.set()

    thread = threading.Thread(target=release_later)
    thread.start()
    sink = run(map(row, range(200)), Model(), prepare=prepare)
    thread.join()
    assert sink.ids == [f"row {i}" for i in range(200)]
    assert prepared.index(0) == FlowOptions(3, 2).window - 1


def test_rows_that_are_slow_to_come_leave_at_once() -> None:
    times: dict[str, float] = {}

    def slow() -> Iterator[InputRow]:
        for index in range(3):
            yield row(index)
            times[f"row {index}"] = time.monotonic()
            time.sleep(3 * PATIENCE)

    sink, left = Sink(), {}
    run(slow(), Model(), sink, on_row=lambda _: left.update({sink.ids[-1]: time.monotonic()}), workers=1)
    assert all(left[name] - times[name] < 2 * PATIENCE for name in times)
    assert sink.stats.seconds_waited > PATIENCE


def test_errors_leave_while_the_model_waits_for_a_prompt() -> None:
    left = threading.Event()

    def rows() -> Iterator[InputRow]:
        yield row(0, "bad 0")
        assert left.wait(5), "the row was held back"
        yield row(1)

    sink = run(rows(), Model(), on_row=lambda _: left.set(), workers=1)
    assert sink.ids == ["bad 0", "row 1"]


def test_the_model_is_not_made_to_wait_while_it_has_work() -> None:
    """`take` without waiting gives what is ready, which may be nothing."""
    may_come = threading.Event()

    def rows() -> Iterator[InputRow]:
        yield row(0)
        may_come.wait(5)
        yield row(1)

    def decode(source: Any) -> Iterator[tuple[int, FakeResult]]:
        assert source.take(8, True) == ["row 0"]
        assert source.take(8, False) == []
        yield 0, FakeResult("first")
        may_come.set()
        assert source.take(8, True) == ["row 1"]
        yield 1, FakeResult("second")
        assert source.take(8, True) == []

    sink = run(rows(), SimpleNamespace(batch_size=4, decode=decode), workers=1)
    assert sink.texts == ["first", "second"]


# Rows for one who takes them


def taken(rows: Iterable[InputRow], model: Any, prepare: Callable[[InputRow], Any] = echo, **options: Any) -> Iterator:
    return flowed(iter(rows), Steps(prepare, model.decode), FlowOptions(model.batch_size, 2, **options))


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 6), st.sampled_from([Model, Ahead]))
@settings(max_examples=50, deadline=None)
def test_rows_are_handed_out_as_a_run_writes_them(good: list[bool], batch_size: int, kind: type[Model]) -> None:
    rows = [row(i, f"{'good' if is_good else 'bad'} {i}") for i, is_good in enumerate(good)]
    handed = [(each.id, outcome) for each, outcome in taken(rows, kind(batch_size, shuffled=True))]
    assert handed == run(rows, kind(batch_size, shuffled=True)).rows


@pytest.mark.parametrize("is_bad", [True, False])
def test_no_more_is_read_than_the_taker_has_room_for(is_bad: bool) -> None:
    read: list[int] = []

    def endless() -> Iterator[InputRow]:
        for index in count():
            read.append(index)
            yield row(index, f"bad {index}" if is_bad else None)

    handed = taken(endless(), Model())
    for number, _ in enumerate(handed):
        assert len(read) - number <= 2 * FlowOptions(3, 2).window
        if number == 200:
            break
    handed.close()
    test_no_thread_outlives_a_run(1)


def test_images_in_memory_count_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """No further row is read while so many bytes are in flight; three images of 40 kB are."""
    monkeypatch.setattr(prefetch, "MAX_BYTES_IN_FLIGHT", 100_000)
    read: list[int] = []

    def endless() -> Iterator[InputRow]:
        for index in count():
            read.append(index)
            yield InputRow(index, str(index), None, (Image.new("RGB", (100, 100)),), NO_VALUES)

    handed = taken(endless(), Model())
    for number, _ in zip(range(20), handed, strict=False):
        assert len(read) - number <= 4 + Model().batch_size
    handed.close()


def test_an_error_is_handed_out_before_the_next_row_comes() -> None:
    asked = threading.Event()

    def rows() -> Iterator[InputRow]:
        yield row(0, "bad 0")
        assert asked.wait(5), "the row was held back"
        yield row(1)

    handed = taken(rows(), Model())
    assert next(handed)[0].id == "bad 0"
    asked.set()
    assert [each.id for each, _ in handed] == ["row 1"]


def test_what_is_raised_comes_after_the_rows_before_it_are_handed_out() -> None:
    def broken() -> Iterator[InputRow]:
        yield from (row(i, f"bad {i}" if i == 3 else None) for i in range(5))
        raise InputError("two rows with one id")

    handed, ids = taken(broken(), Model()), []
    with pytest.raises(InputError, match="one id"):
        for each, _ in handed:
            ids.append(each.id)
    assert ids == ["row 0", "row 1", "row 2", "bad 3", "row 4"]


# Endings


def test_enough_errors_end_the_run_early() -> None:
    sink = run([row(i, f"bad {i}" if i > 2 else None) for i in range(9)], Model(), max_errors=2)
    assert len(sink.rows) == 5 and sink.stats.stopped_early


def test_errors_of_an_earlier_run_do_not_end_this_one() -> None:
    sink = Sink()
    sink.stats.add("before", "image_missing")
    run([row(0, "bad 0"), row(1)], Model(), sink, max_errors=2)
    assert not sink.stats.stopped_early and sink.stats.num_failed == 2


@pytest.mark.parametrize("rows_at_once", [1, 3])
@pytest.mark.parametrize("num_rows", [0, 4, 6, 40])
def test_what_the_reader_raises_comes_behind_its_rows(num_rows: int, rows_at_once: int) -> None:
    def broken() -> Iterator[InputRow]:
        yield from map(row, range(num_rows))
        raise InputError("two rows with one id")

    sink = Sink()
    with pytest.raises(InputError, match="one id"):
        run(broken(), Model(), sink, rows_at_once=rows_at_once)
    assert len(sink.rows) == sink.stats.rows == num_rows


def test_a_bug_goes_through_and_rows_before_it_are_written() -> None:
    def fail_later(prompts: list) -> None:
        if len(model.calls) >= 2:
            raise ValueError("shapes")

    model, sink = Model(before=fail_later), Sink()
    with pytest.raises(ValueError, match="shapes"):
        run(map(row, range(9)), model, sink)
    assert sink.ids == ["row 0", "row 1", "row 2"]


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_a_bug_in_a_prepare_thread_goes_through_behind_the_rows_before_it(rows_at_once: int) -> None:
    def broken(row: InputRow) -> str:
        if row.index == 5:
            raise ZeroDivisionError
        return row.id

    sink = Sink()
    with pytest.raises(ZeroDivisionError):
        run(map(row, range(9)), Model(), sink, prepare=broken, rows_at_once=rows_at_once)
    assert sink.ids == [f"row {i}" for i in range(5)]


def test_a_model_that_forgets_a_row_is_found_out() -> None:
    def forgetful(source: Any) -> Iterator[tuple[int, FakeResult]]:
        while source.take(3, True):
            yield from ()

    model = SimpleNamespace(batch_size=3, decode=forgetful)
    with pytest.raises(AssertionError, match="2 rows came in and 0 went out"):
        run(map(row, range(2)), model)
    with pytest.raises(AssertionError, match="the model forgets rows"):
        list(taken(map(row, range(2)), model))


@pytest.mark.parametrize("rows_at_once", [1, 16])
def test_no_thread_outlives_a_run(rows_at_once: int) -> None:
    def stop(prompts: list) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run((row(i) for i in count()), Model(before=stop), workers=4, rows_at_once=rows_at_once)
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("prepare") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)
