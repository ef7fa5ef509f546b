"""What `GenerationMixin.generate` needs between its steps, for a model whose inputs are texts *and* images.

Functions over the model's keyword arguments: `modeling.py` binds them to the hooks that `generate` calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IMAGE_INPUTS = ("pixel_values", "image_encoder_embeddings", "perceiver_embeddings")


def image_inputs(model_kwargs: dict[str, Any], use_resampler: bool) -> dict[str, Tensor | None]:
    """The one image input of the next forward: what the last forward encoded, else what the caller gave."""
    encoded = model_kwargs.get("image_hidden_states")
    if encoded is not None:
        return {"perceiver_embeddings" if use_resampler else "image_encoder_embeddings": encoded}
    return {name: model_kwargs[name] for name in IMAGE_INPUTS if model_kwargs.get(name) is not None}


def image_mask_for_tokens(image_attention_mask: Tensor, num_tokens: int) -> Tensor:
    """The last `num_tokens` rows of the mask (rows, tokens, images); tokens beyond it see what its last token sees."""
    missing = max(0, num_tokens - image_attention_mask.shape[1])
    last = image_attention_mask[:, -1:].expand(-1, missing, -1)
    return torch.cat([image_attention_mask, last], dim=1)[:, -num_tokens:]


def extend_image_mask(image_attention_mask: Tensor, use_cache: bool) -> Tensor:
    """The mask for the token just generated (with a cache), or for the sequence grown by it (without)."""
    last = image_attention_mask[:, -1:]
    return last if use_cache else torch.cat([image_attention_mask, last], dim=1)
