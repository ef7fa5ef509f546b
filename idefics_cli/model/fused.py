"""What layers compute between their products, each in one launch on CUDA: norms, gates, activations, rotation.

Each is plain torch, and an operator of its own (`torch.ops.idefics`), for which Triton's kernels are entered where
Triton is installed and works. Where a gradient may be needed it stays plain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

LIBRARY = torch.library.Library("idefics", "DEF")
log = logging.getLogger(__name__)


@cache
def has_triton() -> bool:
    """Whether Triton is here and can compile, which also takes a C compiler."""
    if find_spec("triton") is None:
        return False
    try:
        import_module("idefics_cli.model.triton_kernels").probe()  # it enters its kernels here
    except Exception as error:  # of the compiler, the driver or the library: many kinds
        log.warning("Triton does not work here, plain kernels are used (%s: %s)", type(error).__name__, error)
        return False
    return True


def one_launch(schema: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """The function as an operator, and in its place a choice between operator and function."""

    def wrapped(plain: Callable[..., object]) -> Callable[..., object]:
        LIBRARY.define(plain.__name__ + schema)
        LIBRARY.impl(plain.__name__, plain, "CompositeExplicitAutograd")
        operator = getattr(torch.ops.idefics, plain.__name__)

        @wraps(plain)
        def chosen(first: Tensor, *others: object) -> object:
            is_fused = first.device.type == "cuda" and not torch.is_grad_enabled() and has_triton()
            return (operator if is_fused else plain)(first, *others)

        return chosen

    return wrapped


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Statistics in fp32, rounded to the weight's type (Zhang & Sennrich 2019)."""
    if hidden_states.dtype == weight.dtype:
        return nn.functional.rms_norm(hidden_states, weight.shape, weight, eps)
    variance = hidden_states.float().square().mean(-1, keepdim=True)
    return weight * (hidden_states * torch.rsqrt(variance + eps)).to(weight.dtype)


@one_launch("(Tensor hidden_states, Tensor update, Tensor alpha) -> Tensor")
def gated_add(hidden_states: Tensor, update: Tensor, alpha: Tensor) -> Tensor:
    """`update` enters through a tanh gate of one number or one per channel."""
    return hidden_states + alpha.tanh() * update


@one_launch("(Tensor hidden_states, Tensor update, Tensor? alpha, Tensor weight, float eps) -> (Tensor, Tensor)")
def add_norm(
    hidden_states: Tensor, update: Tensor, alpha: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum, through a gate where there is one, and its `rms_norm`."""
    gated = update if alpha is None else alpha.tanh() * update
    hidden_states = hidden_states + gated
    return hidden_states, rms_norm(hidden_states, weight, eps)


@one_launch("(Tensor gate, Tensor up) -> Tensor")
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


@one_launch("(Tensor positions, Tensor inv_freq, float scaling, ScalarType dtype) -> (Tensor, Tensor)")
def angles(positions: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of (rows, tokens) positions, (rows, tokens, head_dim), as `rotate` takes them: the first half
    of the sines is negated."""
    turns = positions[:, :, None].float() * torch.cat([-inv_freq, inv_freq]).float()
    return (turns.cos() * scaling).to(dtype), (turns.sin() * scaling).to(dtype)


@one_launch("(Tensor query, Tensor key, Tensor cos, Tensor signed_sin) -> (Tensor, Tensor)")
def rotate(query: Tensor, key: Tensor, cos: Tensor, signed_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each pair (i, i + head_dim/2) of (rows, heads, tokens, head_dim) by its angle."""
    return rotate_one(query, cos, signed_sin), rotate_one(key, cos, signed_sin)


def rotate_one(states: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    partners = states.roll(states.shape[-1] // 2, dims=-1)
    return torch.addcmul(states * cos[:, None], partners, signed_sin[:, None])
