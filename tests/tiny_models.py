"""Small IDEFICS models of every shape that published checkpoints have, with random weights, and inputs for them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from tiny_tokenizers import BASE_TOKENS, INSTRUCT_TOKENS, llama_tokenizer
from torch import Tensor
from transformers import IdeficsConfig, PreTrainedModel

from idefics_cli.model.modeling import IdeficsForVisionText2Text

IMAGE_SIZE, PATCH_SIZE, VOCAB_SIZE = 28, 14, 64


@dataclass(frozen=True)
class Shape:
    """What distinguishes one IDEFICS checkpoint's structure from another's."""

    alpha_type: str = "float"
    qk_layer_norms: bool = True
    use_resampler: bool = True
    additional_vocab_size: int = 2
    cross_layer_interval: int = 2

    def __str__(self) -> str:
        qk = "qk" if self.qk_layer_norms else "noqk"
        resampler = "resampler" if self.use_resampler else "patches"
        return f"{self.alpha_type}-{qk}-{resampler}-add{self.additional_vocab_size}-every{self.cross_layer_interval}"


GRID = tuple(
    Shape(*values)
    for values in itertools.product(("vector", "float"), (True, False), (True, False), (0, 2, 3), (1, 2, 4))
)


def tiny_config(shape: Shape = Shape(), **changes: object) -> IdeficsConfig:
    settings = {
        "vocab_size": VOCAB_SIZE,
        "additional_vocab_size": shape.additional_vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "alpha_type": shape.alpha_type,
        "alpha_initializer": "ones",
        "cross_layer_interval": shape.cross_layer_interval,
        "qk_layer_norms": shape.qk_layer_norms,
        "freeze_text_layers": False,
        "freeze_vision_layers": False,
        "use_resampler": shape.use_resampler,
        "vision_config": {
            "embed_dim": 24,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "perceiver_config": {
            "use_resampler": shape.use_resampler,
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": shape.qk_layer_norms,
        },
    }
    return IdeficsConfig(**{**settings, **changes})


def randomize(model: PreTrainedModel, seed: int = 0, spread: float = 0.25) -> PreTrainedModel:
    """Weights large enough that every part of the model has a say in its output; gates differ from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * spread
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + noise if is_norm or "alpha" in name else noise)
    return model.eval()


def random_inputs(config: IdeficsConfig, seed: int = 0, num_images: int = 4, num_tokens: int = 14) -> dict[str, Tensor]:
    """Five rows with 0 to `num_images` images, left-padded unevenly, with tokens before the first image."""
    generator = torch.Generator().manual_seed(seed)
    rows = 5
    input_ids = torch.randint(3, VOCAB_SIZE + config.additional_vocab_size, (rows, num_tokens), generator=generator)
    padding = torch.tensor([0, 3, 1, 5, 0])
    attention_mask = (torch.arange(num_tokens) >= padding[:, None]).long()
    image_attention_mask = torch.zeros(rows, num_tokens, num_images)
    for row in range(rows):
        starts = torch.randperm(num_tokens - 8, generator=generator)[: min(row, num_images)].sort().values + 7
        for image, start in enumerate(starts.tolist()):
            image_attention_mask[row, start:] = 0
            image_attention_mask[row, start:, image] = 1
    return {
        "input_ids": input_ids.masked_fill(attention_mask == 0, 0),
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(rows, num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "image_attention_mask": image_attention_mask,
    }


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value."""
    return float(((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).detach())


def save_checkpoint(
    folder: Path,
    instruct: bool = False,
    seed: int = 0,
    sizes: Mapping[str, int] = MappingProxyType({}),
    **saving: object,
) -> Path:
    """A whole checkpoint folder with random weights and LLaMA's kind of tokenizer, in the published form."""
    tokenizer = llama_tokenizer(legacy=False, added=INSTRUCT_TOKENS if instruct else BASE_TOKENS)
    added = 3 if instruct else 2
    config = tiny_config(Shape(additional_vocab_size=added), vocab_size=len(tokenizer) - added, **sizes)
    randomize(IdeficsForVisionText2Text(config), seed).save_pretrained(folder, **saving)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_size": IMAGE_SIZE}), encoding="utf-8")
    return folder
