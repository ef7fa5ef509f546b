"""How likely a model finds given answers: each prompt is read once, with all its choices behind it in one pass.

A row holds the prompt's own tokens and behind them those of every choice; a token sees the prompt and what stands
before it in its own choice, as if that were alone. So a choice costs its own tokens, and one of a single token costs
nothing: its probability is known at the prompt's end. Prompts come in as token ids with pixels, sums of
log-probabilities go out. Knows nothing of text, files and decoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from idefics_cli.engine.engine import WINDOWS_AHEAD, Engine
from idefics_cli.engine.kv_cache import PrefillMemory, RowImages, attend_part, merge_parts
from idefics_cli.engine.memory_budget import Limit
from idefics_cli.engine.prefill import NOTHING_SHARED, Prefix, Reading, Waiting, common_start
from idefics_cli.engine.prompt_source import EncodedChoices, PromptSource
from idefics_cli.engine.row_errors import TOO_LARGE, Overflows
from idefics_cli.engine.varlen import RaggedRows
from idefics_cli.errors import RowError
from idefics_cli.model.kv_interface import image_visibility
from idefics_cli.model.memory_errors import naming_memory_errors

if TYPE_CHECKING:
    from idefics_cli.engine.options import Vocabulary
    from idefics_cli.model.decoder import IdeficsAttention
    from idefics_cli.model.modeling import IdeficsForVisionText2Text

CHOICE_TOKENS_PER_ROW = 512  # what stands behind a prompt in one row; more choices are more rows
PLACES_AT_ONCE = 256  # so many tokens have their logits over the whole vocabulary at a time


@dataclass(frozen=True)
class Part:
    """Some of a prompt's choices, those from number `first` on: what one row reads."""

    prompt: Waiting
    first: int
    choice_ids: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.input_ids) + sum(len(ids) - 1 for ids in self.choice_ids)

    def split(self, at: int) -> list[Part]:
        return [
            Part(self.prompt, self.first, self.choice_ids[:at]),
            Part(self.prompt, self.first + at, self.choice_ids[at:]),
        ]


def parts_of(prompt: Waiting, choice_ids: Sequence[tuple[int, ...]], most_tokens: int) -> list[Part]:
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


@dataclass(frozen=True)
class PackedMemory(PrefillMemory):
    """While prompts are read with their choices behind them: nobody comes back to their keys, so none are kept.

    `mask` (rows, 1, width, width) is additive and says what each token sees of its row.
    """

    mask: Tensor

    def _attend_own(self, layer: IdeficsAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, log_sum = attend_part(query, key, value, self.mask, layer.scaling)
        if self.prefix.length:
            output = merge_parts((output, log_sum), self.prefix.attend(layer.layer_idx, query, layer.scaling))
        return output


def packed_mask(owners: Tensor, dtype: torch.dtype) -> Tensor:
    """What tokens see: those before them of the prompt and of their own choice. Additive, (rows, 1, tokens, tokens).

    `owners` (rows, tokens) says whose a token is: 0 the prompt's, from 1 on a choice's, -1 nobody's.
    """
    num_tokens = owners.shape[1]
    before = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=owners.device).tril()
    visible = before & ((owners[:, None, :] == 0) | (owners[:, None, :] == owners[:, :, None]))
    mask = torch.zeros(visible.shape, dtype=dtype, device=owners.device).masked_fill(~visible, -torch.inf)
    return mask[:, None]


class ChoicesReading(Reading):
    """Rows of a prompt's own tokens and its choices', each choice without its last token, which nothing follows."""

    def __init__(self, parts: Sequence[Part], prefix: Prefix, vocabulary: Vocabulary):
        super().__init__([part.prompt for part in parts], prefix, vocabulary)
        self.choices = [part.choice_ids for part in parts]
        self.prompt_lengths = self.lengths
        behind = [[token_id for ids in choices for token_id in ids[:-1]] for choices in self.choices]
        self.own_ids = [(*ids, *more) for ids, more in zip(self.own_ids, behind, strict=True)]
        self.lengths = [len(ids) for ids in self.own_ids]

    def log_likelihoods(self, model: IdeficsForVisionText2Text, images: RowImages) -> list[list[float]]:
        """For each row those of its choices."""
        input_ids = self._padded().to(model.device)  # (rows, width)
        owners, offsets = (table.to(model.device) for table in self._places())
        image_mask, image_gate = image_visibility(self._sees(input_ids), images.seq_len, model.dtype)
        rows = RaggedRows(self.lengths, model.device, model.model.line_length(sum(self.lengths)))
        mask = packed_mask(owners, model.dtype)
        memory = PackedMemory(self.prefix.shared, (), images, image_mask, image_gate, rows, mask)
        embeddings = model.model.embed_tokens(rows.in_line(input_ids))  # (1, line, hidden)
        positions = rows.in_line(offsets + self.prefix.shared.length)
        return self._sums(model, model.model.decode(embeddings, positions, memory)[0], rows.starts)

    def _places(self) -> tuple[Tensor, Tensor]:
        """Whose each token is, as `packed_mask` has it, and its place behind the prefix; both (rows, tokens)."""
        owners = torch.full((len(self.lengths), max(self.lengths)), -1)
        offsets = torch.zeros_like(owners)
        for row, (prompt_length, choices) in enumerate(zip(self.prompt_lengths, self.choices, strict=True)):
            owners[row, :prompt_length] = 0
            offsets[row, :prompt_length] = torch.arange(prompt_length)
            first = prompt_length
            for number, ids in enumerate(choices, start=1):
                span = slice(first, first + len(ids) - 1)
                owners[row, span] = number
                offsets[row, span] = prompt_length + torch.arange(len(ids) - 1)
                first = span.stop
        return owners, offsets

    def _sums(
        self, model: IdeficsForVisionText2Text, hidden_states: Tensor, starts: Sequence[int]
    ) -> list[list[float]]:
        """From (line, hidden): at a prompt's last token and at each of its choices' tokens one is predicted."""
        tokens = [
            start + prompt_length - 1 + place
            for start, prompt_length, choices in zip(starts, self.prompt_lengths, self.choices, strict=True)
            for place in range(self._num_places(choices))
        ]
        states = hidden_states[torch.tensor(tokens)]  # (places, hidden)
        place_of, token_ids, owners = map(torch.tensor, zip(*self._predictions(), strict=True))
        found = log_probabilities(model, states, place_of, token_ids)
        sums = torch.zeros(sum(map(len, self.choices)), dtype=torch.float64).index_add(0, owners, found)
        return [each.tolist() for each in sums.split([len(choices) for choices in self.choices])]

    @staticmethod
    def _num_places(choices: Sequence[tuple[int, ...]]) -> int:
        return 1 + sum(len(ids) - 1 for ids in choices)

    def _predictions(self) -> Iterator[tuple[int, int, int]]:
        """(place, token predicted there, number of its choice among all rows') for every token of every choice."""
        number = end_of_prompt = 0
        for choices in self.choices:
            place = end_of_prompt
            for ids in choices:
                yield end_of_prompt, ids[0], number
                for token_id in ids[1:]:
                    place += 1
                    yield place, token_id, number
                number += 1
            end_of_prompt = place + 1


def log_probabilities(model: IdeficsForVisionText2Text, states: Tensor, place_of: Tensor, token_ids: Tensor) -> Tensor:
    """Those of `token_ids` (tokens,), each at its place among `states` (places, hidden); float64, on the host.

    Not finite where the model's numbers have overflowed.
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
        self.engine, self.limit = engine, Limit(engine.row_limit.now)
        self.overflows = Overflows(engine.model.dtype)
        self.line: list[Part] = []
        self.num_taken = 0
        self.prompts: dict[int, EncodedChoices] = {}  # those that are not finished, by number
        self.scores: dict[int, dict[int, float]] = {}  # by number of the prompt and of the choice

    def run(self, source: PromptSource) -> Iterator[tuple[int, EncodedChoices, list[float] | RowError]]:
        """(number, prompt, log-likelihood of each choice) in the order of finishing, numbers in that of taking.

        One that the device's memory does not hold even alone, or whose numbers overflow, has a RowError in their place;
        IdeficsError is raised where the first prompts overflow all.
        """
        while True:
            self._look_ahead(source)
            if not self.line:
                return
            for number in self._read_some():
                yield number, self.prompts.pop(number), self._outcome(self.scores.pop(number))

    def _outcome(self, scores: dict[int, float]) -> list[float] | RowError:
        if not scores:
            return TOO_LARGE
        found = [scores[choice] for choice in sorted(scores)]
        return found if all(map(math.isfinite, found)) else self.overflows.error

    def _look_ahead(self, source: PromptSource) -> None:
        """Lengthen the line, sorted by length behind what the last look ahead has left in it."""
        if len(self.line) >= self.limit.now:
            return
        taken = source.take(WINDOWS_AHEAD * self.limit.now - len(self.line), wait=not self.line)
        parts: list[Part] = []
        for number, prompt in enumerate(taken, start=self.num_taken):
            assert all(prompt.choice_ids) and prompt.choice_ids, f"prompt {number} has an empty choice or none"
            self.prompts[number], self.scores[number] = prompt, {}
            waiting = Waiting.of(number, prompt, self.engine.vocabulary.image_token_id)
            parts += parts_of(waiting, prompt.choice_ids, CHOICE_TOKENS_PER_ROW)
        self.num_taken += len(taken)
        self.line += sorted(parts, key=lambda part: part.num_tokens)

    @torch.inference_mode()
    def _read_some(self) -> list[int]:
        """Read the first in line and what goes with it -> the numbers of the prompts that are finished by it."""
        group = self.line[:1]
        try:
            with naming_memory_errors():
                prefix = self._shared_start()
                group = [part for part in self.line if prefix.starts(part.prompt)][: self.limit.now]
                found = self._log_likelihoods(group, prefix)
        except torch.OutOfMemoryError:
            found = None  # handled below, when the exception and the tensors it holds are gone
        if found is None:
            return self._back_off(group)
        self.limit.end_well(len(group))
        self.overflows.look_at([not all(map(math.isfinite, scores)) for scores in found])
        self.line = [part for part in self.line if part not in group]
        for part, scores in zip(group, found, strict=True):
            self.scores[part.prompt.index].update(enumerate(scores, start=part.first))
        numbers = dict.fromkeys(part.prompt.index for part in group)
        return [each for each in numbers if len(self.scores[each]) == len(self.prompts[each].choice_ids)]

    def _shared_start(self) -> Prefix:
        """The start that the first in line is read behind."""
        line = [part.prompt for part in self.line]
        known = self.engine.known_prefix(line[0])
        try:
            with naming_memory_errors():
                return self.engine.prefix_for(line, known, common_start(line, len(line)), lost=0)
        except torch.OutOfMemoryError:
            return NOTHING_SHARED

    def _log_likelihoods(self, group: Sequence[Part], prefix: Prefix) -> list[list[float]]:
        engine = self.engine
        reading = ChoicesReading(group, prefix, engine.vocabulary)
        line = [part.prompt for part in self.line]  # the group among them
        images = reading.arrange(engine.images([part.prompt for part in group], reading.wanted, ahead=line))
        with engine.timed("prefill"):
            found = reading.log_likelihoods(engine.model, images)
        engine.times.prompt_tokens += sum(reading.lengths)
        return found

    def _back_off(self, group: Sequence[Part]) -> list[int]:
        """Half as many rows, then half as many choices in a row; one choice that does not fit alone ends its prompt."""
        self.engine.free_memory()
        if len(group) > 1:
            self.limit.halve(len(group))
            return []
        (part,) = group
        others = [other for other in self.line if other is not part]
        if len(part.choice_ids) > 1:
            self.limit.now = 1
            self.line = [*part.split(len(part.choice_ids) // 2), *others]
            return []
        number = part.prompt.index
        self.line = [other for other in others if other.prompt.index != number]
        self.scores[number] = {}
        self.limit.forget()
        return [number]
