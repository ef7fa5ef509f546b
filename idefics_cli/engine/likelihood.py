"""How likely a model finds given answers: each prompt is read once, with all its choices after it in one pass.

A row holds the prompt's own tokens and after them those of every choice; a token sees the prompt and what stands before
it in its own choice, as if that were alone. So a choice costs its own tokens, and one of a single token costs nothing:
its probability is known at the prompt's end. Prompts come in as token ids with pixels, sums of log-probabilities go
out. Knows nothing of text, files and decoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from idefics_cli.engine.engine import Engine
from idefics_cli.engine.memory_budget import AdaptiveBatchSize, attempt
from idefics_cli.engine.prefill import Intake, PrefillBatch, QueuedPrompt
from idefics_cli.engine.prompt_source import EncodedChoices, PromptSource
from idefics_cli.engine.row_errors import TOO_LARGE, Overflows
from idefics_cli.engine.scheduler import WINDOWS_AHEAD
from idefics_cli.errors import RowError
from idefics_cli.model.modeling import IdeficsForVisionText2Text

CHOICE_TOKENS_PER_ROW = 512  # what stands after a prompt in one row; more choices are more rows
PLACES_AT_ONCE = 256  # so many tokens have their logits over the whole vocabulary at a time

Choices = Sequence[tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Part:
    """Some of a prompt's choices, those from number `first` on: what one row reads."""

    prompt: QueuedPrompt
    first: int
    choice_ids: tuple[tuple[int, ...], ...]

    @property
    def tail(self) -> list[int]:
        """What is read after the prompt: each choice without its last token, which nothing follows."""
        return [token_id for ids in self.choice_ids for token_id in ids[:-1]]

    def split(self, at: int) -> list[Part]:
        return [
            replace(self, choice_ids=self.choice_ids[:at]),
            replace(self, first=self.first + at, choice_ids=self.choice_ids[at:]),
        ]


def parts_of(prompt: QueuedPrompt, choice_ids: Choices, most_tokens: int) -> list[Part]:
    """The choices in their order, as many to a part as have `most_tokens` together, and at least one."""
    parts, rest = [], Part(prompt, 0, tuple(choice_ids))
    num_tokens, length = 0, 0
    for ids in choice_ids:
        if length and num_tokens + len(ids) > most_tokens:
            part, rest = rest.split(length)
            parts.append(part)
            num_tokens, length = 0, 0
        num_tokens, length = num_tokens + len(ids), length + 1
    return [*parts, rest]


# ---- one pass


def log_likelihoods(
    model: IdeficsForVisionText2Text,
    batch: PrefillBatch,
    choices: Sequence[Choices],
    images: Sequence[Sequence[Tensor]],
) -> list[list[float]]:
    """For each row those of its choices, whose tails the batch has after its prompts."""
    owners, offsets = (table.to(model.device) for table in places(batch.prompt_lengths, choices))
    rows, hidden_states = batch.forward(model, images, mask=packed_mask(owners, model.dtype), offsets=offsets)
    tokens = [
        start + prompt_length - 1 + place  # at a prompt's last token and at each of its choices' one is predicted
        for start, prompt_length, some in zip(rows.starts, batch.prompt_lengths, choices, strict=True)
        for place in range(1 + sum(len(ids) - 1 for ids in some))
    ]
    place_of, token_ids, numbers = map(torch.tensor, zip(*predictions(choices), strict=True))
    found = log_probabilities(model, hidden_states[0, torch.tensor(tokens)], place_of, token_ids)
    sums = torch.zeros(sum(map(len, choices)), dtype=torch.float64).index_add(0, numbers, found)
    return [each.tolist() for each in sums.split([len(some) for some in choices])]


def places(prompt_lengths: Sequence[int], choices: Sequence[Choices]) -> tuple[Tensor, Tensor]:
    """Whose each token is, as `packed_mask` has it, and its place after the prefix; both (rows, tokens)."""
    tails = [[len(ids) - 1 for ids in some] for some in choices]
    width = max(length + sum(tail) for length, tail in zip(prompt_lengths, tails, strict=True))
    owners = torch.full((len(choices), width), -1)
    offsets = torch.zeros_like(owners)
    for row, (prompt_length, tail) in enumerate(zip(prompt_lengths, tails, strict=True)):
        numbers = torch.tensor([0, *range(1, len(tail) + 1)]).repeat_interleave(torch.tensor([prompt_length, *tail]))
        owners[row, : len(numbers)] = numbers
        steps = [torch.arange(prompt_length), *(prompt_length + torch.arange(length) for length in tail)]
        offsets[row, : len(numbers)] = torch.cat(steps)
    return owners, offsets


def packed_mask(owners: Tensor, dtype: torch.dtype) -> Tensor:
    """What tokens see: those before them of the prompt and of their own choice. Additive, (rows, 1, tokens, tokens).

    `owners` (rows, tokens) says whose a token is: 0 the prompt's, from 1 on a choice's, -1 padding.
    """
    num_tokens = owners.shape[1]
    before = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=owners.device).tril()
    visible = before & ((owners[:, None, :] == 0) | (owners[:, None, :] == owners[:, :, None]))
    mask = torch.zeros(visible.shape, dtype=dtype, device=owners.device).masked_fill(~visible, -torch.inf)
    return mask[:, None]


def predictions(choices: Sequence[Choices]) -> Iterator[tuple[int, int, int]]:
    """(place, token predicted there, number of its choice among all rows') for every token of every choice."""
    number = end_of_prompt = 0
    for some in choices:
        place = end_of_prompt
        for ids in some:
            yield end_of_prompt, ids[0], number
            for token_id in ids[1:]:
                place += 1
                yield place, token_id, number
            number += 1
        end_of_prompt = place + 1


def log_probabilities(model: IdeficsForVisionText2Text, states: Tensor, place_of: Tensor, token_ids: Tensor) -> Tensor:
    """Those of `token_ids` (tokens,), each at its place among `states` (places, hidden); float64, on the host.

    Not finite where the model's values are not.
    """
    found = torch.empty(len(token_ids), dtype=torch.float64)
    for first in range(0, len(states), PLACES_AT_ONCE):
        here = (place_of >= first) & (place_of < first + PLACES_AT_ONCE)
        logits = model.lm_head(states[first : first + PLACES_AT_ONCE]).float()  # (places, vocabulary)
        found[here] = logits.log_softmax(dim=-1)[place_of[here] - first, token_ids[here]].double().cpu()
    return found


# ---- a stream of prompts


class Scoring:
    """One run over a stream of prompts with choices. The engine's caches and bounds hold for it too."""

    def __init__(self, engine: Engine):
        self.engine, self.batch_size = engine, AdaptiveBatchSize(engine.batch_size.now)
        self.overflows = Overflows(engine.model.dtype)
        self.queue: list[Part] = []
        self.scores: dict[int, dict[int, float]] = {}  # by number of the prompt and of the choice

    def run(self, source: PromptSource) -> Iterator[tuple[int, EncodedChoices, list[float] | RowError]]:
        """(number, prompt, log-likelihood of each choice) in the order of finishing, numbers in that of taking.

        One that the device's memory does not hold even alone, or whose values are not finite, has a RowError in their
        place; IdeficsError is raised where none of the first prompts' are.
        """
        intake = Intake(source, self.engine.vocabulary.image_token_id)
        while True:
            self._look_ahead(intake)
            if not self.queue:
                return
            for prompt in self._score_some():
                yield prompt.index, prompt.prompt, self._outcome(self.scores.pop(prompt.index))

    def _outcome(self, scores: dict[int, float]) -> list[float] | RowError:
        if not scores:
            return TOO_LARGE
        found = [scores[choice] for choice in sorted(scores)]
        return found if all(map(math.isfinite, found)) else self.overflows.error

    def _look_ahead(self, intake: Intake) -> None:
        """Lengthen the queue, sorted by length after what the last look ahead has left in it."""
        if len(self.queue) >= self.batch_size.now:
            return
        most = WINDOWS_AHEAD * self.batch_size.now - len(self.queue)
        taken = intake.take(most, wait=not self.queue)
        self.scores |= {prompt.index: {} for prompt in taken}
        parts = [part for each in taken for part in parts_of(each, each.prompt.choice_ids, CHOICE_TOKENS_PER_ROW)]
        self.queue += sorted(parts, key=lambda part: len(part.prompt.content) + len(part.tail))

    def _score_some(self) -> list[QueuedPrompt]:
        """Read the first in the queue and those that share its prefix -> the prompts that are finished by it."""
        shared = self.queue[0].prompt.shared
        group = [part for part in self.queue if part.prompt.shared == shared][: self.batch_size.now]
        found = attempt(partial(self._log_likelihoods, group))
        if found is None:
            return self._back_off(group)
        self.batch_size.record_success(len(group))
        self.overflows.look_at([not all(map(math.isfinite, scores)) for scores in found])
        self._drop(group)
        for part, scores in zip(group, found, strict=True):
            self.scores[part.prompt.index].update(enumerate(scores, start=part.first))
        prompts = dict.fromkeys(part.prompt for part in group)
        return [each for each in prompts if len(self.scores[each.index]) == len(each.prompt.choice_ids)]

    @torch.inference_mode()
    def _log_likelihoods(self, group: Sequence[Part]) -> list[list[float]]:
        engine, prompts = self.engine, [part.prompt for part in group]
        prefix = engine.prefixes.get_or_prefill(prompts[0])
        batch = PrefillBatch(prompts, prefix, engine.vocabulary, tails=[part.tail for part in group])
        queued = [part.prompt for part in self.queue]  # the group among them
        images = batch.arrange(engine.images(prompts, batch.wanted, ahead=queued))
        with engine.timed("prefill"):
            found = log_likelihoods(engine.model, batch, [part.choice_ids for part in group], images)
        engine.times.prompt_tokens += sum(batch.lengths)
        return found

    def _drop(self, group: Sequence[Part]) -> None:
        done = set(group)
        self.queue = [part for part in self.queue if part not in done]

    def _back_off(self, group: Sequence[Part]) -> list[QueuedPrompt]:
        """Half as many rows, then half as many choices in a row; one choice that does not fit alone ends its prompt."""
        self.engine.free_memory()
        if self.batch_size.shrink(len(group)):
            return []
        (part,) = group
        self._drop(group)
        if len(part.choice_ids) > 1:
            self.queue = [*part.split(len(part.choice_ids) // 2), *self.queue]
            return []
        self.batch_size.reset()
        self.queue = [other for other in self.queue if other.prompt is not part.prompt]
        self.scores[part.prompt.index] = {}
        return [part.prompt]
