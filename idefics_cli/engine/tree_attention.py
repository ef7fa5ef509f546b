"""Attention over parts of the keys: the shared prefix, a row's own prompt, its tree of beams, its images.

The two memories here answer the same two questions as the network's plain one (`model/kv_interface.py`), so there is
one forward pass: `PrefillMemory` while prompts are read, `DecodeMemory` while texts are written. Tensors only: no text,
no files, and no choice of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn
from transformers import IdeficsConfig

from idefics_cli.engine.kv_cache import KeyValues, KVStore, Prefix
from idefics_cli.engine.varlen import PackedRows
from idefics_cli.errors import IdeficsError
from idefics_cli.model.fused import LIBRARY, has_triton, one_launch, rotate
from idefics_cli.model.kv_interface import AttentionOutput, PositionEmbeddings, on_device

LIBRARY.define(  # of a CUDA device with Triton alone: `tree_kernel.py`
    "tree_attention(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? signed_sin, Tensor(a!) stored, "
    "Tensor newest, Tensor ancestors, Tensor widths, Tensor lengths, Tensor? start, Tensor? start_log_sum, "
    "int prompt_slots, float scale) -> Tensor"
)
LARGEST_HEAD = 128  # that the kernel is compiled for and tested with
ALIGNED = 8  # CUDA's fused kernels read a mask by so many keys at a time


def resolve_attention(attention: str, config: IdeficsConfig, device: torch.device) -> str:
    """What "auto" means for a decode step here. Raises IdeficsError where "triton" is asked for and cannot be."""
    head_dim = config.hidden_size // config.num_attention_heads
    missing = [
        "a CUDA device" if device.type != "cuda" else None,
        "Triton (pip install triton), which needs a C compiler" if device.type == "cuda" and not has_triton() else None,
        f"heads of an even size up to {LARGEST_HEAD}" if head_dim % 2 or head_dim > LARGEST_HEAD else None,
    ]
    lacks = [each for each in missing if each]
    if attention == "triton" and lacks:
        raise IdeficsError(f"--attention triton needs {' and '.join(lacks)}: use auto or sdpa")
    if attention == "sdpa" or lacks:
        return "sdpa"
    import_module("idefics_cli.engine.tree_kernel")  # it enters its operators
    return "triton"


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention over one part of the keys: output (rows, heads, queries, head_dim) and the log-sum-exp of its scores,
    both in fp32 at least, so that what is merged is rounded once.

    `mask` (rows, 1, queries, keys) is 0 or -inf. Scores are held in fp32, by fused kernels a few at a time.
    """
    if query.dtype in (torch.bfloat16, torch.float16):
        return part_attention(query, key, value, mask, scaling, is_causal)
    if query.device.type == "cpu" and query.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scaling
        )
    if query.device.type == "cuda" and query.shape[-1] % ALIGNED == 0:
        bias = None if mask is None else aligned(mask).expand(*query.shape[:3], key.shape[2])
        output, log_sum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, is_causal, scale=scaling
        )
        return output, log_sum[..., : query.shape[2]]  # it is padded
    scores = (query * scaling) @ key.transpose(-1, -2)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    if mask is not None:
        scores = scores + mask
    log_sum = scores.logsumexp(dim=-1)
    return (scores - log_sum[..., None]).exp() @ value, log_sum


@one_launch("(Tensor query, Tensor key, Tensor value, Tensor? mask, float scaling, bool is_causal) -> (Tensor, Tensor)")
def part_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """`attend_part` of half precision: torch's kernels would round the output."""
    return attend_part(
        query.float(), key.float(), value.float(), None if mask is None else mask.float(), scaling, is_causal
    )


def aligned(mask: Tensor) -> Tensor:
    """The same numbers, each row of keys beginning at a multiple of `ALIGNED`."""
    spare = -mask.shape[-1] % ALIGNED
    if mask.stride(-2) % ALIGNED == 0 or not spare:
        return mask
    return nn.functional.pad(mask, (0, spare))[..., : mask.shape[-1]]


def attend_few(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of a few queries: output (rows, heads, queries, head_dim); `mask` is additive.

    On the CPU the fused kernel is built for many queries: for a few, two products and a softmax are faster, and in fp32
    as exact. In half precision the fused kernel keeps its scores in fp32, so it stays.
    """
    if query.device.type != "cpu" or query.dtype != torch.float32:
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    scores = (query * scaling) @ key.transpose(-1, -2)  # (rows, heads, queries, keys)
    return (scores if mask is None else scores + mask).softmax(dim=-1) @ value


def merge_parts(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over two parts together, from each part's output and log-sum-exp (Milakov & Gimelshein 2018)."""
    (output, log_sum), (other_output, other_log_sum) = first, second
    # Each part's share of the whole sum of exponentials; a sigmoid stays exact where one of them vanishes.
    share = torch.sigmoid(log_sum - other_log_sum).unsqueeze(-1)
    return output * share + other_output * (1 - share)


def attend_prefix(prefix: Prefix, layer: nn.Module, query: Tensor) -> tuple[Tensor, Tensor]:
    """All rows' queries (rows, heads, queries, head_dim) as one block against the one prefix."""
    rows, heads, queries, head_dim = query.shape
    key, value = prefix.key_values[layer.layer_idx]  # (1, heads, tokens, head_dim)
    block = query.transpose(0, 1).reshape(1, heads, rows * queries, head_dim)
    output, log_sum = attend_part(block, key, value, None, layer.scaling)
    output = output.view(heads, rows, queries, head_dim).transpose(0, 1)
    return output, log_sum.reshape(heads, rows, queries).transpose(0, 1)


@dataclass(frozen=True)
class PrefillMemory:
    """While prompts are read: each token sees the prefix and what is before it in its row, or what `mask` says.

    Keys and values go into `key_values`, for each layer (2, rows, heads, width, head_dim); empty: they are not needed
    again. `mask` (rows, 1, width, width) and `image_mask` (rows, 1, width, images * seq) are additive, `image_gate`
    (rows, width) is open where a token sees an image. `images` are those of each row, as many for all.
    """

    prefix: Prefix
    rows: PackedRows
    key_values: Sequence[Tensor]
    images: Sequence[Sequence[KeyValues]]
    image_mask: Tensor
    image_gate: Tensor
    mask: Tensor | None = None

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, position_embeddings: PositionEmbeddings
    ) -> AttentionOutput:
        query, key = rotate(query, key, *position_embeddings)
        query, key, value = map(self.rows.pad, (query, key, value))  # (rows, heads, width, head_dim)
        if self.key_values:
            for index, states in enumerate((key, value)):
                self.key_values[layer.layer_idx][index].copy_(states)
        is_causal, scaling = self.mask is None, layer.scaling
        if self.prefix.length == 0:
            output = nn.functional.scaled_dot_product_attention(
                query, key, value, self.mask, is_causal=is_causal, scale=scaling
            )
        else:
            own = attend_part(query, key, value, self.mask, scaling, is_causal)
            output = merge_parts(own, attend_prefix(self.prefix, layer, query)).to(query.dtype)
        return self.rows.pack(output.transpose(1, 2)), None  # (1, packed, heads, head_dim)

    def attend_image(
        self, layer: nn.Module, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> AttentionOutput:
        joined = [torch.cat([image[layer.layer_idx] for image in row], dim=2) for row in self.images]
        key, value = torch.stack(joined, dim=1)  # (rows, heads, images * seq, head_dim)
        query = self.rows.pad(query)
        output = nn.functional.scaled_dot_product_attention(query, key, value, self.image_mask, scale=layer.scaling)
        output = output.transpose(1, 2).masked_fill(~self.image_gate[:, :, None, None], 0.0)
        return self.rows.pack(output), None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PrefillMemory:
        return on_device(self, device)


@dataclass(frozen=True)
class DecodeMemory:
    """While texts are written: the k beams of a row are k queries of one attention over the row's slots.

    `rows` has as many tokens as there are beams, the newest of each. Torch's kernels are told where they go, `written`
    (rows * heads * beams,), counted over the first three axes of a layer's (rows, heads, slots, head_dim), and read
    `slots`, with `mask` (rows, 1, beams, slots) to be added. Without these, one kernel does it all.
    """

    store: KVStore
    prefix: Prefix
    rows: PackedRows
    slots: slice | None = None
    written: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, store: KVStore, prefix: Prefix, rows: PackedRows, longest: int, used: int) -> DecodeMemory:
        """For torch's kernels: `longest` prompt slots and `used` tree slots are read: all that are in use, or more."""
        num_rows, beams, device = rows.num_rows, rows.width, store.newest.device
        _, _, heads, slots, _ = store.key_values[0].shape
        first = torch.arange(num_rows * heads, device=device) * slots + store.prompt_slots
        written = first.view(num_rows, heads, 1) + store.newest[:num_rows, None]  # (rows, heads, beams)
        in_prompt = store.holds_prompt(num_rows, longest)[:, None].expand(-1, beams, -1)
        visible = torch.cat([in_prompt, store.ancestors[:num_rows, :, :used]], dim=2)  # (rows, beams, slots in use)
        dtype = store.key_values[0].dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, -torch.inf)
        mask = aligned(mask) if device.type == "cuda" else mask  # once for all layers
        slots = slice(store.prompt_slots - longest, store.prompt_slots + used)
        return cls(store, prefix, rows, slots, written.flatten(), mask[:, None])

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, position_embeddings: PositionEmbeddings
    ) -> AttentionOutput:
        if self.mask is None:
            return self._attend_in_one_launch(layer, query, key, value, position_embeddings), None
        query, key = rotate(query, key, *position_embeddings)
        query, key, value = map(self.rows.pad, (query, key, value))  # (rows, heads, beams, head_dim)
        stored = self.store.key_values[layer.layer_idx]  # (2, rows, heads, slots, head_dim)
        for index, states in enumerate((key, value)):
            stored[index].flatten(0, 2).index_copy_(0, self.written, states.flatten(0, 2))
        key, value = stored[:, : self.rows.num_rows, :, self.slots]  # (rows, heads, slots in use, head_dim)
        if self.prefix.length == 0:
            output = attend_few(query, key, value, self.mask, layer.scaling)
        else:
            own = attend_part(query, key, value, self.mask, layer.scaling)
            output = merge_parts(own, attend_prefix(self.prefix, layer, query)).to(query.dtype)
        return self.rows.pack(output.transpose(1, 2)), None  # (1, packed, heads, head_dim)

    def _attend_in_one_launch(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, position_embeddings: PositionEmbeddings
    ) -> Tensor:
        """(1, packed, heads, head_dim). What attention to a prefix gives is where that to the row begins."""
        store, num_rows, rotation, start = self.store, self.rows.num_rows, position_embeddings, (None, None)
        if self.prefix.length:
            query, key = rotate(query, key, *rotation)
            rotation = (None, None)
            start = attend_part(query, *self.prefix.key_values[layer.layer_idx], None, layer.scaling)
        tables = (store.newest, store.ancestors, store.prompt_widths, store.prompt_lengths)
        return torch.ops.idefics.tree_attention(
            *(query, key, value, *rotation, store.key_values[layer.layer_idx]),
            *(table[:num_rows] for table in tables),
            *(*start, store.prompt_slots, layer.scaling),
        )

    def attend_image(
        self, layer: nn.Module, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> AttentionOutput:
        """Zero where a row sees no image: its values are zeros."""
        key, value = self.store.image_key_values[layer.layer_idx][:, : self.rows.num_rows]
        output = attend_few(self.rows.pad(query), key, value, None, layer.scaling)
        return self.rows.pack(output.transpose(1, 2)), None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DecodeMemory:
        return on_device(self, device)
