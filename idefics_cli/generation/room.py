"""How much memory rows and images take, how much there is, and how many rows that makes.

Bytes from the network's shapes alone: no prompts, and nothing is allocated.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from idefics_cli.model.modeling import IdeficsForVisionText2Text

SLOTS_ASSUMED = 512
MOST_ROWS = (16, 64)  # elsewhere, on CUDA: more make no row faster


def rows_that_fit(model: IdeficsForVisionText2Text) -> int:
    """How many rows to decode at a time: what half of the free memory holds, at a length that prompts seldom exceed."""
    config = model.config
    slot_bytes = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize  # a key and a value
    row_bytes = SLOTS_ASSUMED * slot_bytes + image_key_bytes(model)
    return max(1, min(free_bytes(model.device) // 2 // row_bytes, MOST_ROWS[model.device.type == "cuda"]))


def free_bytes(device: torch.device) -> int:
    """What can still be allocated; where nobody tells, as much as is ever asked for."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return sys.maxsize
    facts = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(facts["MemAvailable"].split()[0]) * 1024


def image_seq_len(model: IdeficsForVisionText2Text) -> int:
    """How many vectors cross-attention reads of one image."""
    config = model.config
    if config.use_resampler:
        return config.perceiver_config.resampler_n_latents
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1


def image_key_bytes(model: IdeficsForVisionText2Text) -> int:
    """What gated layers read of one image: a key and a value for each of its vectors."""
    vectors = len(model.model.gated_cross_attn_layers) * image_seq_len(model)
    return 2 * vectors * model.config.hidden_size * model.dtype.itemsize
