from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from idefics_cli.storage.unique_ids import UniqueIds

ALIKE = st.text(st.sampled_from("aAé\u0301e 01\0"), max_size=3)


@given(st.lists(ALIKE | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)))
def test_ids_are_remembered_as_a_dictionary_would(ids: list[str]) -> None:
    """Those too that differ little."""
    seen, expected = UniqueIds(), {}
    for index, row_id in enumerate(ids):
        assert (row_id in seen) == (row_id in expected)
        assert seen.add(row_id, index) == expected.get(row_id)
        expected.setdefault(row_id, index)
