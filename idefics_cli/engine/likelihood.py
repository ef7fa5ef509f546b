"""How likely a model finds given answers: each prompt is read once, with all its choices after it in one pass.

A row holds the prompt's own tokens and after them those of every choice; a token sees the prompt and what stands before
it in its own choice, as if that were alone. So a choice costs its own tokens, and one of a single token costs nothing:
its probability is known at the prompt's end. Prompts come in as token ids with pixels, sums of log-probabilities go
out. Knows nothing of text, files and decoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from idefics_cli.engine.engine import Engine
from idefics_cli.engine.kv_cache import KeyValues
from idefics_cli.engine.memory_budget import AdaptiveBatchSize, attempt
from idefics_cli.engine.prefill import PrefillBatch, PromptQueue, QueuedPrompt
from idefics_cli.engine.prompt_source import EncodedChoices, PromptSource, shared
from idefics_cli.engine.row_errors import TOO_LARGE, Overflows
from idefics_cli.engine.transfer import send, send_ids
from idefics_cli.errors import RowError
from idefics_cli.model.modeling import IdeficsForVisionText2Text

PLACES_AT_ONCE = 256  # so many tokens have their logits over the whole vocabulary at a time

Choices = Sequence[tuple[int, ...]]


# ---- one pass


def log_likelihoods(
    model: IdeficsForVisionText2Text,
    batch: PrefillBatch,
    choices: Sequence[Choices],
    images: Sequence[Sequence[KeyValues]],
) -> list[list[float]]:
    """For each row those of its choices, whose tails the batch has after its prompts."""
    owners, offsets = (send(table, model.device) for table in places(batch.prompt_lengths, choices))
    rows, hidden_states = batch.forward(model, images, mask=packed_mask(owners, model.dtype), offsets=offsets)
    tokens = [
        start + prompt_length - 1 + place  # at a prompt's last token and at each of its choices' one is predicted
        for start, prompt_length, some in zip(rows.starts, batch.prompt_lengths, choices, strict=True)
        for place in range(1 + sum(len(ids) - 1 for ids in some))
    ]
    place_of, token_ids, numbers = map(torch.tensor, zip(*predictions(choices), strict=True))
    found = log_probabilities(model, hidden_states[0, send_ids(tokens, model.device)], place_of, token_ids)
    sums = torch.zeros(sum(map(len, choices)), dtype=torch.float64).index_add(0, numbers, found)
    return [each.tolist() for each in sums.split([len(some) for some in choices])]


def places(prompt_lengths: Sequence[int], choices: Sequence[Choices]) -> tuple[Tensor, Tensor]:
    """Whose each token is, as `packed_mask` has it, and its place after the prefix; both (rows, tokens)."""
    owners, offsets = [], []
    for prompt_length, some in zip(prompt_lengths, choices, strict=True):
        lengths = [prompt_length, *(len(ids) - 1 for ids in some)]
        owners.append(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)))
        steps = (prompt_length + torch.arange(length) for length in lengths[1:])
        offsets.append(torch.cat([torch.arange(prompt_length), *steps]))
    return pad_sequence(owners, batch_first=True, padding_value=-1), pad_sequence(offsets, batch_first=True)


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
        logits = model.logits(states[first : first + PLACES_AT_ONCE]).float()  # (places, vocabulary)
        found[here] = logits.log_softmax(dim=-1)[place_of[here] - first, token_ids[here]].double().cpu()
    return found


# ---- a stream of prompts

Scored = tuple[int, EncodedChoices, list[float] | RowError]


class Scoring:
    """One run over a stream of prompts with choices. The engine's caches and bounds hold for it too."""

    def __init__(self, engine: Engine):
        self.engine, self.batch_size = engine, AdaptiveBatchSize(engine.batch_size.now)
        self.overflows = Overflows(engine.model.dtype)
        self.scores: dict[int, dict[int, float]] = {}  # by number of the prompt and of the choice

    def run(self, source: PromptSource) -> Iterator[Scored]:
        """(number, prompt, log-likelihood of each choice) in the order of finishing, numbers in that of taking.

        One that the device's memory does not hold even alone, or whose values are not finite, has a RowError in their
        place; IdeficsError is raised where none of the first prompts' are.
        """
        with shared(source, self.engine.model.ranks, "score") as source:
            yield from self._run(PromptQueue(source, self.engine.vocabulary.image_token_id))

    def _run(self, queue: PromptQueue) -> Iterator[Scored]:
        while True:
            if len(queue) < self.batch_size.now:
                queue.look_ahead(self.batch_size.now, idle=True)
            if not queue:
                return
            group = queue.pop_group(self.batch_size.now)
            with self.engine.turn:
                found = attempt(partial(self._log_likelihoods, group, queue), self.engine.model.ranks)
                finished = self._back_off(group, queue) if found is None else list(self._finished(group, found))
            yield from finished

    @torch.inference_mode()
    def _log_likelihoods(self, group: Sequence[QueuedPrompt], queue: PromptQueue) -> list[list[float]]:
        engine = self.engine
        batch = PrefillBatch(group, engine.prefixes.get_or_prefill(group[0]), engine.vocabulary)
        images = batch.arrange(engine.images(group, batch.wanted, ahead=queue.prompts))
        with engine.timed("prefill"):
            found = log_likelihoods(engine.model, batch, [row.choice_ids for row in group], images)
        engine.times.prompt_tokens += sum(batch.lengths)
        return found

    def _finished(self, group: Sequence[QueuedPrompt], found: Sequence[Sequence[float]]) -> Iterator[Scored]:
        """The prompts whose last choices these are."""
        self.batch_size.record_success(len(group))
        self.overflows.look_at([not all(map(math.isfinite, scores)) for scores in found])
        for row, scores in zip(group, found, strict=True):
            known = self.scores.setdefault(row.index, {})
            known |= enumerate(scores, start=row.first_choice)
            if len(known) == len(row.prompt.choice_ids):
                of_all = [known[choice] for choice in range(len(known))]
                yield row.index, row.prompt, of_all if all(map(math.isfinite, of_all)) else self.overflows.error
                del self.scores[row.index]

    def _back_off(self, group: Sequence[QueuedPrompt], queue: PromptQueue) -> list[Scored]:
        """Half as many rows, then half as many choices in a row; one choice that does not fit alone ends its prompt."""
        self.engine.free_memory()
        if self.batch_size.shrink(len(group)):
            queue.prompts = [*group, *queue.prompts]
            return []
        (row,) = group
        if len(row.choice_ids) > 1:
            queue.prompts = [*row.split(len(row.choice_ids) // 2), *queue.prompts]
            return []
        self.batch_size.reset()
        queue.prompts = [other for other in queue.prompts if other.index != row.index]
        self.scores.pop(row.index, None)
        return [(row.index, row.prompt, TOO_LARGE)]
