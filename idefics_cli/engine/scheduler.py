"""One stream of prompts: a queue, and running rows that are admitted, prefilled, decoded and evicted.

What streams share is the engine's, where keys and values lie the store's, which token comes next `beam_search.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from idefics_cli.engine.beam_search import NEVER, BeamRules, BeamState, longest_start, step
from idefics_cli.engine.decode_graph import DecodeGraphs
from idefics_cli.engine.engine import Engine
from idefics_cli.engine.kv_cache import NO_PREFIX, KVStore
from idefics_cli.engine.memory_budget import attempt
from idefics_cli.engine.options import DecodingOptions, Hypothesis, Vocabulary
from idefics_cli.engine.prefill import PrefillBatch, PromptQueue, QueuedPrompt
from idefics_cli.engine.prompt_source import PromptSource, shared
from idefics_cli.engine.reference import until_end
from idefics_cli.engine.row_errors import NOTHING_ALLOWED, TOO_LARGE, Overflows
from idefics_cli.engine.sampling import random_draws
from idefics_cli.engine.transfer import send, send_ids
from idefics_cli.engine.tree_attention import DecodeMemory
from idefics_cli.engine.varlen import PackedRows
from idefics_cli.errors import RowError

Outcome = list[Hypothesis] | RowError


def stream(
    engine: Engine, source: PromptSource, options: DecodingOptions, banned_sequences: Sequence[Sequence[int]] = ()
) -> Iterator[tuple[int, Outcome]]:
    """(number of the prompt, its hypotheses, best first) for each prompt, in the order in which they finish.

    Prompts are numbered from 0 in the order taken. The source is waited for only while there is nothing else to do. A
    prompt that the device's memory does not hold even alone, or with non-finite values, has a RowError in place of
    hypotheses; IdeficsError is raised where all of the first ones have them. `banned_sequences` are as `Vocabulary` has
    them, for this stream, beside its own.
    """
    banned = (*engine.vocabulary.banned_sequences, *map(tuple, banned_sequences))
    with shared(source, engine.model.ranks, "stream", options, banned_sequences) as source:
        yield from Scheduler(engine, source, options, replace(engine.vocabulary, banned_sequences=banned)).run()


class Scheduler:
    """The running rows of one stream, and its queue. Row i is row i of the store and of every tensor here."""

    def __init__(self, engine: Engine, source: PromptSource, options: DecodingOptions, vocabulary: Vocabulary):
        self.engine, self.model, self.options = engine, engine.model, options
        self.queue = PromptQueue(source, vocabulary.image_token_id)
        config, device = engine.model.config, engine.model.device
        self.rules = BeamRules.of(options, config.vocab_size + config.additional_vocab_size, vocabulary, device)
        self.context_length = longest_start(vocabulary.banned_sequences)  # of prompts, None for all of it
        if options.no_repeat_ngram_size or options.repetition_penalty != 1.0:
            self.context_length = None
        self.overflows = Overflows(self.model.dtype)
        self.works_meanwhile = device.type == "cuda"
        self._start_over()

    def _start_over(self) -> None:
        """With no row running."""
        device = self.model.device
        self.rows: list[QueuedPrompt] = []
        self.prefix = NO_PREFIX
        self.store = KVStore(self.model, self.options)
        self.state = BeamState.start(self._draws([]), self.options)
        self.context = torch.zeros(0, 0, dtype=torch.long, device=device)
        self.graphs = None if self.engine.is_eager else DecodeGraphs(self.store, self._next_state_anywhere)

    # ---- the loop

    def run(self) -> Iterator[tuple[int, Outcome]]:
        finished: list[tuple[int, Outcome]] = []
        while True:
            if not (self.works_meanwhile and self.rows):
                yield from finished
                finished = []
            group = self.admit()
            if not group and not self.rows:
                return
            with self.engine.turn:
                is_known = attempt(partial(self.advance, group), self.model.ranks)
            yield from finished  # while the device computes
            with self.engine.turn:
                ended = [] if is_known is False else is_known and attempt(self.evict, self.model.ranks)
                finished = self.back_off(group) if ended is None else ended

    @torch.inference_mode()
    def advance(self, group: list[QueuedPrompt]) -> bool:
        """One token for the new rows, or else for all. Whether it is worth asking who has ended: hardly a text ends
        with its first token, and the host does not wait for it. One that does is over, whatever is written after it.
        """
        if not group:
            self.decode_step()
            return True
        self.prefill(group)
        return self.options.max_new_tokens == 1

    def admit(self) -> list[QueuedPrompt]:
        """Prompts of similar length to run, where there is space for a good number of them.

        The first in the queue decides which prefix is shared; where it is another than the running rows have, these
        finish first. So no prompt waits for ever.
        """
        batch_size = self.engine.rows_at_once(self.options.num_paths)
        free = batch_size - len(self.rows)
        if self.rows and free < max(1, batch_size // 4):
            return []
        if len(self.queue) < free:
            self.queue.look_ahead(batch_size, idle=not self.rows)
        if not self.queue or (self.rows and self.queue.prompts[0].shared != self.prefix.content):
            return []
        return self.queue.pop_group(free)

    def prefill(self, group: list[QueuedPrompt]) -> None:
        """Read the prompts and choose their first tokens."""
        assert not any(prompt.choice_ids for prompt in group), "choices are scored, not continued"
        engine, rows = self.engine, slice(len(self.rows), len(self.rows) + len(group))
        if not self.rows:
            self.prefix = engine.prefixes.get_or_prefill(group[0])
        batch = PrefillBatch(group, self.prefix, engine.vocabulary)
        # Before the store grows: it then lies where the vision tower's activations have been.
        images = batch.arrange(engine.images(group, batch.wanted, ahead=self.queue.prompts))
        expected = min(engine.rows_at_once(self.options.num_paths), rows.stop + len(self.queue))
        self.store.reserve(rows.stop, max(batch.lengths), expected)
        logits = engine.prefill(batch, images, self.store.prompts(rows, max(batch.lengths)))
        self.store.admit(rows, batch.lengths, batch.last_images(images))
        context = self._context_of(group)
        start = BeamState.start(self._draws(group), self.options)
        logits = logits[:, None].expand(-1, self.options.num_paths, -1)  # (rows, beams, vocabulary)
        state, parents = step(logits, start, self.rules, context)
        self.store.advance(rows, parents, state.done)
        self.state = BeamState.join(self.state, state)
        self.context = join_contexts(self.context, context)
        self.rows = self.rows + group
        self.store.used = max(self.store.used, self.options.num_paths)

    def decode_step(self) -> None:
        """One token for every beam of every running row."""
        with self.engine.timed("decode"):
            if self.graphs is not None:
                self.state = self.graphs.step(self.state, self.context, self.prefix)
            else:
                self.store.reserve(len(self.rows))
                self.state = self._next_state(self.state, self.context, max(self.store.widths), self.store.used)
        self.engine.times.steps += 1

    def _next_state(self, state: BeamState, context: Tensor, longest: int, used: int) -> BeamState:
        """One token for every beam of the rows of `state`: on the device alone. Slots as in `DecodeMemory.of`."""
        next_logits = self._next_logits(state, longest, used)
        state, parents = step(next_logits, state, self.rules, context)
        self.store.advance(slice(len(state.done)), parents, state.done)
        return state

    def _next_state_anywhere(self, state: BeamState, context: Tensor) -> BeamState:
        """The same whatever slots are in use: for all steps alike."""
        return self._next_state(state, context, self.store.prompt_slots, self.store.tree_slots)

    @torch.inference_mode()
    def evict(self) -> list[tuple[int, Outcome]]:
        """Take out the rows whose search is over, and compact the rest."""
        in_use = self.store.in_use[: len(self.rows)].tolist()  # the one thing that the device is asked in a step
        assert max(in_use) <= self.store.tree_slots, (in_use, self.store.tree_slots)
        self.store.used = max(0, *in_use)
        done = [slots < 0 for slots in in_use]
        ended = [row for row, is_done in enumerate(done) if is_done]
        if not ended:
            return []
        outcomes = dict(zip(ended, self._outcomes(ended), strict=True))
        finished = [(self.rows[row].index, outcome) for row, outcome in outcomes.items()]
        overflowed = [row for row in ended if outcomes[row] == self.overflows.error]
        self.overflows.look_at([row in overflowed for row in range(len(self.rows))])
        self.store.erase(overflowed)
        self.compact(compaction_order(done))
        self.engine.batch_size.record_success(len(finished))
        return finished

    def compact(self, sources: list[int]) -> None:
        """Row i becomes what row `sources[i]` was."""
        self.store.compact(sources)
        index = send_ids(sources, self.model.device)
        self.state, self.context = self.state.pick(index), self.context[index]
        self.rows = [self.rows[source] for source in sources]

    def back_off(self, group: list[QueuedPrompt]) -> list[tuple[int, Outcome]]:
        """Memory has ended: half as many rows, and running ones start over. One that does not fit alone has no text."""
        running = set(self.rows)
        begun = self.rows + [prompt for prompt in group if prompt not in running]
        self._start_over()
        self.engine.free_memory()
        if self.engine.batch_size.shrink(len(begun)):
            self.queue.prompts = begun + self.queue.prompts
            return []
        self.engine.batch_size.reset()
        (prompt,) = begun
        return [(prompt.index, TOO_LARGE)]

    # ---- what the loop is made of

    def _context_of(self, group: list[QueuedPrompt]) -> Tensor:
        """What n-gram blocking and banned sequences look at of each prompt, padded on the left with −1."""
        count, prompts = self.context_length, [each.prompt.input_ids for each in group]
        ends = [ids if count is None else ids[-count:] if count else [] for ids in prompts]
        width = max(map(len, ends))
        rows = [[-1] * (width - len(ids)) + ids for ids in ends]
        return send_ids(rows, self.model.device).view(len(group), width)

    def _draws(self, group: list[QueuedPrompt]) -> Tensor:
        """(rows, max_new_tokens, draws)"""
        shape = (len(group), self.options.max_new_tokens, self.rules.num_draws)
        if not group or not self.rules.num_draws:
            return torch.empty(shape, device=self.model.device)
        draws = [random_draws(prompt.content, self.options, self.rules.num_draws) for prompt in group]
        return send(torch.stack(draws), self.model.device)

    def _next_logits(self, state: BeamState, longest: int, used: int) -> Tensor:
        """The network over every beam's newest token: what may come next, (rows, beams, vocabulary)."""
        num_rows, beams, model = len(state.done), self.options.num_paths, self.model.model
        rows = PackedRows([beams] * num_rows, self.model.device, model.padded_length(num_rows * beams))
        memory = DecodeMemory(self.store, self.prefix, rows)
        if not self.engine.has_tree_kernel:
            memory = DecodeMemory.of(self.store, self.prefix, rows, longest, used)
        steps = state.length - 1  # (rows,): tokens whose keys are stored
        tokens = state.tokens.gather(2, steps[:, None, None].expand(-1, beams, 1)).squeeze(2)  # (rows, beams)
        positions = self.prefix.length + self.store.prompt_lengths[:num_rows] + steps
        embeddings = model.embed_tokens(rows.pack(tokens))  # (1, packed, hidden)
        hidden_states = model.decode(embeddings, rows.pack(positions[:, None].expand(-1, beams)), memory)
        logits = self.model.logits(hidden_states)
        return logits[0, : rows.num_tokens].unflatten(0, (num_rows, beams))

    def _outcomes(self, rows: list[int]) -> list[Outcome]:
        """Each row's texts, best first, or why there are none."""
        state, wanted = self.state, self.options.num_return_sequences
        overflow = state.final_scores.isnan().any(dim=1)[:, None].expand(-1, wanted)
        about = torch.stack([overflow, state.final_scores[:, :wanted], state.final_lengths[:, :wanted]], dim=2)
        numbers = torch.cat([about, state.final_tokens[:, :wanted]], dim=2)  # in fp32, which holds all ids
        return [self._outcome(row) for row in numbers.cpu()[rows].tolist()]

    def _outcome(self, row: list[list[float]]) -> Outcome:
        """Of each text whether anything overflowed, score, length and token ids."""
        if row[0][0]:
            return self.overflows.error
        ends = self.engine.vocabulary.end_token_ids
        texts = [
            Hypothesis(until_end([int(each) for each in ids[: int(length)]], ends), score)
            for _, score, length, *ids in row
            if score > NEVER / 2
        ]
        return sorted(texts, key=lambda text: -text.score) or NOTHING_ALLOWED  # samples end in any order


def compaction_order(done: Sequence[bool]) -> list[int]:
    """Which row takes each place: rows that stay keep theirs, and the last ones fill the gaps."""
    alive = [row for row, is_done in enumerate(done) if not is_done]
    moving = [row for row in alive if row >= len(alive)]
    return [row if not done[row] else moving.pop() for row in range(len(alive))]


def join_contexts(first: Tensor, second: Tensor) -> Tensor:
    """Both under one width, padded on the left with −1."""
    width = max(first.shape[1], second.shape[1])
    pad = torch.nn.functional.pad
    return torch.cat([pad(each, (width - each.shape[1], 0), value=-1) for each in (first, second)])
