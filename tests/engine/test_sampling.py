"""Samples are those that `generate` makes of the same random numbers, and depend on seed and prompt alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts_for_tests import (
    MODELS,
    VOCABULARY,
    assert_same,
    decode,
    engine,
    model,
    prompts,
    some_prompts,
    tensors_of,
)

from idefics_cli.engine import reference
from idefics_cli.engine.beam_search import BeamRules
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.engine.prefill import QueuedPrompt
from idefics_cli.engine.prompt_source import EncodedPrompt
from idefics_cli.engine.sampling import random_draws, sample, warp
from idefics_cli.errors import IdeficsError


@st.composite
def sampling(draw) -> DecodingOptions:
    num_beams, longest = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 10))
    return DecodingOptions(
        num_beams=num_beams,
        max_new_tokens=longest,
        min_new_tokens=draw(st.sampled_from([0, min(3, longest)])),
        length_penalty=draw(st.sampled_from([0.0, 1.0, 2.0])),
        early_stopping=draw(st.sampled_from([True, False])),
        no_repeat_ngram_size=draw(st.sampled_from([0, 0, 2])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.5])),
        num_return_sequences=draw(st.integers(1, num_beams if num_beams > 1 else 4)),
        do_sample=True,
        temperature=draw(st.sampled_from([0.5, 1.0, 1.7])),
        top_k=draw(st.sampled_from([0, 1, 5, 50])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.3])),
        seed=draw(st.integers(0, 3)),
    )


@contextmanager
def drawing(prompt: EncodedPrompt, options: DecodingOptions) -> Iterator[None]:
    """transformers draws by the numbers that the prompt has."""
    content = QueuedPrompt.of(0, prompt, VOCABULARY.image_token_id).content
    rules = BeamRules.of(options, 1000, VOCABULARY)
    steps = iter(random_draws(content, options, rules.num_draws))

    def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        draws = next(steps)[:, None] if options.num_beams == 1 else next(steps)[None, :num_samples]
        return sample(probabilities.log(), draws)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        yield


@settings(max_examples=40, deadline=None)
@given(model, st.lists(prompts(), min_size=1, max_size=4), sampling(), st.sampled_from([1, 3]))
def test_the_engine_draws_what_generate_draws(network, some, chosen, rows) -> None:
    for prompt, got in zip(some, decode(engine(network, rows), some, chosen), strict=True):
        with drawing(prompt, chosen):
            expected = reference.generate(network, tensors_of(prompt), chosen, VOCABULARY)[0]
        assert_same(got, sorted(expected, key=lambda each: -each.score))


@settings(max_examples=25, deadline=None)
@given(model, st.lists(prompts(), min_size=2, max_size=7), sampling(), st.randoms(use_true_random=False))
def test_company_and_order_change_no_sample(network, some, chosen, chance) -> None:
    expected = [decode(engine(network, 1), [prompt], chosen)[0] for prompt in some]
    order = random.Random(chance.random()).sample(range(len(some)), len(some))
    for place, got in zip(order, decode(engine(network, 3), [some[each] for each in order], chosen), strict=True):
        assert_same(got, expected[place])


def test_seeds_differ_and_the_same_one_repeats() -> None:
    some = some_prompts(12)

    def texts(seed: int) -> list[tuple[int, ...]]:
        found = decode(engine(MODELS[0]), some, DecodingOptions(do_sample=True, max_new_tokens=6, seed=seed))
        return [each[0].token_ids for each in found]

    assert texts(1) == texts(1)
    assert sum(one != other for one, other in zip(texts(1), texts(2), strict=True)) > 6


def test_samples_of_one_prompt_differ_and_the_best_comes_first() -> None:
    (found,) = decode(
        engine(MODELS[0]), some_prompts(1), DecodingOptions(do_sample=True, num_return_sequences=8, max_new_tokens=6)
    )
    assert len({each.token_ids for each in found}) > 4
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)


def test_draws_follow_the_probabilities() -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    draws = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0))
    found = sample(scores, draws)
    assert (found[:, 0] != found[:, 1]).all()
    counted = Counter(found[:, 0].tolist())
    for index, share in enumerate((0.5, 0.3, 0.15, 0.05)):
        assert counted[index] / 20_000 == pytest.approx(share, abs=0.01)
    second = Counter(found[found[:, 0] == 0, 1].tolist())  # of what the first has left
    assert second[1] / second.total() == pytest.approx(0.6, abs=0.02)


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=40), sampling(), st.integers(1, 4))
def test_warped_scores_are_those_of_transformers(scores, chosen, keep) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    expected = TemperatureLogitsWarper(chosen.temperature)(None, torch.tensor([scores]))
    if chosen.top_k:
        expected = TopKLogitsWarper(chosen.top_k, min_tokens_to_keep=keep)(None, expected)
    if chosen.top_p < 1:
        expected = TopPLogitsWarper(chosen.top_p, min_tokens_to_keep=keep)(None, expected)
    torch.testing.assert_close(warp(torch.tensor([scores]), chosen, keep), expected)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": 0.7}, "--temperature has no effect"),
        ({"top_k": 5}, "--top-k has no effect"),
        ({"top_p": 0.9}, "--top-p has no effect"),
        ({"do_sample": True, "temperature": 0.0}, "invalid --temperature 0.0"),
        ({"do_sample": True, "top_p": 1.5}, "invalid --top-p 1.5"),
        ({"do_sample": True, "top_p": float("nan")}, "invalid --top-p nan"),
        ({"repetition_penalty": -1}, "invalid --repetition-penalty -1"),
        ({"do_sample": True, "num_beams": 2, "num_return_sequences": 3}, "--num-return-sequences 3"),
        ({"num_beams": 1, "num_return_sequences": 2}, "--num-return-sequences 2"),
    ],
)
def test_what_means_nothing_is_refused(given, said) -> None:
    with pytest.raises(IdeficsError, match=said):
        DecodingOptions(**given)
