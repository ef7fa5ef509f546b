"""Reading prompts: the one forward pass over a group's own tokens, behind what they share.

Prompts come with their images' content known, so that equal starts and equal images are found by comparing. Knows
where keys and values go (`cache.py`), and nothing of beams, of the stream that prompts come from, or of text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from idefics_cli.engine.kv_cache import NO_PREFIX, PrefillMemory, RowImages, SharedPrefix
from idefics_cli.engine.options import Vocabulary
from idefics_cli.engine.prompt_source import EncodedPrompt
from idefics_cli.engine.varlen import RaggedRows
from idefics_cli.model.kv_interface import image_attention_mask, image_visibility
from idefics_cli.model.modeling import IdeficsForVisionText2Text


@dataclass(frozen=True)
class Waiting:
    """A prompt in line. `content` is what its tokens stand for, images by what they show: equal starts are shared."""

    index: int
    input_ids: tuple[int, ...]
    image_keys: tuple[bytes, ...]
    pixels: tuple[Tensor, ...] = field(repr=False)
    content: tuple[int, ...] = field(repr=False)

    @classmethod
    def of(cls, index: int, prompt: EncodedPrompt, image_token_id: int) -> Waiting:
        assert prompt.input_ids, "a prompt has at least one token"
        num_images, keys = prompt.input_ids.count(image_token_id), prompt.image_keys
        assert num_images == len(keys) == len(prompt.pixels), (num_images, len(keys), len(prompt.pixels))
        in_order = iter(keys)
        content = tuple(
            -1 - int.from_bytes(next(in_order), "big") if token_id == image_token_id else token_id
            for token_id in prompt.input_ids
        )
        return cls(index, tuple(prompt.input_ids), keys, prompt.pixels, content)

    def goes_on_from(self, start: tuple[int, ...]) -> bool:
        """Whether the prompt begins with it and has a token of its own behind it."""
        return len(self.content) > len(start) and self.content[: len(start)] == start


@dataclass(frozen=True)
class Prefix:
    """A start that prompts share: its content, the number of its images, and its keys and values."""

    content: tuple[int, ...]
    num_images: int
    shared: SharedPrefix

    def starts(self, prompt: Waiting) -> bool:
        """Whether the prompt may be read behind it."""
        return prompt.goes_on_from(self.content)


NOTHING_SHARED = Prefix((), 0, NO_PREFIX)


def common_start(prompts: Sequence[Waiting], sharing: int) -> tuple[int, ...]:
    """The longest content with which the first prompt and at least so many of all begin; nothing for one alone.

    It is short of the whole of any of them.
    """
    if len(prompts) < 2:
        return ()
    first = prompts[0].content
    lengths = sorted((shared_length(first, prompt.content) for prompt in prompts), reverse=True)
    return first[: lengths[max(2, sharing) - 1]]


def shared_length(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many tokens two prompts begin with, leaving each at least one of its own."""
    most = min(len(first), len(second)) - 1
    if first[:most] == second[:most]:
        return most
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


class Reading:
    """What is read of a group of prompts: their own tokens behind `prefix`, or their start up to `stop`.

    Each token sees the last image at or before it; the one that the prefix ended in comes before the prompts' own.
    """

    def __init__(
        self,
        prompts: Sequence[Waiting],
        prefix: Prefix,
        vocabulary: Vocabulary,
        stop: int | None = None,
    ):
        self.prefix, self.vocabulary = prefix, vocabulary
        self.own_ids = [prompt.input_ids[len(prefix.content) : stop] for prompt in prompts]
        self.lengths = [len(ids) for ids in self.own_ids]
        self.inherited = [prefix.shared.last_image] if prefix.shared.last_image is not None else []
        self.image_keys = [
            [*self.inherited, *prompt.image_keys[prefix.num_images :][: ids.count(vocabulary.image_token_id)]]
            for prompt, ids in zip(prompts, self.own_ids, strict=True)
        ]
        self.most_images = max(1, *map(len, self.image_keys))

    @property
    def wanted(self) -> list[bytes]:
        """The distinct images in sight."""
        return list(dict.fromkeys(key for keys in self.image_keys for key in keys))

    def arrange(self, images: Mapping[bytes, Tensor]) -> RowImages:
        """What each row sees of `images`, which has all that are wanted, and one that nobody sees where none is.

        A row's own first image fills it up, so that numbers that overflow stay within their row; where it has none, any
        does: what is seen of that is thrown away.
        """
        any_image = next(iter(images.values()))
        seen = [[images[key] for key in keys] or [any_image] for keys in self.image_keys]
        return RowImages([row + row[:1] * (self.most_images - len(row)) for row in seen])

    def run(self, model: IdeficsForVisionText2Text, images: RowImages, key_values: Sequence[Tensor]) -> Tensor:
        """The last tokens' logits, (rows, vocabulary).

        `key_values`, for each layer (2, rows, heads, width, head_dim), is filled; the longest row has `width` tokens.
        """
        input_ids = self._padded().to(model.device)  # (rows, width)
        image_mask, image_gate = image_visibility(self._sees(input_ids), images.seq_len, model.dtype)
        rows = RaggedRows(self.lengths, model.device, model.model.line_length(sum(self.lengths)))
        memory = PrefillMemory(self.prefix.shared, key_values, images, image_mask, image_gate, rows)
        positions = torch.arange(rows.width, device=model.device).expand_as(input_ids) + self.prefix.shared.length
        embeddings = model.model.embed_tokens(rows.in_line(input_ids))  # (1, line, hidden)
        hidden_states = model.model.decode(embeddings, rows.in_line(positions), memory)
        return model.lm_head(rows.last(hidden_states))

    def last_images(self, images: RowImages) -> list[Tensor]:
        """What each row still sees behind its prompt, (layers, 2, heads, seq, head_dim) each."""
        return [row[max(len(keys) - 1, 0)] for row, keys in zip(images.rows, self.image_keys, strict=True)]

    def sees_image(self) -> Tensor:
        """(rows,): whether tokens behind the prompt see an image."""
        return self._last(self._sees(self._padded())).any(dim=-1)

    def _padded(self) -> Tensor:
        width = max(self.lengths)
        pad = self.vocabulary.pad_token_id
        return torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in self.own_ids])

    def _last(self, states: Tensor) -> Tensor:
        """(rows, tokens, ...) -> (rows, ...) at each row's last token."""
        last = torch.tensor(self.lengths, device=states.device) - 1
        return states[torch.arange(len(last), device=states.device), last]

    def _sees(self, input_ids: Tensor) -> Tensor:
        """(rows, tokens, images)."""
        image, end = self.vocabulary.image_token_id, self.vocabulary.end_token_ids[0]
        return image_attention_mask(input_ids, self.most_images, image, end, sees_first=bool(self.inherited))
