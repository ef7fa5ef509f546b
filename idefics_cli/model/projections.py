"""Several linear layers over the same inputs, in one product where their weights lie in one matrix.

A module whose layers read the same inputs names them in `joint_linears`, and asks for their outputs here. How weights
lie is `packed.py`'s affair. This module knows no layers in particular.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def project(inputs: Tensor, *linears: nn.Module) -> Sequence[Tensor]:
    """Each layer's output: (..., in) -> (..., out), which may be a view of a joint output."""
    joint = getattr(linears[0], "joint", None)
    if joint is None or any(getattr(linear, "joint", None) is not joint for linear in linears):
        return [linear(inputs) for linear in linears]
    return joint(inputs).split([linear.joint_features for linear in linears], dim=-1)
