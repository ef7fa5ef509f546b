"""Prompts on their way into the engine: taken and queued, the start they share found or read, then read in batches.

Knows where keys and values go (`kv_cache.py`), and nothing of beams or of text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, takewhile

import torch
from torch import Tensor

from idefics_cli.engine.kv_cache import NO_PREFIX, BoundedCache, KeyValues, Prefix
from idefics_cli.engine.options import Vocabulary
from idefics_cli.engine.prompt_source import EncodedChoices, EncodedPrompt, PromptSource
from idefics_cli.engine.transfer import send
from idefics_cli.engine.tree_attention import PrefillMemory
from idefics_cli.engine.varlen import PackedRows
from idefics_cli.model.kv_interface import image_attention_mask, image_visibility
from idefics_cli.model.modeling import IdeficsForVisionText2Text

WINDOWS_AHEAD = 4  # prompts looked at ahead, in multiples of the rows, to group them by length
CHOICE_TOKENS_PER_ROW = 512  # what stands after a prompt in one row; more choices are more rows


@dataclass(frozen=True, eq=False)
class QueuedPrompt:
    """A prompt in the queue, by its number in the stream, with its choices from number `first_choice` on, if any.

    `content` is what its tokens stand for, images by what they show; `shared` is the start of it that other prompts
    have too.
    """

    index: int
    prompt: EncodedPrompt = field(repr=False)
    content: tuple[int, ...] = field(repr=False)
    shared: tuple[int, ...] = field(repr=False)
    choice_ids: tuple[tuple[int, ...], ...] = field(repr=False)
    first_choice: int = 0

    @classmethod
    def of(cls, index: int, prompt: EncodedPrompt, image_token_id: int) -> QueuedPrompt:
        assert prompt.input_ids, "a prompt has at least one token"
        num_images, keys = prompt.input_ids.count(image_token_id), prompt.image_keys
        assert num_images == len(keys), f"{num_images} image tokens for {len(keys)} images"
        in_order = iter(keys)
        content = tuple(
            -1 - int.from_bytes(next(in_order), "big") if token_id == image_token_id else token_id
            for token_id in prompt.input_ids
        )
        choice_ids = prompt.choice_ids if isinstance(prompt, EncodedChoices) else ()
        return cls(index, prompt, content, content[: min(prompt.shared_len, len(content) - 1)], choice_ids)

    @property
    def tail(self) -> list[int]:
        """What is read after the prompt: each choice without its last token, which nothing follows."""
        return [token_id for ids in self.choice_ids for token_id in ids[:-1]]

    def split(self, at: int) -> list[QueuedPrompt]:
        """The prompt twice, with its first `at` choices and with the others."""
        return [
            replace(self, choice_ids=self.choice_ids[:at]),
            replace(self, choice_ids=self.choice_ids[at:], first_choice=self.first_choice + at),
        ]

    def in_rows(self) -> list[QueuedPrompt]:
        """The prompt once for every `CHOICE_TOKENS_PER_ROW` tokens of its choices, each with at least one choice."""
        rows, rest = [], self
        while sum(map(len, rest.choice_ids)) > CHOICE_TOKENS_PER_ROW and len(rest.choice_ids) > 1:
            lengths = accumulate(map(len, rest.choice_ids))
            row, rest = rest.split(max(1, sum(length <= CHOICE_TOKENS_PER_ROW for length in lengths)))
            rows.append(row)
        return [*rows, rest]


class PromptQueue:
    """Prompts of a source, numbered from 0 as they are taken, a few batches ahead.

    Those that do not say what they share are given the common start of those that first came together.
    """

    def __init__(self, source: PromptSource, image_token_id: int):
        self.prompts: list[QueuedPrompt] = []
        self._source, self._image_token_id = source, image_token_id
        self._num_taken = 0
        self._start: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def look_ahead(self, batch_size: int, idle: bool) -> None:
        """Take more, sorted by length after what the last look ahead has left; wait for them if all is `idle`."""
        most = WINDOWS_AHEAD * batch_size - len(self.prompts)
        taken = self._numbered(self._source.take(most, wait=idle and not self.prompts))
        rows = [row for prompt in taken for row in prompt.in_rows()]
        self.prompts += sorted(rows, key=lambda row: len(row.content) + len(row.tail))

    def _numbered(self, taken: Sequence[EncodedPrompt]) -> list[QueuedPrompt]:
        prompts = [
            QueuedPrompt.of(number, prompt, self._image_token_id)
            for number, prompt in enumerate(taken, start=self._num_taken)
        ]
        self._num_taken += len(prompts)
        if self._start is None and len(prompts) > 1:
            self._start = common_start(prompts)
        return [self._sharing_start(prompt) for prompt in prompts]

    def _sharing_start(self, prompt: QueuedPrompt) -> QueuedPrompt:
        start = self._start
        if not start or prompt.shared or len(prompt.content) <= len(start) or prompt.content[: len(start)] != start:
            return prompt
        return replace(prompt, shared=start)

    def pop_group(self, most: int) -> list[QueuedPrompt]:
        """Take out the first and those after it that share its prefix, at most so many."""
        group = [prompt for prompt in self.prompts if prompt.shared == self.prompts[0].shared][:most]
        chosen = set(group)
        self.prompts = [prompt for prompt in self.prompts if prompt not in chosen]
        return group


def common_start(prompts: Sequence[QueuedPrompt]) -> tuple[int, ...]:
    """The longest content with which all begin, where it is most of one of them; else nothing.

    To read a few tokens again costs less than attention in two parts. Every prompt keeps a token of its own.
    """
    contents = [prompt.content for prompt in prompts]
    shortest, first, last = min(map(len, contents)), min(contents), max(contents)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))  # in these two, and all between
    length = min(sum(1 for _ in same), shortest - 1)
    return first[:length] if 2 * length > shortest else ()


class PrefixCache(BoundedCache[Prefix]):
    """Starts that prompts share, each read once and kept within `max_bytes`, the least recently used dropped."""

    def __init__(self, max_bytes: int, prefill: Callable[[QueuedPrompt], Prefix]):
        super().__init__(max_bytes)
        self._prefill = prefill

    def get_or_prefill(self, prompt: QueuedPrompt) -> Prefix:
        """What the prompt is read after; another content than it says it shares only costs time."""
        if not prompt.shared:
            return NO_PREFIX
        prefix = self.get(prompt.shared)
        if prefix is None:
            prefix = self._prefill(prompt)
            self.put(prompt.shared, prefix, prefix.num_bytes)
        return prefix


class PrefillBatch:
    """What is read of some prompts after `prefix`: their own tokens and their tails.

    Each token sees the last image at or before it; the one that the prefix ended in comes before the prompts' own.
    """

    def __init__(self, prompts: Sequence[QueuedPrompt], prefix: Prefix, vocabulary: Vocabulary):
        self.prefix, self.vocabulary = prefix, vocabulary
        own_ids = [prompt.prompt.input_ids[prefix.length :] for prompt in prompts]
        self.prompt_lengths = [len(ids) for ids in own_ids]
        self.own_ids = [[*ids, *prompt.tail] for ids, prompt in zip(own_ids, prompts, strict=True)]
        self.lengths = [len(ids) for ids in self.own_ids]
        self.inherited = [] if prefix.last_image is None else [prefix.last_image]
        self.image_keys = [[*self.inherited, *prompt.prompt.image_keys[prefix.num_images :]] for prompt in prompts]
        self.most_images = max(1, *map(len, self.image_keys))

    @property
    def wanted(self) -> list[bytes]:
        """The distinct images in sight."""
        return list(dict.fromkeys(key for keys in self.image_keys for key in keys))

    def arrange(self, images: Mapping[bytes, KeyValues]) -> list[list[KeyValues]]:
        """What each row sees of `images`, as many for all; `images` has all that are wanted, or one that nothing sees.

        A row's own first image fills it up, so that non-finite values stay within their row; where it has none, any
        does: what is seen of that is thrown away.
        """
        any_image = next(iter(images.values()))
        seen = [[images[key] for key in keys] or [any_image] for keys in self.image_keys]
        return [row + row[:1] * (self.most_images - len(row)) for row in seen]

    def last_images(self, images: Sequence[Sequence[KeyValues]]) -> list[KeyValues]:
        """What each row still sees after its prompt: zeros for nothing, of which attention makes zeros."""
        last = [row[max(len(keys) - 1, 0)] for row, keys in zip(images, self.image_keys, strict=True)]
        seen = zip(last, self.sees_image().tolist(), strict=True)
        return [image if sees else tuple(map(torch.zeros_like, image)) for image, sees in seen]

    def sees_image(self) -> Tensor:
        """(rows,): whether tokens after the prompt see an image."""
        last = torch.tensor(self.lengths) - 1
        return self._sees(self._padded())[torch.arange(len(last)), last].any(dim=-1)

    def forward(
        self,
        model: IdeficsForVisionText2Text,
        images: Sequence[Sequence[KeyValues]],
        key_values: Sequence[Tensor] = (),
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> tuple[PackedRows, Tensor]:
        """The one pass over all rows, packed: hidden states (1, packed, hidden).

        `key_values` and `mask` are `PrefillMemory`'s; `offsets` (rows, width) are the tokens' places after the prefix,
        by default in order.
        """
        device = model.device
        input_ids = send(self._padded(), device)  # (rows, width)
        image_mask, image_gate = image_visibility(self._sees(input_ids), images[0][0][0].shape[2], model.dtype)
        rows = PackedRows(self.lengths, device, model.model.padded_length(sum(self.lengths)))
        memory = PrefillMemory(self.prefix, rows, key_values, images, image_mask, image_gate, mask)
        if offsets is None:
            offsets = torch.arange(rows.width, device=device).expand_as(input_ids)
        embeddings = model.model.embed_tokens(rows.pack(input_ids))  # (1, packed, hidden)
        return rows, model.model.decode(embeddings, rows.pack(offsets + self.prefix.length), memory)

    def _padded(self) -> Tensor:
        width, pad = max(self.lengths), self.vocabulary.pad_token_id
        return torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in self.own_ids])

    def _sees(self, input_ids: Tensor) -> Tensor:
        """(rows, tokens, images)."""
        image, end = self.vocabulary.image_token_id, self.vocabulary.end_token_ids[0]
        return image_attention_mask(input_ids, self.most_images, image, end, sees_first=bool(self.inherited))
