"""Several questions about each row: ids, and going on in the middle of a row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idefics_cli.errors import InputError
from idefics_cli.rows import InputRow
from idefics_cli.tasks.questions import rows_asked, with_questions

names = st.text("ab#1", min_size=1)


def row(name: str, index: int = 0) -> InputRow:
    return InputRow(index, name, None, (), {"question": "the manifest's own"})


def rows(ids: list[str]) -> list[InputRow]:
    return [row(name, index) for index, name in enumerate(ids)]


def test_of_several_questions_each_makes_an_id_of_its_own() -> None:
    asked = list(with_questions(rows(["x", "y"]), ["What?", "Where?"]))
    assert [(each.id, each.asked) for each in asked] == [
        ("x#1", "What?"),
        ("x#2", "Where?"),
        ("y#1", "What?"),
        ("y#2", "Where?"),
    ]
    assert all(each.values == {"question": "the manifest's own"} for each in asked)


def test_one_question_leaves_the_ids_as_they_are() -> None:
    assert [each.id for each in with_questions(rows(["x", "y#1"]), ["What?"])] == ["x", "y#1"]


@given(st.lists(names, unique=True), st.integers(1, 3), st.data())
def test_going_on_anywhere_asks_what_is_left(ids: list[str], num_questions: int, data: st.DataObject) -> None:
    questions = [f"question {number}" for number in range(num_questions)]
    whole = [each.id for each in with_questions(rows(ids), questions)]
    assert len(set(whole)) == len(whole)
    num_done = data.draw(st.integers(0, len(whole)))
    left: list[str] = []
    passed = list(rows_asked(whole[:num_done], num_questions, left))
    assert passed == ids[: num_done // num_questions]
    rest = with_questions(rows(ids)[len(passed) :], questions, left)
    assert [each.id for each in rest] == whole[num_done:]


def test_another_row_in_the_place_of_an_unfinished_one_is_refused() -> None:
    with pytest.raises(InputError, match="row 1 of the input is now y, but the unfinished output ends with x#1"):
        list(with_questions([row("y")], ["What?", "Where?"], ["x#1"]))


def test_an_input_that_ends_before_an_unfinished_row_is_refused() -> None:
    with pytest.raises(InputError, match="the input ends before the row of x#1"):
        list(with_questions([], ["What?", "Where?"], ["x#1"]))
