"""Work for the CPU and for a CUDA device, to be compared: a real device where there is one, else one in software."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from prompts_for_tests import (
    FAKE_ID,
    IMAGE_ID,
    IMAGES,
    MODELS,
    VOCABULARY,
    after_shots,
    decode,
    some_prompts,
)
from software_cuda import SoftwareCuda, Wait

from idefics_cli.engine.embed import embed
from idefics_cli.engine.engine import Engine
from idefics_cli.engine.likelihood import Scoring
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.engine.prompt_source import EncodedChoices, EncodedImage, EncodedPrompt, IterableSource
from idefics_cli.engine.scheduler import Scheduler
from idefics_cli.model.modeling import IdeficsForVisionText2Text

Network = IdeficsForVisionText2Text
BEAMS = DecodingOptions(num_beams=3, max_new_tokens=6)
LONG = DecodingOptions(num_beams=4, max_new_tokens=40, min_new_tokens=40)  # the tree's storage grows
SAMPLES = DecodingOptions(do_sample=True, num_return_sequences=2, max_new_tokens=5, repetition_penalty=1.2)
# Of two lengths in images and several in texts, so that rows are padded, end apart and are compacted.
MIXED = [*some_prompts(4, images=2), *some_prompts(5), EncodedPrompt([1, 5, 6, 7])]
SHOTS = EncodedPrompt([1, FAKE_ID, IMAGE_ID, FAKE_ID, *range(3, 20)], (IMAGES[6],))
AFTER_SHOTS = [after_shots(SHOTS, prompt) for prompt in some_prompts(5)]
QUESTIONS, QUESTIONS_AFTER_SHOTS = (
    [
        EncodedChoices(
            prompt.input_ids, prompt.pixels, choices=("a", "b", "c"), choice_ids=((5,), (6, 7, 8), (9, number + 10))
        )
        for number, prompt in enumerate(prompts)
    ]
    for prompts in (some_prompts(4), AFTER_SHOTS)
)


@contextmanager
def device(index: int = 0) -> Iterator[SoftwareCuda | None]:
    """A GPU: the real one has no counts."""
    if torch.cuda.is_available():
        yield None
    else:
        with SoftwareCuda(index) as gpu:
            yield gpu


def moved(network: Network, index: int = 0) -> Network:
    return copy.deepcopy(network).to(f"cuda:{index}")


def texts(
    network: Network,
    some: Sequence[EncodedPrompt],
    chosen: DecodingOptions,
    rows: int = 3,
    eager: bool = False,
    attention: str = "auto",
) -> list[Any]:
    found = decode(Engine(network, VOCABULARY, rows, eager, attention=attention), list(some), chosen)
    return [[(each.token_ids, each.score) for each in row] for row in found]


def scores(network: Network, some: Sequence[EncodedChoices], rows: int = 3) -> list[Any]:
    found = Scoring(Engine(network, VOCABULARY, rows)).run(IterableSource(some))
    return [scores for _, _, scores in sorted(found, key=lambda each: each[0])]


def latents(network: Network) -> list[Any]:
    images = [EncodedImage((each,)) for each in IMAGES]
    return [each.tolist() for _, each in embed(Engine(network, VOCABULARY, 3), IterableSource(images))]


def texts_from_latents(network: Network) -> list[Any]:
    """Of images that were embedded beforehand: they lie on the host."""
    images = [EncodedImage((each,)) for each in IMAGES]
    known = dict(embed(Engine(network, VOCABULARY, 3), IterableSource(images)))
    some = [EncodedPrompt([1, FAKE_ID, IMAGE_ID, FAKE_ID, 5 + number], (known[number],)) for number in range(5)]
    return texts(network, some, BEAMS)


WORK: dict[str, Callable[[Network], list[Any]]] = {
    "beams": lambda network: texts(network, MIXED, BEAMS),
    "greedy": lambda network: texts(network, MIXED, DecodingOptions(num_beams=1, max_new_tokens=12)),
    "samples": lambda network: texts(network, MIXED, SAMPLES),
    "shots": lambda network: texts(network, AFTER_SHOTS, BEAMS),
    "long texts": lambda network: texts(network, some_prompts(3), LONG),
    "torch's attention": lambda network: texts(network, MIXED, BEAMS, attention="sdpa"),
    "torch's attention after shots": lambda network: texts(network, AFTER_SHOTS, BEAMS, eager=True, attention="sdpa"),
    "eager steps": lambda network: texts(network, AFTER_SHOTS, BEAMS, eager=True),
    "choices": lambda network: scores(network, QUESTIONS),
    "choices after shots": lambda network: scores(network, QUESTIONS_AFTER_SHOTS),
    "latents": latents,
    "texts from latents": texts_from_latents,
}


def alike(one: Any, other: Any) -> bool:
    """Equal token ids, and numbers within rounding."""
    if isinstance(one, float):
        return abs(one - other) <= 2e-4 * max(1.0, abs(one))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other


def require_same_as_on_cpu(work: Callable[[Network], list[Any]], network: Network = MODELS[0], index: int = 0) -> None:
    expected = work(network)
    with device(index):
        got = work(moved(network, index))
    assert alike(expected, got), (expected, got)


@dataclass(frozen=True)
class Counted:
    """Of one step on the device in software, or of an admission."""

    num_admitted: int
    num_ended: int
    waits: list[Wait]
    launches: int


def advances(some: Sequence[EncodedPrompt], rows: int, chosen: DecodingOptions, eager: bool = False) -> list[Counted]:
    """All that becomes of these prompts, one admission or step after another, on the device in software."""
    counted = []
    with SoftwareCuda() as gpu:
        engine = Engine(moved(MODELS[0]), VOCABULARY, rows, eager)
        scheduler = Scheduler(engine, IterableSource(some), chosen, VOCABULARY)
        gpu.clear()
        while (group := scheduler.admit()) or scheduler.rows:
            ended = scheduler.evict() if scheduler.advance(group) else []
            counted.append(Counted(len(group), len(ended), list(gpu.waits), sum(gpu.launches.values())))
            gpu.clear()
    return counted


def steps(rows: int, shots: bool = False, eager: bool = True) -> list[Counted]:
    """The admission of all rows, then all steps but the last, in which all rows end."""
    some = [EncodedPrompt([1, FAKE_ID, IMAGE_ID, FAKE_ID, 5], (IMAGES[number % 7],)) for number in range(rows)]
    if shots:
        some = [after_shots(SHOTS, prompt) for prompt in some]
    chosen = DecodingOptions(num_beams=3, max_new_tokens=6, min_new_tokens=6)
    return advances(some, rows, chosen, eager)[:-1]
