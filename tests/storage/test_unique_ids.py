from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from idefics_cli.storage.unique_ids import UniqueIds


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3)))
def test_ids_are_remembered_as_a_dictionary_would(ids: list[str]) -> None:
    seen, expected = UniqueIds(), {}
    for index, row_id in enumerate(ids):
        assert (row_id in seen) == (row_id in expected)
        assert seen.add(row_id, index) == expected.get(row_id)
        expected.setdefault(row_id, index)


def test_ids_that_differ_little_are_not_one() -> None:
    seen = UniqueIds()
    assert [seen.add(text, i) for i, text in enumerate(["a", "A", "a ", "a\0", "a\0b", "é", "e\u0301", "1", "01"])] == [
        None
    ] * 9
