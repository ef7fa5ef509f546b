"""What `GenerationMixin.generate` needs between its steps, for a model whose inputs are texts *and* images.

Functions over the model's keyword arguments: `modeling.py` binds them to the hooks that `generate` calls. Rows are
expanded by indexing; no image is encoded twice because a row has several beams.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

IMAGE_INPUTS = ("pixel_values", "image_encoder_embeddings", "perceiver_embeddings")


def expand_inputs_for_generation(
    input_ids: Tensor | None, expand_size: int, model_kwargs: dict[str, Any]
) -> tuple[Tensor | None, dict[str, Any]]:
    """Each row `expand_size` times, side by side: what beam search calls its batch.

    Every tensor with a leading row dimension follows; anything else (a flag, None) stays as it is.
    """
    if expand_size == 1:
        return input_ids, model_kwargs
    tensors = {name: value for name, value in model_kwargs.items() if isinstance(value, Tensor)}
    first = input_ids if input_ids is not None else next(iter(tensors.values()))
    rows = torch.arange(first.shape[0], device=first.device).repeat_interleave(expand_size)
    expanded = {
        name: value.index_select(0, rows.to(value.device)) for name, value in tensors.items() if value.dim() > 0
    }
    input_ids = input_ids.index_select(0, rows) if input_ids is not None else None
    return input_ids, {**model_kwargs, **expanded}


def image_inputs(model_kwargs: dict[str, Any], use_resampler: bool) -> dict[str, Tensor | None]:
    """The one image input of the next forward: what the last forward encoded, else what the caller gave."""
    encoded = model_kwargs.get("image_hidden_states")
    if encoded is not None:
        return {"perceiver_embeddings" if use_resampler else "image_encoder_embeddings": encoded}
    return {name: model_kwargs[name] for name in IMAGE_INPUTS if model_kwargs.get(name) is not None}


def image_mask_for_tokens(image_attention_mask: Tensor, num_tokens: int) -> Tensor:
    """The last `num_tokens` rows of the mask (rows, tokens, images); tokens beyond it see what its last token sees."""
    missing = num_tokens - image_attention_mask.shape[1]
    if missing > 0:
        last = image_attention_mask[:, -1:].expand(-1, missing, -1)
        image_attention_mask = torch.cat([image_attention_mask, last], dim=1)
    return image_attention_mask[:, -num_tokens:]


def extend_image_mask(image_attention_mask: Tensor, use_cache: bool) -> Tensor:
    """The mask for the token just generated (with a cache), or for the sequence grown by it (without)."""
    last = image_attention_mask[:, -1:]
    return last if use_cache else torch.cat([image_attention_mask, last], dim=1)


def reorder_cache(past_key_values: Cache, beam_idx: Tensor) -> Cache:
    """Give each beam the keys and values of the beam it continues; `beam_idx` (rows * beams,) holds the parents."""
    past_key_values.reorder_cache(beam_idx)
    return past_key_values
