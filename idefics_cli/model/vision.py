"""The vision tower: pixels to one vector per patch, plus one for the whole image.

A CLIP vision transformer (Radford et al. 2021, https://arxiv.org/abs/2103.00020) whose last hidden state is used
before `post_layernorm`. Module names, the misspelt `pre_layrnorm` among them, are the checkpoints'.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN, GELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.idefics.configuration_idefics import IdeficsVisionConfig

from idefics_cli.model.kv_interface import attention_function
from idefics_cli.model.packed_linear import project_heads


class IdeficsVisionEmbeddings(nn.Module):
    """Patches, a class vector in front, and positions: (images, 3, height, width) -> (images, 1 + patches, dim)."""

    def __init__(self, config: IdeficsVisionConfig):
        super().__init__()
        self.image_size = config.image_size
        self.patch_size = config.patch_size
        self.grid_size = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=self.patch_size, stride=self.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(self.grid_size**2 + 1, config.hidden_size)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        height, width = pixel_values.shape[-2:]
        if not interpolate_pos_encoding and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values are {height}x{width} but the model was trained on {self.image_size}x{self.image_size}: "
                "resize them, or pass interpolate_pos_encoding=True"
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)  # (images, patches, dim)
        class_embedding = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat([class_embedding, patches], dim=1) + self.positions(height, width)

    def positions(self, height: int, width: int) -> Tensor:
        """(1, 1 + patches, dim): the learned grid, stretched bicubically to an image of another size.

        The scale is (size + 0.1) / grid, as DINO does it to be safe from rounding
        (https://github.com/facebookresearch/dino/issues/8): the published weights' users rely on the same values.
        """
        numbers = torch.arange(self.position_embedding.num_embeddings, device=self.class_embedding.device)
        positions = self.position_embedding(numbers).unsqueeze(0)  # asked, for its weights may be elsewhere
        grid_height, grid_width = height // self.patch_size, width // self.patch_size
        if (height, width) == (self.image_size, self.image_size):
            return positions
        grid = positions[:, 1:].unflatten(1, (self.grid_size, self.grid_size)).permute(0, 3, 1, 2)
        # bfloat16 has no bicubic kernel everywhere; fp32 is exact for what it holds
        scale = ((grid_height + 0.1) / self.grid_size, (grid_width + 0.1) / self.grid_size)
        stretched = nn.functional.interpolate(grid.float(), scale_factor=scale, mode="bicubic", align_corners=False)
        assert stretched.shape[-2:] == (grid_height, grid_width), (stretched.shape, grid_height, grid_width)
        stretched = stretched.to(positions.dtype).flatten(2).transpose(1, 2)  # (1, patches, dim)
        return torch.cat([positions[:, :1], stretched], dim=1)


class IdeficsVisionAttention(nn.Module):
    """Full self-attention among one image's vectors; all projections carry a bias."""

    joint_linears = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: IdeficsVisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        if self.head_dim * self.num_heads != config.hidden_size:
            raise ValueError(f"embed_dim {config.hidden_size} is not a multiple of {self.num_heads} attention heads")
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        self.is_causal = False
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        # (images, heads, patches, head_dim)
        query, key, value = project_heads(hidden_states, self.head_dim, self.q_proj, self.k_proj, self.v_proj)
        attend = attention_function(self.config._attn_implementation)
        dropout = self.dropout if self.training else 0.0
        output, _ = attend(self, query, key, value, None, dropout=dropout, scaling=self.scaling, is_causal=False)
        return self.out_proj(output.flatten(-2))  # (images, patches, dim)


class IdeficsVisionMLP(nn.Module):
    def __init__(self, config: IdeficsVisionConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.fc1(hidden_states)
        if type(self.activation_fn) is GELUActivation and not torch.is_grad_enabled():
            # In place: fresh memory for so large a tensor costs as much as the activation itself.
            return self.fc2(torch.ops.aten.gelu_(hidden_states))
        return self.fc2(self.activation_fn(hidden_states))


class IdeficsVisionEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: IdeficsVisionConfig):
        super().__init__()
        self.self_attn = IdeficsVisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = IdeficsVisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class IdeficsVisionTransformer(nn.Module):
    """(images, 3, height, width) -> last hidden state (images, 1 + patches, dim) and class vector (images, dim)."""

    sizes_recur = True  # every image has as many vectors

    def __init__(self, config: IdeficsVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = IdeficsVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        layers = nn.ModuleList(IdeficsVisionEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> BaseModelOutputWithPooling:
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding))
        for layer in self.encoder["layers"]:
            hidden_states = layer(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.post_layernorm(hidden_states[:, 0])
        )
