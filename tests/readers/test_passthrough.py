"""Pass-through columns: taken from the inputs a second time, for JSON lines or as Arrow."""

from __future__ import annotations

import datetime
import decimal
import json
import tempfile
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import written_manifests
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st
from written_manifests import ALL_FORMATS, write_manifest

from idefics_cli.columns import json_text, strict_json
from idefics_cli.errors import InputError
from idefics_cli.readers.inputs import Inputs
from idefics_cli.readers.undeclared_types import in_parquet, inferred_types

opened = partial(written_manifests.opened, keep="all")


def as_table(found: Inputs) -> pa.Table:
    return pa.Table.from_batches(found.passthrough_batches())


# Every format


@pytest.mark.parametrize("name", ALL_FORMATS)
@pytest.mark.parametrize("options", [{}, {"shard": (2, 3)}, {"limit": 4}, {"shard": (1, 2), "limit": 2}])
def test_columns_are_those_of_the_rows(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """Of those that have been read, and those that have not been reached."""
    rows = [{"id": str(i), "image": f"{i}.png", "question": f"What is {i}?"} for i in range(8)]
    path = write_manifest(tmp_path / name, rows)
    found = opened(path, **options)
    assert next(found.rows).index < next(found.rows).index
    expected = [{"question": f"What is {row.id}?"} for row in opened(path, **options).rows]
    assert list(found.passthrough_rows()) == expected
    assert as_table(found).to_pylist() == expected


def test_columns_of_several_inputs_are_one_table(tmp_path: Path) -> None:
    """Whose types are those of all where they agree; rows without a column have null."""
    typed = tmp_path / "typed.parquet"
    numbers = pa.array([1, 2], pa.int16())
    pq.write_table(pa.table({"id": ["a", "b"], "image": ["a.png"] * 2, "n": numbers, "text": ["x", "y"]}), typed)
    plain = write_manifest(tmp_path / "plain.csv", [{"id": "c", "image": "c.png", "text": "z"}])
    free = write_manifest(tmp_path / "free.jsonl", [{"id": "d", "image": "d.png", "m": [1]}])
    found = opened(typed, "-", plain, free, stdin=b"e.png\nf.png\n")
    assert found.passthrough == {"n": pa.int16(), "text": pa.string(), "m": None}
    assert len(list(found.rows)) == 6
    nothing = {"n": None, "text": None, "m": None}
    expected = [{"n": 1, "text": "x"}, {"n": 2, "text": "y"}, {}, {}, {"text": "z"}, {"m": [1]}]
    assert list(found.passthrough_rows()) == as_table(found).to_pylist() == [nothing | row for row in expected]
    assert as_table(found).schema.types == [pa.int16(), pa.string(), pa.list_(pa.int64())]
    assert as_table(opened(typed, "-", limit=3, stdin=b"e.png\nf.png\n")).num_rows == 3


def test_types_that_differ_are_inferred_from_the_values(tmp_path: Path) -> None:
    lines = write_manifest(tmp_path / "rows.jsonl", [{"id": "a", "image": "a.png", "n": 1.5}])
    typed = write_manifest(tmp_path / "rows.parquet", [{"id": "b", "image": "b.png", "n": 2}])
    assert as_table(opened(lines, typed)).to_pydict() == {"n": [1.5, 2.0]}


UNION = pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])])


@pytest.mark.parametrize(
    ("values", "inferred", "expected"),
    [
        (UNION, pa.string(), ["1", "b"]),
        (pa.array([pa.MonthDayNano([1, 2, 3]), None]), pa.list_(pa.int64()), [[1, 2, 3], None]),
        (pc.run_end_encode(pa.array([7, 7])), pa.int64(), [7, 7]),
        (pa.array([{}, None], pa.struct([])), pa.string(), ["{}", None]),
        (pa.array([b"", b""], pa.binary(0)), pa.string(), ["", ""]),
    ],
)
def test_types_that_parquet_lacks_are_inferred_too(
    tmp_path: Path, values: pa.Array, inferred: pa.DataType, expected: list[Any]
) -> None:
    table = pa.table({"image": ["a.png", "b.png"], "x": values})
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as file:
        file.write_table(table)
    found = as_table(opened(tmp_path / "rows.arrow"))
    assert (found["x"].type, found["x"].to_pylist()) == (inferred, expected)
    pq.write_table(found, tmp_path / "result.parquet")


class Unhashable(pa.ExtensionType):
    def __init__(self) -> None:
        super().__init__(pa.int32(), "test.unhashable")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Unhashable:
        return cls()


REQUIRED = pa.field("n", pa.int32(), nullable=False)


@pytest.mark.parametrize(
    ("of", "value"),
    [
        (pa.struct([REQUIRED]), {"n": 1}),
        (pa.struct([pa.field("s", pa.struct([REQUIRED]), nullable=False)]), {"s": {"n": 1}}),
    ],
)
def test_types_that_parquet_has_are_kept(tmp_path: Path, of: pa.DataType, value: Any) -> None:
    """With rows that have no value, too, whose parts may not be null."""
    table = pa.table({"image": ["a.png"], "x": pa.array([value], of)})
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as file:
        file.write_table(table)
    found = opened(tmp_path / "rows.arrow", "-", stdin=b"b.png\n")
    assert len(list(found.rows)) == 2 and found.passthrough == {"x": of}
    pq.write_table(as_table(found), tmp_path / "result.parquet")
    assert pq.read_table(tmp_path / "result.parquet")["x"].to_pylist() == [value, None]


def test_a_type_that_says_nothing_of_its_hash_is_kept() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(Unhashable())
    assert in_parquet(Unhashable()) == Unhashable()


def test_bad_rows_have_no_values(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "n": 1}\n{\n{"image": "c.png", "n": 3}\n')
    assert list(opened(tmp_path / "rows.jsonl").passthrough_rows()) == [{"n": 1}, {"n": None}, {"n": 3}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv.gz", "rows.parquet", "rows.tar"])
def test_inputs_that_have_changed_are_refused(tmp_path: Path, name: str) -> None:
    row = {"id": "x", "image": "x.png"}
    path = write_manifest(tmp_path / name, [{**row, "question": "a"}])
    found = opened(path)
    write_manifest(path, [{**row, "question": "b"}])
    for read in found.passthrough_rows, found.passthrough_batches:
        with pytest.raises(InputError, match=r"rows.* changed while the run was under way: restore it"):
            list(read())
    path.unlink()
    with pytest.raises(InputError, match="rows"):
        list(found.passthrough_rows())


# Declared types: leaves with values as Arrow gives them to Python, and whatever can be made of them.

SOME_DATES = st.datetimes(datetime.datetime(1, 1, 2), datetime.datetime(9999, 12, 30))
NANOSECOND_DATES = st.datetimes(datetime.datetime(1700, 1, 1), datetime.datetime(2200, 1, 1))
SECONDS = st.integers(-(2**31), 2**31)


def aware(moments: st.SearchStrategy[datetime.datetime]) -> st.SearchStrategy[datetime.datetime]:
    return moments.map(lambda moment: moment.replace(tzinfo=datetime.UTC))


def rounded(moment: datetime.datetime) -> datetime.datetime:
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def decimals(digits: int) -> st.SearchStrategy[decimal.Decimal]:
    numbers = st.integers(-(10**digits) + 1, 10**digits - 1)
    return numbers.map(lambda number: decimal.Decimal(number).scaleb(-2, decimal.Context(prec=80)))


def texts(**options: Any) -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"]), **options)


LEAVES: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.bool_(), st.booleans()),
    *[(getattr(pa, f"int{bits}")(), st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)) for bits in (8, 16, 32, 64)],
    *[(getattr(pa, f"uint{bits}")(), st.integers(0, 2**bits - 1)) for bits in (8, 16, 32, 64)],
    (pa.float16(), st.floats(width=16)),
    (pa.float32(), st.floats(width=32)),
    (pa.float64(), st.floats()),
    (pa.decimal32(7, 2), decimals(7)),
    (pa.decimal64(15, 2), decimals(15)),
    (pa.decimal128(38, 2), decimals(38)),
    (pa.decimal256(70, 2), decimals(70)),
    (pa.string(), texts()),
    (pa.large_string(), texts()),
    (pa.string_view(), texts()),
    *[(of, st.binary(max_size=40)) for of in (pa.binary(), pa.large_binary(), pa.binary_view())],
    (pa.binary(3), st.binary(min_size=3, max_size=3)),
    (pa.binary(16), st.binary(min_size=16, max_size=16)),
    (pa.date32(), st.dates()),
    (pa.date64(), st.dates()),
    (pa.time32("s"), st.times().map(lambda time: time.replace(microsecond=0))),
    (pa.time64("us"), st.times()),
    (pa.time64("ns"), st.times()),
    (pa.timestamp("s"), SOME_DATES.map(lambda moment: moment.replace(microsecond=0))),
    (pa.timestamp("ms"), SOME_DATES.map(rounded)),
    (pa.timestamp("us"), SOME_DATES),
    (pa.timestamp("ns"), NANOSECOND_DATES),
    (pa.timestamp("us", "UTC"), aware(SOME_DATES)),
    (pa.timestamp("ms", "Asia/Kolkata"), aware(NANOSECOND_DATES).map(rounded)),
    (pa.timestamp("us", "-03:30"), aware(NANOSECOND_DATES)),
    (pa.timestamp("ns", "Europe/Berlin"), aware(NANOSECOND_DATES)),
    (pa.duration("s"), SECONDS.map(lambda seconds: datetime.timedelta(seconds=seconds))),
    (pa.duration("us"), SECONDS.map(lambda count: datetime.timedelta(microseconds=count))),
    (pa.duration("ns"), SECONDS.map(lambda count: datetime.timedelta(microseconds=count))),
    (pa.null(), st.none()),
]
Typed = tuple[pa.DataType, st.SearchStrategy[Any]]


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


def as_struct(items: list[Typed]) -> Typed:
    types = pa.struct([(f"f{i}", of) for i, (of, _) in enumerate(items)])
    return types, st.fixed_dictionaries({f"f{i}": maybe(values) for i, (_, values) in enumerate(items)})


def nested(inner: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    return st.one_of(
        inner.map(lambda item: (pa.list_(item[0]), st.lists(maybe(item[1]), max_size=3))),
        inner.map(lambda item: (pa.large_list(item[0]), st.lists(maybe(item[1]), max_size=3))),
        inner.map(lambda item: (pa.list_(item[0], 2), st.lists(maybe(item[1]), min_size=2, max_size=2))),
        inner.map(
            lambda item: (pa.map_(pa.string(), item[0]), st.lists(st.tuples(texts(), maybe(item[1])), max_size=3))
        ),
        st.lists(inner, min_size=1, max_size=3).map(as_struct),
    )


TYPES = st.recursive(st.sampled_from(LEAVES), nested, max_leaves=4)


@st.composite
def columns(draw: st.DrawFn, types: st.SearchStrategy[Typed]) -> pa.Array:
    of, values = draw(types)
    return pa.array(draw(st.lists(maybe(values), max_size=4)), of)


def saved(folder: str, column: pa.Array) -> tuple[Path, pa.Table]:
    """A manifest with this column, and the column as Arrow reads it."""
    path = Path(folder) / "rows.parquet"
    try:
        pq.write_table(pa.table({"v": column}), path, row_group_size=3)
    except pa.ArrowNotImplementedError:  # some views within others
        reject()
    return path, pq.read_table(path)


@given(column=columns(TYPES).filter(len), number=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_arrow_stays_as_it_is(column: pa.Array, number: int) -> None:
    """Column by column and bit by bit, and so does the part of a shard; as JSON lines it is strict."""
    with tempfile.TemporaryDirectory() as folder:
        path, table = saved(folder, column)
        found = as_table(opened(path, needs_image=False, shard=(1, number)))
        lines = [strict_json(json_text(row)) for row in opened(path, needs_image=False).passthrough_rows()]
    part = [table["v"][i] for i in range(len(column) // number)]
    assert found.schema == table.schema
    assert list(found["v"]) == part or str(found["v"].to_pylist()) == str([each.as_py() for each in part])  # NaN
    for line in lines:
        assert b"\n" not in line
        json.loads(line.decode(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([uuid.uuid4().bytes, None], pa.uuid()),
        pa.array([1, None], pa.bool8()),
        pa.array(["{}", None], pa.json_()),
        pa.array(["a", "b", None, "a"]).dictionary_encode(),
        pa.array([b"\xff", None]).dictionary_encode(),
        pa.array([1_700_000_000_123_456_789, -2429827200 * 10**9, None], pa.timestamp("ns", "Europe/Berlin")),
        pa.array([1, None, 3], pa.time64("ns")),
        pa.array([-1, None, 2**63 - 1], pa.duration("ns")),
        pa.FixedShapeTensorArray.from_numpy_ndarray(pa.array(range(12), pa.float32()).to_numpy().reshape(2, 2, 3)),
        pa.ListArray.from_arrays([0, 1, 1], pa.array([uuid.uuid4().bytes], pa.uuid())),
        pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers()),
    ],
    ids=lambda column: str(column.type)[:30],
)
@pytest.mark.parametrize("shard", [None, (2, 2)])
def test_arrow_types_that_python_lacks_stay_as_they_are(
    tmp_path: Path, column: pa.Array, shard: tuple[int, int] | None
) -> None:
    path, table = saved(str(tmp_path), column)
    found = as_table(opened(path, needs_image=False, shard=shard))
    assert found.equals(table if shard is None else table.slice(len(column) // 2))
    pq.write_table(found, tmp_path / "result.parquet")
    assert pq.read_table(tmp_path / "result.parquet").equals(found)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1_700_000_000_123_456_789], pa.timestamp("ns", "UTC")), ["2023-11-14T22:13:20.123456789Z"]),
        (pa.array([{"a": [b"x"]}]), [{"a": ["eA=="]}]),
        (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), [[["k", 1]]]),
        (pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers()), ["a", None]),
    ],
)
def test_what_json_has_no_form_for_is_text(tmp_path: Path, column: pa.Array, expected: list[Any]) -> None:
    path, _ = saved(str(tmp_path), column)
    rows = opened(path, needs_image=False).passthrough_rows()
    assert [json.loads(json_text(row))["v"] for row in rows] == expected


# Undeclared columns: whatever JSON holds

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "ü"]), inner),
    max_leaves=6,
)


def without_nulls(value: Any) -> Any:
    """An object's name that is missing, and one that is null, are one in a struct."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return value


def same_value(found: Any, value: Any) -> bool:
    """As it was, or as JSON in a column of texts."""
    expected = without_nulls(value)
    if isinstance(found, str) and not isinstance(value, str):
        return without_nulls(json.loads(found)) == expected
    return without_nulls(found) == expected


@given(st.lists(JSON_VALUES, min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
@example([2**53 + 1, 0.5])
def test_undeclared_columns_hold_whatever_json_holds(values: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b"".join(json_text({"image": "a.png", "v": value}) + b"\n" for value in values))
        found = opened(path)
        expected = [row["v"] for row in found.passthrough_rows()]
        pq.write_table(as_table(found), Path(folder) / "result.parquet")
        values = pq.read_table(Path(folder) / "result.parquet")["v"].to_pylist()
    assert all(map(same_value, values, expected)), (values, expected)


def inferred(chunks: Sequence[Sequence[Any]]) -> pa.DataType:
    return inferred_types(lambda: [[{"v": value} for value in chunk] for chunk in chunks], ["v"])["v"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], pa.string()),
        ([None], pa.string()),
        ([1, None], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([2**53, 0.5], pa.float64()),
        ([2**53 + 1, 0.5], pa.string()),
        ([2**63 - 1, -(2**63)], pa.int64()),
        ([2**63], pa.string()),
        ([True, None], pa.bool_()),
        ([True, 1], pa.string()),
        ([1, "a"], pa.string()),
        ([[1], [2.5], []], pa.list_(pa.float64())),
        ([[None]], pa.list_(pa.string())),
        ([[1], ["a"]], pa.string()),
        ([{"a": 1}, {"b": "x"}], pa.struct([("a", pa.int64()), ("b", pa.string())])),
        ([{"a": 1}, {"a": [1]}], pa.string()),
        ([{}], pa.string()),
        ([{}, {"a": 1}], pa.struct([("a", pa.int64())])),
        ([[{}]], pa.string()),
        ([{"\ud800": 1}], pa.string()),
        ([{f"key {i}": i} for i in range(1000)], pa.string()),
    ],
)
def test_the_type_of_an_undeclared_column(values: list[Any], expected: pa.DataType) -> None:
    """Whether they come in one chunk or several."""
    assert inferred([values]) == expected
    assert inferred([[value] for value in values]) == expected


def test_values_that_are_nested_deep_are_text() -> None:
    value: Any = "inside"
    for _ in range(100):
        value = [value]
    assert inferred([[value]]) == pa.string()
