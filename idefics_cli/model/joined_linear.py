"""Linear layers that read the same inputs as one product: their weights are views of one matrix.

For devices on which a product costs a launch. Each layer keeps its parameters under their names, to be saved, loaded
or moved. Where a weight no longer lies in the matrix, or needs a gradient, the layers are computed one by one again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ALONE = ("cpu", "meta")  # devices on which layers are computed in a way of their own


class JoinedMatrix:
    """The weights of some layers: (..., in) -> (..., all out)."""

    def __init__(self, linears: Sequence[nn.Linear]):
        sizes = [linear.out_features for linear in linears]
        self.weight = torch.cat([linear.weight.detach() for linear in linears])
        self.bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
        weights, biases = self.weight.split(sizes), [None] * len(sizes) if self.bias is None else self.bias.split(sizes)
        self.views = [(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        for linear, (weight, bias) in zip(linears, self.views, strict=True):
            linear.weight = nn.Parameter(weight, linear.weight.requires_grad)
            linear.bias = None if bias is None else nn.Parameter(bias, linear.bias.requires_grad)
            linear.joint, linear.joint_features = self, linear.out_features

    def serves(self, linears: Sequence[nn.Module]) -> bool:
        """Whether all of these layers' weights are still here, and are not to be trained."""
        if any(getattr(linear, "joint", None) is not self for linear in linears):
            return False
        pairs = zip(linears, self.views, strict=True)
        return all(is_same(linear.weight, weight) and is_same(linear.bias, bias) for linear, (weight, bias) in pairs)

    def __call__(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight, self.bias)


def is_same(parameter: nn.Parameter | None, view: Tensor | None) -> bool:
    if parameter is None or view is None:
        return parameter is view
    return parameter.data_ptr() == view.data_ptr() and not parameter.requires_grad


def join_linears(model: nn.Module) -> None:
    """Join what modules name in `joint_linears`, one module after the other: only one of them is in memory twice.

    Plain layers alone, on one device that is not the CPU: others are computed in a way of their own.
    """
    for module in model.modules():
        linears = [getattr(module, name) for name in getattr(module, "joint_linears", ())]
        devices = {linear.weight.device for linear in linears if is_plain(linear)}
        if linears and all(map(is_plain, linears)) and len(devices) == 1:
            JoinedMatrix(linears)


def is_plain(linear: nn.Module) -> bool:
    """Nothing but a product, on a device where its launch counts."""
    is_hooked = linear._forward_hooks or linear._forward_pre_hooks or hasattr(linear, "_hf_hook")
    if type(linear) is not nn.Linear or is_hooked or is_traceable_wrapper_subclass(linear.weight):  # quantized ones are
        return False
    return linear.weight.device.type not in ALONE


def add_product(residual: Tensor, inputs: Tensor, linear: nn.Module) -> Tensor:
    """`residual` + linear(inputs): one launch, which writes over `residual`, where there is no gradient."""
    if torch.is_grad_enabled() or not is_plain(linear) or linear.bias is not None:
        return residual + linear(inputs)
    residual.flatten(0, -2).addmm_(inputs.flatten(0, -2), linear.weight.t())
    return residual
