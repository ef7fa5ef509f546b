"""Both sides of a benchmark: our engine and transformers' `generate`, on the same weights, prompt by prompt.

Times, memory and texts of each run, and whether both sides say the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from idefics_cli.bench.memory import MemoryMeter, MemoryUse
from idefics_cli.bench.subjects import FIRST_CALL, BenchOptions, Subject, transformers_model
from idefics_cli.engine import reference
from idefics_cli.engine.embed import embed
from idefics_cli.engine.options import DecodingOptions, Hypothesis, Vocabulary
from idefics_cli.engine.prompt_source import EncodedImage, EncodedPrompt, IterableSource
from idefics_cli.engine.reference import collate
from idefics_cli.errors import IdeficsError, RowError
from idefics_cli.model.modeling import IdeficsForVisionText2Text

TIE = 1e-5  # two texts whose scores differ by less are equally good
TIES_EXAMINED = 16
TOUCHES = 1_000_000  # the draws behind which runs are timed count from here


class PhaseTimes(Protocol):
    """Seconds and counts that an engine adds up."""

    vision: float
    prefill: float
    decode: float
    images: int
    prompt_tokens: int
    steps: int

    def reset(self) -> None: ...


class TextEngine(Protocol):
    """What is measured: `generation.engine.Engine`, or in tests something that answers the same.

    `waits` makes `times` true on CUDA, where the device works on behind the host.
    """

    times: PhaseTimes
    waits: bool

    def generate(
        self, prompts: Iterable[EncodedPrompt], options: DecodingOptions
    ) -> Iterator[tuple[int, list[Hypothesis] | RowError]]: ...


EngineFactory = Callable[[IdeficsForVisionText2Text, Vocabulary, int], TextEngine]


def make_engine(model: IdeficsForVisionText2Text, vocabulary: Vocabulary, rows: int) -> TextEngine:
    """Our engine on our model, whose weights are laid out for the device as they are after loading."""
    from idefics_cli.engine.engine import Engine
    from idefics_cli.model.packed_linear import pack_linears

    pack_linears(model)
    return Engine(model, vocabulary, rows)


# ---- runs


@dataclass(frozen=True)
class Run:
    """One pass over a draw of prompts. `texts` holds (token ids, score or None) of each prompt, in order."""

    seconds: float
    texts: list[tuple[tuple[int, ...], float | None]]
    memory: MemoryUse
    times: dict[str, float] = field(default_factory=dict)


class Pair(NamedTuple):
    """Both sides' runs over the same prompts."""

    prompts: Sequence[EncodedPrompt]
    ours: Run
    theirs: Run


class Bench:
    """Both sides of one benchmark, ready to run."""

    def __init__(self, subject: Subject, options: BenchOptions, factory: EngineFactory = make_engine):
        self.subject, self.options = subject, options
        self.device = subject.model.device
        self.meter = MemoryMeter(self.device)
        # Before our engine may lay the weights out anew: transformers keeps them as they are.
        self.theirs = transformers_model(subject.model)
        with self.meter.measure() as layout:
            started = self._now()
            self.engine = factory(subject.model, subject.vocabulary, options.batch_size)
            self.layout_seconds = self._now() - started
        self.layout_bytes = layout.kept

    def run_ours(
        self, prompts: Sequence[EncodedPrompt], decoding: DecodingOptions | None = None, metered: bool = False
    ) -> Run:
        """As the benchmark's options say, or `decoding`.

        Memory is looked at where it is asked for: to tidy up before and behind a run costs the next one time.
        """
        if self.options.embeddings:
            prompts = self._embedded(prompts)
        self.engine.times.reset()
        texts: list[tuple[tuple[int, ...], float | None]] = [((), None)] * len(prompts)
        with self._watched(metered) as memory:
            started = self._now()
            for index, hypotheses in self.engine.generate(prompts, decoding or self.options.texts):
                if isinstance(hypotheses, RowError):
                    raise IdeficsError(f"a prompt has no text ({hypotheses}): lower --shots or --num-beams")
                texts[index] = (hypotheses[0].token_ids, hypotheses[0].score)
            seconds = self._now() - started
        return Run(seconds, texts, memory, phase_times(self.engine.times))

    def _watched(self, metered: bool) -> AbstractContextManager[MemoryUse]:
        return self.meter.measure() if metered else nullcontext(MemoryUse())

    def _embedded(self, prompts: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
        """The prompts with latents in the place of images, as `idefics embed` makes them beforehand: untimed."""
        pixels = {key: each for prompt in prompts for key, each in zip(prompt.image_keys, prompt.pixels, strict=True)}
        images = [EncodedImage((each,)) for each in pixels.values()]
        latents = dict(zip(pixels, (found for _, found in embed(self.engine, IterableSource(images))), strict=True))
        for found in latents.values():
            if isinstance(found, RowError):
                raise IdeficsError(f"an image has no latents ({found}): use another --device or --dtype")
        self.engine.latents.clear()
        return [EncodedPrompt(each.input_ids, tuple(latents[key] for key in each.image_keys)) for each in prompts]

    def run_theirs(
        self,
        prompts: Sequence[EncodedPrompt],
        decoding: DecodingOptions | None = None,
        with_scores: bool = False,
        metered: bool = False,
    ) -> Run:
        """Batches of similar length, as a careful caller makes them. Collating is not timed, `generate` is.

        Scores are asked for only where time and memory do not count: transformers keeps every step's logits for them.
        """
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].input_ids))
        texts: list[tuple[tuple[int, ...], float | None]] = [((), None)] * len(prompts)
        seconds = 0.0
        with self._watched(metered) as memory:
            for first in range(0, len(order), self.options.batch_size):
                batch = order[first : first + self.options.batch_size]
                inputs = self._collate([prompts[index] for index in batch])
                started = self._now()
                found = self._generate(inputs, decoding or self.options.texts, with_scores)
                seconds += self._now() - started
                for index, text in zip(batch, found, strict=True):
                    texts[index] = text
        return Run(seconds, texts, memory)

    def _collate(self, prompts: Sequence[EncodedPrompt]) -> dict[str, Tensor]:
        return vars(collate(prompts, self.subject.vocabulary, self.subject.image_size))

    def _generate(
        self, inputs: dict[str, Tensor], options: DecodingOptions, with_scores: bool
    ) -> list[tuple[tuple[int, ...], float | None]]:
        tensors = {name: value.to(self.device) for name, value in inputs.items()}
        vocabulary = self.subject.vocabulary
        if with_scores:
            decoded = reference.generate(self.theirs, tensors, options, vocabulary)
            return [(hypotheses[0].token_ids, hypotheses[0].score) for hypotheses in decoded]
        config = reference.generation_config(options, vocabulary)
        config.return_dict_in_generate = config.output_scores = config.output_logits = False
        with torch.inference_mode():
            sequences = self.theirs.generate(**tensors, generation_config=config)
        written = sequences[:, tensors["input_ids"].shape[1] :].tolist()
        return [(reference.until_end(row, vocabulary.end_token_ids), None) for row in written]

    @torch.inference_mode()
    def score(self, prompt: EncodedPrompt, token_ids: tuple[int, ...]) -> float:
        """The text's score as one forward pass of transformers' model gives it."""
        options = self.options.texts
        tensors = {
            name: value.to(self.device)
            for name, value in self._collate([EncodedPrompt([*prompt.input_ids, *token_ids], prompt.pixels)]).items()
        }
        logits = self.theirs(**tensors, use_cache=False).logits[0, len(prompt.input_ids) - 1 :].float()
        log_probabilities = logits.log_softmax(dim=-1)  # (tokens + 1, vocabulary)
        written = torch.tensor(token_ids, dtype=torch.long, device=self.device)
        total = float(log_probabilities[:-1].gather(1, written[:, None]).sum())
        length = len(token_ids)
        if length < options.max_new_tokens:  # an end token closes it, the likeliest of them
            total += float(log_probabilities[-1, list(self.subject.vocabulary.end_token_ids)].max())
            length += 1
        return total / length**options.length_penalty

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def phase_times(times: PhaseTimes) -> dict[str, float]:
    return {name: getattr(times, name) for name in ("vision", "prefill", "decode", "images", "prompt_tokens", "steps")}


# ---- whether both say the same


def agreement(bench: Bench, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Texts of both sides, row by row. Where they differ, transformers scores both: a tie is no difference.

    Scores are compared where transformers was asked for its own.
    """
    rows = [row for prompts, ours, theirs in pairs for row in zip(prompts, ours.texts, theirs.texts, strict=True)]
    same = [row for row in rows if row[1][0] == row[2][0]]
    differing = [row for row in rows if row[1][0] != row[2][0]]
    gaps = [
        abs(bench.score(prompt, ours[0]) - bench.score(prompt, theirs[0]))
        for prompt, ours, theirs in differing[:TIES_EXAMINED]
    ]
    return {
        "rows": len(rows),
        "identical": len(same) / len(rows),
        "differing_rows": len(differing),
        "differing_examined": len(gaps),
        "differing_ties": sum(gap <= TIE for gap in gaps),
        "largest_gap": max(gaps, default=None),
        "rows_with_scores": sum(theirs[1] is not None for _, _, theirs in same),
        "max_score_difference": max(
            (abs(ours[1] - theirs[1]) for _, ours, theirs in same if theirs[1] is not None), default=None
        ),
    }


# ---- all runs


Floors = dict[str, dict[str, float]]  # for each phase, seconds of its products' parts


class Phased(NamedTuple):
    """A run of ours whose phases are told apart, and the floors of what it did, timed right behind it.

    Later they would be timed on what is as good as another machine: a shared one changes its pace within minutes.
    """

    run: Run
    floors: Floors


FloorTimer = Callable[[Run], Floors]


@dataclass(frozen=True)
class Measured:
    """All runs: the two pairs of the warm-up, the timed ones, and those of ours whose phases are told apart."""

    first: Pair
    metered: Pair
    ours: list[Run]
    theirs: list[Run]
    phased: list[Phased]
    agreement: dict[str, Any]

    @property
    def our_peak(self) -> int | None:
        """Counts what the first call left behind: caches are part of how we do it."""
        kept, rise = self.first.ours.memory.kept, self.metered.ours.memory.rise
        return None if kept is None or rise is None else kept + rise

    @property
    def their_peak(self) -> int | None:
        return self.metered.theirs.memory.rise

    @cached_property
    def ratios(self) -> list[float]:
        return [theirs.seconds / ours.seconds for ours, theirs in zip(self.ours, self.theirs, strict=True)]


def warm_up(bench: Bench, say: Callable[[str], None]) -> tuple[Pair, Pair]:
    """A first pair, ours with cold caches and transformers asked for scores, and one whose memory is looked at."""
    say("first call, and transformers with scores")
    prompts = bench.subject.prompts.draw(FIRST_CALL)
    first = Pair(prompts, bench.run_ours(prompts, metered=True), bench.run_theirs(prompts, with_scores=True))
    say("memory")
    prompts = bench.subject.prompts.draw(FIRST_CALL + 1)
    return first, Pair(prompts, bench.run_ours(prompts, metered=True), bench.run_theirs(prompts, metered=True))


def measure(bench: Bench, warm: tuple[Pair, Pair], time_floors: FloorTimer, say: Callable[[str], None]) -> Measured:
    """The timed pairs behind those of the warm-up, each side first in turn, each pair over new images."""
    pairs: list[Pair] = []
    phased: list[Phased] = []

    def run_ours(prompts: Sequence[EncodedPrompt], repeat: int) -> Run:
        run = run_timed(bench, bench.run_ours, prompts, repeat)
        phased.append(with_floors(bench, run, time_floors))
        return run

    for repeat in range(1, bench.options.repeats + 1):
        prompts = bench.subject.prompts.draw(FIRST_CALL + 1 + repeat)
        ours = run_ours(prompts, repeat) if repeat % 2 == 0 else None
        theirs = run_timed(bench, bench.run_theirs, prompts, repeat)
        ours = ours or run_ours(prompts, repeat)
        say(f"repeat {repeat}: ours {ours.seconds:.2f} s, transformers {theirs.seconds:.2f} s")
        pairs.append(Pair(prompts, ours, theirs))
    ours, theirs = [pair.ours for pair in pairs], [pair.theirs for pair in pairs]
    return Measured(*warm, ours, theirs, phased, agreement(bench, [*warm, *pairs]))


def run_timed(bench: Bench, side: Callable[..., Run], prompts: Sequence[EncodedPrompt], repeat: int) -> Run:
    """One run over `prompts`, behind a short one over the first of another draw: one token each, untimed.

    Weights that lay idle while the other side ran can be slow to reach at first, a virtual machine's above all.
    """
    others = bench.subject.prompts.draw(TOUCHES + repeat)[: bench.options.batch_size]
    side(others, decoding=replace(bench.options.texts, max_new_tokens=1, min_new_tokens=0))
    return side(prompts)


def with_floors(bench: Bench, timed: Run, time_floors: FloorTimer) -> Phased:
    """The run and its floors; on CUDA another run, since waiting for the device after each phase costs time."""
    run = timed
    if bench.device.type == "cuda":
        bench.engine.waits = True
        run = bench.run_ours(bench.subject.prompts.draw(FIRST_CALL + bench.options.repeats + 2))
        bench.engine.waits = False
    return Phased(run, time_floors(run))
