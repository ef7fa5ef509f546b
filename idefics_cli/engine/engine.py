"""The decoding engine: encode each image once, read each prompt once, keep rows busy, move no key to reorder beams.

Prompts come in as token ids with pixels, hypotheses go out as they finish. What prompts start with in common (an
instruction, shots with their images) is read once and shared; images are known by their content; a row that ends makes
room for the next. The engine knows nothing of tokenization and nothing of files.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from idefics_cli.engine.beam_search import NEVER, BeamRules, BeamState, beam_step, longest_start
from idefics_cli.engine.kv_cache import (
    BoundedCache,
    DecodeMemory,
    RowImages,
    RowStore,
    SharedPrefix,
    project_images,
)
from idefics_cli.engine.memory_budget import VISION_BATCH, Limit
from idefics_cli.engine.options import DecodingOptions, Hypothesis, Vocabulary
from idefics_cli.engine.prefill import NOTHING_SHARED, Prefix, Reading, Waiting, common_start, shared_length
from idefics_cli.engine.prompt_source import EncodedImage, EncodedPrompt, IterableSource, PromptSource
from idefics_cli.engine.reference import until_end
from idefics_cli.engine.row_errors import NOTHING_ALLOWED, TOO_LARGE, Overflows
from idefics_cli.engine.varlen import RaggedRows
from idefics_cli.errors import RowError
from idefics_cli.model.kv_interface import image_seq_len
from idefics_cli.model.memory_errors import naming_memory_errors
from idefics_cli.model.modeling import IdeficsForVisionText2Text

LATENTS_BYTES, IMAGE_KEYS_BYTES, PREFIX_BYTES = 512 << 20, 512 << 20, 512 << 20
SHORTEST_PREFIX = 8  # tokens; sharing fewer saves less than it costs
WINDOWS_AHEAD = 4  # prompts looked at ahead, in multiples of the rows, to group them by length
SLOT_STEP = 32  # prompt slots are rounded up to this, so that storage seldom grows
# Beams share most of their past: at first the tree has room for one path, and for what each beam has of its own.
PATH_SLOTS, OWN_SLOTS = 32, 6
TREE_STEP = 3  # tokens of every beam that the tree's storage grows by

Outcome = list[Hypothesis] | RowError
WithImages = EncodedPrompt | EncodedImage  # or a prompt in line


@dataclass
class PhaseTimes:
    """Where the time went, in seconds, and what was done in it."""

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    images: int = 0
    prompt_tokens: int = 0
    steps: int = 0

    def reset(self) -> None:
        self.__init__()


class Engine:
    """Decodes streams of prompts with one model. `rows` is how many are decoded at a time, fewer where memory ends.

    Latents, images' keys and values, and prefixes are kept from one stream to the next, within bounds. `waits` makes
    `times` true on a device that works on behind the host, at some cost: for benchmarks.
    """

    def __init__(self, model: IdeficsForVisionText2Text, vocabulary: Vocabulary, rows: int = 8):
        self.model, self.vocabulary = model, vocabulary
        self.row_limit, self.image_limit = Limit(rows), Limit(VISION_BATCH)
        self.times = PhaseTimes()
        self.waits = False
        self.latents: BoundedCache[Tensor] = BoundedCache(LATENTS_BYTES)
        self.image_key_values: BoundedCache[Tensor] = BoundedCache(IMAGE_KEYS_BYTES)
        self.prefixes: BoundedCache[Prefix] = BoundedCache(PREFIX_BYTES)
        self.last_read: tuple[int, ...] = ()  # the content of a prompt

    def clear_caches(self) -> None:
        for cache in (self.latents, self.image_key_values, self.prefixes):
            cache.clear()

    def free_memory(self) -> None:
        """Drop what is kept for later, and give back what the device's allocator holds."""
        self.clear_caches()
        if self.model.device.type == "mps":
            torch.mps.empty_cache()
        torch.cuda.empty_cache()  # nothing where CUDA is not in use

    def generate(self, prompts: Iterable[EncodedPrompt], options: DecodingOptions) -> Iterator[tuple[int, Outcome]]:
        """`stream` over an iterable, which is taken from a few times the rows ahead."""
        return self.stream(IterableSource(prompts), options)

    def stream(
        self, source: PromptSource, options: DecodingOptions, banned_sequences: Sequence[Sequence[int]] = ()
    ) -> Iterator[tuple[int, Outcome]]:
        """(number of the prompt, its hypotheses, best first) for each prompt, in the order in which they finish.

        Prompts are numbered from 0 in the order taken. The source is waited for only while there is nothing else to
        do. A prompt that the device's memory does not hold even alone, or whose numbers overflow, has a RowError in
        place of hypotheses; IdeficsError is raised where all of the first ones overflow. `banned_sequences` are as
        `Vocabulary` has them, for this stream, beside its own.
        """
        banned = (*self.vocabulary.banned_sequences, *map(tuple, banned_sequences))
        vocabulary = replace(self.vocabulary, banned_sequences=banned)
        return Stream(self, options, vocabulary).run(source)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.waits and self.model.device.type == "cuda":
            torch.cuda.synchronize()
        setattr(self.times, phase, getattr(self.times, phase) + time.perf_counter() - started)

    # ---- reading

    def read(self, reading: Reading, images: RowImages, key_values: Sequence[Tensor]) -> Tensor:
        """The last tokens' logits; keys and values go into `key_values`."""
        with self.timed("prefill"):
            logits = reading.run(self.model, images, key_values)
        self.times.prompt_tokens += sum(reading.lengths)
        return logits

    def images(
        self, prompts: Sequence[Waiting], wanted: Sequence[bytes], ahead: Sequence[Waiting] = ()
    ) -> dict[bytes, Tensor]:
        """What gated layers read of each wanted image of `prompts`: (layers, 2, heads, seq, head_dim) each.

        Where none is wanted, one that nobody sees. Those that prompts `ahead` show too are kept for them; to make
        others' anew from latents would cost little.
        """
        if not wanted:
            return {b"": self._no_image()}
        found = {key: self.image_key_values.get(key) for key in wanted}
        missing = [key for key, value in found.items() if value is None]
        if missing:
            latents = self.encode(prompts, missing, ahead)
            with self.timed("prefill"):
                projected = project_images(latents, self.model.model.gated_cross_attn_layers)
            found |= zip(missing, projected, strict=True)
        coming = {key for prompt in ahead for key in prompt.image_keys}
        self.image_key_values.retain(coming)
        for key in coming & found.keys():
            self.image_key_values.put(key, found[key], found[key].nbytes)
        return found

    def encode(
        self,
        prompts: Sequence[WithImages],
        wanted: Sequence[bytes],
        ahead: Sequence[WithImages] = (),
    ) -> Tensor:
        """(images, seq, dim): given, from the cache, or from vision tower and resampler, several at a time.

        Images of prompts `ahead` fill the last batch.
        """
        pixels = images_of(prompts)
        given = {key: pixels[key] for key in wanted if is_latents(pixels[key])}
        found = {key: self.latents.get(key) for key in wanted if key not in given}
        missing = [key for key, value in found.items() if value is None]
        if missing:
            coming = {key: each for key, each in images_of(ahead).items() if not is_latents(each)}
            later = [key for key in coming if key not in pixels and self.latents.get(key) is None]
            missing += later[: -len(missing) % self.image_limit.now]
            found |= self._encode(missing, coming | pixels)
        found |= {key: latents.to(self.model.device, self.model.dtype) for key, latents in given.items()}
        return torch.stack([found[key] for key in wanted])

    def _encode(self, keys: Sequence[bytes], pixels: dict[bytes, Tensor]) -> dict[bytes, Tensor]:
        """The images' latents, kept for later too."""
        assert len(set(keys)) == len(keys), "each image is encoded once"
        found: dict[bytes, Tensor] = {}
        while len(found) < len(keys):
            batch = keys[len(found) : len(found) + self.image_limit.now]
            encoded = self._encode_batch([pixels[key] for key in batch])
            if encoded is None:
                self.image_limit.halve(len(batch))
            else:
                found |= zip(batch, encoded, strict=True)
                self.image_limit.end_well(len(batch))
        for key, latents in found.items():
            self.latents.put(key, latents.clone(), latents.nbytes)
        return found

    def _encode_batch(self, images: Sequence[Tensor]) -> Tensor | None:
        """(images, seq, dim); None where memory does not hold them at once, but may hold fewer."""
        try:
            with self.timed("vision"), naming_memory_errors():
                stacked = torch.stack(list(images)).to(self.model.device)
                encoded = self.model.model.encode_images(pixel_values=stacked[:, None]).squeeze(1)
        except torch.OutOfMemoryError:
            if len(images) == 1:
                self.image_limit.forget()
                raise
            return None
        self.times.images += len(images)
        return encoded

    def _no_image(self) -> Tensor:
        model = self.model
        latents = torch.zeros(1, image_seq_len(model.config), model.config.vision_config.embed_dim, dtype=model.dtype)
        return project_images(latents.to(model.device), model.model.gated_cross_attn_layers)[0]

    # ---- prefixes

    def known_prefix(self, prompt: Waiting) -> Prefix:
        """The longest kept start of a prompt."""
        fitting = [prefix for prefix in self.prefixes.values() if prefix.starts(prompt)]
        return max(fitting, key=lambda prefix: len(prefix.content), default=NOTHING_SHARED)

    def prefix_for(self, line: Sequence[Waiting], current: Prefix, start: tuple[int, ...], lost: int) -> Prefix:
        """What to read the line's first prompt behind: `current`, or a longer start where that is worth it.

        The longest one that is kept, `start`, or one that comes again. What the line saves by it must be as much as the
        change costs, `lost` tokens.
        """
        known = self.known_prefix(line[0])
        best = known if saved_by(known.content, current.content, line) >= lost else current
        again = self._start_again(line, least=max(SHORTEST_PREFIX, 2 * len(best.content), lost))
        if again and saved_by(start, again, line) < len(start):
            chosen = again
        # A longer start has to be read as a whole, and the rows in work may have to end for it.
        elif saved_by(start, best.content, line) >= len(start) + (lost if best is current else 0):
            chosen = start
        else:
            self.prefixes.get(best.content)  # it is used: others are dropped first
            return best
        prefix = self._read_prefix(line[0], len(chosen), ahead=line)
        shared = prefix.shared
        self.prefixes.put(prefix.content, prefix, sum(tensor.nbytes for tensor in (*shared.keys, *shared.values)))
        return prefix

    def _start_again(self, line: Sequence[Waiting], least: int) -> tuple[int, ...]:
        """What all prompts in line begin with as a kept start or the last prompt did, such as shots; or nothing.

        One prompt alone, or several about one image, do not tell what the next ones will have in common with them.
        """
        first = line[0].content
        length = max(shared_length(first, seen) for seen in (self.last_read, *self.prefixes.keys()))
        if length >= least:
            length = min(length, *(shared_length(first, each.content) for each in line))
        return first[:length] if length >= least else ()

    def _read_prefix(self, prompt: Waiting, length: int, ahead: Sequence[Waiting]) -> Prefix:
        model, config = self.model, self.model.config
        heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        key_values = [
            torch.empty(2, 1, heads, length, head_dim, device=model.device, dtype=model.dtype)
            for _ in range(config.num_hidden_layers)
        ]
        reading = Reading([prompt], NOTHING_SHARED, self.vocabulary, stop=length)
        self.read(reading, reading.arrange(self.images([prompt], reading.wanted, ahead)), key_values)
        num_images = len(reading.image_keys[0])
        # An end token itself still sees the image before it; what comes behind it does not.
        sees = bool(reading.sees_image()[0]) and prompt.input_ids[length - 1] != self.vocabulary.end_token_ids[0]
        last_image = prompt.image_keys[num_images - 1] if sees else None
        keys, values = zip(*key_values, strict=True)
        shared = SharedPrefix(keys, values, length, last_image)
        return Prefix(prompt.content[:length], num_images, shared)


def saved_by(content: tuple[int, ...], instead_of: tuple[int, ...], line: Sequence[Waiting]) -> int:
    """Tokens that prompts in line need not read when they share a start in place of another; −1: not worth it."""
    gain, sharing = len(content) - len(instead_of), sum(prompt.goes_on_from(content) for prompt in line)
    return gain * sharing if gain >= SHORTEST_PREFIX else -1


def images_of(prompts: Sequence[WithImages]) -> dict[bytes, Tensor]:
    """The prompts' pixels, or the latents in their place, by what they show."""
    return {key: each for prompt in prompts for key, each in zip(prompt.image_keys, prompt.pixels, strict=True)}


def is_latents(image: Tensor) -> bool:
    """(seq, dim), not (3, side, side)."""
    return image.dim() == 2


class Stream:
    """One run over a stream of prompts: the rows in work, and those in line.

    Row i in work is row i of the store and of every tensor here.
    """

    def __init__(self, engine: Engine, options: DecodingOptions, vocabulary: Vocabulary):
        self.engine, self.model, self.options = engine, engine.model, options
        config = engine.model.config
        self.rules = BeamRules.of(
            options, config.vocab_size + config.additional_vocab_size, vocabulary, engine.model.device
        )
        self.context_length = longest_start(vocabulary.banned_sequences)  # of prompts, None for all of it
        if options.no_repeat_ngram_size:
            self.context_length = None
        self.limit = engine.row_limit
        self.overflows = Overflows(self.model.dtype)
        self.line: list[Waiting] = []
        self.num_taken = 0
        self._start_over()

    def _start_over(self) -> None:
        device = self.model.device
        self.prefix = NOTHING_SHARED
        self.store = RowStore(
            config=self.model.config,
            num_beams=self.options.num_beams,
            max_new_tokens=self.options.max_new_tokens,
            image_seq_len=image_seq_len(self.model.config),
            device=device,
            dtype=self.model.dtype,
        )
        self.rows: list[Waiting] = []
        self.widths: list[int] = []  # the rows' `prompt_widths` in the store, known without asking the device
        self.slots_in_use = 0  # of the rows' trees, up to the last that a path holds: known without asking the device
        self.state = BeamState.start(0, self.options, device)
        self.context = torch.zeros(0, 0, dtype=torch.long, device=device)

    def run(self, source: PromptSource) -> Iterator[tuple[int, Outcome]]:
        while (finished := self._advance(source)) is not None:
            yield from finished

    def _advance(self, source: PromptSource) -> list[tuple[int, Outcome]] | None:
        """Admit, write one token, retire; None when nothing is left to do. Backs off where memory ends."""
        group = self._next_group(source)
        try:
            with torch.inference_mode(), naming_memory_errors():
                if group:
                    self._admit(group)
                if not self.rows:
                    return None
                if not group:
                    self._step()
                return self._retire()
        except torch.OutOfMemoryError:
            pass  # handled below, when the exception and the tensors it holds are gone
        return self._back_off(group)

    def _back_off(self, group: list[Waiting]) -> list[tuple[int, Outcome]]:
        """Half as many rows; those in work begin again. Where only one may be in work, that is its end."""
        known = {prompt.index for prompt in self.rows}
        begun = self.rows + [prompt for prompt in group if prompt.index not in known]
        self._start_over()
        self.engine.free_memory()
        if self.limit.now == 1:
            assert len(begun) == 1, f"{len(begun)} rows in work where one fits"
            self.limit.forget()
            return [(begun[0].index, TOO_LARGE)]
        self.limit.halve(len(begun))
        self.line = [*begun, *self.line]
        return []

    # ---- admit

    def _next_group(self, source: PromptSource) -> list[Waiting]:
        """Prompts of similar length to bring into work, where there is room for a good number of them.

        The first in line decides behind which shared start; when it is another than that of the rows in work, these
        come to their end first. So no prompt waits for ever.
        """
        free = self.limit.now - len(self.rows)
        if self.rows and free < max(1, self.limit.now // 4):
            return []
        if len(self.line) < free:
            self._look_ahead(source)
        if not self.line:
            return []
        prefix = self._shared_start()
        if not self.rows:
            self.prefix = prefix
        if prefix is not self.prefix:
            return []
        first, *others = self.line
        group = [first, *(prompt for prompt in others if self._goes_with(prompt))][:free]
        chosen = {prompt.index for prompt in group}
        self.line = [prompt for prompt in self.line if prompt.index not in chosen]
        return group

    def _goes_with(self, prompt: Waiting) -> bool:
        """Whether no kept start serves the prompt better than the present one."""
        best = self.engine.known_prefix(prompt)
        return self.prefix.starts(prompt) and len(best.content) < len(self.prefix.content) + SHORTEST_PREFIX

    def _look_ahead(self, source: PromptSource) -> None:
        """Lengthen the line, sorted by length behind what the last look ahead has left in it."""
        idle = not self.rows and not self.line
        taken = source.take(WINDOWS_AHEAD * self.limit.now - len(self.line), wait=idle)
        known = [
            Waiting.of(self.num_taken + number, prompt, self.engine.vocabulary.image_token_id)
            for number, prompt in enumerate(taken)
        ]
        self.num_taken += len(taken)
        self.line += sorted(known, key=lambda prompt: len(prompt.content))

    @torch.inference_mode()
    def _shared_start(self) -> Prefix:
        """The start that the first in line is read behind, where memory holds it."""
        current, sharing, lost = NOTHING_SHARED, len(self.line), 0
        if self.rows:
            current, sharing = self.prefix, len(self.line) // 2
            # Before another start can be used, rows come to their end without new ones in their place.
            lost = len(self.rows) * self.options.num_beams * self.options.max_new_tokens // 2
        if not current.starts(self.line[0]):
            current = self.engine.known_prefix(self.line[0])
        try:
            with naming_memory_errors():
                return self.engine.prefix_for(self.line, current, common_start(self.line, sharing), lost)
        except torch.OutOfMemoryError:
            return NOTHING_SHARED

    def _admit(self, group: list[Waiting]) -> None:
        """Read the prompts and choose their first tokens."""
        engine, device = self.engine, self.model.device
        reading = Reading(group, self.prefix, engine.vocabulary)
        rows = slice(len(self.rows), len(self.rows) + len(group))
        # Before room is made: the store then lies where the vision tower's activations have been.
        images = reading.arrange(engine.images(group, reading.wanted, ahead=self.line))
        self._make_room(len(group), max(reading.lengths))
        engine.last_read = group[0].content
        logits = engine.read(reading, images, self.store.prompts(rows, max(reading.lengths)))
        self.store.admit(rows, reading.lengths, reading.last_images(images), reading.sees_image().to(device))
        context = self._context(group)
        spread = logits[:, None].expand(-1, self.options.num_beams, -1)  # (rows, beams, vocabulary)
        start = BeamState.start(len(group), self.options, device)
        state, parents = beam_step(spread, start, self.rules, context)
        self.store.advance(rows, parents)
        self.state = BeamState.join(self.state, state)
        self.context = join_contexts(self.context, context)
        self.rows = self.rows + group
        self.widths = self.widths + [max(reading.lengths)] * len(group)

    def _make_room(self, num_new: int, prompt_length: int) -> None:
        """For so many more rows with prompts of this length, and for every beam's next token."""
        rows = len(self.rows) + num_new
        if rows > self.store.rows:
            rows = max(rows, min(self.limit.now, rows + len(self.line)))
        prompt_slots = -(-prompt_length // SLOT_STEP) * SLOT_STEP
        self.store.grow(rows, prompt_slots, self._tree_slots())

    def _tree_slots(self) -> int:
        """How many every beam can write its next token to."""
        beams = self.options.num_beams
        slots = self.store.tree_slots or min(self.options.max_new_tokens, PATH_SLOTS) + OWN_SLOTS * beams
        return slots if self.slots_in_use + beams <= slots else slots + TREE_STEP * beams

    def _context(self, group: list[Waiting]) -> Tensor:
        """What n-gram blocking and banned sequences look at of each prompt, padded on the left with −1."""
        count = self.context_length
        ends = [prompt.input_ids if count is None else prompt.input_ids[-count:] if count else () for prompt in group]
        width = max(map(len, ends))
        rows = [[-1] * (width - len(ids)) + list(ids) for ids in ends]
        return torch.tensor(rows, dtype=torch.long, device=self.model.device).view(len(group), width)

    # ---- decode

    def _step(self) -> None:
        """One token for every beam of every row in work."""
        with self.engine.timed("decode"):
            logits = self._decode_step()
            self.state, parents = beam_step(logits, self.state, self.rules, self.context)
            self._make_room(0, 0)
            self.store.advance(slice(len(self.rows)), parents)
        self.engine.times.steps += 1

    def _decode_step(self) -> Tensor:
        """The network over every beam's newest token: what may come next, (rows, beams, vocabulary)."""
        num_rows, beams, model = len(self.rows), self.options.num_beams, self.model.model
        rows = RaggedRows([beams] * num_rows, self.model.device, model.line_length(num_rows * beams))
        steps = self.state.length - 1  # (rows,): tokens whose keys are stored
        memory = DecodeMemory.of(self.store, self.prefix.shared, rows, longest=max(self.widths), used=self.slots_in_use)
        tokens = self.state.tokens.gather(2, steps[:, None, None].expand(-1, beams, 1)).squeeze(2)  # (rows, beams)
        positions = self.prefix.shared.length + self.store.prompt_lengths[:num_rows] + steps
        hidden_states = model.decode(
            model.embed_tokens(rows.in_line(tokens)), rows.in_line(positions[:, None].expand(-1, beams)), memory
        )  # (1, line, hidden)
        logits = self.model.lm_head(hidden_states)
        return logits[0, : rows.num_tokens].unflatten(0, (num_rows, beams))

    # ---- retire

    def _retire(self) -> list[tuple[int, Outcome]]:
        """Take out the rows whose search is over, and close ranks."""
        known = torch.stack([self.state.done.long(), self.store.slots_in_use(len(self.rows))])
        done, slots_in_use = known.tolist()  # the one thing that the device is asked in a step
        ended = [row for row, is_done in enumerate(done) if is_done]
        self.slots_in_use = max((slots for row, slots in enumerate(slots_in_use) if not done[row]), default=0)
        if not ended:
            return []
        outcomes = self._outcomes(self.state.pick(torch.tensor(ended, device=self.model.device)))
        finished = [(self.rows[row].index, outcome) for row, outcome in zip(ended, outcomes, strict=True)]
        overflowed = [row for row, outcome in zip(ended, outcomes, strict=True) if outcome == self.overflows.error]
        self.overflows.look_at([row in overflowed for row in range(len(self.rows))])
        self.store.erase(overflowed)
        self._keep(survivors(done))
        self.limit.end_well(len(finished))
        return finished

    def _outcomes(self, state: BeamState) -> list[Outcome]:
        overflow = state.final_scores.isnan().any(dim=1).tolist()
        return [
            self.overflows.error if is_overflow else hypotheses or NOTHING_ALLOWED
            for hypotheses, is_overflow in zip(self._hypotheses(state), overflow, strict=True)
        ]

    def _hypotheses(self, state: BeamState) -> list[list[Hypothesis]]:
        """None where no text could be written."""
        wanted, ends = self.options.num_return_sequences, self.engine.vocabulary.end_token_ids
        columns = (
            values[:, :wanted].tolist() for values in (state.final_scores, state.final_lengths, state.final_tokens)
        )
        return [
            [
                Hypothesis(until_end(ids[:length], ends), score)
                for score, length, ids in zip(*row, strict=True)
                if score > NEVER / 2
            ]
            for row in zip(*columns, strict=True)
        ]

    def _keep(self, sources: list[int]) -> None:
        """Row i becomes what row `sources[i]` was."""
        self.store.keep(sources)
        index = torch.tensor(sources, dtype=torch.long, device=self.model.device)
        self.state, self.context = self.state.pick(index), self.context[index]
        self.rows, self.widths = ([each[source] for source in sources] for each in (self.rows, self.widths))


def survivors(done: Sequence[bool]) -> list[int]:
    """Whose place each row that stays in work takes: rows keep theirs, and the last ones fill the gaps."""
    alive = [row for row, is_done in enumerate(done) if not is_done]
    moving = [row for row in alive if row >= len(alive)]
    return [row if not done[row] else moving.pop() for row in range(len(alive))]


def join_contexts(first: Tensor, second: Tensor) -> Tensor:
    """Both under one width, padded on the left with −1."""
    width = max(first.shape[1], second.shape[1])
    pad = torch.nn.functional.pad
    return torch.cat([pad(each, (width - each.shape[1], 0), value=-1) for each in (first, second)])
