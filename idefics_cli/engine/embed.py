"""The vision side alone: images in, their latents out, several at a time and each distinct image once.

Latents are what the engine keeps of an image, and takes in its place: the resampler's output or, in a model without
one, the vision tower's last hidden states. Knows nothing of text and files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from idefics_cli.engine.memory_budget import Limit
from idefics_cli.engine.row_errors import TOO_LARGE, Overflows
from idefics_cli.errors import RowError
from idefics_cli.model.memory_errors import naming_memory_errors

if TYPE_CHECKING:
    from idefics_cli.engine.engine import Engine
    from idefics_cli.engine.prompt_source import EncodedImage, PromptSource


def embed(engine: Engine, source: PromptSource) -> Iterator[tuple[int, Tensor | RowError]]:
    """(number, latents (seq, dim)) of each thing with one image, in order; numbers count from 0 as they are taken.

    Latents have the model's dtype and are on the host. A RowError stands in the place of an image that the device's
    memory does not hold alone, or whose numbers overflow; IdeficsError is raised where those of the first ones do all.
    """
    num_taken, limit, overflows = 0, Limit(engine.row_limit.now), Overflows(engine.model.dtype)
    while taken := source.take(limit.now, wait=True):
        while taken:
            batch, latents = taken[: limit.now], _latents(engine, taken[: limit.now])
            if latents is None and len(batch) > 1:
                limit.halve(len(batch))
                continue
            if latents is None:
                limit.forget()
            else:
                limit.end_well(len(batch))
            yield from enumerate(_outcomes(latents, overflows), start=num_taken)
            num_taken, taken = num_taken + len(batch), taken[len(batch) :]


def _outcomes(latents: Tensor | None, overflows: Overflows) -> list[Tensor | RowError]:
    if latents is None:
        return [TOO_LARGE]
    is_finite = latents.isfinite().all(dim=(1, 2)).tolist()
    overflows.look_at([not each for each in is_finite])
    return [each if is_good else overflows.error for each, is_good in zip(latents, is_finite, strict=True)]


def _latents(engine: Engine, batch: list[EncodedImage]) -> Tensor | None:
    """(images, seq, dim), or None where memory has ended."""
    try:
        with torch.no_grad(), naming_memory_errors():
            found = engine.encode(batch, list(dict.fromkeys(each.image_keys[0] for each in batch)))
    except torch.OutOfMemoryError:
        found = None  # handled below, when the exception and the tensors it holds are gone
    if found is None:
        engine.free_memory()
        return None
    place = {key: number for number, key in enumerate(dict.fromkeys(each.image_keys[0] for each in batch))}
    return found.cpu()[[place[each.image_keys[0]] for each in batch]]
