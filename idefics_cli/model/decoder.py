"""The text side's building blocks: decoupled vocabularies, norms, rotary positions, attention and both kinds of layer.

A LLaMA decoder (Touvron et al. 2023, https://arxiv.org/abs/2302.13971) with Flamingo's gated cross-attention layers
(Alayrac et al. 2022, section 3.1.2) between its blocks. Layers project; what a query may see, and where keys
and values are rotated and kept, is up to the memory (`kv_interface.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from idefics_cli.model import fused
from idefics_cli.model.joined_linear import add_product
from idefics_cli.model.kv_interface import AttentionOutput, Memory, PositionEmbeddings
from idefics_cli.model.packed_linear import project, project_heads


class IdeficsDecoupledEmbedding(nn.Embedding):
    """An embedding in two parts: ids below `num_embeddings` in `weight`, the added ones in `additional_embedding`.

    `partially_freeze` freezes `weight` alone, so that the added tokens can still be learned.
    """

    def __init__(
        self,
        num_embeddings: int,
        num_additional_embeddings: int,
        embedding_dim: int,
        partially_freeze: bool = False,
        padding_idx: int | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, padding_idx=padding_idx)
        self.num_additional_embeddings = num_additional_embeddings
        if partially_freeze:
            self.weight.requires_grad_(False)
        if num_additional_embeddings > 0:
            self.additional_embedding = nn.Embedding(num_additional_embeddings, embedding_dim)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(rows, tokens) -> (rows, tokens, dim)."""
        if self.num_additional_embeddings == 0:
            return nn.functional.embedding(input_ids, self.weight)
        # Both tables are read everywhere and one answer kept: nothing here depends on the ids' values, so the host
        # never waits and the shapes stay fixed.
        additional = input_ids >= self.num_embeddings
        regular = nn.functional.embedding(input_ids.masked_fill(additional, 0), self.weight)
        added_ids = (input_ids - self.num_embeddings).clamp(min=0)
        return torch.where(additional.unsqueeze(-1), self.additional_embedding(added_ids), regular)


class IdeficsRMSNorm(nn.Module):
    """Root-mean-square norm with a weight for each channel."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(
        self, hidden_states: Tensor, update: Tensor | None = None, alpha: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm. With an `update`: the sum, through a tanh gate where there is one, and the norm of it."""
        if update is None:
            return fused.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return fused.add_norm(hidden_states, update, alpha, self.weight, self.variance_epsilon)


class IdeficsRotaryEmbedding(nn.Module):
    """Rotary angles (Su et al. 2021, https://arxiv.org/abs/2104.09864), computed once per forward for all layers."""

    def __init__(self, config: IdeficsConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        inverse_frequencies = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = inverse_frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @property
    def asks_positions(self) -> bool:
        """Whether the host waits for positions, on which the angles depend: that cannot be captured as a graph."""
        return "dynamic" in self.rope_type

    @staticmethod
    def compute_default_rope_parameters(config: IdeficsConfig, *_: object, **__: object) -> tuple[Tensor, float]:
        """theta**(-2i/head_dim) for i in [0, head_dim/2), not scaled; the name is the one transformers looks for."""
        head_dim = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> PositionEmbeddings:
        """Cosines and sines (rows, tokens, head_dim) in `hidden_states`' type, as `fused.rotate` takes them."""
        return fused.angles(position_ids, self.inv_freq, self.attention_scaling, hidden_states.dtype)


class IdeficsMLP(nn.Module):
    """down(act(gate(x)) * up(x)), without biases (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    joint_linears = ("gate_proj", "up_proj")

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.act_fn, self.is_silu = ACT2FN[hidden_act], hidden_act == "silu"

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """With what is to be added to it, which may be overwritten."""
        gate, up = project(hidden_states, self.gate_proj, self.up_proj)
        activated = fused.silu_mul(gate, up) if self.is_silu else self.act_fn(gate) * up
        return self.down_proj(activated) if residual is None else add_product(residual, activated, self.down_proj)


class IdeficsAttention(nn.Module):
    """Projections of one attention layer, of a text to itself or to images; only the latter knows qk-norms.

    `layer_idx` counts among layers of the same kind, `num_heads` the heads that are here: where a model is split, a
    process has its share of them.
    """

    def __init__(self, config: IdeficsConfig, layer_idx: int, is_cross_attention: bool = False):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        if self.head_dim * self.num_heads != config.hidden_size:
            raise ValueError(f"hidden_size {config.hidden_size} is not a multiple of {self.num_heads} attention heads")
        self.scaling = self.head_dim**-0.5
        self.dropout = config.dropout
        self.is_cross_attention = is_cross_attention
        self.is_causal = not is_cross_attention
        source_size = config.vision_config.embed_dim if is_cross_attention else config.hidden_size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(source_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(source_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.joint_linears = ("k_proj", "v_proj") if is_cross_attention else ("q_proj", "k_proj", "v_proj")
        self.qk_layer_norms = is_cross_attention and config.qk_layer_norms
        if self.qk_layer_norms:
            self.q_layer_norm = IdeficsRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_layer_norm = IdeficsRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        memory: Memory,
        position_embeddings: PositionEmbeddings | None = None,
        image_hidden_states: Tensor | None = None,
    ) -> AttentionOutput:
        """(rows, tokens, hidden) -> the same, and the weights (rows, heads, tokens, keys) where they are computed.

        A text attends to itself with `position_embeddings`, to images with `image_hidden_states`
        (rows, images * seq, dim), which may be None where the memory holds the images' keys and values already.
        """
        if self.is_cross_attention:
            query = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
            query = (self.q_layer_norm(query) if self.qk_layer_norms else query).transpose(1, 2)
            projected = (None, None) if image_hidden_states is None else self.project_image(image_hidden_states)
            output, weights = memory.attend_image(self, query, *projected)
        else:
            query, key, value = project_heads(hidden_states, self.head_dim, self.q_proj, self.k_proj, self.v_proj)
            output, weights = memory.attend(self, query, key, value, position_embeddings)
        return self.o_proj(output.flatten(-2)), weights

    def project_image(self, image_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """What cross-attention reads: (rows, images * seq, dim) -> key, value (rows, heads, images * seq, head_dim)."""
        key, value = project_heads(image_hidden_states, self.head_dim, self.k_proj, self.v_proj)
        return (self.k_layer_norm(key) if self.qk_layer_norms else key), value


def dropped(states: Tensor, layer: nn.Module) -> Tensor:
    return nn.functional.dropout(states, layer.dropout) if layer.training else states


class IdeficsDecoderLayer(GradientCheckpointingLayer):
    """One LLaMA block: (rows, tokens, hidden) -> the same."""

    def __init__(self, config: IdeficsConfig, layer_idx: int):
        super().__init__()
        self.self_attn = IdeficsAttention(config, layer_idx)
        self.mlp = IdeficsMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = IdeficsRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = IdeficsRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = config.dropout

    def forward(self, hidden_states: Tensor, memory: Memory, position_embeddings: PositionEmbeddings) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), memory, position_embeddings)
        attended = dropped(attended, self)
        hidden_states, normed = self.post_attention_layernorm(hidden_states, attended)
        if self.training or self.mlp._forward_hooks:  # hooks are for what the MLP gives: processes sum it up
            return hidden_states + dropped(self.mlp(normed), self)
        return self.mlp(normed, hidden_states)


def initial_alpha(config: IdeficsConfig) -> Tensor:
    """A gate before training: one float or one per channel, at zero (as in Flamingo), one, or random."""
    if config.alpha_type not in ("float", "vector"):
        raise ValueError(f"Unknown value for `alpha_type` ({config.alpha_type}): use 'float' or 'vector'")
    shape = (1, 1, config.hidden_size) if config.alpha_type == "vector" else (1,)
    if config.alpha_initializer == "zeros":
        return torch.zeros(shape)
    if config.alpha_initializer == "ones":
        return torch.ones(shape)
    if config.alpha_initializer in ("normal", "gaussian", "random"):
        return torch.randn(shape) * config.alphas_initializer_range
    raise ValueError(f"Unknown value for `alpha_initializer` ({config.alpha_initializer}): use zeros, ones or normal")


class IdeficsGatedCrossAttentionLayer(GradientCheckpointingLayer):
    """Text looks at images; both halves enter the residual through a tanh gate: (rows, tokens, hidden) -> the same.

    A token that sees no image passes the attention half unchanged, the MLP half like any other.
    """

    def __init__(self, config: IdeficsConfig, layer_idx: int):
        super().__init__()
        self.cross_attn = IdeficsAttention(config, layer_idx, is_cross_attention=True)
        self.mlp = IdeficsMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = IdeficsRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = IdeficsRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = config.dropout
        self.alpha_cross_attn = nn.Parameter(initial_alpha(config))
        self.alpha_dense = nn.Parameter(initial_alpha(config))

    def forward(self, hidden_states: Tensor, image_hidden_states: Tensor | None, memory: Memory) -> Tensor:
        attended, _ = self.cross_attn(
            self.input_layernorm(hidden_states), memory, image_hidden_states=image_hidden_states
        )
        attended = dropped(attended, self)
        hidden_states, normed = self.post_attention_layernorm(hidden_states, attended, self.alpha_cross_attn)
        return fused.gated_add(hidden_states, dropped(self.mlp(normed), self), self.alpha_dense)
