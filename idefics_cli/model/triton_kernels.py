"""Triton's kernels for the operators of `fused.py`; importing this module enters them for CUDA.

A program is one token (of `silu_mul`, a part of one). With TRITON_INTERPRET=1 they run on the CPU, to be tested.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps

import torch
import triton
import triton.language as tl
from torch import Tensor

from idefics_cli.model.fused import LIBRARY

DEVICE = "CPU" if os.environ.get("TRITON_INTERPRET") == "1" else "CUDA"
PIECE = 1024  # numbers of `silu_mul` per program


def enter(launch: Callable[..., object]) -> Callable[..., object]:
    """As the operator of its name, on the device of its first tensor."""

    @wraps(launch)
    def on_its_device(first: Tensor, *others: object) -> object:
        with torch.cuda.device_of(first):
            return launch(first, *others)

    LIBRARY.impl(launch.__name__, on_its_device, DEVICE)
    return launch


@triton.jit
def gated(update, alpha_ptr, channel, inside, GATES: tl.constexpr):
    """`update` as it is, or times tanh(alpha), of one number (1) or of each channel (2)."""
    if GATES == 0:
        return update
    alpha = tl.load(alpha_ptr + channel * (GATES - 1), mask=inside, other=0.0).to(tl.float32)
    return update * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * alpha)))


@triton.jit
def add_norm_kernel(
    hidden_ptr, update_ptr, alpha_ptr, weight_ptr, sum_ptr, normed_ptr, size, eps,
    GATES: tl.constexpr, NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK)
    inside = channel < size
    here = tl.program_id(0).to(tl.int64) * size + channel
    hidden = tl.load(hidden_ptr + here, mask=inside, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + here, mask=inside, other=0.0).to(tl.float32)
    total = (hidden + gated(update, alpha_ptr, channel, inside, GATES)).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + here, total, mask=inside)
    if NORMS:
        total = total.to(tl.float32)
        weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(total * total, 0) / size + eps)
        tl.store(normed_ptr + here, (total * scale * weight).to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, size, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    gate = tl.load(gate_ptr + token * gate_stride + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + token * up_stride + place, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * size + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def angles_kernel(position_ptr, inv_freq_ptr, cos_ptr, sin_ptr, scaling, DIM: tl.constexpr, BLOCK: tl.constexpr):
    token, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = d < DIM
    inv_freq = tl.load(inv_freq_ptr + d % (DIM // 2), mask=inside, other=0.0).to(tl.float32)
    turn = tl.load(position_ptr + token).to(tl.float32) * inv_freq
    sin = tl.sin(turn) * scaling
    tl.store(cos_ptr + token * DIM + d, (tl.cos(turn) * scaling).to(cos_ptr.dtype.element_ty), mask=inside)
    tl.store(sin_ptr + token * DIM + d, tl.where(d < DIM // 2, -sin, sin).to(sin_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    query_ptr, key_ptr, cos_ptr, sin_ptr, query_out_ptr, key_out_ptr, token_stride, head_stride, num_angles,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside, d = place < HEADS * DIM, place % DIM
    head = token * token_stride + place // DIM * head_stride
    angle = token % num_angles * DIM + d
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    partner = (d + DIM // 2) % DIM
    out = token * HEADS * DIM + place
    states = tl.load(query_ptr + head + d, mask=inside, other=0.0).to(tl.float32)
    partners = tl.load(query_ptr + head + partner, mask=inside, other=0.0).to(tl.float32)
    tl.store(query_out_ptr + out, (states * cos + partners * sin).to(query_out_ptr.dtype.element_ty), mask=inside)
    states = tl.load(key_ptr + head + d, mask=inside, other=0.0).to(tl.float32)
    partners = tl.load(key_ptr + head + partner, mask=inside, other=0.0).to(tl.float32)
    tl.store(key_out_ptr + out, (states * cos + partners * sin).to(key_out_ptr.dtype.element_ty), mask=inside)


@enter
def add_norm(
    hidden_states: Tensor, update: Tensor, alpha: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    hidden_states, update = hidden_states.contiguous(), update.contiguous()
    size = hidden_states.shape[-1]
    total, normed = torch.empty_like(hidden_states), torch.empty_like(hidden_states) if weight is not None else None
    gates = 0 if alpha is None else 1 if alpha.numel() == 1 else 2
    add_norm_kernel[(hidden_states.numel() // size,)](
        hidden_states, update, alpha, weight, total, normed, size, eps,
        GATES=gates, NORMS=weight is not None, BLOCK=triton.next_power_of_2(size), num_warps=8,
    )  # fmt: skip
    return total, normed


@enter
def gated_add(hidden_states: Tensor, update: Tensor, alpha: Tensor) -> Tensor:
    return add_norm(hidden_states, update, alpha, None, 0.0)[0]


@enter
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    size, out = gate.shape[-1], torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = gate.flatten(0, -2), up.flatten(0, -2)  # (tokens, size), one token's side by side
    silu_mul_kernel[(len(gate), triton.cdiv(size, PIECE))](
        gate, up, out, gate.stride(0), up.stride(0), size, BLOCK=PIECE, num_warps=4
    )
    return out


@enter
def rotate(query: Tensor, key: Tensor, cos: Tensor, signed_sin: Tensor) -> tuple[Tensor, Tensor]:
    query, key = query.transpose(1, 2), key.transpose(1, 2)  # (rows, tokens, heads, dim)
    rows, tokens, heads, dim = query.shape
    if query.stride() != key.stride() or query.stride(3) != 1 or query.stride(0) != tokens * query.stride(1):
        query, key = query.contiguous(), key.contiguous()
    rotated = [torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(2)]
    rotate_kernel[(rows * tokens,)](
        query, key, cos, signed_sin, *rotated, query.stride(1), query.stride(2), cos.numel() // dim,
        HEADS=heads, DIM=dim, BLOCK=triton.next_power_of_2(heads * dim), num_warps=8,
    )  # fmt: skip
    return rotated[0].transpose(1, 2), rotated[1].transpose(1, 2)


@enter
def angles(positions: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    (rows, tokens), dim = positions.shape, 2 * len(inv_freq)
    cos, sin = (torch.empty(rows, tokens, dim, dtype=dtype, device=positions.device) for _ in range(2))
    angles_kernel[(rows * tokens,)](
        positions.contiguous(), inv_freq, cos, sin, scaling, DIM=dim, BLOCK=triton.next_power_of_2(dim), num_warps=1
    )  # fmt: skip
    return cos, sin


def probe() -> None:
    """Raises where kernels cannot be compiled and run."""
    some = torch.ones(1, 16, device="cuda")
    silu_mul(some, some)
