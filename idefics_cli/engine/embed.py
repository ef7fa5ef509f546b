"""The vision side alone: images in, their latents out, several at a time and each distinct image once.

Latents are what the engine keeps of an image, and takes in its place: the resampler's output or, in a model without
one, the vision tower's last hidden states. Knows nothing of text and files.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from idefics_cli.engine.engine import Engine
from idefics_cli.engine.memory_budget import AdaptiveBatchSize, attempt
from idefics_cli.engine.prompt_source import EncodedImage, PromptSource
from idefics_cli.engine.row_errors import TOO_LARGE, Overflows
from idefics_cli.errors import RowError


def embed(engine: Engine, source: PromptSource) -> Iterator[tuple[int, Tensor | RowError]]:
    """(number, latents (seq, dim)) of each image, in order; numbers count from 0 as they are taken.

    Latents have the model's dtype and are on the host. A RowError stands in the place of an image that the device's
    memory does not hold alone, or whose values are not finite; IdeficsError is raised where those of all first ones are
    not.
    """
    num_taken, overflows = 0, Overflows(engine.model.dtype)
    batch_size = AdaptiveBatchSize(engine.batch_size.now)
    while taken := source.take(batch_size.now, wait=True):
        while taken:
            batch = taken[: batch_size.now]
            with engine.turn:
                latents = attempt(partial(_latents, engine, batch))
                if latents is None:
                    engine.free_memory(prefixes=False)  # which all ranks have, or none
            if latents is not None:
                batch_size.record_success(len(batch))
            else:
                if batch_size.shrink(len(batch)):
                    continue
                batch_size.reset()
            yield from enumerate(_outcomes(latents, overflows), start=num_taken)
            num_taken, taken = num_taken + len(batch), taken[len(batch) :]


@torch.no_grad()
def _latents(engine: Engine, batch: list[EncodedImage]) -> Tensor:
    """(images, seq, dim)"""
    keys = [each.image_keys[0] for each in batch]
    distinct = list(dict.fromkeys(keys))
    return engine.encode_images(batch, distinct).cpu()[[distinct.index(key) for key in keys]]


def _outcomes(latents: Tensor | None, overflows: Overflows) -> list[Tensor | RowError]:
    if latents is None:
        return [TOO_LARGE]
    is_finite = latents.isfinite().all(dim=(1, 2)).tolist()
    overflows.look_at([not each for each in is_finite])
    return [each if is_good else overflows.error for each, is_good in zip(latents, is_finite, strict=True)]
