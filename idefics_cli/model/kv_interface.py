"""The seam between the network and generation: what a token sees, and where keys and values live.

An attention layer projects its query, key and value and asks a *memory* for the rest. The plain memory
here serves training, `generate()` and the tests: whole sequences, transformers' `Cache`, a causal mask, and images
projected on the spot. Another memory may keep keys and values wherever it likes; the forward pass stays the same one.

This module knows no text, no beams, no files, and no layer but by its `layer_idx` and `scaling`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from idefics_cli.model.fused import rotate

AttentionOutput = tuple[Tensor, Tensor | None]
Moved = TypeVar("Moved")
PositionEmbeddings = tuple[Tensor, Tensor]


class Memory(Protocol):
    """What a layer asks for: queries are (rows, heads, tokens, head_dim), outputs (rows, tokens, heads, head_dim).

    The second element of each result holds the attention weights where the implementation computes them, else None.
    """

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, position_embeddings: PositionEmbeddings
    ) -> AttentionOutput:
        """Rotate query and key, store the new tokens' key and value for this layer and attend to all that each query
        may see. `position_embeddings` are (rows, tokens, head_dim) each, as `fused.rotate` takes them.
        """
        ...

    def attend_image(
        self, layer: nn.Module, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> AttentionOutput:
        """Attend to the images each query may see; exactly zero for a query that sees none.

        `key` and `value` (rows, heads, images * seq, head_dim) are those of all images; None: the memory has its own.
        """
        ...


def on_device(memory: Moved, device: torch.device | str) -> Moved:
    """A dataclass with those of its fields on `device` that can be moved."""
    values = {each.name: getattr(memory, each.name) for each in fields(memory)}
    return replace(memory, **{name: value.to(device) for name, value in values.items() if hasattr(value, "to")})


def device_of(layer: nn.Module, otherwise: torch.device) -> torch.device:
    """Where a layer of a model that accelerate has spread over devices computes; its weights may be elsewhere."""
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return otherwise if device is None else torch.device(device)


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate moves inputs, or weights, from device to device while it works."""
    return hasattr(model, "_hf_hook")


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> AttentionOutput:
    """Attention written out, softmax in fp32 (Vaswani et al. 2017, eq. 1); `attention_mask` is added to the scores."""
    scores = query @ key.transpose(-1, -2) * scaling  # (rows, heads, queries, keys)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights  # (rows, queries, heads, head_dim)


def attention_function(name: str) -> Callable[..., AttentionOutput]:
    """The attention implementation transformers registers under `name` ("sdpa" by default), or the eager one."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)


def image_seq_len(config: IdeficsConfig) -> int:
    """How many vectors cross-attention reads of one image."""
    if config.use_resampler:
        return config.perceiver_config.resampler_n_latents
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1


def image_attention_mask(
    input_ids: Tensor, num_images: int, image_token_id: int, eos_token_id: int, sees_first: bool = False
) -> Tensor:
    """Which image each token sees: (rows, tokens) ids -> (rows, tokens, num_images) int64, at most one 1 per token.

    That is the last image at or before the token. None before the first image, and none after an end token (which
    itself still sees one) until the next image. `sees_first`: the first of `num_images` comes before these tokens.
    """
    is_image = input_ids == image_token_id
    last_end = _last_position(input_ids == eos_token_id)
    ended_before = nn.functional.pad(last_end, (1, 0), value=-1)[:, :-1]
    hidden = ended_before > _last_position(is_image)  # (rows, tokens)
    index = is_image.cumsum(dim=1) - (0 if sees_first else 1)
    sees = index[..., None] == torch.arange(num_images, device=input_ids.device)
    return (sees & ~hidden[..., None]).long()


def _last_position(found: Tensor) -> Tensor:
    """For each token the position of the last True at or before it, or -1."""
    positions = torch.arange(found.shape[1], device=found.device).expand_as(found)
    return positions.masked_fill(~found, -1).cummax(dim=1).values if found.shape[1] else positions


def image_visibility(image_attention_mask: Tensor, seq_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """From (rows, tokens, images) to an additive mask (rows, 1, tokens, images * seq_len) and the open gate.

    The gate, (rows, tokens) and boolean, is open where a token sees at least one image.
    """
    visible = image_attention_mask.bool()
    additive = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    additive = additive.masked_fill(~visible, torch.finfo(dtype).min)
    additive = additive.repeat_interleave(seq_len, dim=-1).unsqueeze(1)  # (rows, 1, tokens, images * seq)
    return additive, visible.any(dim=-1)


@dataclass(frozen=True)
class PlainMemory:
    """Whole sequences: every layer sees all keys so far through `causal_mask`, and the images that it projects itself.

    `causal_mask` is what transformers' `create_causal_mask` returns (None where plain causality is enough),
    `image_mask` (rows, 1, tokens, images * seq) is additive, `image_gate` (rows, tokens) boolean.
    """

    attention: str
    causal_mask: Tensor | None
    image_mask: Tensor
    image_gate: Tensor
    past_key_values: Cache | None = None

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, position_embeddings: PositionEmbeddings
    ) -> AttentionOutput:
        query, key = rotate(query, key, *position_embeddings)
        if self.past_key_values is not None:
            key, value = self.past_key_values.update(key, value, layer.layer_idx)
        return self._attention(layer, query, key, value, self.causal_mask)

    def attend_image(
        self, layer: nn.Module, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> AttentionOutput:
        assert key is not None and value is not None, "the plain memory holds no image's keys and values"
        output, weights = self._attention(layer, query, key, value, self.image_mask)
        return output.masked_fill(~self.image_gate[:, :, None, None], 0.0), weights

    def _attention(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> AttentionOutput:
        attend = attention_function(self.attention)
        dropout = layer.dropout if layer.training else 0.0
        return attend(layer, query, key, value, mask, dropout=dropout, scaling=layer.scaling)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PlainMemory:
        """The same memory with its masks on `device`: a model spread over devices moves it from layer to layer."""
        return on_device(self, device)
