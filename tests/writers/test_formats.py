from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.columns import Column, json_text
from idefics_cli.errors import OutputError
from idefics_cli.writers import formats
from idefics_cli.writers.formats import JsonLines, Parquet, Rows, format_of, temporary_file

COLUMNS = [
    Column("id", "text"),
    Column("score", "real"),
    Column("tokens", "count"),
    Column("candidates", "candidates"),
    Column("width", pa.int16()),
    Column("tags", pa.list_(pa.string())),
    Column("more", None),
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
CANDIDATES = st.fixed_dictionaries({"text": TEXTS, "score": st.floats(-9, 0), "tokens": st.integers(0, 99)})
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "id": TEXTS,
            "score": st.none() | st.floats(allow_nan=False, allow_infinity=False),
            "tokens": st.none() | st.integers(0, 2**31 - 1),
            "candidates": st.none() | st.lists(CANDIDATES, max_size=2),
            "width": st.none() | st.integers(-(2**15), 2**15 - 1),
            "tags": st.none() | st.lists(TEXTS | st.none(), max_size=3),
            "more": st.none() | st.integers(-(2**53), 2**53),
        }
    ),
    max_size=12,
)
both = pytest.mark.parametrize("name", ["f.jsonl", "f.parquet"])


def write(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[Column] = COLUMNS) -> dict[str, Any]:
    """A finished file of these rows; what run made it."""
    form, run = format_of(path), {"settings": {"model": "demo"}, "rows": len(rows), "failed": {}}
    with temporary_file(path) as target:
        form.write(target, Rows(lambda: map(json_text, rows)), columns, run)
        form.before_rename(target, path, run)
        target.rename(path)
    return run


@both
@given(ROWS)
@settings(deadline=None, max_examples=40)
def test_rows_come_back_equal_with_the_run_that_made_them(name: str, rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        run = write(path, rows)
        form = format_of(path)
        assert [json.loads(text) for text in form.texts(path)] == rows
        assert form.run_of(path).items() >= run.items()
        assert not list(Path(folder).glob("*.tmp"))


@pytest.mark.parametrize(("num_rows", "groups"), [(0, []), (1, [1]), (30, [12, 12, 6]), (24, [12, 12])])
def test_row_groups_are_gathered_from_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int, groups: list[int]
) -> None:
    monkeypatch.setattr(formats, "CHUNK_ROWS", 4)
    monkeypatch.setattr(formats, "ROW_GROUP_ROWS", 12)
    write(tmp_path / "f.parquet", [{"id": str(number)} for number in range(num_rows)])
    found = pq.read_metadata(tmp_path / "f.parquet")
    assert [found.row_group(i).num_rows for i in range(found.num_row_groups)] == groups
    assert all(found.row_group(i).column(0).compression == "ZSTD" for i in range(found.num_row_groups))
    assert pq.read_table(tmp_path / "f.parquet")["id"].to_pylist() == [str(number) for number in range(num_rows)]


def test_parquet_columns_have_their_types_without_rows_too(tmp_path: Path) -> None:
    write(tmp_path / "f.parquet", [])
    schema = pq.read_schema(tmp_path / "f.parquet")
    assert [schema.field(name).type for name in ("id", "score", "tokens", "width", "tags", "more")] == [
        pa.string(),
        pa.float64(),
        pa.int32(),
        pa.int16(),
        pa.list_(pa.field("element", pa.string())),
        pa.string(),
    ]


def test_no_number_is_null_in_json_lines_and_itself_in_parquet(tmp_path: Path) -> None:
    columns = [Column("id", "text"), Column("x", pa.float64())]
    for name in "f.jsonl", "f.parquet":
        write(tmp_path / name, [{"id": "a", "x": math.nan}], columns)
    assert (tmp_path / "f.jsonl").read_text() == '{"id": "a", "x": null}\n'
    assert math.isnan(pq.read_table(tmp_path / "f.parquet")["x"][0].as_py())


# ---- what run made a file


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_a_changed_json_file_is_nobody_knows_whose(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.jsonl"
        write(path, [{"id": "a"}, {"id": "b"}])
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        assert JsonLines().run_of(path) is None


@pytest.mark.parametrize("record", [None, b"", b"{", b"[]", b"null", b'{"settings": {}, "rows": 1}', b"\xff"])
def test_without_a_record_nothing_is_known_of_a_json_file(tmp_path: Path, record: bytes | None) -> None:
    path = tmp_path / "f.jsonl"
    write(path, [{"id": "a"}])
    beside = tmp_path / "f.jsonl.run"
    beside.unlink() if record is None else beside.write_bytes(record)
    assert JsonLines().run_of(path) is None


def test_nothing_is_known_of_parquet_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"id": ["a"]}), path)
    assert Parquet().run_of(path) is None
    write(path, [{"id": "a"}])
    path.write_bytes(path.read_bytes()[:-1])
    assert Parquet().run_of(path) is None
    path.write_bytes(b"")
    assert Parquet().run_of(path) is None


def test_a_parquet_file_with_other_rows_is_not_the_runs(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    write(path, [{"id": "a"}, {"id": "b"}])
    pq.write_table(pq.read_table(path).slice(0, 1), path)  # keeps the metadata
    assert Parquet().run_of(path) is None


# ---- names


@pytest.mark.parametrize("name", ["f.csv", "f", "f.jsonl.gz", "jsonl"])
def test_other_formats_are_refused(name: str) -> None:
    with pytest.raises(OutputError, match=r"ends in \.jsonl or \.parquet"):
        format_of(Path(name))


def test_capitals_do_not_matter() -> None:
    assert [type(format_of(Path(name))) for name in ("f.JSONL", "f.ndjson", "f.Parquet")] == [
        JsonLines,
        JsonLines,
        Parquet,
    ]


def test_what_is_not_renamed_is_gone(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), temporary_file(tmp_path / "f") as target:
        target.write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
