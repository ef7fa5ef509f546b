from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idefics_cli.columns import (
    Column,
    arrow_array,
    arrow_type,
    encodable,
    finite,
    json_text,
    strict_json,
    tensor_numbers,
    tensor_values,
)

# JSON


def test_lines_are_utf8_and_single() -> None:
    assert json_text({"id": "ü\n\u2028", "score": -0.5, "caption": None}) == (
        '{"id": "ü\\n\u2028", "score": -0.5, "caption": null}'.encode()
    )


def test_lone_surrogates_are_escaped() -> None:
    line = json_text({"id": "a\udce9ü"})
    assert line.isascii() and json.loads(line) == {"id": "a\udce9ü"}


@given(st.dictionaries(st.text(), st.floats() | st.text() | st.sampled_from(["NaN", "Infinity"]), max_size=4))
def test_strict_lines_have_null_for_nan_and_infinities_and_else_the_same(row: Mapping[str, Any]) -> None:
    found = json.loads(strict_json(json_text(row)).decode(), parse_constant=pytest.fail)
    assert found == {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"\xff\x00", '"/wA="'),
        (datetime.date(2024, 2, 29), '"2024-02-29"'),
        (datetime.time(1, 2, 3, 4), '"01:02:03.000004"'),
        (datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC), '"1970-01-01T00:00:00+00:00"'),
        (datetime.timedelta(seconds=-1, microseconds=5), "-999995"),
        (decimal.Decimal("-1.50"), '"-1.50"'),
        (uuid.UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        ([{"a": b"\x01"}], '[{"a": "AQ=="}]'),
    ],
)
def test_values_that_json_has_no_form_for(value: Any, text: str) -> None:
    assert json_text({"v": value}).decode() == f'{{"v": {text}}}'


def test_what_no_row_can_hold_is_a_bug() -> None:
    with pytest.raises(TypeError, match="a column holds a object, which JSON cannot hold"):
        json_text({"v": object()})


def test_scores_that_are_not_finite_are_null() -> None:
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


# Arrow


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("text", ["ü", None, "a\ud800"], ["ü", None, "a\ufffd"]),
        ("real", [0.5, None], [0.5, None]),
        ("count", [2**31 - 1, None], [2**31 - 1, None]),
        (
            "candidates",
            [None, [{"text": "\ud800", "score": None, "tokens": 2}]],
            [None, [{"text": "\ufffd", "score": None, "tokens": 2}]],
        ),
    ],
)
def test_own_columns_as_arrow(kind: Any, values: list[Any], expected: list[Any]) -> None:
    column = Column("v", kind)
    assert arrow_array(column, values, arrow_type(column)).to_pylist() == expected


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_latents_go_to_arrow_and_back_through_bytes_and_json(dtype: str) -> None:
    numbers = np.arange(6, dtype=dtype)
    value = {"dtype": dtype, "shape": [2, 3], "data": numbers.tobytes()}
    column = Column("latents", "latents")
    of = arrow_type(column, value)
    assert of == pa.fixed_shape_tensor(pa.from_numpy_dtype(dtype), [2, 3])
    for row in value, json.loads(json_text(value)):
        array = arrow_array(column, [None, row, row], of)
        assert tensor_values(array) == [None, value, value] and tensor_values(array.slice(1, 1)) == [value]
        assert (tensor_numbers(row) == numbers).all()
