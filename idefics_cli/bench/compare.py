"""Both sides of a benchmark, on the same weights and prompts: our engine and transformers' own `generate`.

Times, memory and texts of each run, and whether both sides say the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from idefics_cli.bench.floor import Counts, copy_bandwidth, floor_seconds, work_of
from idefics_cli.bench.memory import MemoryUse, measured
from idefics_cli.bench.options import BenchOptions
from idefics_cli.bench.subjects import FIRST_CALL, Subject, transformers_model
from idefics_cli.engine import reference
from idefics_cli.engine.embed import embed
from idefics_cli.engine.engine import PhaseTimes
from idefics_cli.engine.options import DecodingOptions, Hypothesis
from idefics_cli.engine.prompt_source import EncodedImage, EncodedPrompt, IterableSource
from idefics_cli.engine.scheduler import stream
from idefics_cli.errors import IdeficsError, first_error
from idefics_cli.model.joined_linear import join_linears
from idefics_cli.model.packed_linear import pack_linears

TIE = 1e-5  # two texts whose scores differ by less are equally good
TIES_EXAMINED = 16
WARMING = 1_000_000  # the draws for untimed runs count from here

Text = tuple[tuple[int, ...], float | None]  # token ids, and the score where the side was asked for it


@dataclass(frozen=True)
class Run:
    """One pass over `prompts`: `texts` in their order. `times` and `floors`, by phase, are of our engine only."""

    prompts: Sequence[EncodedPrompt]
    texts: list[Text]
    seconds: float
    memory: MemoryUse
    times: PhaseTimes = field(default_factory=PhaseTimes)
    floors: dict[str, dict[str, float]] = field(default_factory=dict)


Pair = tuple[Run, Run]  # ours and transformers', over the same prompts


class Bench:
    """Both sides of one benchmark, ready to run."""

    def __init__(self, subject: Subject, options: BenchOptions):
        self.subject, self.options = subject, options
        self.device, self.draw = subject.model.device, subject.prompts.draw
        self.theirs = transformers_model(subject.model)  # first: it keeps the weights that packing replaces
        with measured(self.device) as layout:
            started = self._now()
            (pack_linears if self.device.type == "cpu" else join_linears)(subject.model)
            self.layout_seconds = self._now() - started
        self.layout_bytes = layout.kept
        self.engine = subject.engine(options.batch_size, options.request.eager, options.request.attention)
        # Elsewhere caches would decide.
        self.bandwidth = copy_bandwidth(self.device) if self.device.type == "cuda" else None

    # ---- ours

    def run_ours(
        self,
        prompts: Sequence[EncodedPrompt],
        decoding: DecodingOptions | None = None,
        metered: bool = False,
        on_device: bool = False,
    ) -> Run:
        """`decoding` is that of the options unless it is given. `metered`: with its memory, which costs time;
        `on_device`: with the times of the device, not of the host."""
        taken = self._embedded(prompts) if self.options.embeddings else prompts
        self.engine.times.reset()
        with measured(self.device) if metered else nullcontext(MemoryUse()) as memory:
            started = self._now()
            with self.engine.timed_on_device() if on_device else nullcontext():
                found = dict(stream(self.engine, IterableSource(taken), decoding or self.options.texts))
            seconds = self._now() - started
        failed = first_error(found.values())
        if failed is not None:
            raise IdeficsError(f"a prompt has no text ({failed}): lower --shots or --num-beams")
        texts = [best_text(found[index]) for index in range(len(prompts))]
        return Run(prompts, texts, seconds, memory, replace(self.engine.times))

    def _embedded(self, prompts: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
        """The prompts with latents instead of images, as `idefics embed` makes them beforehand: not timed."""
        pixels = {key: each for prompt in prompts for key, each in zip(prompt.image_keys, prompt.pixels, strict=True)}
        images = IterableSource([EncodedImage((each,)) for each in pixels.values()])
        latents = dict(zip(pixels, (found for _, found in embed(self.engine, images)), strict=True))
        failed = first_error(latents.values())
        if failed is not None:
            raise IdeficsError(f"an image has no latents ({failed}): use another --device or --dtype")
        self.engine.latents.clear()
        return [replace(each, pixels=tuple(latents[key] for key in each.image_keys)) for each in prompts]

    def with_floors(self, run: Run, number: int) -> Run:
        """The run with the floor of each phase, timed now: within minutes a shared machine changes its pace.

        On CUDA another run, over draw `number`, in which events say what the device took for each phase.
        """
        if self.device.type == "cuda":
            run = self.run_ours(self.draw(number), on_device=True)
        counts = Counts(
            images=run.times.images,
            prompt_tokens=run.times.prompt_tokens,
            steps=run.times.steps,
            prompts=len(run.prompts),
            rows=min(self.options.batch_size, len(run.prompts)),
            beams=self.options.decoding.num_beams,
            prompt_length=statistics.fmean(len(prompt.input_ids) for prompt in run.prompts),
            text_length=statistics.fmean(len(token_ids) for token_ids, _ in run.texts),
        )
        work = work_of(self.theirs, counts)
        return replace(run, floors={phase: floor_seconds(each, self.bandwidth) for phase, each in work.items()})

    # ---- transformers'

    def run_theirs(
        self,
        prompts: Sequence[EncodedPrompt],
        decoding: DecodingOptions | None = None,
        metered: bool = False,
        with_scores: bool = False,
    ) -> Run:
        """Batches of similar length, as a careful caller makes them; only `generate` is timed.

        Scores only where time and memory do not count: transformers keeps every step's logits for them.
        """
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].input_ids))
        texts: dict[int, Text] = {}
        seconds = 0.0
        with measured(self.device) if metered else nullcontext(MemoryUse()) as memory:
            for first in range(0, len(order), self.options.batch_size):
                batch = order[first : first + self.options.batch_size]
                inputs = self.subject.inputs([prompts[index] for index in batch])
                started = self._now()
                texts |= zip(batch, self._generate(inputs, decoding or self.options.texts, with_scores), strict=True)
                seconds += self._now() - started
        return Run(prompts, [texts[index] for index in range(len(prompts))], seconds, memory)

    def _generate(self, inputs: dict[str, Tensor], options: DecodingOptions, with_scores: bool) -> Iterable[Text]:
        tensors = {name: value.to(self.device) for name, value in inputs.items()}
        vocabulary = self.subject.vocabulary
        if with_scores:
            return map(best_text, reference.generate(self.theirs, tensors, options, vocabulary))
        config = reference.generation_config(options, vocabulary)
        config.return_dict_in_generate = config.output_scores = config.output_logits = False
        with torch.inference_mode():
            sequences = self.theirs.generate(**tensors, generation_config=config)
        written = sequences[:, tensors["input_ids"].shape[1] :].tolist()
        return [(reference.until_end(row, vocabulary.end_token_ids), None) for row in written]

    @torch.inference_mode()
    def score(self, prompt: EncodedPrompt, token_ids: tuple[int, ...]) -> float:
        """The text's score by one forward pass of transformers' model."""
        options = self.options.texts
        inputs = self.subject.inputs([EncodedPrompt([*prompt.input_ids, *token_ids], prompt.pixels)])
        tensors = {name: value.to(self.device) for name, value in inputs.items()}
        logits = self.theirs(**tensors, use_cache=False).logits[0, len(prompt.input_ids) - 1 :].float()
        log_probabilities = logits.log_softmax(dim=-1)  # (tokens + 1, vocabulary)
        written = torch.tensor(token_ids, dtype=torch.long, device=self.device)
        total = float(log_probabilities[:-1].gather(1, written[:, None]).sum())
        length = len(token_ids)
        if length < options.max_new_tokens:  # the likeliest end token closes it
            total += float(log_probabilities[-1, list(self.subject.vocabulary.end_token_ids)].max())
            length += 1
        return total / length**options.length_penalty

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def best_text(hypotheses: Sequence[Hypothesis]) -> Text:
    return hypotheses[0].token_ids, hypotheses[0].score


# ---- all runs


def warm_up(bench: Bench, say: Callable[[str], None]) -> tuple[Pair, Pair]:
    """The first call, ours with cold caches and transformers with scores; then a pair whose memory is measured."""
    say("first call, and transformers with scores")
    prompts = bench.draw(FIRST_CALL)
    first = bench.run_ours(prompts, metered=True), bench.run_theirs(prompts, with_scores=True)
    say("memory")
    prompts = bench.draw(FIRST_CALL + 1)
    return first, (bench.run_ours(prompts, metered=True), bench.run_theirs(prompts, metered=True))


def timed_runs(bench: Bench, say: Callable[[str], None]) -> tuple[list[Pair], list[Run]]:
    """Pairs over new images, each side first in turn; and for each our run whose phases stand beside their floors."""
    pairs, phased, repeats = [], [], bench.options.repeats
    short = replace(bench.options.texts, max_new_tokens=1, min_new_tokens=0)
    for repeat in range(1, repeats + 1):
        prompts = bench.draw(FIRST_CALL + 1 + repeat)
        others = bench.draw(WARMING + repeat)[: bench.options.batch_size]
        runs: dict[str, Run] = {}
        for side in ("theirs", "ours")[:: 1 if repeat % 2 else -1]:
            run = bench.run_ours if side == "ours" else bench.run_theirs
            run(others, short)  # weights that lay idle meanwhile can be slow to reach at first
            runs[side] = run(prompts)
            if side == "ours":
                say("the bare matrix products")
                phased.append(bench.with_floors(runs[side], FIRST_CALL + 1 + repeats + repeat))
        say(f"repeat {repeat}: ours {runs['ours'].seconds:.2f} s, transformers {runs['theirs'].seconds:.2f} s")
        pairs.append((runs["ours"], runs["theirs"]))
    return pairs, phased


def agreement(bench: Bench, pairs: Iterable[Pair]) -> dict[str, Any]:
    """Texts of both sides, row by row. Where they differ transformers scores both: a tie is not a difference."""
    rows = [row for ours, theirs in pairs for row in zip(ours.prompts, ours.texts, theirs.texts, strict=True)]
    same = [(ours, theirs) for _, ours, theirs in rows if ours[0] == theirs[0]]
    differing = [row for row in rows if row[1][0] != row[2][0]]
    gaps = [
        abs(bench.score(prompt, ours[0]) - bench.score(prompt, theirs[0]))
        for prompt, ours, theirs in differing[:TIES_EXAMINED]
    ]
    score_differences = [abs(ours[1] - theirs[1]) for ours, theirs in same if theirs[1] is not None]
    return {
        "rows": len(rows),
        "identical": len(same) / len(rows),
        "differing_rows": len(differing),
        "differing_examined": len(gaps),
        "differing_ties": sum(gap <= TIE for gap in gaps),
        "largest_gap": max(gaps, default=None),
        "rows_with_scores": len(score_differences),
        "max_score_difference": max(score_differences, default=None),
    }
