"""Where keys and values live: per image, per run (the shared prefix), per row (its prompt and its tree of beams).

Each is written once and read in place (`tree_attention.py`). Tensors only: no text, no files, and no choice of tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from idefics_cli.engine.options import DecodingOptions
from idefics_cli.engine.transfer import send_ids
from idefics_cli.model.kv_interface import device_of, image_seq_len

if TYPE_CHECKING:
    from idefics_cli.model.modeling import IdeficsForVisionText2Text

Value = TypeVar("Value")
KeyValues = tuple[Tensor, ...]  # of one image: for each gated layer (2, heads, seq, head_dim), keys and values


class BoundedCache(Generic[Value]):
    """Values by key, the least recently used dropped when their bytes exceed `max_bytes`."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._entries: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Hashable, value: Value, num_bytes: int) -> None:
        if key in self._entries:
            self.num_bytes -= self._entries.pop(key)[1]
        self._entries[key] = (value, num_bytes)
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes and len(self._entries) > 1:
            self.num_bytes -= self._entries.popitem(last=False)[1][1]

    def retain(self, keys: Collection[Hashable]) -> None:
        """Drop all others."""
        for key in self._entries.keys() - keys:
            self.num_bytes -= self._entries.pop(key)[1]

    def keys(self) -> list[Hashable]:
        return list(self._entries)

    def clear(self) -> None:
        self._entries.clear()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)


def project_images(latents: Tensor, gated_layers: nn.ModuleList) -> list[KeyValues]:
    """What every gated layer reads of each image: (images, seq, dim) -> for each layer (2, heads, seq, head_dim).

    Each image's are tensors of their own, to be dropped one by one.
    """
    layers = [torch.stack(layer.cross_attn.project_image(latents)) for layer in gated_layers]
    return [tuple(layer[:, image].clone() for layer in layers) for image in range(len(latents))]


def bytes_of(key_values: KeyValues) -> int:
    return sum(each.nbytes for each in key_values)


def space_for(
    attentions: Iterable[nn.Module], model: IdeficsForVisionText2Text, start: tuple[int, ...], slots: int
) -> list[Tensor]:
    """For each layer's attention (*start, heads, slots, head_dim), not initialised, where the layer computes."""
    return [
        torch.empty(
            *start, each.num_heads, slots, each.head_dim, device=device_of(each, model.device), dtype=model.dtype
        )
        for each in attentions
    ]


@dataclass(frozen=True)
class Prefix:
    """A start that prompts share, once it is read: for each layer keys and values (2, 1, heads, tokens, head_dim).

    `last_image` is the key of the image that tokens after the prefix still see, or None.
    """

    content: tuple[int, ...] = ()
    num_images: int = 0
    key_values: Sequence[Tensor] = ()
    last_image: bytes | None = None

    @property
    def length(self) -> int:
        return len(self.content)

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in self.key_values)


NO_PREFIX = Prefix()

SLOT_STEP = 32  # prompt slots are rounded up to this, so that storage seldom grows
# Beams share most of their past: at first the tree has space for one path, and for what each beam has of its own.
PATH_SLOTS, OWN_SLOTS = 32, 6
TREE_STEP = 3  # tokens of every beam that the tree's storage grows by
TABLES = ("prompt_lengths", "prompt_widths", "ancestors", "newest", "in_use")  # a store's, (rows, ...) each


class KVStore:
    """Space for `rows` rows: their prompts' and beams' keys and values, and those of the one image each still sees.

    A row has `prompt_slots` for its prompt, then `tree_slots` for what its beams write. Prompts read together begin in
    one slot, and the longest fills the part up to its end (`widths`): a step reads no more slots than its longest row
    needs. A token stays in its slot; `ancestors` (rows, beams, tree slots) says which of them a beam's path holds, so
    reordering beams only reorders this table. Slots that no path holds are given out again; the first `used` tree slots
    hold all that are in use, known without asking the device.
    """

    def __init__(self, model: IdeficsForVisionText2Text, options: DecodingOptions):
        self.rows = self.prompt_slots = self.tree_slots = self.used = 0
        self.widths: list[int] = []  # of the rows in use; `prompt_widths` on the host
        self.num_beams, self.max_new_tokens = options.num_paths, options.max_new_tokens
        network = model.model

        def empty(*shape: int, of: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device=model.device)

        # For each layer (2, rows, heads, slots, head_dim): a head's slots lie side by side, as attention reads them.
        self.key_values = space_for((layer.self_attn for layer in network.layers), model, (2, 0), 0)
        gated = (layer.cross_attn for layer in network.gated_cross_attn_layers)
        self.image_key_values = space_for(gated, model, (2, 0), image_seq_len(model.config))
        self.prompt_lengths = empty(0, of=torch.long)
        self.prompt_widths = empty(0, of=torch.long)
        self.ancestors = empty(0, self.num_beams, 0, of=torch.bool)
        self.newest = empty(0, self.num_beams, of=torch.long)  # the slot of each beam's newest token
        # What the host asks after a step: how many tree slots there are up to the last in use, -1 where a row is over.
        self.in_use = empty(0, of=torch.long)

    def reserve(self, rows: int, prompt_length: int = 0, expected: int = 0) -> None:
        """Make space for so many rows, for prompts of this length, and for every beam's next token.

        Where more rows are needed, there will be `expected` of them.
        """
        rows = max(rows, expected) if rows > self.rows else rows
        prompt_slots = -(-prompt_length // SLOT_STEP) * SLOT_STEP
        first_slots = min(self.max_new_tokens, PATH_SLOTS) + OWN_SLOTS * self.num_beams
        tree_slots = self.tree_slots or first_slots
        if self.used + self.num_beams > tree_slots:
            # On CUDA what was captured over the old storage is lost: seldom.
            least = tree_slots // 2 if self.newest.device.type == "cuda" else 0
            tree_slots += max(least, TREE_STEP * self.num_beams)
        self.grow(rows, prompt_slots, tree_slots)

    def grow(self, rows: int, prompt_slots: int, tree_slots: int) -> None:
        """Make space for at least so much. What is there keeps its row, and its slot counted from the tree's first."""
        rows, prompt_slots = max(rows, self.rows), max(prompt_slots, self.prompt_slots)
        tree_slots = max(min(tree_slots, self.max_new_tokens * self.num_beams), self.tree_slots)
        if (rows, prompt_slots, tree_slots) == (self.rows, self.prompt_slots, self.tree_slots):
            return
        first = prompt_slots - self.prompt_slots
        for layer, old in enumerate(self.key_values):  # one by one, so that no more than one is there twice
            new = old.new_zeros(2, rows, old.shape[2], prompt_slots + tree_slots, old.shape[4])
            new[:, : self.rows, :, first : first + old.shape[3]] = old
            self.key_values[layer] = new
        self.image_key_values = [enlarged(layer, 1, rows) for layer in self.image_key_values]
        for name in TABLES:
            setattr(self, name, enlarged(getattr(self, name), 0, rows))
        self.ancestors = enlarged(self.ancestors, 2, tree_slots)
        self.rows, self.prompt_slots, self.tree_slots = rows, prompt_slots, tree_slots

    def prompts(self, rows: slice, width: int) -> list[Tensor]:
        """Where prompts that are read together go, the longest of which has `width` tokens: for each layer
        (2, rows, heads, width, head_dim)."""
        return [layer[:, rows, :, self.prompt_slots - width : self.prompt_slots] for layer in self.key_values]

    def admit(self, rows: slice, prompt_lengths: Sequence[int], images: Sequence[KeyValues]) -> None:
        """New rows after those in use, whose prompts are there: each of `images` is what one sees from now on."""
        for layer, of_rows in zip(self.image_key_values, zip(*images, strict=True), strict=True):
            layer[:, rows] = torch.stack(of_rows, dim=1)
        self.prompt_lengths[rows] = send_ids(prompt_lengths, self.prompt_lengths.device)
        self.prompt_widths[rows] = max(prompt_lengths)
        self.widths += [max(prompt_lengths)] * len(prompt_lengths)
        self.ancestors[rows] = False

    def advance(self, rows: slice, parents: Tensor, done: Tensor) -> None:
        """Each beam takes over its parent's path and gets a slot for its newest token, the first that no path holds.

        `parents` (rows, beams) are indices among the row's old beams. There must be as many free slots. `done` (rows,)
        says which rows are over.
        """
        table = self.ancestors[rows]
        table = table.gather(1, parents[:, :, None].expand(-1, -1, self.tree_slots))
        places = torch.arange(self.tree_slots, device=table.device)
        in_order = places + table.any(dim=1) * self.tree_slots  # (rows, slots): those in use come last
        self.newest[rows] = in_order.topk(self.num_beams, dim=1, largest=False).indices
        table = table.scatter(2, self.newest[rows][:, :, None], True)
        self.ancestors[rows] = table
        in_use = (table.any(dim=1) * (places + 1)).amax(dim=1)
        self.in_use[rows] = in_use.masked_fill(done, -1)

    def fill_spare(self, rows: slice) -> None:
        """Rows that no prompt has: each beam sees the tree's slots, which hold numbers, and no prompt."""
        self.prompt_lengths[rows] = self.prompt_widths[rows] = 0
        self.ancestors[rows] = True
        self.newest[rows] = torch.arange(self.num_beams, device=self.newest.device)

    def holds_prompt(self, num_rows: int, longest: int) -> Tensor:
        """(rows, longest): which of the last prompt slots hold a token of the row's prompt."""
        from_start = torch.arange(-longest, 0, device=self.prompt_widths.device) + self.prompt_widths[:num_rows, None]
        return (from_start >= 0) & (from_start < self.prompt_lengths[:num_rows, None])

    def erase(self, rows: list[int]) -> None:
        """Zeros in place of non-finite values: no mask hides them from the row that uses these slots next."""
        if not rows:
            return
        index = send_ids(rows, self.newest.device)
        for key_values in self.key_values:
            key_values.index_fill_(1, index.to(key_values.device), 0)

    def compact(self, sources: list[int]) -> None:
        """Row i becomes what row `sources[i]` was: itself, which is not touched, or one after all that stay."""
        self.widths = [self.widths[source] for source in sources]
        moves = [(target, source) for target, source in enumerate(sources) if source != target]
        if not moves:
            return
        assert all(source >= len(sources) for _, source in moves), sources
        targets, origins = send_ids(moves, self.newest.device).unbind(1)
        for key_values in (*self.key_values, *self.image_key_values):
            here = key_values.device
            key_values[:, targets.to(here)] = key_values[:, origins.to(here)]
        for table in map(vars(self).get, TABLES):
            table[targets] = table[origins]


def enlarged(table: Tensor, axis: int, size: int) -> Tensor:
    """With zeros after it up to `size` along `axis`."""
    missing = [size - length if each == axis else length for each, length in enumerate(table.shape)]
    return torch.cat([table, table.new_zeros(missing)], dim=axis) if missing[axis] else table
