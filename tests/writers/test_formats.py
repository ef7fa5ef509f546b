from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.columns import Column, json_text
from idefics_cli.errors import InputError, OutputError
from idefics_cli.writers import formats
from idefics_cli.writers.formats import JsonLines, Parquet, Passthrough, format_of, replacing

COLUMNS = [Column("id", "text"), Column("score", "real"), Column("tokens", "count"), Column("candidates", "candidates")]
OWN = [column.name for column in COLUMNS]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
CANDIDATES = st.fixed_dictionaries({"text": TEXTS, "score": st.floats(-9, 0), "tokens": st.integers(0, 99)})
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "id": TEXTS,
            "score": st.none() | st.floats(allow_nan=False, allow_infinity=False),
            "tokens": st.none() | st.integers(0, 2**31 - 1),
            "candidates": st.none() | st.lists(CANDIDATES, max_size=2),
        }
    ),
    max_size=12,
)
NONE = Passthrough()
both = pytest.mark.parametrize("name", ["f.jsonl", "f.parquet"])


def write(path: Path, rows: Sequence[dict[str, Any]], passthrough: Passthrough = NONE) -> dict[str, Any]:
    """A finished file of these rows; what run made it."""
    form, run = format_of(path), {"settings": {"model": "demo"}, "rows": len(rows), "failed": {}}
    form.write(path, lambda: map(json_text, rows), COLUMNS, passthrough, run)
    return run


def passed(*batches: pa.RecordBatch, rows_each: int = 1, **names: str) -> Passthrough:
    """The columns of these batches, under other names where `names` has some."""
    names = {name: names.get(name, name) for name in batches[0].schema.names}
    return Passthrough(
        names, lambda: (row for batch in batches for row in batch.to_pylist()), lambda: iter(batches), rows_each
    )


@both
@given(ROWS)
@settings(deadline=None, max_examples=40)
def test_rows_come_back_equal_with_the_run_that_made_them(name: str, rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        run = write(path, rows)
        assert list(format_of(path).rows(path, OWN)) == rows
        assert format_of(path).run_of(path).items() >= run.items()
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
    empty = pa.RecordBatch.from_arrays([pa.array([], pa.int16())], ["width"])
    write(tmp_path / "f.parquet", [], passed(empty))
    schema = pq.read_schema(tmp_path / "f.parquet")
    types = [schema.field(name).type for name in ("id", "score", "tokens", "width")]
    assert types == [pa.string(), pa.float64(), pa.int32(), pa.int16()]


# ---- columns that are passed through

ZONE = pa.timestamp("ns", "Europe/Berlin")
BATCH = pa.RecordBatch.from_pydict(
    {
        "when": pa.array([-2429827200 * 10**9, None, 1], ZONE),
        "price": pa.array([1, None, 2]).cast(pa.decimal128(38, 2)),
        "kind": pa.array(["a", None, "a"]).dictionary_encode(),
        "embedding": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12, dtype=np.float32).reshape(3, 2, 2)),
        "id": pa.array([[b"\xff"], [], None]),
    }
)


@pytest.mark.parametrize("sizes", [(3,), (1, 2), (0, 1, 0, 1, 1)])
@pytest.mark.parametrize("rows_each", [1, 3])
def test_parquet_has_them_as_they_are_in_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: Sequence[int], rows_each: int
) -> None:
    monkeypatch.setattr(formats, "CHUNK_ROWS", 2)
    batches = [BATCH.slice(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    rows = [{"id": str(number)} for number in range(3 * rows_each)]
    write(tmp_path / "f.parquet", rows, passed(*batches, rows_each=rows_each, id="input_id"))
    found = pq.read_table(tmp_path / "f.parquet")
    assert found.column_names == [*OWN, "when", "price", "kind", "embedding", "input_id"]
    assert found["id"].to_pylist() == [row["id"] for row in rows]
    expected = pa.Table.from_batches([BATCH]).take([i // rows_each for i in range(3 * rows_each)])
    for name in BATCH.schema.names[:-1]:
        assert found[name].combine_chunks().equals(expected[name].combine_chunks())
    assert found["input_id"].to_pylist() == expected["id"].to_pylist()


@pytest.mark.parametrize("rows_each", [1, 2])
def test_json_lines_have_them_last(tmp_path: Path, rows_each: int) -> None:
    rows = [{"id": str(number)} for number in range(2 * rows_each)]
    batch = pa.RecordBatch.from_pydict({"width": [5, None], "id": ["ü", "y"]})
    write(tmp_path / "f.jsonl", rows, passed(batch, rows_each=rows_each, id="input_id"))
    values = [{"width": 5, "input_id": "ü"}, {"width": None, "input_id": "y"}]
    expected = [json_text({**row, **values[i // rows_each]}) for i, row in enumerate(rows)]
    assert (tmp_path / "f.jsonl").read_bytes().splitlines() == expected


@both
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_inputs_that_have_other_rows_than_the_run_are_refused(tmp_path: Path, name: str, num_rows: int) -> None:
    batch = pa.RecordBatch.from_pydict({"width": [1, 2]})
    rows = [{"id": str(number)} for number in range(num_rows)]
    with pytest.raises(InputError, match="the inputs changed while the run was under way: restore them"):
        write(tmp_path / name, rows, passed(batch))
    assert not list(tmp_path.iterdir())


def test_nan_is_null_in_json_lines_and_itself_in_parquet(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({"x": [math.nan]})
    for name in "f.jsonl", "f.parquet":
        write(tmp_path / name, [{"id": "a"}], passed(batch))
    assert (tmp_path / "f.jsonl").read_text() == '{"id": "a", "x": null}\n'
    assert math.isnan(pq.read_table(tmp_path / "f.parquet")["x"][0].as_py())


# ---- what run made a file


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_a_changed_json_file_has_no_record(data: st.DataObject) -> None:
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


def of_others(path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"]}), path)


def with_other_rows(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(0, 1), path)  # keeps the metadata


@pytest.mark.parametrize(
    "change",
    [
        of_others,
        with_other_rows,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
    ],
)
def test_nothing_is_known_of_another_parquet_file(tmp_path: Path, change: Callable[[Path], object]) -> None:
    write(tmp_path / "f.parquet", [{"id": "a"}, {"id": "b"}])
    change(tmp_path / "f.parquet")
    assert Parquet().run_of(tmp_path / "f.parquet") is None


# ---- names


def test_the_suffix_says_the_format() -> None:
    assert type(format_of(Path("f.JSONL"))) is type(format_of(Path("f.ndjson"))) is JsonLines
    assert type(format_of(Path("f.Parquet"))) is Parquet
    for name in "f.txt", "f", "f.jsonl.gz", "jsonl":
        with pytest.raises(OutputError, match=r"ends in \.jsonl, \.parquet or \.csv"):
            format_of(Path(name))


def test_what_cannot_be_finished_is_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "f") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
