"""How much memory rows and images take, how much there is, how many rows that makes, and what follows when it ends.

Bytes from the network's shapes alone: no prompts, and nothing is allocated.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from idefics_cli.model.kv_interface import image_seq_len
from idefics_cli.model.modeling import IdeficsForVisionText2Text

VISION_BATCH = 16  # images; more at a time make no product faster
SLOTS_ASSUMED = 512
MOST_ROWS = (16, 64)  # elsewhere, on CUDA: more make no row faster
PATIENCE = 16  # times as many as are wanted at a time end well before more are tried again


@dataclass
class Limit:
    """How many are worked on at a time: `wanted`, fewer where memory has ended, and more again when that is long ago.

    Memory may have ended for one large prompt, or for another process's sake. Each time that more do not fit after all,
    they are tried again half as often.
    """

    wanted: int
    now: int = field(init=False)

    def __post_init__(self) -> None:
        self.now = self.wanted
        self._ended_well, self._patience, self._is_trial = 0, PATIENCE * self.wanted, False

    def halve(self, tried: int) -> None:
        """`tried` at a time have been too many."""
        self.now = max(1, min(self.now, tried) // 2)
        self._patience *= 2 if self._is_trial else 1
        self._ended_well, self._is_trial = 0, False

    def forget(self) -> None:
        """Not even one has fitted, alone: it says nothing about the others."""
        self.now, self._ended_well, self._is_trial = self.wanted, 0, False

    def end_well(self, count: int) -> None:
        """So many more have been worked on."""
        self._ended_well += count
        if self.now < self.wanted and self._ended_well >= self._patience:
            self.now = min(self.wanted, 2 * self.now)
            self._ended_well, self._is_trial = 0, True


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


def image_key_bytes(model: IdeficsForVisionText2Text) -> int:
    """What gated layers read of one image: a key and a value for each of its vectors."""
    vectors = len(model.model.gated_cross_attn_layers) * image_seq_len(model.config)
    return 2 * vectors * model.config.hidden_size * model.dtype.itemsize
