"""Rows in one line and side by side, and attention over them beside each row alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.generation.ragged import RaggedRows

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
def test_a_row_is_the_same_in_line_and_side_by_side(lengths: list[int]) -> None:
    rows = RaggedRows(lengths)
    line = torch.randn(1, 2, sum(lengths), 4)  # (1, heads, tokens, head_dim)
    beside = rows.side_by_side(line)
    assert beside.shape == (len(lengths), 2, max(lengths), 4)
    for row, part in enumerate(line.split(lengths, dim=2)):
        assert torch.equal(beside[row, :, : lengths[row]], part[0])
        assert torch.equal(line[0, :, rows.last[row]], part[0, :, -1])
    assert torch.equal(rows.in_line(beside.transpose(1, 2)), line.transpose(1, 2))


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
def test_rows_do_not_see_each_other(lengths: list[int]) -> None:
    rows = RaggedRows(lengths)
    line = torch.randn(3, 1, 2, sum(lengths), 4)  # query, key, value
    attend = torch.nn.functional.scaled_dot_product_attention
    together = rows.in_line(attend(*map(rows.side_by_side, line), is_causal=True).transpose(1, 2))
    alone = [attend(*part, is_causal=True).transpose(1, 2) for part in line.split(lengths, dim=3)]
    assert torch.allclose(together, torch.cat(alone, dim=1), atol=1e-6)


def test_rows_of_one_length_are_not_copied() -> None:
    rows, line = RaggedRows([3, 3]), torch.randn(1, 2, 6, 4)
    assert rows.side_by_side(line).data_ptr() == line.data_ptr()
