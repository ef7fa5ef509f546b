"""Several questions about each row, and the ids of the rows that come of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from idefics_cli.rows import InputRow
from idefics_cli.tasks.caption_vqa import input_id, with_questions

names = st.text("ab#1", min_size=1)


def rows(ids: list[str]) -> list[InputRow]:
    values = {"question": "the manifest's own"}
    return [InputRow(index, name, None, (), values) for index, name in enumerate(ids)]


def test_each_of_several_questions_makes_an_id_and_one_alone_leaves_it() -> None:
    asked = list(with_questions(rows(["x", "y"]), ["What?", "Where?"]))
    assert [each.id for each in asked] == ["x#1", "x#2", "y#1", "y#2"]
    assert [each.asked for each in asked] == ["What?", "Where?"] * 2
    assert all(each.values == {"question": "the manifest's own"} for each in asked)
    assert [each.id for each in with_questions(rows(["x", "y#1"]), ["What?"])] == ["x", "y#1"]


@given(st.lists(names, unique=True), st.integers(1, 3))
def test_no_two_ids_are_equal_and_each_leads_back_to_its_row(ids: list[str], num_questions: int) -> None:
    asked = list(with_questions(rows(ids), [f"question {number}" for number in range(num_questions)]))
    assert len({each.id for each in asked}) == len(asked) == num_questions * len(ids)
    assert [input_id(each.id, num_questions) for each in asked[::num_questions]] == ids
