"""Drawing tokens by their probability: which may be drawn, and by which numbers. Tensors only.

Every prompt has random numbers of its own, made from the seed and from its content: what is drawn for it does not
depend on the rows beside it, on its place in a run, or on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from idefics_cli.engine.options import DecodingOptions


def random_draws(content: Sequence[int], options: DecodingOptions, per_step: int) -> Tensor:
    """(max_new_tokens, per_step) numbers from 0 to 1 for the prompt of this content."""
    digest = hashlib.blake2b(repr((options.seed, *content)).encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.rand(options.max_new_tokens, per_step, generator=generator)


def warp(scores: Tensor, options: DecodingOptions, keep: int) -> Tensor:
    """Scores by temperature, −inf for tokens outside `top_k` and `top_p`; the best `keep` of them stay.

    In the order and with the rules of transformers' logits warpers: of equals at the end of `top_k` all stay.
    """
    scores = scores / options.temperature
    if options.top_k:
        best = scores.topk(min(max(options.top_k, keep), scores.shape[-1]), dim=-1).values
        scores = scores.masked_fill(scores < best[..., -1:], -torch.inf)
    if options.top_p < 1.0:
        ascending, order = scores.sort(dim=-1)
        unlikely = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - options.top_p
        unlikely[..., -keep:] = False
        scores = scores.masked_fill(unlikely.scatter(-1, order, unlikely), -torch.inf)
    return scores


def sample(scores: Tensor, draws: Tensor) -> Tensor:
    """An index for each of `draws` (..., draws), none twice, with probabilities softmax(scores) (..., indices)."""
    exact = torch.float32 if scores.device.type == "mps" else torch.float64
    weights = scores.softmax(dim=-1, dtype=exact)
    found = []
    for draw in draws.to(exact).unbind(dim=-1):
        sums = weights.cumsum(dim=-1)
        place = torch.searchsorted(sums, (draw * sums[..., -1])[..., None], right=True)
        found.append(place.clamp(max=scores.shape[-1] - 1))
        weights = weights.scatter(-1, found[-1], 0.0)
    return torch.cat(found, dim=-1)
