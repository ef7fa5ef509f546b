"""Rows of different lengths without padding: one behind the other, and side by side where attention looks at them.

All of the network but attention treats tokens one by one: there the rows form one line of tokens, and nothing is
computed for padding. Knows no prompts and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class RaggedRows:
    """Rows of these lengths, which begin at `starts` in the line.

    Side by side they are `width` tokens each, padded on the right with any token's states.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu"):
        assert lengths and min(lengths) > 0, lengths
        self.num_rows, self.width = len(lengths), max(lengths)
        self.is_even = self.num_rows * self.width == sum(lengths)
        self.starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
        starts, counts, offsets = torch.tensor(self.starts), torch.tensor(lengths), torch.arange(self.width)
        is_token = offsets < counts[:, None]  # (rows, width)
        self.last = (starts + counts - 1).to(device)  # (rows,): each row's last token in the line
        self._sources = torch.where(is_token, starts[:, None] + offsets, 0).flatten().to(device)
        self._places = is_token.flatten().nonzero().squeeze(1).to(device)  # (tokens,)

    def in_line(self, padded: Tensor) -> Tensor:
        """(rows, width, ...) -> (1, tokens, ...)"""
        joined = padded.flatten(0, 1)
        return (joined if self.is_even else joined.index_select(0, self._places)).unsqueeze(0)

    def side_by_side(self, states: Tensor) -> Tensor:
        """(1, heads, tokens, head_dim) -> (rows, heads, width, head_dim)"""
        line = states.squeeze(0).transpose(0, 1)  # (tokens, heads, head_dim)
        padded = line if self.is_even else line.index_select(0, self._sources)
        return padded.unflatten(0, (self.num_rows, self.width)).transpose(1, 2)
