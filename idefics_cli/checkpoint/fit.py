"""Whether a model fits on devices of some memory, in each number format and quantization: by names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from idefics_cli.errors import DeviceError

if TYPE_CHECKING:
    from torch import nn

    from idefics_cli.model.modeling import IdeficsForVisionText2Text

NUM_BEAMS = 3
MOST_DEVICES = 64
BLOCK = 64  # weights of nf4 under one scale
FORMATS = {  # bits of a weight of the layers that are split (and quantized), bytes of all others, and how to ask for it
    "fp32": (32, 4, "--dtype fp32"),
    "bf16 or fp16": (16, 2, "--dtype bf16"),
    "int8": (8, 2, "--quantize int8"),
    "nf4": (4, 2, "--quantize nf4"),
}


@dataclass(frozen=True)
class Fits:
    """`model`, on the meta device, on devices of `memory` bytes each."""

    model: IdeficsForVisionText2Text
    memory: int
    is_cuda: bool

    def weights(self, name: str, number: int) -> tuple[int, int]:
        """Bytes of all and of those on each of `number` devices."""
        from idefics_cli.model.parallel import style_of

        total = each = 0.0
        for parameter_name, parameter in self.model.named_parameters():
            is_split = style_of(parameter_name.removesuffix(".weight")) is not None
            size = bytes_of(parameter, name, is_split)
            total, each = total + size, each + (size / number if is_split else size)
        return int(total), int(each)

    def rows(self, name: str, number: int) -> int:
        """How many are decoded at a time beside the weights; 0: it does not fit."""
        from idefics_cli.engine.memory_budget import MemoryPlan

        plan = MemoryPlan.of(self.model.config, 0, FORMATS[name][1], number)
        return max(0, plan.rows_at_most(self.memory - self.weights(name, number)[1], self.is_cuda, NUM_BEAMS))

    def remedies(self, name: str, number: int) -> Iterator[str]:
        """What would make it fit: smaller weights on as many devices, or more devices."""
        later = list(FORMATS)[list(FORMATS).index(name) + 1 :]
        yield from (FORMATS[each][2] for each in later if self.rows(each, number))
        numbers = (each for each in range(number + 1, MOST_DEVICES + 1) if can_split(self.model, each))
        enough = next((each for each in numbers if self.rows(name, each)), None)
        if enough is not None:
            yield f"torchrun --nproc-per-node {enough}"

    def in_words(self, name: str, number: int) -> str:
        total, each = self.weights(name, number)
        rows, options = self.rows(name, number), " or ".join(self.remedies(name, number))
        verdict = f"fits, {rows} rows at a time" if rows else f"does not fit: {options or '--device-map auto, slowly'}"
        return f"{total / 1e6:,.1f} MB of weights, {each / 1e6:,.1f} MB on each; {verdict}"


def bytes_of(parameter: nn.Parameter, name: str, is_quantized: bool) -> float:
    """With the scales beside quantized weights, in fp32: one for each output of int8, one for each block of nf4."""
    bits, itemsize, _ = FORMATS[name]
    if not is_quantized or bits >= 16:
        return parameter.numel() * itemsize
    return parameter.numel() * bits / 8 + 4 * (len(parameter) if bits == 8 else parameter.numel() / BLOCK)


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
