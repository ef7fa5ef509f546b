"""Why a prompt has no texts: reasons that travel with it as values, and the one that ends a whole run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from idefics_cli.errors import IdeficsError, RowError

TOO_LARGE = RowError("out_of_memory", "the device's memory does not hold this prompt alone")
NOTHING_ALLOWED = RowError(
    "row_invalid", "every token that could come next is forbidden: allow shorter texts, or repetition"
)

FIRST_PROMPTS = 16


class Overflows:
    """`error` is that of a prompt with non-finite values. Where all of the first `FIRST_PROMPTS` have them, the number
    format is at fault, not the prompts; fewer may be what an earlier run has left."""

    def __init__(self, dtype: torch.dtype):
        others = "bf16 or fp32" if dtype == torch.float16 else "fp32"
        name = str(dtype).removeprefix("torch.")
        remedy = "use another checkpoint" if dtype == torch.float32 else f"use --dtype {others}"
        cause = ", whose largest number is 65504" if dtype == torch.float16 else ""
        self.error = RowError("overflow", f"the model computes non-finite values (NaN/Inf) in {name}{cause}: {remedy}")
        self.num_seen, self.are_all = 0, True

    def look_at(self, overflow: Sequence[bool]) -> None:
        """At the prompts that have ended, and those that continue, which have none. Raises IdeficsError."""
        self.num_seen, self.are_all = self.num_seen + len(overflow), self.are_all and all(overflow)
        if self.are_all and self.num_seen >= FIRST_PROMPTS:
            raise IdeficsError(self.error.message)
