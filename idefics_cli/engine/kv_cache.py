"""Where keys and values live: per image, per run (the shared prefix), per row (its prompt and its tree of beams).

Each is written once and read in place. The two memories here answer the same two questions as the network's plain one
(`model/memory.py`), so the forward pass is the same: one while prompts are read, one while texts are written. Tensors
only: no text, no files, and no choice of tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from idefics_cli.engine.varlen import RaggedRows
from idefics_cli.model.kv_interface import AttentionOutput

if TYPE_CHECKING:
    from transformers import IdeficsConfig

    from idefics_cli.model.decoder import IdeficsAttention

Value = TypeVar("Value")


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

    def values(self) -> list[Value]:
        """All that is kept, without its counting as use."""
        return [value for value, _ in self._entries.values()]

    def clear(self) -> None:
        self._entries.clear()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)


def project_images(latents: Tensor, gated_layers: nn.ModuleList) -> list[Tensor]:
    """What every gated layer reads of each image: (images, seq, dim) -> (layers, 2, heads, seq, head_dim) each.

    Index 0 of the second axis holds keys, 1 values. Each image's are a tensor of their own, to be dropped one by one.
    """
    layers = [layer.cross_attn.project_image(latents) for layer in gated_layers]
    return [
        torch.stack([torch.stack([key[image], value[image]]) for key, value in layers]) for image in range(len(latents))
    ]


# ---- attention over parts


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention over one part of the keys: output (rows, heads, queries, head_dim) and the log-sum-exp of its scores.

    `mask` is additive and broadcasts to (rows, heads, queries, keys).
    """
    if query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scaling
        )
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    if mask is not None:
        scores = scores + mask
    log_sum = scores.logsumexp(dim=-1)
    return (scores - log_sum[..., None]).exp().to(value.dtype) @ value, log_sum


def attend_few(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of a few queries: output (rows, heads, queries, head_dim); `mask` is additive.

    On the CPU the fused kernel is built for many queries: for a handful, two products and a softmax are faster, and in
    fp32 as exact. In half precision the fused kernel keeps its scores in fp32, so it stays.
    """
    if query.device.type != "cpu" or query.dtype != torch.float32:
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    scores = (query * scaling) @ key.transpose(-1, -2)  # (rows, heads, queries, keys)
    return (scores if mask is None else scores + mask).softmax(dim=-1) @ value


def merge_parts(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over two parts together, from each part's output and log-sum-exp (Milakov & Gimelshein 2018)."""
    (output, log_sum), (other_output, other_log_sum) = first, second
    # Each part's share of the whole sum of exponentials; a sigmoid stays exact where one of them vanishes.
    share = torch.sigmoid(log_sum.float() - other_log_sum.float()).unsqueeze(-1)
    return (output.float() * share + other_output.float() * (1 - share)).to(output.dtype)


# ---- what is kept


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of what a run's prompts start with: for each layer (1, heads, tokens, head_dim).

    `last_image` is the key of the image that tokens behind the prefix still see, or None.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    length: int
    last_image: Hashable | None

    def attend(self, layer_idx: int, query: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """All rows' queries (rows, heads, queries, head_dim) as one block against the one prefix."""
        rows, heads, queries, head_dim = query.shape
        block = query.transpose(0, 1).reshape(1, heads, rows * queries, head_dim)
        output, log_sum = attend_part(block, self.keys[layer_idx], self.values[layer_idx], None, scaling)
        output = output.view(heads, rows, queries, head_dim).transpose(0, 1)
        return output, log_sum.reshape(heads, rows, queries).transpose(0, 1)


NO_PREFIX = SharedPrefix((), (), 0, None)


TABLES = ("sees_image", "prompt_lengths", "prompt_widths", "ancestors", "newest")  # a store's, (rows, ...) each


class RowStore:
    """Room for `rows` rows: their prompts' and beams' keys and values, and those of the one image each still sees.

    A row has `prompt_slots` for its prompt, then `tree_slots` for what its beams write. Prompts that were read together
    begin in one slot, and the longest of them fills the part up to its end (`prompt_widths`), so that a step only reads
    as many slots as the longest of its rows needs. A token stays in its slot; `ancestors` (rows, beams, tree slots)
    says which of them a beam's own path holds, so another order of beams is another order of this table's lines. A slot
    that no path holds any more is given out again: beams share most of their past, and few slots are in use however
    long the texts become.
    """

    def __init__(
        self,
        config: IdeficsConfig,
        num_beams: int,
        max_new_tokens: int,
        image_seq_len: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.rows = self.prompt_slots = self.tree_slots = 0
        self.num_beams, self.most_tree_slots = num_beams, max_new_tokens * num_beams
        heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        gated_layers = -(-config.num_hidden_layers // config.cross_layer_interval)

        def empty(*shape: int, of: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device=device)

        # For each layer (2, rows, heads, slots, head_dim): a head's slots lie side by side, as attention reads them.
        self.key_values = [empty(2, 0, heads, 0, head_dim, of=dtype) for _ in range(config.num_hidden_layers)]
        self.image_key_values = empty(gated_layers, 2, 0, heads, image_seq_len, head_dim, of=dtype)
        self.sees_image = empty(0, of=torch.bool)
        self.prompt_lengths = empty(0, of=torch.long)
        self.prompt_widths = empty(0, of=torch.long)
        self.ancestors = empty(0, num_beams, 0, of=torch.bool)
        self.newest = empty(0, num_beams, of=torch.long)  # the slot of each beam's newest token

    def grow(self, rows: int, prompt_slots: int, tree_slots: int) -> None:
        """Make room for at least so much. What is there keeps its row, and its slot counted from the tree's first."""
        rows, prompt_slots = max(rows, self.rows), max(prompt_slots, self.prompt_slots)
        tree_slots = max(min(tree_slots, self.most_tree_slots), self.tree_slots)
        if (rows, prompt_slots, tree_slots) == (self.rows, self.prompt_slots, self.tree_slots):
            return
        for layer, old in enumerate(self.key_values):  # one by one, so that no more than one is there twice
            new = old.new_empty(2, rows, old.shape[2], prompt_slots + tree_slots, old.shape[4])
            fill(new, old, first_slot=prompt_slots - self.prompt_slots)
            self.key_values[layer] = new
        self.image_key_values = enlarged(self.image_key_values, 2, rows)
        for name in TABLES:
            setattr(self, name, enlarged(getattr(self, name), 0, rows))
        self.ancestors = enlarged(self.ancestors, 2, tree_slots)
        self.rows, self.prompt_slots, self.tree_slots = rows, prompt_slots, tree_slots

    def prompts(self, rows: slice, width: int) -> list[Tensor]:
        """Where prompts that are read together go, the longest of which has `width` tokens: for each layer
        (2, rows, heads, width, head_dim)."""
        return [layer[:, rows, :, self.prompt_slots - width : self.prompt_slots] for layer in self.key_values]

    def admit(self, rows: slice, prompt_lengths: Sequence[int], images: Sequence[Tensor], sees_image: Tensor) -> None:
        """New rows, whose prompts are there: each of `images` (layers, 2, heads, seq, head_dim) is what one sees from
        now on."""
        for row, image in zip(range(rows.start, rows.stop), images, strict=True):
            self.image_key_values[:, :, row] = image
        self.sees_image[rows] = sees_image
        self.prompt_lengths[rows] = torch.tensor(prompt_lengths, device=self.prompt_lengths.device)
        self.prompt_widths[rows] = max(prompt_lengths)
        self.ancestors[rows] = False

    def advance(self, rows: slice, parents: Tensor) -> None:
        """Each beam takes over its parent's path and gets a slot for its newest token, the first that no path holds.

        `parents` (rows, beams) are indices among the row's old beams. There must be as many free slots.
        """
        table = self.ancestors[rows]
        table = table.gather(1, parents[:, :, None].expand(-1, -1, self.tree_slots))
        places = torch.arange(self.tree_slots, device=table.device)
        in_order = places + table.any(dim=1) * self.tree_slots  # (rows, slots): those in use come last
        self.newest[rows] = in_order.topk(self.num_beams, dim=1, largest=False).indices
        self.ancestors[rows] = table.scatter(2, self.newest[rows][:, :, None], True)

    def holds_prompt(self, num_rows: int, longest: int) -> Tensor:
        """(rows, longest): which of the last prompt slots hold a token of the row's prompt."""
        from_start = torch.arange(-longest, 0, device=self.prompt_widths.device) + self.prompt_widths[:num_rows, None]
        return (from_start >= 0) & (from_start < self.prompt_lengths[:num_rows, None])

    def slots_in_use(self, num_rows: int) -> Tensor:
        """(rows,): how many tree slots there are up to the last that a path holds."""
        numbers = torch.arange(1, self.tree_slots + 1, device=self.ancestors.device)
        return (self.ancestors[:num_rows].any(dim=1) * numbers).amax(dim=1)

    def erase(self, rows: list[int]) -> None:
        """Zeros in the place of numbers that have overflowed: no mask hides them from who gets these slots next."""
        if not rows:
            return
        index = torch.tensor(rows, device=self.newest.device)
        for key_values in self.key_values:
            key_values.index_fill_(1, index, 0)

    def keep(self, sources: list[int]) -> None:
        """Row i becomes what row `sources[i]` was: one behind all that are kept, or itself, which is not touched."""
        moves = [(target, source) for target, source in enumerate(sources) if source != target]
        if not moves:
            return
        assert all(source >= len(sources) for _, source in moves), sources
        targets, origins = torch.tensor(moves, device=self.newest.device).unbind(1)
        for key_values in self.key_values:
            key_values[:, targets] = key_values[:, origins]
        self.image_key_values[:, :, targets] = self.image_key_values[:, :, origins]
        for table in map(vars(self).get, TABLES):
            table[targets] = table[origins]


def fill(new: Tensor, old: Tensor, first_slot: int) -> None:
    """(2, rows, heads, slots, head_dim): what was there, from `first_slot` on, and zeros all around it."""
    rows, end = old.shape[1], first_slot + old.shape[3]
    new[:, :rows, :, first_slot:end] = old
    new[:, :rows, :, :first_slot] = 0
    new[:, :rows, :, end:] = 0
    new[:, rows:] = 0


def enlarged(table: Tensor, axis: int, size: int) -> Tensor:
    """With zeros behind it up to `size` along `axis`."""
    missing = [size - length if each == axis else length for each, length in enumerate(table.shape)]
    return torch.cat([table, table.new_zeros(missing)], dim=axis) if missing[axis] else table


@dataclass(frozen=True)
class RowImages:
    """The images that each row sees while it is read, the same number for all: (layers, 2, heads, seq, head_dim) each.

    A row with fewer has others in addition, which no token of it sees.
    """

    rows: Sequence[Sequence[Tensor]]

    @property
    def seq_len(self) -> int:
        return self.rows[0][0].shape[3]

    def of_layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each (rows, heads, images * seq, head_dim)."""
        joined = [torch.cat([image[layer_idx] for image in row], dim=2) for row in self.rows]
        key, value = torch.stack(joined, dim=1)
        return key, value


@dataclass(frozen=True)
class PrefillMemory:
    """While prompts are read: their tokens come in one line, and each sees the prefix and what is before it in its row.

    Keys and values go into `key_values`, for each layer (2, rows, heads, width, head_dim). `image_mask`
    (rows, 1, width, images * seq) is additive and `image_gate` (rows, width) open where a token sees one.
    """

    prefix: SharedPrefix
    key_values: Sequence[Tensor]
    images: RowImages
    image_mask: Tensor
    image_gate: Tensor
    rows: RaggedRows

    def attend(self, layer: IdeficsAttention, query: Tensor, key: Tensor, value: Tensor) -> AttentionOutput:
        output = self._attend_own(layer, *map(self.rows.side_by_side, (query, key, value)))
        return self.rows.in_line(output.transpose(1, 2)), None  # (1, line, heads, head_dim)

    def _attend_own(self, layer: IdeficsAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(rows, heads, width, head_dim) each, as the output is."""
        for index, states in enumerate((key, value)):
            self.key_values[layer.layer_idx][index].copy_(states)
        if self.prefix.length == 0:
            return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=layer.scaling)
        own = attend_part(query, key, value, None, layer.scaling, is_causal=True)
        return merge_parts(own, self.prefix.attend(layer.layer_idx, query, layer.scaling))

    def attend_image(
        self, layer: IdeficsAttention, query: Tensor, image_hidden_states: Tensor | None
    ) -> AttentionOutput:
        key, value = self.images.of_layer(layer.layer_idx)
        query = self.rows.side_by_side(query)
        output = nn.functional.scaled_dot_product_attention(query, key, value, self.image_mask, scale=layer.scaling)
        output = output.transpose(1, 2).masked_fill(~self.image_gate[:, :, None, None], 0.0)
        return self.rows.in_line(output), None


@dataclass(frozen=True)
class DecodeMemory:
    """While texts are written: the k beams of a row are k queries of one attention over the row's slots.

    The newest tokens come in one line: `rows`, of as many tokens as there are beams. `written` (rows * heads * beams,)
    is where they go, counted over the first three axes of a layer's (rows, heads, slots, head_dim); `mask`
    (rows, 1, beams, slots in use) is additive. `slots` are those in use.
    """

    store: RowStore
    prefix: SharedPrefix
    rows: RaggedRows
    slots: slice
    written: Tensor
    mask: Tensor
    image_gate: Tensor

    @classmethod
    def of(cls, store: RowStore, prefix: SharedPrefix, rows: RaggedRows, longest: int, used: int) -> DecodeMemory:
        """`longest` is the largest of these rows' `prompt_widths`, and no path of theirs holds a tree slot behind the
        first `used`."""
        num_rows, beams, device = rows.num_rows, rows.width, store.newest.device
        _, _, heads, slots, _ = store.key_values[0].shape
        first = torch.arange(num_rows * heads, device=device) * slots + store.prompt_slots
        written = first.view(num_rows, heads, 1) + store.newest[:num_rows, None]  # (rows, heads, beams)
        visible = torch.cat(
            [
                store.holds_prompt(num_rows, longest)[:, None].expand(-1, beams, -1),
                store.ancestors[:num_rows, :, :used],
            ],
            dim=2,
        )  # (rows, beams, slots in use)
        dtype = store.image_key_values.dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, -torch.inf)
        return cls(
            store=store,
            prefix=prefix,
            rows=rows,
            slots=slice(store.prompt_slots - longest, store.prompt_slots + used),
            written=written.flatten(),
            mask=mask[:, None],
            image_gate=store.sees_image[:num_rows, None, None, None],
        )

    def attend(self, layer: IdeficsAttention, query: Tensor, key: Tensor, value: Tensor) -> AttentionOutput:
        query, key, value = map(self.rows.side_by_side, (query, key, value))  # (rows, heads, beams, head_dim)
        stored = self.store.key_values[layer.layer_idx]  # (2, rows, heads, slots, head_dim)
        for index, states in enumerate((key, value)):
            stored[index].flatten(0, 2).index_copy_(0, self.written, states.flatten(0, 2))
        key, value = stored[:, : self.rows.num_rows, :, self.slots]  # (rows, heads, slots in use, head_dim)
        if self.prefix.length == 0:
            output = attend_few(query, key, value, self.mask, layer.scaling)
        else:
            own = attend_part(query, key, value, self.mask, layer.scaling)
            output = merge_parts(own, self.prefix.attend(layer.layer_idx, query, layer.scaling))
        return self.rows.in_line(output.transpose(1, 2)), None  # (1, line, heads, head_dim)

    def attend_image(
        self, layer: IdeficsAttention, query: Tensor, image_hidden_states: Tensor | None
    ) -> AttentionOutput:
        key, value = self.store.image_key_values[layer.layer_idx, :, : self.rows.num_rows]
        output = attend_few(self.rows.side_by_side(query), key, value, None, layer.scaling)
        return self.rows.in_line(output.transpose(1, 2).masked_fill(~self.image_gate, 0.0)), None
