"""A decode step's attention as it is meant: the reference for its kernel, and its stand-in on the software device."""

from __future__ import annotations

import torch
from torch import Tensor

from idefics_cli.model.fused import rotate_one


def plain_tree_attention(
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
    """Softmax over the prefix as one key with its log-sum-exp for a score, the row's prompt, and the beam's path."""
    rows, beams = newest.shape
    if cos is not None:
        query, key = rotate_one(query, cos, signed_sin), rotate_one(key, cos, signed_sin)
    query, key, value = (each[0].unflatten(1, (rows, beams)).transpose(0, 1) for each in (query, key, value))
    place = (prompt_slots + newest)[:, None, :, None].expand(key.shape)  # (rows, heads, beams, head_dim)
    for part, states in enumerate((key, value)):
        stored[part, :rows].scatter_(2, place, states)

    slot = torch.arange(stored.shape[3], device=newest.device) - prompt_slots  # of the tree, below 0 of the prompt
    offset = slot + widths[:, None]  # (rows, slots): of the prompt's tokens
    in_prompt = (offset >= 0) & (offset < lengths[:, None]) & (slot < 0)
    in_tree = torch.nn.functional.pad(ancestors, (prompt_slots, 0))  # (rows, beams, slots)
    visible = (in_prompt[:, None] | in_tree)[:, None]  # (rows, 1, beams, slots)
    keys, values = stored[:, :rows].float().masked_fill(~visible.any(dim=2)[..., None], 0.0)
    scores = (query.float() @ keys.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    log_sum = scores.logsumexp(dim=-1)  # (rows, heads, beams)
    output = (scores - log_sum[..., None]).exp() @ values
    if start is not None:
        before = start_log_sum[0].unflatten(1, (rows, beams)).transpose(0, 1)
        share = torch.sigmoid(before - log_sum)[..., None]
        output = output * (1 - share) + start[0].unflatten(1, (rows, beams)).transpose(0, 1).float() * share
    return output.to(query.dtype).permute(0, 2, 1, 3).reshape(1, rows * beams, *output.shape[1::2])
