"""Tensor parallelism (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053): each process has a part of every layer.

Of attention, to texts and to images, it has some of the heads, of an MLP some of the inner features; what they add up
to is summed over the processes, once for each. transformers reads each process's part of the weights, and quantizes it;
here the layers become plain ones again, only smaller, so that packing and kernels need not know. Vision tower,
resampler, embedding and head are whole everywhere.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from idefics_cli.errors import DeviceError
from idefics_cli.model.decoder import IdeficsAttention, IdeficsMLP
from idefics_cli.model.memory_errors import naming_memory_errors
from idefics_cli.model.modeling import IdeficsForVisionText2Text
from idefics_cli.ranks import Ranks

COLUMNS, ROWS = "colwise", "rowwise"  # whether the rows of a weight, a layer's outputs, are dealt out, or its inputs
ATTENTION = {"q_proj": COLUMNS, "k_proj": COLUMNS, "v_proj": COLUMNS, "o_proj": ROWS}
MLP = {"gate_proj": COLUMNS, "up_proj": COLUMNS, "down_proj": ROWS}
BLOCKS = {
    "layers.*.self_attn": ATTENTION,
    "layers.*.mlp": MLP,
    "gated_cross_attn_layers.*.cross_attn": ATTENTION,
    "gated_cross_attn_layers.*.mlp": MLP,
}
PLAN = {f"model.{block}.{name}": style for block, styles in BLOCKS.items() for name, style in styles.items()}


def require_divisible(config: Any, size: int) -> None:
    """Raises DeviceError where heads or MLP features cannot be dealt out evenly."""
    counts = {"attention heads": config.num_attention_heads, "MLP features": config.intermediate_size}
    for what, count in counts.items():
        if count % size:
            fitting = [str(number) for number in range(2, count + 1) if not any(n % number for n in counts.values())]
            raise DeviceError(
                f"the model's {count} {what} cannot be split over {size} processes: start "
                f"{' or '.join(fitting[:4]) or 'one'}"
            )


def style_of(name: str) -> str | None:
    """How the linear layer of this name is split, None for one that is whole."""
    return PLAN.get(re.sub(r"\.\d+\.", ".*.", name))


def join_ranks(model: IdeficsForVisionText2Text, ranks: Ranks) -> None:
    """The network with this process's part of the weights, as transformers has loaded it, works with the others."""
    for module in model.modules():
        vars(module).pop("forward", None)  # transformers' own, around the class's
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                local = parameter.to_local().clone(memory_format=torch.contiguous_format)  # not a view of the whole
                setattr(module, name, nn.Parameter(local, requires_grad=False))
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    blocks = [module for module in model.modules() if isinstance(module, (IdeficsAttention, IdeficsMLP))]
    for block in blocks:
        block.register_forward_hook(partial(_summed, ranks))
        if isinstance(block, IdeficsAttention):
            block.num_heads //= ranks.size
    model.ranks, decode = ranks, model.model.decode

    def decode_together(hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        with ranks.passing(hidden_states, num_sums=len(blocks)), naming_memory_errors():
            return decode(hidden_states, *arguments, **keywords)

    model.model.decode = decode_together


def _summed(ranks: Ranks, module: nn.Module, _: object, output: Any) -> Any:
    if isinstance(output, Tensor):
        return ranks.sum(output)
    states, weights = output
    return ranks.sum(states), weights
