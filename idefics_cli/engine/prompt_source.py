"""What the engine takes: prompts and images as tensors and ids, and where a stream of them comes from.

Imports no torch and knows no text: whoever makes prompts, and whoever hands them on, may import this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from idefics_cli.ranks import Ranks


@dataclass(frozen=True)
class EncodedPrompt:
    """One row: token ids, and the pixels or bytes (3, S, S) of each of its images in order, or its latents (seq, dim).

    `image_keys` are the images' `content_key`s, computed here unless the caller knows them. The first `shared_len`
    tokens are those that further prompts of the run begin with too (instruction, shots); 0: unknown.
    """

    input_ids: list[int]
    pixels: tuple[Tensor, ...] = ()
    image_keys: tuple[bytes, ...] = ()
    shared_len: int = 0

    def __post_init__(self) -> None:
        if not self.image_keys:
            object.__setattr__(self, "image_keys", tuple(map(content_key, self.pixels)))
        assert len(self.image_keys) == len(self.pixels), (len(self.image_keys), len(self.pixels))
        assert 0 <= self.shared_len <= len(self.input_ids), (self.shared_len, len(self.input_ids))


@dataclass(frozen=True)
class EncodedChoices(EncodedPrompt):
    """A prompt and the answers to choose from: their texts, and the token ids of each after `input_ids`.

    `input_ids` are what all of them have in common, which may be a little less than the prompt.
    """

    choices: tuple[str, ...] = ()
    choice_ids: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        assert len(self.choices) == len(self.choice_ids) > 0, (self.choices, self.choice_ids)
        assert all(self.choice_ids), self.choice_ids


@dataclass(frozen=True)
class EncodedImage:
    """One image without a prompt, to be embedded: its pixels or bytes (3, S, S), and its `content_key`."""

    pixels: tuple[Tensor]
    image_keys: tuple[bytes] = field(init=False)

    def __post_init__(self) -> None:
        (pixels,) = self.pixels
        object.__setattr__(self, "image_keys", (content_key(pixels),))


def content_key(pixels: Tensor) -> bytes:
    """Equal for equal pixels, or latents."""
    data = pixels.contiguous().cpu().numpy()
    return hashlib.blake2b(data, digest_size=16, salt=str(data.shape[-1]).encode()).digest()


class PromptSource(Protocol):
    """Encoded prompts (or images) in order, each given once."""

    def take(self, most: int, wait: bool) -> list[Any]:
        """Up to `most` of them. Without `wait` those that are ready now, perhaps none; with it at least one, and none
        only at the end of the stream."""
        ...


@dataclass(frozen=True)
class SharedSource:
    """A source whose prompts all `ranks` get: what is ready depends on time, so rank 0 alone asks it."""

    source: PromptSource
    ranks: Ranks

    def take(self, most: int, wait: bool) -> list[Any]:
        return self.ranks.broadcast(self.source.take(most, wait) if self.ranks.rank == 0 else None)


@contextmanager
def shared(source: PromptSource, ranks: Ranks | None, *work: Any) -> Iterator[PromptSource]:
    """The source of a stream of `work`, which other ranks do too: see `Idefics.follow`."""
    if ranks is None:
        yield source
        return
    with ranks.working(*work):
        yield SharedSource(source, ranks)


class IterableSource:
    """Prompts of an iterable, which is taken to have them ready."""

    def __init__(self, prompts: Iterable[Any]):
        self._prompts = iter(prompts)

    def take(self, most: int, wait: bool) -> list[Any]:
        return list(islice(self._prompts, most))
