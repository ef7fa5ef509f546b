"""What follows when memory ends: fewer at a time, and more again when that is long ago."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from idefics_cli.engine.memory_budget import PATIENCE, AdaptiveBatchSize
from idefics_cli.model.memory_errors import naming_memory_errors


@pytest.mark.parametrize("text", ["MPS backend out of memory (MPS allocated: 9 GB)", None])
def test_memorys_end_has_one_name(text: str | None) -> None:
    with pytest.raises(torch.OutOfMemoryError), naming_memory_errors():
        if text is None:
            torch.empty(1 << 62, dtype=torch.uint8)
        raise RuntimeError(text)


def test_other_errors_keep_theirs() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught, naming_memory_errors():
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert type(caught.value) is RuntimeError
    with pytest.raises(torch.OutOfMemoryError, match="CUDA"), naming_memory_errors():
        raise torch.OutOfMemoryError("CUDA out of memory")


@given(st.integers(1, 64), st.lists(st.none() | st.integers(1, 64), max_size=60))
def test_no_more_than_wanted_and_never_none(wanted: int, happened: list[int | None]) -> None:
    limit = AdaptiveBatchSize(wanted)
    for count in happened:
        before = limit.now
        if count is None:
            limit.shrink(before)
            assert limit.now == max(1, before // 2)
        else:
            limit.record_success(min(count, before))
            assert limit.now in (before, min(wanted, 2 * before))
        assert 1 <= limit.now <= wanted


def test_more_are_tried_again_each_time_half_as_often() -> None:
    """Where 4 fit and 8 do not, for ever."""
    limit, tried, num_ended = AdaptiveBatchSize(8), [], 0
    limit.shrink(8)
    while num_ended < 5000:
        if limit.now == 8:
            tried.append(num_ended)
            limit.shrink(8)
        limit.record_success(4)
        num_ended += 4
    waits = [later - sooner for sooner, later in zip([0, *tried], tried, strict=False)]
    assert waits[0] == PATIENCE * 8 and len(waits) == 5
    assert all(later == 2 * sooner for sooner, later in pairwise(waits))
