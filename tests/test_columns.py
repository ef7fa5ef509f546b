from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idefics_cli.columns import encodable, finite, json_text, strict_json


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_lines_are_utf8_and_single() -> None:
    assert json_text({"id": "ü\n\u2028", "score": -0.5, "caption": None}) == (
        '{"id": "ü\\n\u2028", "score": -0.5, "caption": null}'.encode()
    )


def test_lone_surrogates_are_escaped() -> None:
    line = json_text({"id": "a\udce9ü"})
    assert line.isascii() and json.loads(line) == {"id": "a\udce9ü"}


@given(st.dictionaries(st.text(), st.floats() | st.text() | st.sampled_from(["NaN", "Infinity"]), max_size=4))
def test_strict_lines_have_null_for_what_is_not_finite_and_else_the_same(row: Mapping[str, Any]) -> None:
    found = json.loads(strict_json(json_text(row)).decode(), parse_constant=refuse)
    assert found == {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def test_what_json_cannot_hold_is_a_bug() -> None:
    with pytest.raises(TypeError, match="a column holds a object"):
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
