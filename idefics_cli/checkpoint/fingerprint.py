"""Which models see an image alike."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict

from idefics_cli.checkpoint.files import Checkpoint, adapter_settings, tensors_of
from idefics_cli.checkpoint.find import downloaded
from idefics_cli.checkpoint.load import load_config
from idefics_cli.checkpoint.request import ModelRequest

# Files of 2023 hold a buffer too, `position_ids`, which no class reads.
VISION_TENSOR = re.compile(r"(?:base_model\.model\.)?model\.(vision_model|perceiver_resampler)\..*(?<!position_ids)")
VISION_FIELDS = ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
RESAMPLER_FIELDS = ("resampler_n_heads", "resampler_head_dim", "qk_layer_norms_perceiver")


def known_vision_fingerprint(request: ModelRequest) -> str | None:
    """`vision_fingerprint` of a model, or None for one not downloaded yet."""
    checkpoint = downloaded(request)
    return None if checkpoint is None else vision_fingerprint(checkpoint)


def vision_fingerprint(checkpoint: Checkpoint) -> str:
    """Equal for checkpoints that make the same latents of an image, whatever their name, shards and language side.

    A digest of the stored tensors of vision tower and resampler, of the settings that say how they are used, and of how
    pixels are made. The dtype of a run is not part of it: it changes rounding only.
    """
    from idefics_cli.images.preprocess import ImageProcessor

    config = load_config(checkpoint)
    settings = {name: getattr(config.vision_config, name) for name in VISION_FIELDS}
    settings["use_resampler"] = config.use_resampler
    if config.use_resampler:
        settings |= {name: getattr(config.perceiver_config, name) for name in RESAMPLER_FIELDS}
    settings |= asdict(ImageProcessor.from_pretrained(checkpoint.folder))
    tensors = dict(_vision_digests(checkpoint))
    if checkpoint.adapter is not None and (changes := dict(_vision_digests(checkpoint.adapter))):
        tensors |= {**changes, "adapter": adapter_settings(checkpoint.adapter)}
    return hashlib.sha256(json.dumps([settings, tensors], sort_keys=True).encode()).hexdigest()


def _vision_digests(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Names and digests of the tensors of vision tower and resampler."""
    import torch

    for file in checkpoint.weight_files:
        for name, tensor in tensors_of(file, checkpoint.is_pickled, VISION_TENSOR):
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
            yield name, digest.hexdigest()
