"""Beam steps over a model's plain forward pass, beside transformers' `generate`, for options of every kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import Shape, random_inputs, randomize, tiny_config

from idefics_cli.engine import reference
from idefics_cli.engine.beam_search import BeamRules, BeamState, beam_step
from idefics_cli.engine.options import DecodingOptions, Vocabulary
from idefics_cli.model.modeling import IdeficsForVisionText2Text

VOCAB = 66


@pytest.fixture(scope="module")
def model() -> IdeficsForVisionText2Text:
    return randomize(IdeficsForVisionText2Text(tiny_config(Shape())), spread=0.35)


@st.composite
def all_options(draw) -> DecodingOptions:
    num_beams = draw(st.integers(1, 8))
    longest = draw(st.integers(1, 10))
    return DecodingOptions(
        num_beams=num_beams,
        max_new_tokens=longest,
        min_new_tokens=draw(st.integers(0, min(longest, 4))),
        length_penalty=draw(st.sampled_from([0.0, 1.0, 2.0, -0.5, 0.7])),
        early_stopping=draw(st.sampled_from([True, False, "never"])),
        no_repeat_ngram_size=draw(st.sampled_from([0, 0, 1, 2, 3])),
        num_return_sequences=draw(st.integers(1, num_beams)),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=all_options(), num_ends=st.integers(1, 12), seed=st.integers(0, 1000))
def test_steps_find_what_generate_finds(
    model: IdeficsForVisionText2Text, options: DecodingOptions, num_ends: int, seed: int
) -> None:
    inputs = {name: value[:3] for name, value in random_inputs(model.config, seed).items()}
    ends = tuple(range(40, 40 + num_ends))
    vocabulary = Vocabulary(ends, banned_token_ids=(64, 65), pad_token_id=0, image_token_id=65)
    expected = reference.generate(model, inputs, options, vocabulary)
    state = search(model, inputs, options, vocabulary)
    for row, hypotheses in enumerate(expected):
        for rank, hypothesis in enumerate(hypotheses):
            if hypothesis.score < -1e8:
                continue  # transformers fills up with texts that are none
            length = int(state.final_lengths[row, rank])
            token_ids = reference.until_end(state.final_tokens[row, rank, :length].tolist(), ends)
            assert token_ids == hypothesis.token_ids
            assert float(state.final_scores[row, rank]) == pytest.approx(hypothesis.score, abs=1e-4, rel=2e-5)


@torch.inference_mode()
def search(model, inputs: dict, options: DecodingOptions, vocabulary: Vocabulary) -> BeamState:
    """Every step runs the whole forward pass over every beam's whole sequence."""
    rules = BeamRules.of(options, VOCAB, vocabulary)
    rows = len(inputs["input_ids"])
    state = BeamState.start(rows, options)
    context = inputs["input_ids"].clone()
    for length in range(options.max_new_tokens):
        input_ids = torch.cat(
            [inputs["input_ids"][:, None].expand(-1, options.num_beams, -1), state.tokens[:, :, :length]], dim=2
        ).flatten(0, 1)
        spread = {name: value.repeat_interleave(options.num_beams, dim=0) for name, value in inputs.items()}
        mask = torch.nn.functional.pad(spread["attention_mask"], (0, length), value=1)
        seen = spread["image_attention_mask"]
        seen = torch.cat([seen, seen[:, -1:].expand(-1, length, -1)], dim=1)
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            pixel_values=spread["pixel_values"],
            image_attention_mask=seen,
            logits_to_keep=1,
        ).logits[:, -1]
        state, _ = beam_step(logits.unflatten(0, (rows, -1)), state, rules, context)
        if state.done.all():
            break
    return state
