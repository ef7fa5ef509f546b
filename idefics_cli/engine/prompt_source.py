"""Where an engine's prompts come from. Knows nothing of what is done with them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Protocol

from torch import Tensor


class HasImages(Protocol):
    """Images in order, and keys equal for equal ones: pixels (3, side, side), or latents (seq, dim) in their place."""

    @property
    def pixels(self) -> tuple[Tensor, ...]: ...

    @property
    def image_keys(self) -> tuple[bytes, ...]: ...


class Prompt(HasImages, Protocol):
    """Token ids, with those of the images among them."""

    @property
    def input_ids(self) -> list[int]: ...


class PromptSource(Protocol):
    """Prompts in order, each given once."""

    def take(self, most: int, wait: bool) -> list[Prompt]:
        """Up to `most` prompts. Without `wait` those that are ready now, perhaps none; with it at least one, and none
        only at the end of the stream."""


class IterableSource:
    """Prompts of an iterable, which is taken to have them ready."""

    def __init__(self, prompts: Iterable[Prompt]):
        self._prompts = iter(prompts)

    def take(self, most: int, wait: bool) -> list[Prompt]:
        return list(islice(self._prompts, most))
