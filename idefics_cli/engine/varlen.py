"""Rows of different lengths without padding: one behind the other, and side by side where attention looks at them.

All of the network but attention treats tokens one by one: there the rows form one line of tokens, and nothing is
computed for padding, but a few tokens at the line's end where its length has to be a certain one. Knows no prompts and
no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


class RaggedRows:
    """Rows of these lengths, which begin at `starts` in the line.

    Side by side they are `width` tokens each, padded on the right with the states of the row's own first token, so that
    numbers that overflow stay within their row. The line has `line_length` tokens, of which those behind the rows' are
    nobody's.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu", line_length: int | None = None):
        assert lengths and min(lengths) > 0, lengths
        self.lengths = lengths
        self.num_rows, self.width, self.num_tokens = len(lengths), max(lengths), sum(lengths)
        self.line_length = self.num_tokens if line_length is None else line_length
        assert self.line_length >= self.num_tokens, (self.line_length, self.num_tokens)
        self.is_even = self.num_rows * self.width == self.num_tokens
        if not self.is_even:
            self._sources, self._places = (table.to(device) for table in self._tables(torch.tensor(lengths)))

    @cached_property
    def starts(self) -> list[int]:
        return [end - length for end, length in zip(accumulate(self.lengths), self.lengths, strict=True)]

    def _tables(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Where in the line each token side by side is (rows * width,), and the other way round (line,)."""
        offsets = torch.arange(self.width)
        is_token = offsets < lengths[:, None]  # (rows, width)
        starts = torch.tensor(self.starts)[:, None]
        sources = torch.where(is_token, starts + offsets, starts)
        places = torch.zeros(self.line_length, dtype=torch.long)
        places[: self.num_tokens] = is_token.flatten().nonzero().squeeze(1)
        return sources.flatten(), places

    def in_line(self, padded: Tensor) -> Tensor:
        """(rows, width, ...) -> (1, line, ...)"""
        if not self.is_even:
            line = padded.flatten(0, 1).index_select(0, self._places)
        elif self.line_length == self.num_tokens:
            line = padded.flatten(0, 1)
        else:
            line = padded.new_zeros(self.line_length, *padded.shape[2:])
            line[: self.num_tokens].unflatten(0, (self.num_rows, self.width)).copy_(padded)
        return line.unsqueeze(0)

    def side_by_side(self, states: Tensor) -> Tensor:
        """(1, heads, line, head_dim) -> (rows, heads, width, head_dim)"""
        if self.is_even:
            beside = states[0, :, : self.num_tokens].unflatten(1, (self.num_rows, self.width))
            return beside.transpose(0, 1)
        beside = states[0].transpose(0, 1).index_select(0, self._sources)  # (rows * width, heads, head_dim)
        return beside.unflatten(0, (self.num_rows, self.width)).transpose(1, 2)

    def last(self, line: Tensor) -> Tensor:
        """(1, line, ...) -> (rows, ...): each row's last token."""
        ends = [*self.starts[1:], self.num_tokens]
        return line[0, torch.tensor(ends, device=line.device) - 1]
