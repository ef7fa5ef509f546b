from __future__ import annotations

import datetime
import decimal
import json
import math
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from idefics_cli.columns import (
    Column,
    encodable,
    finite,
    from_json,
    inferred_types,
    json_text,
    python_values,
    strict_json,
)
from idefics_cli.writers.formats import Parquet, Rows

MOST_EXAMPLES = settings(max_examples=150, deadline=None)


def through_parquet(values: list[Any], of: pa.DataType | None) -> pa.ChunkedArray:
    """The column as a finished Parquet file holds it, its values having gone through the journal's JSON."""
    texts = [json_text({"v": value}) for value in values]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.parquet"
        Parquet().write(path, Rows(lambda: iter(texts)), [Column("v", of)], {})
        return pq.read_table(path)["v"]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


# Declared types: leaves with values as Arrow gives them to Python, and whatever can be made of them.

SOME_DATES = st.datetimes(datetime.datetime(1, 1, 2), datetime.datetime(9999, 12, 30))
NANOSECOND_DATES = st.datetimes(datetime.datetime(1700, 1, 1), datetime.datetime(2200, 1, 1))
SECONDS = st.integers(-(2**31), 2**31)


def aware(moments: st.SearchStrategy[datetime.datetime]) -> st.SearchStrategy[datetime.datetime]:
    return moments.map(lambda moment: moment.replace(tzinfo=datetime.timezone.utc))


def rounded(moment: datetime.datetime) -> datetime.datetime:
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def decimals(digits: int) -> st.SearchStrategy[decimal.Decimal]:
    numbers = st.integers(-(10**digits) + 1, 10**digits - 1)
    with decimal.localcontext(decimal.Context(prec=80)):
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


def nested(inner: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    def as_list(item: Typed) -> Typed:
        return pa.list_(item[0]), st.lists(maybe(item[1]), max_size=3)

    def as_large_list(item: Typed) -> Typed:
        return pa.large_list(item[0]), st.lists(maybe(item[1]), max_size=3)

    def as_fixed_list(item: Typed) -> Typed:
        return pa.list_(item[0], 2), st.lists(maybe(item[1]), min_size=2, max_size=2)

    def as_struct(items: list[Typed]) -> Typed:
        fields = {f"f{i}": item for i, item in enumerate(items)}
        return pa.struct([(name, of) for name, (of, _) in fields.items()]), st.fixed_dictionaries(
            {name: maybe(values) for name, (_, values) in fields.items()}
        )

    def as_map(item: Typed) -> Typed:
        pairs = st.lists(st.tuples(texts(), maybe(item[1])), max_size=3)
        return pa.map_(pa.string(), item[0]), pairs

    return st.one_of(
        inner.map(as_list),
        inner.map(as_large_list),
        inner.map(as_fixed_list),
        st.lists(inner, min_size=1, max_size=3).map(as_struct),
        inner.map(as_map),
    )


TYPES = st.recursive(st.sampled_from(LEAVES), nested, max_leaves=4)


@st.composite
def columns(draw: st.DrawFn, types: st.SearchStrategy[Typed]) -> pa.Array:
    of, values = draw(types)
    return pa.array(draw(st.lists(maybe(values), max_size=4)), of)


@given(column=columns(TYPES))
@MOST_EXAMPLES
def test_values_of_every_declared_type_come_back_equal(column: pa.Array) -> None:
    """Read by Arrow, journalled as JSON, written as Parquet, read again."""
    found = through_parquet(python_values(column), column.type)
    assert alike(found.to_pylist(), column.to_pylist())


@pytest.mark.parametrize(("of", "values"), LEAVES, ids=lambda each: str(each) if isinstance(each, pa.DataType) else "")
def test_each_type_is_kept(of: pa.DataType, values: st.SearchStrategy[Any]) -> None:
    """But for views, which are plain, and what Parquet does not know: whole seconds, dates of milliseconds."""
    told = {
        pa.string_view(): pa.string(),
        pa.binary_view(): pa.binary(),
        pa.timestamp("s"): pa.timestamp("ms"),
        pa.time32("s"): pa.time32("ms"),
        pa.date64(): pa.date32(),
    }
    assert through_parquet([None], of).type == told.get(of, of)


def alike(one: Any, other: Any) -> bool:
    """Equal, with NaN equal to itself and moments by what they mean."""
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one)
    return type(one) is type(other) and one == other


@given(columns(TYPES))
@MOST_EXAMPLES
def test_json_lines_of_every_declared_type_are_strict(column: pa.Array) -> None:
    for value in python_values(column):
        line = strict_json(json_text({"v": value}))
        assert b"\n" not in line
        json.loads(line.decode(), parse_constant=refuse)


@given(
    st.lists(st.none() | st.integers(-(9 * 10**18), 9 * 10**18), max_size=5),
    st.sampled_from([None, "UTC", "+05:30", "Europe/Berlin", "America/New_York"]),
)
@example(counts=[-2429827200 * 10**9, -(9 * 10**18)], zone="Europe/Berlin")  # from the years before zones
@MOST_EXAMPLES
def test_nanoseconds_come_back_to_the_last(counts: list[int | None], zone: str | None) -> None:
    column = pa.array(counts, pa.timestamp("ns", zone))
    found = through_parquet(python_values(column), column.type)
    assert found.type == column.type
    assert found.cast(pa.int64()).to_pylist() == counts


@given(st.sampled_from(["time64", "duration"]), st.lists(st.none() | st.integers(0, 86_400 * 10**9 - 1), max_size=5))
@example(of="duration", counts=[-1, -(2**63) + 1, 2**63 - 1])
@MOST_EXAMPLES
def test_times_and_durations_come_back_to_the_last_nanosecond(of: str, counts: list[int | None]) -> None:
    column = pa.array(counts, getattr(pa, of)("ns"))
    found = through_parquet(python_values(column), column.type)
    assert found.type == column.type
    assert found.cast(pa.int64()).to_pylist() == counts


@pytest.mark.parametrize("length", [6, 9])
def test_moments_are_read_with_and_without_a_zone(length: int) -> None:
    """As libraries write them that give moments of nanoseconds to Python."""
    fraction = "123456789"[:length]
    expected = 10**9 + int(fraction.ljust(9, "0"))
    for text in f"1970-01-01T00:00:01.{fraction}", f"1970-01-01T01:30:01.{fraction}+01:30":
        assert from_json(text, pa.timestamp("ns")) == expected


@pytest.mark.parametrize(
    ("column", "kept_as"),
    [
        (pa.array([uuid.uuid4().bytes, None], pa.uuid()), pa.uuid()),
        (pa.array([1, None], pa.bool8()), pa.bool8()),
        (pa.array(["{}", None], pa.json_()), pa.json_()),
        (pa.array([b"\xff", None], pa.opaque(pa.binary(), "t", "v")), pa.opaque(pa.binary(), "t", "v")),
        (pa.array(["a", "b", None, "a"]).dictionary_encode(), pa.dictionary(pa.int32(), pa.string())),
        (pa.array([b"\xff", None]).dictionary_encode(), pa.binary()),
        (pa.array([1, None]).dictionary_encode(), pa.int64()),
        (pa.array([[b"\xff"], None], pa.list_view(pa.binary())), pa.list_(pa.field("element", pa.binary()))),
    ],
    ids=lambda each: str(each.type) if isinstance(each, pa.Array) else "",
)
def test_types_around_others(column: pa.Array, kept_as: pa.DataType) -> None:
    found = through_parquet(python_values(column), column.type)
    assert found.type == kept_as
    assert found.to_pylist() == column.to_pylist()


def test_types_of_extensions_within_others_are_plain() -> None:
    number = uuid.uuid4()
    of = pa.struct([("ids", pa.list_(pa.uuid()))])
    found = through_parquet([{"ids": [number]}], of)
    assert found.to_pylist() == [{"ids": [number.bytes]}]


def test_a_huge_text() -> None:
    text = "ü" * 5_000_000
    assert through_parquet([text], pa.string()).to_pylist() == [text]


# Undeclared columns: whatever JSON holds

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "ü", "\ud800"]), inner),
    max_leaves=6,
)


def plain(value: Any) -> Any:
    """Without halves of surrogate pairs, which no Parquet file holds."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {encodable(name): plain(item) for name, item in value.items()}
    return value


def without_nulls(value: Any) -> Any:
    """An object's name that is missing, and one that is null, are one in a struct."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return value


def same_value(found: Any, value: Any) -> bool:
    """As it was, or as JSON in a column of texts."""
    expected = without_nulls(plain(value))
    if isinstance(found, str) and not isinstance(value, str):
        return without_nulls(json.loads(found)) == expected
    return without_nulls(found) == expected


@given(st.lists(JSON_VALUES, max_size=6))
@settings(max_examples=300, deadline=None)
def test_undeclared_columns_hold_whatever_json_holds(values: list[Any]) -> None:
    found = through_parquet(values, None).to_pylist()
    assert all(map(same_value, found, values)), (values, found)


def inferred(*chunks: list[Any]) -> pa.DataType:
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
    assert inferred(values) == expected
    assert inferred(*([value] for value in values)) == expected


def test_values_that_are_nested_deep_are_text() -> None:
    value: Any = "inside"
    for _ in range(100):
        value = [value]
    (found,) = through_parquet([value], None).to_pylist()
    assert json.loads(found) == value


# JSON


def test_lines_are_utf8_and_single() -> None:
    assert json_text({"id": "ü\n\u2028", "score": -0.5, "caption": None}) == (
        '{"id": "ü\\n\u2028", "score": -0.5, "caption": null}'.encode()
    )


def test_lone_surrogates_are_escaped() -> None:
    line = json_text({"id": "a\udce9ü"})
    assert line.isascii() and json.loads(line) == {"id": "a\udce9ü"}


@given(st.dictionaries(st.text(), st.floats() | st.text() | st.sampled_from(["NaN", "Infinity"]), max_size=4))
def test_strict_lines_have_null_for_what_is_no_number_and_else_the_same(row: Mapping[str, Any]) -> None:
    found = json.loads(strict_json(json_text(row)).decode(), parse_constant=refuse)
    assert found == {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def test_what_no_row_can_hold_is_a_bug() -> None:
    with pytest.raises(TypeError, match="a kept column holds a object"):
        json_text({"v": object()})


def test_scores_that_are_no_numbers_are_null() -> None:
    assert [finite(score) for score in (None, -0.5, math.nan, -math.inf)] == [None, -0.5, None, None]


@given(st.text())
def test_encodable_text_changes_only_where_it_must(text: str) -> None:
    found = encodable(text)
    found.encode()
    try:
        text.encode()
    except UnicodeEncodeError:
        assert "\ufffd" in found
    else:
        assert found == text
