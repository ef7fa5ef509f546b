"""Triton's kernels, interpreted on the CPU, beside plain torch. A program of its own: TRITON_INTERPRET=1 counts when
Triton is imported.

    TRITON_INTERPRET=1 python tests/engine/interpreted_kernels.py
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from plain_attention import plain_tree_attention  # noqa: E402

from idefics_cli.engine import tree_kernel  # noqa: E402
from idefics_cli.engine.tree_attention import attend_part, merge_parts  # noqa: E402
from idefics_cli.model import fused, triton_kernels  # noqa: E402

PROMPT_SLOTS, TREE_SLOTS, ROWS, HEADS = 8, 40, 2, 2


def case(beams: int, dim: int, rotates: bool, has_start: bool) -> list[Tensor | int | float | None]:
    """The operator's arguments, NaN in each slot that nobody sees. Rows are of different lengths, one has no prompt."""
    tokens, slots = ROWS * beams, PROMPT_SLOTS + TREE_SLOTS
    joint = torch.randn(1, tokens, 3, HEADS, dim)  # queries, keys and values of one product
    query, key, value = (each.transpose(1, 2) for each in joint.unbind(2))
    turns = torch.randn(1, tokens, dim)
    angles = (turns.cos(), turns.sin()) if rotates else (None, None)
    stored = torch.full((2, ROWS + 1, HEADS, slots, dim), torch.nan)
    widths, lengths = torch.tensor([7, 5]), torch.tensor([4, 0])
    ancestors = torch.rand(ROWS, beams, TREE_SLOTS) < 0.3
    newest = torch.stack([torch.randperm(TREE_SLOTS)[:beams] for _ in range(ROWS)])
    for row in range(ROWS):
        ancestors[row, :, newest[row]] = torch.eye(beams, dtype=torch.bool)
        first = PROMPT_SLOTS - widths[row]
        stored[:, row, :, first : first + lengths[row]] = torch.randn(2, HEADS, int(lengths[row]), dim)
        held = PROMPT_SLOTS + ancestors[row].any(dim=0).nonzero().squeeze(1)
        stored[:, row, :, held] = torch.randn(2, HEADS, len(held), dim)
    start = (torch.randn(1, tokens, HEADS, dim).transpose(1, 2), torch.randn(1, HEADS, tokens)) if has_start else ()
    tables = (newest, ancestors, widths, lengths)
    return [query, key, value, *angles, stored, *tables, *(start or (None, None)), PROMPT_SLOTS, dim**-0.5]


def compare(got: Tensor, expected: Tensor, about: object) -> None:
    error = (got - expected).abs().max().item()
    assert error <= 1e-5, f"{about}: {error}"  # and not NaN


def check_tree_attention() -> None:
    for beams, dim in [*product(range(1, 17), [64]), *product((1, 3, 5, 16), [96, 128, 8])]:
        rotates, has_start = bool(beams % 2), bool(beams // 2 % 2)
        one = case(beams, dim, rotates, has_start)
        other = [each.clone() if isinstance(each, Tensor) else each for each in one]
        about = (beams, dim, rotates, has_start)
        compare(tree_kernel.tree_attention(*one), plain_tree_attention(*other), about)
        assert one[5].equal(other[5]) or (one[5] - other[5]).nan_to_num().abs().max() < 1e-5, f"stored: {about}"
        assert one[5].isnan().equal(other[5].isnan()), f"stored elsewhere: {about}"


def check_parts() -> None:
    """Queries, keys and values as views of one product; a prefix is one row of keys for all queries."""
    for queries, keys, dim in [(1, 5, 64), (3, 70, 128), (75, 33, 64), (130, 40, 96), (20, 20, 8)]:
        rows = 1 if keys % 5 else 2
        query = torch.randn(rows, queries, 3, HEADS, dim)[:, :, 1].transpose(1, 2)
        key, value = torch.randn(rows, keys, 2, HEADS, dim).permute(2, 0, 3, 1, 4)
        hidden = torch.rand(rows, 1, queries, keys + 3)[..., :keys] < 0.6
        hidden[..., keys // 2] = False
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
        mask = torch.nn.functional.pad(mask, (0, 3))[..., :keys]
        for part in ((mask, False), (None, False), (None, True)) if queries == keys else ((mask, False), (None, False)):
            got = tree_kernel.part_attention(query, key, value, part[0], dim**-0.5, part[1])
            expected = attend_part(query, key, value, part[0], dim**-0.5, part[1])
            for mine, plain in zip(got, expected, strict=True):
                compare(mine, plain, (queries, keys, dim, part[1]))


def check_rounding() -> None:
    """Two parts together are as exact as the fused kernel over the whole. In fp16: Triton interprets no bf16."""
    for seed, (queries, own, shared) in product(range(3), [(3, 40, 92), (25, 25, 92), (5, 40, 300)]):
        torch.manual_seed(seed)
        query, key, value = (torch.randn(1, HEADS, count, 64).half() for count in (queries, own + shared, own + shared))
        exact = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
        fused = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        parts = [
            tree_kernel.part_attention(query, key[:, :, part], value[:, :, part], None, 1 / 8, False)
            for part in (slice(own), slice(own, None))
        ]
        merged = merge_parts(*parts).to(query.dtype)
        error, fused_error = ((found - exact).norm().item() for found in (merged, fused))
        print(error / fused_error)
        assert error <= 1.2 * fused_error, (seed, queries, own, shared, error / fused_error)


def check_layers() -> None:
    hidden, update, weight = torch.randn(1, 5, 96), torch.randn(1, 5, 96), torch.randn(96)
    for alpha in (None, torch.randn(1), torch.randn(1, 1, 96)):
        arguments = (hidden, update, alpha, weight, 1e-6)
        got, expected = triton_kernels.add_norm(*arguments), fused.add_norm(*arguments)
        compare(torch.stack(got), torch.stack(expected), "add_norm")
        if alpha is not None:
            compare(triton_kernels.gated_add(hidden, update, alpha), expected[0], "gated_add")
    gate, up = torch.randn(1, 5, 2 * 1100).split(1100, dim=-1)
    compare(triton_kernels.silu_mul(gate, up), fused.silu_mul(gate, up), "silu_mul")
    positions, inv_freq = torch.tensor([[0, 7, 300, 2047]]), torch.rand(48)
    got, expected = (each.angles(positions, inv_freq, 1.5, torch.float32) for each in (triton_kernels, fused))
    compare(torch.stack(got) / 100, torch.stack(expected) / 100, "angles")  # of turns that are exact to 1e-4
    for rows in (1, 2):  # whose angles are the same
        query, key, _ = torch.randn(rows, 4, 3, 3, 96).transpose(1, 3).unbind(2)
        arguments = (query, key, *expected)
        compare(torch.stack(triton_kernels.rotate(*arguments)), torch.stack(fused.rotate(*arguments)), "rotate")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    check_tree_attention()
    check_parts()
    check_rounding()
    check_layers()
