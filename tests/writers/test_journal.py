from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.columns import json_text
from idefics_cli.errors import OutputError
from idefics_cli.writers import journal as journals
from idefics_cli.writers.journal import Journal, checked, unchecked

HEADER = {"settings": {"model": "demo"}}
SUMMARY = {"rows": 2, "failed": {}}
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.just('", "crc32": "00000000"}\n')
ROWS = st.lists(
    st.fixed_dictionaries({"id": TEXTS, "caption": TEXTS | st.none(), "error": TEXTS | st.none()}), max_size=5
)


def written(path: Path, *batches: list[dict[str, Any]], summary: dict[str, Any] | None = None) -> Path:
    """A journal with these rows in it, closed."""
    journal = Journal(path)
    journal.begin(HEADER)
    for batch in batches:
        journal.append([json_text(row) for row in batch])
    if summary is not None:
        journal.end(summary)
    journal.close()
    return path


def rows_in(path: Path) -> list[dict[str, Any]]:
    with closing(Journal(path)) as journal:
        return list(journal.rows())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "f.jsonl.part"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    """One with a row, open."""
    with closing(Journal(path)) as journal:
        journal.begin(HEADER)
        journal.append([b'{"id": "a", "error": null}'])
        yield journal


# ---- lines


@given(st.dictionaries(TEXTS, TEXTS | st.integers() | st.none(), min_size=1))
def test_a_line_gives_its_object_back_and_is_json(row: dict[str, Any]) -> None:
    text = json_text(row)
    line, check = checked(text, 7, 42)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert unchecked(line, 7, 42) == (text, check)
    assert unchecked(line, 8, 42) is None and unchecked(line, 7, 43) is None
    assert (
        json.loads(line).items() >= {key: value for key, value in row.items() if key not in ("line", "crc32")}.items()
    )


@given(st.data())
def test_a_line_with_another_byte_is_noticed(data: st.DataObject) -> None:
    line, _ = checked(b'{"id": "an image", "caption": "two dogs"}', 7, 42)
    place, byte = data.draw(st.integers(0, len(line) - 1)), data.draw(st.integers(0, 255))
    changed = line[:place] + bytes([byte]) + line[place + 1 :]
    assert unchecked(changed, 7, 42) is None or changed == line


# ---- written and read back


@given(st.lists(ROWS, max_size=4), st.booleans())
@settings(deadline=None)
def test_rows_come_back_in_order_whenever_the_file_is_opened_again(batches: list, reopen: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.part"
        journal = Journal(path)
        assert journal.header is None
        journal.begin(HEADER)
        for batch in batches:
            journal.append([json_text(row) for row in batch])
            if reopen and batch:
                journal.close()
                journal = Journal(path)
        assert list(journal.rows()) == [row for batch in batches for row in batch]
        assert (journal.header, journal.summary) == (HEADER, None)
        journal.close()


def test_each_batch_is_one_write_and_one_sync(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    write, sync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda file, data: (calls.append("write"), write(file, data))[1])
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), sync(file)))
    journal.append([json_text({"id": str(number)}) for number in range(500)])
    assert calls == ["write", "fsync"]


def test_lines_longer_than_a_block_are_found(path: Path) -> None:
    long = {"id": "a", "caption": "x" * (3 * journals.BLOCK_BYTES), "error": None}
    whole = written(path, [long, long], summary=SUMMARY).read_bytes()
    with closing(Journal(path)) as journal:
        assert (journal.header, journal.summary) == (HEADER, SUMMARY)
        assert list(journal.rows()) == [long, long]
    last_row = whole.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(whole[: last_row - 1])  # torn within the second long row
    assert rows_in(path) == [long]


# ---- torn and changed


def test_a_torn_tail_is_cut_at_every_byte(path: Path) -> None:
    """What is appended then stands on a line of its own."""
    rows = [{"id": "ä", "error": None}, {"id": "b\n", "error": None}]
    whole = written(path, rows[:1], rows[1:], summary=SUMMARY).read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        num_lines = sum(end <= length for end in ends)
        known = rows[: max(0, num_lines - 1)]
        with closing(Journal(path)) as journal:
            assert path.stat().st_size == ([0, *ends][num_lines])
            assert list(journal.rows()) == known
            assert (journal.header is None) == (num_lines == 0)
            if num_lines:
                journal.append([b'{"id": "c", "error": null}'])
                assert list(journal.rows()) == [*known, {"id": "c", "error": None}]


@pytest.mark.parametrize("content", [b"\0" * 100, b'{"idefics' + b"\0" * 100])
def test_zeros_that_a_power_cut_has_left_for_the_first_line_are_as_no_line(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    written(path, [{"id": "a", "error": None}])
    assert rows_in(path) == [{"id": "a", "error": None}]


@pytest.mark.parametrize(
    "content", [b"notes of mine", b"{}\n", b'{"id": "a"}\n', b"\n", b"\0" * 9 + b"mine", b"\0" * 70_000]
)
def test_a_file_of_others_is_refused_even_with_discard(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for discard in False, True:
        with pytest.raises(OutputError, match="not a file of this program"):
            Journal(path, discard=discard)
    assert path.read_bytes() == content


def test_a_journal_is_discarded_only_when_the_next_one_begins(path: Path) -> None:
    before = written(path, [{"id": "a", "error": None}]).read_bytes()
    with closing(Journal(path, discard=True)) as journal:
        assert (journal.header, journal.summary) == (None, None)
    assert path.read_bytes() == before
    with closing(Journal(path, discard=True)) as journal:
        journal.begin(HEADER)
        assert list(journal.rows()) == []


def test_one_without_rows_leaves_nothing(path: Path) -> None:
    journal = Journal(path)
    journal.close()
    journal.close()
    assert not path.exists()
    written(path)
    assert not path.exists()


# ---- locks and places


def test_a_file_that_is_replaced_before_it_is_locked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = journals.fcntl.flock

    def replace(file: int, operation: int) -> None:
        path.unlink()
        path.touch()
        lock(file, operation)

    monkeypatch.setattr(journals.fcntl, "flock", replace)
    with pytest.raises(OutputError, match="another run"):
        Journal(path)


@pytest.mark.parametrize(
    "make", [lambda path: path.symlink_to(path.with_name("elsewhere")), os.mkfifo, lambda path: path.mkdir()]
)
def test_what_is_not_a_regular_file_is_refused(path: Path, make: Callable[[Path], None]) -> None:
    path.with_name("elsewhere").write_text("mine")
    make(path)
    with pytest.raises(OutputError, match=r"f\.jsonl\.part"):
        Journal(path)
    assert path.with_name("elsewhere").read_text() == "mine"


# ---- systems that refuse


def failing(error: BaseException, num_bytes: int = 0) -> Callable[..., int]:
    """A call that raises this; one of `write` that takes so many bytes first."""
    takes, write = iter([num_bytes]), os.write

    def fail(file: Any, data: Any = b"", *more: Any, **options: Any) -> int:
        if taken := next(takes, 0):
            return write(file, data[:taken])
        raise error

    return fail


FULL, BROKEN = (OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EIO))


@pytest.mark.parametrize(
    ("call", "fault", "said"),
    [
        ("write", (FULL,), r"No space left on device; free some space .* same command again"),
        ("write", (FULL, 1), "No space left"),
        ("write", (FULL, 20), "No space left"),
        ("write", (KeyboardInterrupt("stop"), 4), "stop"),
        ("fsync", (BROKEN,), "Input/output error"),
    ],
)
def test_what_cannot_be_written_leaves_whole_rows(
    path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch, call: str, fault: tuple, said: str
) -> None:
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(*fault))
        with pytest.raises((OutputError, KeyboardInterrupt), match=said):
            journal.append([b'{"id": "b", "error": null}'])
    assert path.read_bytes() == before
    journal.append([b'{"id": "c", "error": null}'])
    assert [row["id"] for row in journal.rows()] == ["a", "c"]


def test_one_that_cannot_be_removed_is_one_line_and_is_let_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing(OSError(errno.EROFS, os.strerror(errno.EROFS))))
        with pytest.raises(OutputError, match=r"cannot remove .*f\.jsonl\.part: Read-only file system; name an output"):
            journal.close()
    assert rows_in(path) == []


@pytest.mark.parametrize(
    ("call", "code", "said"),
    [
        ("os.open", errno.EACCES, "Permission denied; name an output that can be written"),
        ("os.open", errno.EROFS, "Read-only file system"),
        ("os.pread", errno.EIO, "cannot read .*Input/output error"),
        ("fcntl.flock", errno.EIO, "cannot lock .*Input/output error"),
        ("os.symlink", errno.ENOSPC, "cannot lock .*No space left on device; free some space"),
    ],
)
def test_a_system_that_refuses_is_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, said: str
) -> None:
    written(path, [{"id": "a", "error": None}])
    with monkeypatch.context() as patch:
        patch.setattr(call, failing(OSError(code, os.strerror(code))))
        with pytest.raises(OutputError, match=said):
            Journal(path)
    assert rows_in(path) == [{"id": "a", "error": None}]
