"""Rows of different lengths without padding: packed one after the other, padded only where attention looks at them.

All of the network but attention treats tokens one by one, so nothing is computed for padding, except a few tokens at
the end where the number of tokens has to be a certain one. Knows no prompts and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from idefics_cli.engine.transfer import send, send_ids


class PackedRows:
    """Rows of these lengths, which begin at `starts` among the `packed_length` tokens; those after the rows' are spare.

    Padded, rows are `width` tokens each, filled up on the right with the row's own first token, so that non-finite
    values stay within their row.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu", packed_length: int | None = None):
        assert lengths and min(lengths) > 0, lengths
        self.lengths = lengths
        self.num_rows, self.width, self.num_tokens = len(lengths), max(lengths), sum(lengths)
        self.packed_length = self.num_tokens if packed_length is None else packed_length
        assert self.packed_length >= self.num_tokens, (self.packed_length, self.num_tokens)
        self.is_even = self.num_rows * self.width == self.num_tokens
        if not self.is_even:
            self._sources, self._places = (send(table, device) for table in self._tables(torch.tensor(lengths)))

    def to(self, device: torch.device | str) -> PackedRows:
        """The same for tensors on `device`."""
        if self.is_even or self._places.device == torch.device(device):
            return self
        moved = copy(self)
        moved._sources, moved._places = self._sources.to(device), self._places.to(device)
        return moved

    @cached_property
    def starts(self) -> list[int]:
        return [end - length for end, length in zip(accumulate(self.lengths), self.lengths, strict=True)]

    def _tables(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Where each padded token is packed (rows * width,), and the other way round (packed_length,)."""
        offsets = torch.arange(self.width)
        is_token = offsets < lengths[:, None]  # (rows, width)
        starts = torch.tensor(self.starts)[:, None]
        sources = torch.where(is_token, starts + offsets, starts)
        places = torch.zeros(self.packed_length, dtype=torch.long)
        places[: self.num_tokens] = is_token.flatten().nonzero().squeeze(1)
        return sources.flatten(), places

    def pack(self, padded: Tensor) -> Tensor:
        """(rows, width, ...) -> (1, packed_length, ...)"""
        if not self.is_even:
            packed = padded.flatten(0, 1).index_select(0, self._places)
        elif self.packed_length == self.num_tokens:
            packed = padded.flatten(0, 1)
        else:
            packed = padded.new_zeros(self.packed_length, *padded.shape[2:])
            packed[: self.num_tokens].unflatten(0, (self.num_rows, self.width)).copy_(padded)
        return packed.unsqueeze(0)

    def pad(self, packed: Tensor) -> Tensor:
        """(1, heads, packed_length, head_dim) -> (rows, heads, width, head_dim)"""
        if self.is_even:
            return packed[0, :, : self.num_tokens].unflatten(1, (self.num_rows, self.width)).transpose(0, 1)
        padded = packed[0].transpose(0, 1).index_select(0, self._sources)  # (rows * width, heads, head_dim)
        return padded.unflatten(0, (self.num_rows, self.width)).transpose(1, 2)

    def last(self, packed: Tensor) -> Tensor:
        """(1, packed_length, ...) -> (rows, ...): each row's last token."""
        ends = [*self.starts[1:], self.num_tokens]
        return packed[0, send_ids(ends, packed.device) - 1]
