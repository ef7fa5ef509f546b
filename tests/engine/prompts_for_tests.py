"""Models of several shapes, prompts of every shape that the engine must take, and what becomes of them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from tiny_models import IMAGE_SIZE, Shape, randomize, tiny_config

from idefics_cli.engine.engine import Engine
from idefics_cli.engine.options import DecodingOptions, Hypothesis, Vocabulary
from idefics_cli.engine.prompt_source import EncodedPrompt, IterableSource
from idefics_cli.engine.reference import collate
from idefics_cli.engine.scheduler import stream
from idefics_cli.engine.tree_attention import DecodeMemory, PrefillMemory
from idefics_cli.model.modeling import IdeficsForVisionText2Text

FAKE_ID, IMAGE_ID, END_ID = 64, 65, 2
ENDS = (END_ID, 40, 41, 42, 43, 44, 45, 46)  # many, so that texts end early
VOCABULARY = Vocabulary(ENDS, banned_token_ids=(FAKE_ID, IMAGE_ID), pad_token_id=0, image_token_id=IMAGE_ID)
IMAGES = torch.randn(7, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(3))

SHAPES = (
    Shape(),
    Shape(
        alpha_type="vector", qk_layer_norms=False, use_resampler=False, additional_vocab_size=2, cross_layer_interval=1
    ),
    Shape(cross_layer_interval=4),
)
MODELS = [randomize(IdeficsForVisionText2Text(tiny_config(shape)), spread=0.35) for shape in SHAPES]
model = st.sampled_from(MODELS)


words = st.integers(3, 39)
texts = st.lists(words, max_size=12)


@st.composite
def prompts(draw, max_images: int = 5, longest_text: int = 120) -> EncodedPrompt:
    """1 to 200 tokens: 0 to `max_images` images between texts; now and then an end token in the middle."""
    ids, pixels = [1], []
    for _ in range(draw(st.integers(0, max_images))):
        ids += draw(texts)
        if draw(st.integers(0, 9)) == 0:
            ids.append(END_ID)
        ids += [FAKE_ID, IMAGE_ID, FAKE_ID]
        pixels.append(IMAGES[draw(st.integers(0, len(IMAGES) - 1))])
    ids += draw(st.lists(words, min_size=len(pixels) == 0, max_size=draw(st.sampled_from([3, 12, longest_text]))))
    return EncodedPrompt(ids, tuple(pixels))


@st.composite
def options(draw, max_beams: int = 8, longest: int = 12) -> DecodingOptions:
    num_beams, max_new_tokens = draw(st.integers(1, max_beams)), draw(st.integers(1, longest))
    return DecodingOptions(
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        min_new_tokens=draw(st.sampled_from([0, 0, min(3, max_new_tokens), min(4, max_new_tokens)])),
        length_penalty=draw(st.sampled_from([0.0, 1.0, 2.0, -0.5, 0.7])),
        early_stopping=draw(st.sampled_from([True, False, "never"])),
        no_repeat_ngram_size=draw(st.sampled_from([0, 0, 1, 2, 3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.8])),
        num_return_sequences=draw(st.integers(1, num_beams)),
    )


def after_shots(shots: EncodedPrompt, prompt: EncodedPrompt) -> EncodedPrompt:
    """`prompt` with another's tokens and images before its own."""
    return EncodedPrompt([*shots.input_ids, *(prompt.input_ids[1:] or [5])], shots.pixels + prompt.pixels)


def tensors_of(prompt: EncodedPrompt) -> dict[str, torch.Tensor]:
    return collate([prompt], VOCABULARY, IMAGE_SIZE)


def some_prompts(count: int, images: int = 1) -> list[EncodedPrompt]:
    chance = random.Random(count)
    made = []
    for _ in range(count):
        ids = [1, *chance.choices(range(3, 40), k=chance.randint(1, 9))]
        pixels = chance.choices(list(IMAGES), k=images)
        made.append(EncodedPrompt([*ids, *[FAKE_ID, IMAGE_ID, FAKE_ID] * images, 7], tuple(pixels)))
    return made


def engine(network: IdeficsForVisionText2Text, rows: int = 4) -> Engine:
    return Engine(network, VOCABULARY, rows)


def decode(runner: Engine, some: list[EncodedPrompt], chosen: DecodingOptions) -> list[list[Hypothesis]]:
    """In the order of the prompts, each exactly once."""
    results = list(stream(runner, IterableSource(some), chosen))
    assert sorted(index for index, _ in results) == list(range(len(some)))
    return [hypotheses for _, hypotheses in sorted(results, key=lambda result: result[0])]


def assert_same(got: list[Hypothesis], expected: list[Hypothesis]) -> None:
    expected = [each for each in expected if each.score > -1e8]  # transformers fills up with texts that are none
    assert [each.token_ids for each in got] == [each.token_ids for each in expected]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.score == pytest.approx(theirs.score, abs=1e-4, rel=2e-5)


def watch_decoding(monkeypatch: pytest.MonkeyPatch, watch: Callable[[PrefillMemory | DecodeMemory], None]) -> None:
    """`watch` sees the memory of each pass over the first model, before it."""
    decode = MODELS[0].model.decode

    def watched(states: torch.Tensor, positions: torch.Tensor, memory: PrefillMemory | DecodeMemory) -> torch.Tensor:
        watch(memory)
        return decode(states, positions, memory)

    monkeypatch.setattr(MODELS[0].model, "decode", watched)


def run_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, is_too_much: Callable[[PrefillMemory | DecodeMemory], bool]
) -> None:
    def scarce(memory: PrefillMemory | DecodeMemory) -> None:
        if is_too_much(memory):
            raise torch.OutOfMemoryError("no more")

    watch_decoding(monkeypatch, scarce)
