"""Attention over parts beside attention over the whole, the bounded cache, and the table of ancestors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_config

from idefics_cli.engine.kv_cache import TABLES, BoundedCache, KVStore
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.engine.scheduler import compaction_order
from idefics_cli.engine.tree_attention import attend_part, merge_parts
from idefics_cli.model.modeling import IdeficsForVisionText2Text

MODEL = IdeficsForVisionText2Text(tiny_config())


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "own", "shared"), [(3, 40, 92), (25, 25, 92), (5, 60, 400), (25, 25, 760)])
def test_parts_are_rounded_once(dtype: torch.dtype, queries: int, own: int, shared: int) -> None:
    """In half precision: as exact as the fused kernel over the whole, whatever the seed."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        query, key, value = (
            torch.randn(2, 4, count, 64, generator=generator).to(dtype) for count in (queries, *[own + shared] * 2)
        )
        exact = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
        fused = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        parts = [
            attend_part(query, key[:, :, part], value[:, :, part], None, 64**-0.5)
            for part in (slice(own), slice(own, None))
        ]
        merged = merge_parts(*parts).to(dtype)
        error, fused_error = ((found - exact).norm().item() for found in (merged, fused))
        assert error <= 1.2 * fused_error, (seed, error / fused_error)


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


def tree(beams: int, tokens: int) -> KVStore:
    options = DecodingOptions(num_beams=beams, max_new_tokens=tokens)
    store = KVStore(MODEL, options)
    store.grow(1, 4, beams * tokens)
    return store


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 8))
def test_beams_take_over_their_parents_paths(data: st.DataObject, beams: int, tokens: int) -> None:
    """Slots of dead paths are given out again, the first ones first, and no slot holds two tokens that still count."""
    store, held = tree(beams, tokens), {}
    paths: list[list[tuple[int, int]]] = [[] for _ in range(beams)]
    for step in range(tokens):
        parents = data.draw(st.lists(st.integers(0, beams - 1), min_size=beams, max_size=beams))
        store.advance(slice(0, 1), torch.tensor([parents]), torch.tensor([False]))
        alive = {token for parent in parents for token in paths[parent]}
        free = [slot for slot in range(beams * tokens) if held.get(slot) not in alive]
        assert store.newest[0].tolist() == free[:beams]
        held |= {slot: (step, beam) for beam, slot in enumerate(free[:beams])}
        paths = [[*paths[parent], (step, beam)] for beam, parent in enumerate(parents)]
        marked = [store.ancestors[0, beam].nonzero().flatten().tolist() for beam in range(beams)]
        assert [sorted(held[slot] for slot in slots) for slots in marked] == [sorted(path) for path in paths]
        assert store.in_use.tolist() == [1 + max(slot for slots in marked for slot in slots)]


def test_a_single_path_needs_few_slots() -> None:
    store = tree(3, 50)
    for _ in range(50):
        store.advance(slice(0, 1), torch.zeros(1, 3, dtype=torch.long), torch.tensor([False]))
    assert store.in_use.item() <= 50 + 2 * 3
    store.advance(slice(0, 1), torch.zeros(1, 3, dtype=torch.long), torch.tensor([True]))
    assert store.in_use.item() == -1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_rows_that_stay_are_compacted(done: list[bool]) -> None:
    """Each tensor's rows are those that were picked, and rows that need not move are not written to."""
    store = tree(2, 3)
    store.grow(len(done), 4, 6)
    tensors = {**{f"layer {index}": layer[0] for index, layer in enumerate(store.key_values)}}
    tensors |= {"images": store.image_key_values[0][0], **{name: getattr(store, name) for name in TABLES}}
    for tensor in tensors.values():
        tensor.copy_(torch.randint(0, 2 if tensor.dtype == torch.bool else 1000, tensor.shape))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    store.widths = list(range(len(done)))
    sources = compaction_order(done)
    store.compact(sources)
    assert store.widths == sources
    assert sorted(sources) == [row for row, is_done in enumerate(done) if not is_done]
    for name, tensor in tensors.items():
        assert torch.equal(tensor[: len(sources)], before[name][sources]), name
        assert torch.equal(tensor[len(sources) :], before[name][len(sources) :]), name
