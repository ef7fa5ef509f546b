"""Models of several shapes, and prompts of token ids and random images of every shape that the engine must take."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from tiny_models import IMAGE_SIZE, Shape, randomize, tiny_config

from idefics_cli.engine.options import DecodingOptions, Vocabulary
from idefics_cli.engine.prompt_source import EncodedPrompt
from idefics_cli.engine.reference import collate
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
        min_new_tokens=draw(st.sampled_from([0, 0, min(3, max_new_tokens)])),
        length_penalty=draw(st.sampled_from([0.0, 1.0, 2.0, -0.5])),
        early_stopping=draw(st.sampled_from([True, False, "never"])),
        no_repeat_ngram_size=draw(st.sampled_from([0, 0, 2, 3])),
        num_return_sequences=draw(st.integers(1, num_beams)),
    )


def after_shots(shots: EncodedPrompt, prompt: EncodedPrompt) -> EncodedPrompt:
    """`prompt` with another's tokens and images before its own."""
    return EncodedPrompt([*shots.input_ids, *(prompt.input_ids[1:] or [5])], shots.pixels + prompt.pixels)


def tensors_of(prompt: EncodedPrompt) -> dict[str, torch.Tensor]:
    return collate([prompt], VOCABULARY, IMAGE_SIZE)
