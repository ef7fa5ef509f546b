"""How much memory rows and images take, how many rows fit, and what follows where memory ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from zlib import crc32

import torch

from idefics_cli.model.kv_interface import image_seq_len
from idefics_cli.model.memory_errors import naming_memory_errors
from idefics_cli.model.modeling import IdeficsForVisionText2Text
from idefics_cli.ranks import Ranks

if TYPE_CHECKING:
    from transformers import IdeficsConfig

Found = TypeVar("Found")

VISION_BATCH = 16  # images; more at a time make no product faster
SLOTS_ASSUMED, TREE_ASSUMED = 480, 32  # of a prompt, and of each beam's own tokens
MOST_ROWS = 16  # not on CUDA: more make no row faster
QUERIES = 240  # of a step on CUDA, rows times beams: with more, products take as long as the weights do to be read
SHARE_ON_CUDA = 0.9  # of the free memory: the rest is for libraries, graphs and what the allocator cannot use
CACHE_BYTES = 512 << 20  # each for latents, for images' keys and values, for shared starts
LOGITS_AT_ONCE = 4  # tensors of a step over the whole vocabulary, in fp32
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
PATIENCE = 16  # times as many as are wanted at a time succeed before more are tried again


def attempt(work: Callable[[], Found], ranks: Ranks | None = None) -> Found | None:
    """What `work` gives; None where memory has ended: then the exception, and the tensors it holds, are gone.

    Of work that `ranks` do together all have the same, or None.
    """
    try:
        with naming_memory_errors():
            found = work()
    except torch.OutOfMemoryError:
        found = None
    if ranks is not None and not ranks.all_well(found is not None, crc32(repr(found).encode())):
        return None
    return found


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


@dataclass(frozen=True)
class MemoryPlan:
    """What a run takes by arithmetic, in bytes. A row takes `slot` for each token of its prompt and its beams' tree,
    `token` while its prompt is read for each of these, `image` for what it sees, and `query` for each of its beams.
    There are once: `weights`, `vision`'s activations, and `caches` at most.
    """

    weights: int
    slot: int
    token: int
    image: int
    query: int
    vision: int
    caches: int = 3 * CACHE_BYTES

    @classmethod
    def of(cls, config: IdeficsConfig, num_parameters: int, itemsize: int, num_processes: int = 1) -> MemoryPlan:
        """Of each of the processes that share the heads and the MLPs' features."""
        hidden, vision = config.hidden_size, config.vision_config
        own_hidden, own_features = hidden // num_processes, config.intermediate_size // num_processes
        gated_layers = -(-config.num_hidden_layers // config.cross_layer_interval)
        patches = VISION_BATCH * (1 + (vision.image_size // vision.patch_size) ** 2)
        return cls(
            weights=num_parameters * itemsize,
            slot=2 * config.num_hidden_layers * own_hidden * itemsize,  # a key and a value
            token=(3 * own_features + 3 * hidden) * itemsize,  # the widest moment is in the MLP
            # Its own, and in the row's place; in prefill one layer's twice more, as they are joined.
            image=(2 * gated_layers + 2) * 2 * image_seq_len(config) * own_hidden * itemsize,
            query=LOGITS_AT_ONCE * (config.vocab_size + config.additional_vocab_size) * 4,
            vision=patches * (2 * vision.intermediate_size + 4 * vision.embed_dim) * itemsize,
        )

    def row(self, prompt_slots: int, tree_slots: int, num_paths: int) -> int:
        slots = (prompt_slots + tree_slots) * self.slot + prompt_slots * self.token
        return slots + self.image + num_paths * self.query

    def rows(self, free: int, is_cuda: bool, num_paths: int = 1) -> int:
        """How many to decode at a time, at a length that prompts seldom exceed, once the weights are there."""
        return max(1, self.rows_at_most(free, is_cuda, num_paths))

    def rows_at_most(self, free: int, is_cuda: bool, num_paths: int) -> int:
        """The same, or less than 1 where not even one fits."""
        row = self.row(SLOTS_ASSUMED, TREE_ASSUMED * num_paths, num_paths)
        space = int(SHARE_ON_CUDA * free) - self.vision - self.caches if is_cuda else free // 2
        return min(space // row, most_rows(num_paths) if is_cuda else MOST_ROWS)


def most_rows(num_paths: int) -> int:
    return max(1, QUERIES // num_paths)


def rows_that_fit(model: IdeficsForVisionText2Text, num_paths: int = 1) -> int:
    """How many rows to decode at a time in what is free on the model's device."""
    num_processes = 1 if model.ranks is None else model.ranks.size
    plan = MemoryPlan.of(model.config, model.num_parameters(), model.dtype.itemsize, num_processes)
    rows = plan.rows(free_bytes(model.device), model.device.type == "cuda", num_paths)
    return rows if model.ranks is None else model.ranks.least(rows)


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
