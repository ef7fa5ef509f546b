"""The resampler: any number of patch vectors of one image to a fixed, small number of latents.

The Perceiver Resampler of Flamingo (Alayrac et al. 2022, https://arxiv.org/abs/2204.14198, section 3.1.1 and
appendix A.1.1): learned latents attend to the patches *and* to themselves, `resampler_depth` times.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import IdeficsConfig

from idefics_cli.model.packed_linear import project_heads


class IdeficsPerceiverAttention(nn.Module):
    """Latents (images, latents, dim) read a context (images, patches, dim); no projection has a bias."""

    joint_linears = ("k_proj", "v_proj")

    def __init__(self, config: IdeficsConfig):
        super().__init__()
        perceiver, embed_dim = config.perceiver_config, config.vision_config.embed_dim
        self.head_dim = perceiver.resampler_head_dim
        self.qk_layer_norms = perceiver.qk_layer_norms_perceiver
        inner_dim = perceiver.resampler_n_heads * self.head_dim
        self.context_layer_norm = nn.LayerNorm(embed_dim)
        self.latents_layer_norm = nn.LayerNorm(embed_dim)
        if self.qk_layer_norms:
            self.q_layer_norm = nn.LayerNorm(self.head_dim)
            self.k_layer_norm = nn.LayerNorm(self.head_dim)
        self.q_proj = nn.Linear(embed_dim, inner_dim, bias=False)
        self.k_proj = nn.Linear(embed_dim, inner_dim, bias=False)
        self.v_proj = nn.Linear(embed_dim, inner_dim, bias=False)
        self.output_proj = nn.Linear(inner_dim, embed_dim, bias=False)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        latents = self.latents_layer_norm(latents)
        source = torch.cat([self.context_layer_norm(context), latents], dim=1)  # (images, patches + latents, dim)
        (query,) = project_heads(latents, self.head_dim, self.q_proj)  # (images, heads, n, head_dim), as all below
        key, value = project_heads(source, self.head_dim, self.k_proj, self.v_proj)
        if self.qk_layer_norms:
            query, key = self.q_layer_norm(query), self.k_layer_norm(key)
        output = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.output_proj(output.transpose(1, 2).flatten(-2))  # (images, latents, dim)


class IdeficsPerceiverMLP(nn.Module):
    """Normalise, widen, ReLU, narrow; without biases."""

    def __init__(self, embed_dim: int, intermediate_size: int):
        super().__init__()
        self.ln = nn.LayerNorm(embed_dim)
        self.fc = nn.Linear(embed_dim, intermediate_size, bias=False)
        self.act = nn.ReLU()
        self.c_proj = nn.Linear(intermediate_size, embed_dim, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.c_proj(self.act(self.fc(self.ln(hidden_states))))


class IdeficsPerceiverResampler(nn.Module):
    """(images, patches, dim) -> (images, latents, dim)."""

    sizes_recur = True  # every image has as many patches

    def __init__(self, config: IdeficsConfig):
        super().__init__()
        perceiver, embed_dim = config.perceiver_config, config.vision_config.embed_dim
        self.latents = nn.Parameter(torch.randn(perceiver.resampler_n_latents, embed_dim))
        self.blocks = nn.ModuleList(
            nn.ModuleList([IdeficsPerceiverAttention(config), IdeficsPerceiverMLP(embed_dim, 4 * embed_dim)])
            for _ in range(perceiver.resampler_depth)
        )
        self.layer_norm = nn.LayerNorm(embed_dim)

    def forward(self, context: Tensor) -> Tensor:
        latents = self.latents.expand(context.shape[0], -1, -1)
        for attention, mlp in self.blocks:
            latents = latents + attention(context, latents)
            latents = latents + mlp(latents)
        return self.layer_norm(latents)
