"""A decode step's attention of one layer in one launch, written for Triton (`tree_attention.py` has it in plain torch).

A program is one row and one head, and nobody else reads or writes its slots. It rotates the beams' queries and keys,
stores the new keys and values, and reads each slot of the row's prompt and tree once for all beams (an online softmax,
Milakov & Gimelshein 2018). Lengths are read on the device and shapes are those of the storage, so that a CUDA graph
holds whatever slots are in use. With TRITON_INTERPRET=1 it runs on the CPU, to be tested.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics_cli.model.triton_kernels import enter


@triton.jit
def attend_block(
    q, top, total, acc, key_ptr, value_ptr, slots, visible, d, scale, DIM: tl.constexpr, PRECISION: tl.constexpr
):
    """Slots that no beam sees are not read: they may hold anything."""
    places = slots[:, None] * DIM + d[None, :]
    is_read = (tl.max(visible.to(tl.int32), 0) > 0)[:, None] & (d < DIM)[None, :]
    key = tl.load(key_ptr + places, mask=is_read, other=0.0)
    scores = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale  # (beams, slots)
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp(scores - new_top[:, None])
    fade = tl.exp(top - new_top)
    value = tl.load(value_ptr + places, mask=is_read, other=0.0)
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
        top, total, acc = attend_block(
            q, top, total, acc, keys, values, first + at + n, visible, d, scale, DIM, PRECISION
        )  # fmt: skip
    for at in range(0, tree_slots, SLOT_BLOCK):
        slot = at + n
        is_known = is_beam[:, None] & (slot < tree_slots)[None, :]
        path = ancestors_ptr + (token * tree_slots)[:, None] + slot[None, :]
        visible = (tl.load(path, mask=is_known, other=0) != 0) & (slot[None, :] != newest[:, None])
        if tl.max(tl.max(visible.to(tl.int32), 1), 0) > 0:
            top, total, acc = attend_block(
                q, top, total, acc, keys, values, prompt_slots + slot, visible, d, scale, DIM, PRECISION
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


enter(tree_attention)
