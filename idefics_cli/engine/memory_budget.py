"""How much memory rows and images take, how many rows fit, and what follows where memory ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from idefics_cli.model.kv_interface import image_seq_len
from idefics_cli.model.memory_errors import naming_memory_errors
from idefics_cli.model.modeling import IdeficsForVisionText2Text

Found = TypeVar("Found")

VISION_BATCH = 16  # images; more at a time make no product faster
SLOTS_ASSUMED = 512
MOST_ROWS = (16, 64)  # elsewhere, on CUDA: more make no row faster
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
PATIENCE = 16  # times as many as are wanted at a time succeed before more are tried again


def attempt(work: Callable[[], Found]) -> Found | None:
    """What `work` gives; None where memory has ended: then the exception, and the tensors it holds, are gone."""
    try:
        with naming_memory_errors():
            return work()
    except torch.OutOfMemoryError:
        return None


class AdaptiveBatchSize:
    """How many are worked on at a time: `wanted`, fewer where memory has ended, and more again when that is long ago.

    Memory may have ended for one large prompt, or because of another process. Each time that more do not fit after all,
    they are tried again half as often.
    """

    def __init__(self, wanted: int):
        self.wanted = self.now = wanted
        self._num_succeeded, self._patience, self._is_trial = 0, PATIENCE * wanted, False

    def shrink(self, tried: int) -> bool:
        """`tried` at a time were too many: from now on half as many. False where it was one at a time already."""
        was_alone = self.now == tried == 1  # another stream of the same engine may have made `now` smaller
        self.now = max(1, min(self.now, tried) // 2)
        self._patience *= 2 if self._is_trial else 1
        self._num_succeeded, self._is_trial = 0, False
        return not was_alone

    def reset(self) -> None:
        """Not even one has fitted, alone: it says nothing about the others."""
        self.now, self._num_succeeded, self._is_trial = self.wanted, 0, False

    def record_success(self, count: int) -> None:
        """So many more are done."""
        self._num_succeeded += count
        if self.now < self.wanted and self._num_succeeded >= self._patience:
            self.now = min(self.wanted, 2 * self.now)
            self._num_succeeded, self._is_trial = 0, True


def rows_that_fit(model: IdeficsForVisionText2Text) -> int:
    """How many rows to decode at a time: what half of the free memory holds, at a length that prompts seldom exceed."""
    config, itemsize = model.config, model.dtype.itemsize
    slot_bytes = 2 * config.num_hidden_layers * config.hidden_size * itemsize  # a key and a value
    image_vectors = len(model.model.gated_cross_attn_layers) * image_seq_len(config)
    row_bytes = SLOTS_ASSUMED * slot_bytes + 2 * image_vectors * config.hidden_size * itemsize
    return max(1, min(free_bytes(model.device) // 2 // row_bytes, MOST_ROWS[model.device.type == "cuda"]))


def free_bytes(device: torch.device) -> int:
    """What can still be allocated; as much as is ever asked for where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return sys.maxsize
    facts = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(facts["MemAvailable"].split()[0]) * 1024
    limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.exists() else "max"
    return available if limit == "max" else min(available, int(limit))
