"""Why a prompt has no texts: reasons that travel with it as values, and the one that ends a whole run.

Knows no tensors but by their type's name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from idefics_cli.errors import IdeficsError, RowError

TOO_LARGE = RowError("out_of_memory", "the device's memory does not hold this prompt alone")
NOTHING_ALLOWED = RowError("row_invalid", "every token that could be written next is forbidden")


class Overflows:
    """`error` is that of a prompt whose numbers overflow. Where those of the first ones do so all, it is the number
    format that is at fault, and no prompt."""

    def __init__(self, dtype: torch.dtype):
        others = "bf16 or fp32" if dtype == torch.float16 else "fp32"
        name = str(dtype).removeprefix("torch.")
        mend = "use another checkpoint" if dtype == torch.float32 else f"use --dtype {others}"
        self.error = RowError("overflow", f"the model's numbers overflow in {name}: {mend}")
        self.has_begun = False

    def begin(self, overflow: Sequence[bool]) -> None:
        """Of the first prompts. Raises IdeficsError where it is all of them."""
        if not self.has_begun and all(overflow):
            raise IdeficsError(self.error.message)
        self.has_begun = True
