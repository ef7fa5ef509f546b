"""Linear layers and what comes right before or behind them, with as little memory written as the case allows.

A module whose linear layers read the same inputs names them in `joint_linears`, and asks for their outputs here: where
their weights lie in one matrix, that is one product. How weights lie is `packed.py`'s affair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation


def project(inputs: Tensor, *linears: nn.Module) -> Sequence[Tensor]:
    """Each layer's output: (..., in) -> (..., out), which may be a view of a joint output."""
    joint = getattr(linears[0], "joint", None)
    if joint is None or any(getattr(linear, "joint", None) is not joint for linear in linears):
        return [linear(inputs) for linear in linears]
    return joint(inputs).split([linear.joint_features for linear in linears], dim=-1)


def line_length(linear: nn.Module, num_tokens: int) -> int:
    """How many tokens such layers take without copying what they read: as many, or a few more."""
    joint = getattr(linear, "joint", None)
    return num_tokens if joint is None else joint.rows_taken(num_tokens)


def activated(inputs: Tensor, linear: nn.Module, activation: nn.Module) -> Tensor:
    """The layer's output, activated: (..., in) -> (..., out)."""
    output = linear(inputs)
    if type(activation) is GELUActivation and not torch.is_grad_enabled():
        # In place: for images, fresh memory for so large a tensor costs as much as the activation itself.
        return torch.ops.aten.gelu_(output)
    return activation(output)
