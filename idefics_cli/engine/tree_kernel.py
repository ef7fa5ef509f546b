"""Attention written for Triton: a decode step's in one launch for a layer, and that over one part of the keys, whose
output is not rounded yet (`tree_attention.py` has both in plain torch).

In a decode step a program is one row and one head, and nobody else reads or writes its slots. It rotates the beams'
queries and keys, stores the new keys and values, and reads each slot of the row's prompt and tree once for all beams
(an online softmax, Milakov & Gimelshein 2018). Lengths are read on the device and shapes are those of the storage, so
that a CUDA graph holds whatever slots are in use. With TRITON_INTERPRET=1 it all runs on the CPU, to be tested.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics_cli.model.triton_kernels import enter


@triton.jit
def attend_block(
    q, top, total, acc, key_ptr, value_ptr, keys, values, visible, d, scale, DIM: tl.constexpr, PRECISION: tl.constexpr
):
    """`keys` and `values` (slots,) are their places. Those that no query sees are not read: they may hold anything."""
    is_read = (tl.max(visible.to(tl.int32), 0) > 0)[:, None] & (d < DIM)[None, :]
    key = tl.load(key_ptr + keys[:, None] + d[None, :], mask=is_read, other=0.0)
    scores = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale  # (queries, slots)
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp(scores - new_top[:, None])
    fade = tl.exp(top - new_top)
    value = tl.load(value_ptr + values[:, None] + d[None, :], mask=is_read, other=0.0)
    acc = acc * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    return new_top, total * fade + tl.sum(weights, 1), acc


@triton.jit
def rotated(ptr, here, partner, inside, cos, sin, ROTATES: tl.constexpr):
    states = tl.load(ptr + here, mask=inside, other=0.0)
    if ROTATES:
        partners = tl.load(ptr + partner, mask=inside, other=0.0).to(tl.float32)
        states = (states.to(tl.float32) * cos + partners * sin).to(states.dtype)
    return states


@triton.jit
def tree_attention_kernel(
    query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, stored_ptr, newest_ptr, ancestors_ptr, widths_ptr, lengths_ptr,
    start_ptr, start_log_sum_ptr, out_ptr,
    token_stride, head_stride, value_token_stride, value_head_stride, part_stride, row_stride,
    stored_head_stride, start_token_stride, start_head_stride, log_sum_stride, prompt_slots, tree_slots, scale,
    HEADS: tl.constexpr, BEAMS: tl.constexpr, DIM: tl.constexpr, BEAM_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
    SLOT_BLOCK: tl.constexpr, ROTATES: tl.constexpr, HAS_START: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, beam, n = tl.arange(0, DIM_BLOCK), tl.arange(0, BEAM_BLOCK), tl.arange(0, SLOT_BLOCK)
    is_beam = beam < BEAMS
    inside = is_beam[:, None] & (d < DIM)[None, :]
    token = row * BEAMS + beam
    here = token[:, None] * token_stride + head * head_stride + d[None, :]
    partner = token[:, None] * token_stride + head * head_stride + ((d + DIM // 2) % DIM)[None, :]
    cos, sin = 1.0, 0.0
    if ROTATES:
        angle = token[:, None] * DIM + d[None, :]
        cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    q = rotated(query_ptr, here, partner, inside, cos, sin, ROTATES)
    new_key = rotated(key_ptr, here, partner, inside, cos, sin, ROTATES)
    value = token[:, None] * value_token_stride + head * value_head_stride + d[None, :]
    new_value = tl.load(value_ptr + value, mask=inside, other=0.0)

    keys = stored_ptr + row * row_stride + head * stored_head_stride
    values = keys + part_stride
    newest = tl.load(newest_ptr + row * BEAMS + beam, mask=is_beam, other=-1).to(tl.int32)
    place = (prompt_slots + newest)[:, None] * DIM + d[None, :]
    tl.store(keys + place, new_key, mask=inside)
    tl.store(values + place, new_value, mask=inside)

    # Each beam sees its own newest token, which is at hand; its slot is not read again.
    top = tl.sum(q.to(tl.float32) * new_key.to(tl.float32), 1) * scale
    total = tl.full((BEAM_BLOCK,), 1.0, tl.float32)
    acc = new_value.to(tl.float32)
    if HAS_START:
        start = token[:, None] * start_token_stride + head * start_head_stride + d[None, :]
        log_sum = tl.load(start_log_sum_ptr + head * log_sum_stride + token, mask=is_beam, other=0.0)
        new_top = tl.maximum(top, log_sum)
        share, fade = tl.exp(log_sum - new_top), tl.exp(top - new_top)
        before = tl.load(start_ptr + start, mask=inside, other=0.0).to(tl.float32)
        acc = acc * fade[:, None] + before * share[:, None]
        top, total = new_top, fade + share

    length = tl.load(lengths_ptr + row).to(tl.int32)
    first = prompt_slots - tl.load(widths_ptr + row).to(tl.int32)
    for at in range(0, length, SLOT_BLOCK):
        visible = (at + n < length)[None, :] & is_beam[:, None]
        slots = (first + at + n) * DIM
        top, total, acc = attend_block(
            q, top, total, acc, keys, values, slots, slots, visible, d, scale, DIM, PRECISION
        )  # fmt: skip
    for at in range(0, tree_slots, SLOT_BLOCK):
        slot = at + n
        is_known = is_beam[:, None] & (slot < tree_slots)[None, :]
        path = ancestors_ptr + (token * tree_slots)[:, None] + slot[None, :]
        visible = (tl.load(path, mask=is_known, other=0) != 0) & (slot[None, :] != newest[:, None])
        slots = (prompt_slots + slot) * DIM
        if tl.max(tl.max(visible.to(tl.int32), 1), 0) > 0:
            top, total, acc = attend_block(
                q, top, total, acc, keys, values, slots, slots, visible, d, scale, DIM, PRECISION
            )  # fmt: skip
    out = (token * HEADS + head)[:, None] * DIM + d[None, :]
    tl.store(out_ptr + out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def constants(query: Tensor, beams: int) -> dict[str, object]:
    """What the kernel is compiled for."""
    is_exact = query.dtype == torch.float32
    return {
        "HEADS": query.shape[1],
        "BEAMS": beams,
        "DIM": query.shape[3],
        "BEAM_BLOCK": max(16, triton.next_power_of_2(beams)),  # no product of tensor cores is smaller
        "DIM_BLOCK": max(16, triton.next_power_of_2(query.shape[3])),
        "SLOT_BLOCK": 32,
        "PRECISION": "ieee" if is_exact else "tf32",
    }


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    signed_sin: Tensor | None,
    stored: Tensor,
    newest: Tensor,
    ancestors: Tensor,
    widths: Tensor,
    lengths: Tensor,
    start: Tensor | None,
    start_log_sum: Tensor | None,
    prompt_slots: int,
    scale: float,
) -> Tensor:
    (_, heads, _, dim), (rows, beams) = query.shape, newest.shape
    assert query.stride() == key.stride() and query.stride(3) == value.stride(3) == 1, (query.stride(), value.stride())
    assert ancestors.is_contiguous() and newest.is_contiguous() and stored.stride()[-2:] == (dim, 1)
    out = torch.empty(1, rows * beams, heads, dim, dtype=query.dtype, device=query.device)
    before = (0, 0, 0) if start is None else (start.stride(2), start.stride(1), start_log_sum.stride(1))
    strides = (*query.stride()[2:0:-1], *value.stride()[2:0:-1], *stored.stride()[:3], *before)
    tree_attention_kernel[(rows, heads)](
        query, key, value, cos, signed_sin, stored, newest, ancestors.view(torch.uint8), widths, lengths,
        start, start_log_sum, out, *strides, prompt_slots, ancestors.shape[2], scale,
        **constants(query, beams), ROTATES=cos is not None, HAS_START=start is not None, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def part_attention_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, out_ptr, log_sum_ptr,
    query_row_stride, query_head_stride, query_stride, key_row_stride, key_head_stride, key_stride,
    value_row_stride, value_head_stride, value_stride, mask_row_stride, mask_query_stride,
    heads, queries, keys, scale,
    DIM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, SLOT_BLOCK: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, head, row = tl.program_id(0) * QUERY_BLOCK, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    d, n = tl.arange(0, DIM_BLOCK), tl.arange(0, SLOT_BLOCK)
    query = first + tl.arange(0, QUERY_BLOCK)
    is_query = query < queries
    inside = is_query[:, None] & (d < DIM)[None, :]
    here = query_ptr + row * query_row_stride + head * query_head_stride
    q = tl.load(here + query.to(tl.int64)[:, None] * query_stride + d[None, :], mask=inside, other=0.0)
    top = tl.full((QUERY_BLOCK,), -1.0e30, tl.float32)  # finite: a block of keys may be hidden
    total = tl.zeros((QUERY_BLOCK,), tl.float32)
    acc = tl.zeros((QUERY_BLOCK, DIM_BLOCK), tl.float32)
    key_ptr += row * key_row_stride + head * key_head_stride
    value_ptr += row * value_row_stride + head * value_head_stride
    end = tl.minimum(keys, first + QUERY_BLOCK) if IS_CAUSAL else keys
    for at in range(0, end, SLOT_BLOCK):
        slot = at + n
        visible = is_query[:, None] & (slot < keys)[None, :]
        if IS_CAUSAL:
            visible = visible & (slot[None, :] <= query[:, None])
        if HAS_MASK:
            said = mask_ptr + row * mask_row_stride + query[:, None] * mask_query_stride + slot[None, :]
            visible = visible & (tl.load(said, mask=visible, other=0.0).to(tl.float32) == 0.0)
        top, total, acc = attend_block(
            q, top, total, acc, key_ptr, value_ptr, slot * key_stride, slot * value_stride, visible, d, scale,
            DIM, PRECISION,
        )  # fmt: skip
    place = (row * heads + head) * queries + query
    tl.store(log_sum_ptr + place, top + tl.log(total), mask=is_query)
    tl.store(out_ptr + place[:, None] * DIM + d[None, :], acc / total[:, None], mask=inside)


def part_constants(query: Tensor) -> dict[str, object]:
    """What the kernel is compiled for."""
    queries, dim = query.shape[2:]
    return {
        "DIM": dim,
        "QUERY_BLOCK": 16 if queries <= 16 else 32,  # more spill registers
        "DIM_BLOCK": max(16, triton.next_power_of_2(dim)),
        "SLOT_BLOCK": 32,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }


def part_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    rows, heads, queries, _ = query.shape
    assert query.stride(3) == key.stride(3) == value.stride(3) == 1, (query.stride(), key.stride(), value.stride())
    assert not is_causal or queries == key.shape[2], (query.shape, key.shape)
    assert mask is None or (mask.stride(3), mask.shape[1]) == (1, 1), (mask.shape, mask.stride())
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    log_sum = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    of_mask = (0, 0) if mask is None else (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2))
    constants = part_constants(query)
    part_attention_kernel[(triton.cdiv(queries, constants["QUERY_BLOCK"]), heads, rows)](
        query, key, value, mask, out, log_sum,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *of_mask, heads, queries, key.shape[2], scaling,
        **constants, IS_CAUSAL=is_causal, HAS_MASK=mask is not None, num_warps=constants["QUERY_BLOCK"] // 4,
    )  # fmt: skip
    return out, log_sum


enter(tree_attention)
enter(part_attention)
