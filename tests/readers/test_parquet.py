from __future__ import annotations

import contextlib
import datetime
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written_manifests import read, refusal

from idefics_cli.errors import InputError
from idefics_cli.readers import parquet
from idefics_cli.readers.parquet import ParquetTable
from idefics_cli.readers.source import ALL, Place, Span
from idefics_cli.storage import limited_process
from idefics_cli.storage.files import local_file

NUM_ROWS = 40
MEGABYTE = 1 << 20
ROWS = [{"id": f"row {i}", "image": f"{i}.jpg", "bytes": bytes([i]) * i} for i in range(NUM_ROWS)]


def table_at(path: Path) -> ParquetTable:
    return ParquetTable(local_file(str(path)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.parquet"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of several row groups and pages, with a checksum for each page."""
    path = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, path, row_group_size=15, data_page_size=64, write_page_checksum=True, write_batch_size=4)
    return path.read_bytes()


# Rows


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(0, NUM_ROWS + 3), more=st.integers(0, 9), group=st.integers(1, NUM_ROWS), page=st.integers(1, 200)
)
def test_any_range_is_that_of_the_plain_rows(
    tmp_path_factory: pytest.TempPathFactory, start: int, more: int, group: int, page: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "range.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=group, data_page_size=page, write_batch_size=1)
    found = list(table_at(path).records(Span(Place(start), Place(start + more)), ["bytes", "id"]))
    expected = [(i, {"bytes": ROWS[i]["bytes"], "id": ROWS[i]["id"]}) for i in range(NUM_ROWS)[start : start + more]]
    assert found == expected


def test_values_that_python_has_none_for_cost_their_rows_alone(path: Path) -> None:
    """Bytes that are declared to be text, and a day in a year that Python does not count to."""
    texts = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())
    days = pa.array([0, 1, 10**8], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"image": ["1.jpg", "2.jpg", "3.jpg"], "text": texts, "day": days}), path)
    good, bad_text, bad_day = read(path, keep="all")
    assert good.values == {"text": "a", "day": datetime.date(1970, 1, 1)} and good.error is None
    assert bad_text.error.code == bad_day.error.code == "row_invalid"
    assert "row 2" in bad_text.error.message and "'day'" in bad_day.error.message


MICROSECONDS = datetime.timedelta(microseconds=2)


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (pa.timestamp("ns"), [1_700_000_000_123_456_789, None], ["2023-11-14T22:13:20.123456789", None]),
        (pa.timestamp("ns", "UTC"), [1_700_000_000_123_456_789, None], ["2023-11-14T22:13:20.123456789Z", None]),
        (pa.time64("ns"), [1_500, 2_000], ["00:00:00.000001500", "00:00:00.000002000"]),
        (pa.duration("ns"), [-1_500, 2_000], ["-1.5", MICROSECONDS]),
    ],
)
def test_what_is_finer_than_pythons_is_kept_as_text(
    path: Path, kind: pa.DataType, values: list[int | None], expected: list[Any]
) -> None:
    pq.write_table(pa.table({"image": ["1.jpg", "2.jpg"], "v": pa.array(values, kind)}), path)
    assert [(row.values["v"], row.error) for row in read(path, keep="all")] == [(value, None) for value in expected]


def test_two_columns_of_one_name_are_refused(path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["image", "image"]), path)
    assert "two columns" in refusal(path)


# Memory


def test_a_row_group_of_images_is_never_held(path: Path) -> None:
    """100 MB in one row group, in pages of 1 MB: a few pages and one batch are held at a time."""
    images = pa.array([bytes([i % 256]) * 50_000 for i in range(2000)], pa.binary())
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 16}
    pq.write_table(pa.table({"image": images}), path, row_group_size=2000, **options)
    del images
    before, most, count = pa.total_allocated_bytes(), 0, 0
    for _ in table_at(path).records(ALL, ["image"]):
        most, count = max(most, pa.total_allocated_bytes() - before), count + 1
    assert count == 2000 and most < 24 * MEGABYTE, most


def test_a_dictionary_that_each_row_repeats_is_not_unpacked_at_once(path: Path) -> None:
    """400 rows stand for one image of 1 MB: unpacked they would be 400, packed they are one."""
    indices = pa.array([0] * 400, pa.int32())
    images = pa.DictionaryArray.from_arrays(indices, pa.array([b"x" * MEGABYTE])).cast(pa.binary())
    pq.write_table(pa.table({"image": images}), path, compression="none", store_schema=False)
    del images
    before, most = pa.total_allocated_bytes(), 0
    for _ in table_at(path).records(ALL, ["image"]):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 160 * MEGABYTE, most


@pytest.mark.parametrize(
    ("bomb", "codec"),
    [
        (pa.array([b"\0" * (30 * MEGABYTE)], pa.large_binary()), "zstd"),
        (pa.array([b"\0" * (30 * MEGABYTE)], pa.large_binary()), "gzip"),
        (pa.array([[None] * (2 * MEGABYTE)], pa.list_(pa.binary())), "none"),
    ],
    ids=["zstd", "gzip", "list"],
)
def test_a_page_that_unpacks_to_far_more_than_its_file_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, bomb: pa.Array, codec: str
) -> None:
    monkeypatch.setattr(parquet, "BOMB_BYTES", 25 * MEGABYTE)
    pq.write_table(pa.table({"image": bomb}), path, compression=codec, use_dictionary=False)
    assert path.stat().st_size < MEGABYTE / 10
    assert "unpacks from" in refusal(path)


# Damage, as in apache/parquet-testing's bad_data


def outcome(path: Path) -> list[dict[str, Any]] | str:
    """The rows of a file, or the line that refuses it. What else is raised is a bug."""
    try:
        return [dict(row.values) for row in read(path, image_column="image", keep="all")]
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return str(error)


def test_a_file_cut_off_anywhere_is_refused(path: Path, whole: bytes) -> None:
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        assert isinstance(outcome(path), str), length


def test_a_byte_changed_anywhere_loses_no_row(path: Path, whole: bytes) -> None:
    """Refused, or as many rows as the file declares by then."""
    for place in range(4, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        found = outcome(path)
        if not isinstance(found, str):
            assert len(found) == pq.read_metadata(path).num_rows, place


def test_pages_of_a_large_file_are_looked_at_before_they_are_read(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    aborting = (
        "import os, sys; sys.path[:] = sys.argv[1:]; from idefics_cli.storage import limited_process, parquet_process; "
    )
    aborting += (
        "parquet_process._read_pages = lambda file, pages: os.abort() if 2 in pages.groups and 'n' in pages.columns"
    )
    monkeypatch.setattr(limited_process, "BOOTSTRAP", f"{aborting} else None; limited_process.main()")
    monkeypatch.setattr(limited_process, "_processes", [])
    monkeypatch.setattr(parquet, "SMALL_BYTES", 0)
    monkeypatch.setattr(parquet, "LOOKED_AT_BYTES", 1)
    pq.write_table(pa.table({"image": ["a.png"] * 8, "n": list(range(8))}), path, row_group_size=2)
    table, found = ParquetTable(local_file(str(path))), []
    with pytest.raises(InputError, match="Arrow ends its process on it"):
        found.extend(table.records(ALL, ["n"]))
    assert found == [(number, {"n": number}) for number in range(4)]
    assert len(list(table.records(ALL, ["image"]))) == 8
    assert [number for number, _ in table.records(Span(Place(6)), ["n"])] == [6, 7]


def test_a_process_that_was_killed_before_it_was_asked_is_not_held_against_the_file(path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.png"], "n": [1]}), path)
    assert outcome(path) == [{"n": 1}]
    (process,) = limited_process._processes
    process.kill()
    process.wait()
    assert outcome(path) == [{"n": 1}]


def test_a_fork_looks_at_files_by_a_process_of_its_own(path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.png"], "n": [1]}), path)
    assert outcome(path) == [{"n": 1}]
    (process,) = limited_process._processes
    forked = os.fork()
    if not forked:
        found = outcome(path)
        (another,) = limited_process._processes
        os._exit(0 if found == [{"n": 1}] and another.pid != process.pid else 1)
    assert os.waitpid(forked, 0)[1] == 0
    assert limited_process._processes == [process]


def test_a_page_with_another_checksum_is_refused(path: Path) -> None:
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table({"image": ["a.jpg", "b.jpg"]}), path, write_page_checksum=True, **plain)
    path.write_bytes(path.read_bytes().replace(b"b.jpg", b"c.jpg"))
    assert "CRC" in outcome(path)


def test_a_row_group_of_fewer_rows_than_it_declares_is_refused(path: Path) -> None:
    """Arrow gives those that it finds, and says nothing of the others (bad_data/ARROW-GH-41317)."""
    pq.write_table(pa.table({"image": list("abcdef")}), path, row_group_size=3)
    write_declaring(path, num_rows=4)
    assert "declares 4 rows but holds 3" in outcome(path)


def write_declaring(path: Path, num_rows: int) -> None:
    """Change the one byte of the footer that says how many rows the first row group has."""
    data = path.read_bytes()
    for place in range(len(data) - 8, 0, -1):
        path.write_bytes(data[:place] + bytes([2 * num_rows]) + data[place + 1 :])  # a number in Thrift's coding
        with contextlib.suppress(pa.ArrowException, OSError):
            if pq.read_metadata(path).row_group(0).num_rows == num_rows:
                return
    raise AssertionError("no byte of the footer is the number of rows")


def test_encrypted_files_are_refused(path: Path, whole: bytes) -> None:
    path.write_bytes(b"PARE" + whole[4:-4] + b"PARE")
    assert "encrypt" in outcome(path).lower()
