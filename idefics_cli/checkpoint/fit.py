"""Whether a model fits on devices of some memory, in each number format and quantization: by names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from idefics_cli.errors import DeviceError

if TYPE_CHECKING:
    from idefics_cli.model.modeling import IdeficsForVisionText2Text

NUM_BEAMS = 3
MOST_DEVICES = 64
FORMATS = {  # the quantization and torch's dtype of all else, and how to ask for it
    "fp32": (None, "float32", "--dtype fp32"),
    "bf16 or fp16": (None, "bfloat16", "--dtype bf16"),
    "int8": ("int8", "bfloat16", "--quantize int8"),
    "nf4": ("nf4", "bfloat16", "--quantize nf4"),
}


@dataclass(frozen=True)
class Fits:
    """`model`, on the meta device, on devices of `memory` bytes each."""

    model: IdeficsForVisionText2Text
    memory: int
    is_cuda: bool

    def weights(self, name: str, number: int) -> tuple[int, int]:
        """Bytes of all and of those on each of `number` devices."""
        import torch

        from idefics_cli.checkpoint.quantize import weight_bytes

        kind, dtype = FORMATS[name][0], getattr(torch, FORMATS[name][1])
        total, each = (weight_bytes(self.model, kind, dtype, size) for size in (1, number))
        return total, each if can_share(name) else total

    def rows(self, name: str, number: int) -> int:
        """How many are decoded at a time beside the weights; 0: it does not fit."""
        import torch

        from idefics_cli.engine.memory_budget import MemoryPlan

        _, dtype, _ = FORMATS[name]
        plan = MemoryPlan.of(self.model.config, 0, getattr(torch, dtype).itemsize, number if can_share(name) else 1)
        return max(0, plan.rows_at_most(self.memory - self.weights(name, number)[1], self.is_cuda, NUM_BEAMS))

    def remedies(self, name: str, number: int) -> Iterator[str]:
        """What would make it fit: smaller weights, or more devices."""
        later = list(FORMATS)[list(FORMATS).index(name) + 1 :]
        yield from (FORMATS[each][2] for each in later if self.rows(each, number))
        numbers = (each for each in range(number + 1, MOST_DEVICES + 1) if can_split(self.model, each))
        enough = next((each for each in numbers if self.rows(name, each)), None) if can_share(name) else None
        if enough is not None:
            yield f"torchrun --nproc-per-node {enough}"

    def in_words(self, name: str, number: int) -> str:
        total, each = self.weights(name, number)
        rows, options = self.rows(name, number), " or ".join(self.remedies(name, number))
        place = "on each" if can_share(name) else "on one device"
        other = options or ("a larger device" if FORMATS[name][0] else "--device-map auto, slowly")
        verdict = f"fits, {rows} rows at a time" if rows else f"does not fit: {other}"
        return f"{total / 1e6:,.1f} MB of weights, {each / 1e6:,.1f} MB {place}; {verdict}"


def can_share(name: str) -> bool:
    """Whether several processes can hold a part of such weights each."""
    return FORMATS[name][0] != "nf4"


def can_split(model: IdeficsForVisionText2Text, number: int) -> bool:
    from idefics_cli.model.parallel import require_divisible

    try:
        require_divisible(model.config, number)
    except DeviceError:
        return False
    return True


def on_devices(model: IdeficsForVisionText2Text, number: int, memory: int, is_cuda: bool) -> dict[str, str]:
    """A line for each format. Raises DeviceError where the model cannot be split over so many."""
    from idefics_cli.model.parallel import require_divisible

    require_divisible(model.config, number)
    fits = Fits(model, memory, is_cuda)
    return {f"{name} on {number} of {memory / 1e9:,.1f} GB": fits.in_words(name, number) for name in FORMATS}
