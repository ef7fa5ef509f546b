from __future__ import annotations

import errno
import io
import json
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.errors import OutputError, StreamClosed
from idefics_cli.writers import writers
from idefics_cli.writers.journal import Journal
from idefics_cli.writers.writers import JournalWriter, StreamWriter

HEADER = {"settings": {}}


# ---- streams


class Stream(io.BytesIO):
    """Remembers how much was there at each flush, which raises `error` if there is one."""

    def __init__(self, error: OSError | None = None) -> None:
        super().__init__()
        self.error = error
        self.flushed: list[int] = []

    def flush(self) -> None:
        if self.error is not None:
            raise self.error
        self.flushed.append(self.getvalue().count(b"\n"))


def test_each_row_is_flushed_when_it_is_written() -> None:
    stream = Stream()
    writer = StreamWriter(stream)
    for number in range(3):
        writer.write({"id": str(number), "score": float("nan")})
    writer.close()
    assert stream.flushed == [1, 2, 3] and writer.num_safe == 3 and not stream.closed
    assert json.loads(stream.getvalue().splitlines()[2]) == {"id": "2", "score": None}


def test_a_closed_stream_is_not_a_mistake_and_a_full_one_is() -> None:
    with pytest.raises(StreamClosed):
        StreamWriter(Stream(BrokenPipeError())).write({"id": "a"})
    writer = StreamWriter(Stream(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OutputError, match="cannot write to stdout: No space left"):
        writer.write({"id": "a"})
    assert writer.num_safe == 0


# ---- journals


class FakeJournal:
    """Takes batches while it `may_go_on`; `error` is raised in place of taking one."""

    def __init__(self) -> None:
        self.batches: list[Sequence[bytes]] = []
        self.error: BaseException | None = None
        self.has_come, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()

    def append(self, texts: Sequence[bytes]) -> None:
        assert self.may_go_on.wait(20)
        if self.error is not None:
            raise self.error
        self.batches.append(texts)
        self.has_come.set()


@pytest.fixture
def journal() -> FakeJournal:
    return FakeJournal()


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 7))
@settings(deadline=None, max_examples=30)
def test_rows_reach_the_journal_in_order_when_the_writer_closes(numbers: list[int], commit_rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers, "COMMIT_ROWS", commit_rows)
        journal = Journal(Path(folder) / "f.part")
        journal.begin(HEADER)
        writer = JournalWriter(journal)
        for number in numbers:
            writer.write({"id": str(number), "error": None})
        writer.close()
        assert writer.num_safe == len(numbers)
        assert [row["id"] for row in journal.rows()] == list(map(str, numbers))
        journal.close()


def test_rows_are_written_many_at_a_time_and_no_more_are_held_than_a_few_times_as_many(
    journal: FakeJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "COMMIT_ROWS", 10)
    journal.may_go_on.clear()
    writer = JournalWriter(journal)
    written = []

    def write_many() -> None:
        for number in range(200):
            writer.write({"id": number})
            written.append(number)

    thread = threading.Thread(target=write_many)
    thread.start()
    thread.join(0.3)
    assert 0 < len(written) <= 10 * 4 + 40 and writer.num_safe == 0  # those held, and those on their way
    journal.may_go_on.set()
    thread.join(20)
    writer.close()
    assert writer.num_safe == 200
    assert [json.loads(text)["id"] for batch in journal.batches for text in batch] == list(range(200))
    assert len(journal.batches) <= 200 // 10 + 1


def test_a_row_alone_does_not_wait_long(journal: FakeJournal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "COMMIT_SECONDS", 0.01)
    writer = JournalWriter(journal)
    writer.write({"id": "a"})
    assert journal.has_come.wait(20), "the row waits for others"
    writer.close()


@pytest.mark.parametrize("error", [OutputError("no space"), KeyboardInterrupt(), ValueError("a bug")])
def test_what_goes_wrong_in_the_thread_is_raised_once_where_rows_come_from(
    journal: FakeJournal, error: BaseException
) -> None:
    """By the end of the run, or by a row before it."""
    journal.error = error
    for num_rows in 1, writers.COMMIT_ROWS * 10:
        writer = JournalWriter(journal)
        with pytest.raises(type(error)):
            for _ in range(num_rows):
                writer.write({"id": "a"})
            writer.close()
        assert writer.num_safe == 0 and not journal.batches
        writer.close()


def test_a_stop_does_not_take_the_journal_from_under_the_thread(
    journal: FakeJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.may_go_on.clear()
    writer = JournalWriter(journal)
    writer.write({"id": "a"})
    join, times = threading.Thread.join, iter([1, 2])

    def interrupted(thread: threading.Thread) -> None:
        if next(times) == 1:
            raise KeyboardInterrupt
        journal.may_go_on.set()
        join(thread)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    assert writer.num_safe == 1
