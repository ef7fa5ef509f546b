"""Rows in one line and side by side, and attention over them beside each row alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.engine.varlen import PackedRows

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
SPARE = st.integers(0, 3)  # tokens after the rows'


@settings(max_examples=60, deadline=None)
@given(LENGTHS, SPARE)
def test_a_row_is_the_same_pack_and_pad(lengths: list[int], spare: int) -> None:
    rows = PackedRows(lengths, packed_length=sum(lengths) + spare)
    line = torch.randn(1, 2, sum(lengths) + spare, 4)  # (1, heads, line, head_dim)
    beside = rows.pad(line)
    assert beside.shape == (len(lengths), 2, max(lengths), 4)
    last = rows.last(line.transpose(1, 2))  # (rows, heads, head_dim)
    *parts, _ = line.split([*lengths, spare], dim=2)
    for row, part in enumerate(parts):
        assert torch.equal(beside[row, :, : lengths[row]], part[0])
        assert torch.equal(last[row], part[0, :, -1])
    again = rows.pack(beside.transpose(1, 2))
    assert again.shape == (1, sum(lengths) + spare, 2, 4)
    assert torch.equal(again[:, : sum(lengths)], torch.cat(parts, dim=2).transpose(1, 2))


@settings(max_examples=60, deadline=None)
@given(LENGTHS, SPARE)
def test_rows_do_not_see_each_other(lengths: list[int], spare: int) -> None:
    rows = PackedRows(lengths, packed_length=sum(lengths) + spare)
    line = torch.randn(3, 1, 2, sum(lengths) + spare, 4)  # query, key, value
    attend = torch.nn.functional.scaled_dot_product_attention
    together = rows.pack(attend(*map(rows.pad, line), is_causal=True).transpose(1, 2))
    *parts, _ = line.split([*lengths, spare], dim=3)
    alone = [attend(*part, is_causal=True).transpose(1, 2) for part in parts]
    assert torch.allclose(together[:, : sum(lengths)], torch.cat(alone, dim=1), atol=1e-6)


def test_rows_of_one_length_are_not_copied() -> None:
    rows, line = PackedRows([3, 3]), torch.randn(1, 2, 6, 4)
    assert rows.pad(line).data_ptr() == line.data_ptr()
