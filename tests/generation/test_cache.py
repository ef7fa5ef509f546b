"""Attention over parts beside attention over the whole, the bounded cache, and the table of ancestors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_config

from idefics_cli.generation.cache import BoundedCache, RowStore, attend_part, grow_ancestors, merge_parts


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    queries=st.integers(1, 6),
    shared=st.integers(1, 70),
    own=st.integers(1, 40),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.1, 1.0, 12.0]),
)
def test_two_parts_make_the_whole(rows: int, queries: int, shared: int, own: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    query, own_key, own_value = random(rows, 4, queries, 8), random(rows, 4, own, 8), random(rows, 4, own, 8)
    key, value = random(1, 4, shared, 8), random(1, 4, shared, 8)
    hidden = torch.rand(rows, 1, queries, own, generator=generator) < 0.4
    hidden[..., 0] = False
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    first = attend_part(query, own_key, own_value, mask, 0.35)
    second = attend_part(query, key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), None, 0.35)
    whole = torch.nn.functional.scaled_dot_product_attention(
        query,
        torch.cat([own_key, key.expand(rows, -1, -1, -1)], dim=2),
        torch.cat([own_value, value.expand(rows, -1, -1, -1)], dim=2),
        torch.cat([mask, torch.zeros(rows, 1, queries, shared)], dim=3),
        scale=0.35,
    )
    # Rounding of a score, which grows with the square of the scale, is an error in its exponential.
    assert torch.allclose(merge_parts(first, second), whole, atol=1e-5 * max(1.0, scale) ** 2)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_fused_part_and_the_written_out_part_agree(is_causal: bool) -> None:
    """fp64 takes the written-out way on the CPU."""
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    output, log_sum = attend_part(query, key, value, None, 0.3, is_causal)
    slow_output, slow_log_sum = attend_part(query.double(), key.double(), value.double(), None, 0.3, is_causal)
    assert torch.allclose(output, slow_output.float(), atol=1e-5)
    assert torch.allclose(log_sum, slow_log_sum.float(), atol=1e-5)


def test_the_least_used_go_first() -> None:
    cache: BoundedCache[str] = BoundedCache(10)
    for key in "abc":
        cache.put(key, key, 4)
    assert cache.get("a") is None and cache.num_bytes == 8
    cache.get("b")
    cache.put("d", "d", 4)
    assert cache.get("c") is None and cache.get("b") == "b"
    cache.put("b", "other", 2)
    assert cache.get("b") == "other" and cache.num_bytes == 6
    cache.put("huge", "huge", 99)
    assert cache.keys() == ["huge"], "what is larger than all is held alone"


def test_beams_take_over_their_parents_paths() -> None:
    store = RowStore(tiny_config(), 1, 4, 3, 4, 5, torch.device("cpu"), torch.float32)
    paths = [[(0, j)] for j in range(3)]
    grow_ancestors(store, 1, torch.zeros(1, 3, dtype=torch.long), torch.tensor([0]))
    for step, parents in enumerate(([1, 1, 0], [2, 0, 2], [0, 1, 2]), start=1):
        grow_ancestors(store, 1, torch.tensor([parents]), torch.tensor([step]))
        paths = [[*paths[parent], (step, beam)] for beam, parent in enumerate(parents)]
    for beam, path in enumerate(paths):
        marked = {divmod(slot, 3) for slot in store.ancestors[0, beam].nonzero().flatten().tolist()}
        assert marked == set(path)
