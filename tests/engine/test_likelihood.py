"""Log-likelihoods of choices, beside the plain forward pass over prompt and choice, for rows of every shape."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts_for_tests import (
    FAKE_ID,
    IMAGE_ID,
    IMAGES,
    MODELS,
    SHAPES,
    VOCABULARY,
    after_shots,
    engine,
    model,
    prompts,
    run_out_of_memory,
    words,
)
from tiny_models import IMAGE_SIZE, tiny_config
from transformers import IdeficsForVisionText2Text as TheirModel

from idefics_cli.engine import likelihood, prefill
from idefics_cli.engine.engine import Engine
from idefics_cli.engine.likelihood import Scoring
from idefics_cli.engine.prompt_source import EncodedChoices, EncodedPrompt, IterableSource
from idefics_cli.engine.reference import collate
from idefics_cli.engine.row_errors import TOO_LARGE, Overflows
from idefics_cli.errors import IdeficsError

choice_lists = st.lists(st.lists(words, min_size=1, max_size=6).map(tuple), min_size=1, max_size=5)
few = settings(max_examples=15, deadline=None)


def asked(prompt: EncodedPrompt, choice_ids: Sequence[tuple[int, ...]]) -> EncodedChoices:
    names = tuple(f"choice {number}" for number in range(len(choice_ids)))
    return EncodedChoices(prompt.input_ids, prompt.pixels, choices=names, choice_ids=tuple(choice_ids))


questions = st.builds(asked, prompts(max_images=3), choice_lists)


def plainly(network: torch.nn.Module, prompt: EncodedChoices) -> list[float]:
    """Every choice in a row of its own after the prompt, in one forward pass without a cache."""
    rows = [EncodedPrompt([*prompt.input_ids, *ids], prompt.pixels) for ids in prompt.choice_ids]
    with torch.no_grad():
        logits = network(**collate(rows, VOCABULARY, IMAGE_SIZE)).logits.double()  # padded on the left
    told = [each[-len(ids) - 1 : -1].log_softmax(-1) for each, ids in zip(logits, prompt.choice_ids, strict=True)]
    chosen = [each.gather(-1, torch.tensor(ids)[:, None]) for each, ids in zip(told, prompt.choice_ids, strict=True)]
    return [float(each.sum()) for each in chosen]


def score(runner: Engine, some: Sequence[EncodedChoices]) -> list[list[float]]:
    """In the order of the prompts, each exactly once and with its own prompt."""
    results = list(Scoring(runner).run(IterableSource(some)))
    assert sorted(number for number, _, _ in results) == list(range(len(some)))
    assert all(prompt is some[number] for number, prompt, _ in results)
    return [scores for _, _, scores in sorted(results, key=lambda result: result[0])]


def assert_close(got: list[float], expected: list[float]) -> None:
    assert got == pytest.approx(expected, abs=2e-4, rel=2e-5)


def some_questions(count: int, num_choices: int = 3) -> list[EncodedChoices]:
    chance = random.Random(count)
    made = []
    for _ in range(count):
        ids = [1, *chance.choices(range(3, 40), k=chance.randint(1, 9)), FAKE_ID, IMAGE_ID, FAKE_ID, 7]
        choices = [tuple(chance.choices(range(3, 40), k=chance.randint(1, 4))) for _ in range(num_choices)]
        made.append(asked(EncodedPrompt(ids, (chance.choice(list(IMAGES)),)), choices))
    return made


@few
@given(st.sampled_from(range(len(SHAPES))), st.lists(questions, min_size=1, max_size=6), st.sampled_from([1, 2, 4, 9]))
def test_choices_are_as_likely_as_transformers_forward_pass_finds_them(place, some, rows) -> None:
    theirs = TheirModel(tiny_config(SHAPES[place])).eval()
    theirs.load_state_dict(MODELS[place].state_dict())
    for prompt, got in zip(some, score(engine(MODELS[place], rows), some), strict=True):
        assert_close(got, plainly(theirs, prompt))


@few
@given(model, prompts(max_images=3), st.lists(questions, min_size=2, max_size=5))
def test_a_shared_start_changes_nothing(network, shots, some) -> None:
    some = [asked(after_shots(shots, prompt), prompt.choice_ids) for prompt in some]
    runner = engine(network)
    for _ in range(2):  # the second time prefix and images are known
        for prompt, got in zip(some, score(runner, some), strict=True):
            assert_close(got, plainly(network, prompt))


@few
@given(model, st.lists(questions, min_size=2, max_size=6), st.integers(1, 12))
def test_company_and_the_number_of_choices_in_a_row_change_nothing(network, some, most_tokens) -> None:
    expected = [score(engine(network, 1), [prompt])[0] for prompt in some]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "CHOICE_TOKENS_PER_ROW", most_tokens)
        patch.setattr(likelihood, "PLACES_AT_ONCE", most_tokens)
        for got, wanted in zip(score(engine(network), some), expected, strict=True):
            assert_close(got, wanted)


def test_a_prompt_is_read_once_and_choices_cost_their_own_tokens() -> None:
    """The last token of a choice is predicted, and never read: yes and no cost nothing beyond the prompt."""
    runner = engine(MODELS[0])
    prompt = EncodedPrompt([1, FAKE_ID, IMAGE_ID, FAKE_ID, 5, 6], (IMAGES[0],))
    score(runner, [asked(prompt, [(7,), (8,)])])
    assert (runner.times.prompt_tokens, runner.times.images) == (6, 1)
    score(runner, [asked(prompt, [(7, 9, 9), (8, 9), (7,)])])
    assert (runner.times.prompt_tokens, runner.times.images) == (6 + 6 + 2 + 1, 1)


def test_shots_are_read_once_for_all_rows() -> None:
    runner = engine(MODELS[0])
    shots = EncodedPrompt([1, FAKE_ID, IMAGE_ID, FAKE_ID, *range(3, 23)], (IMAGES[0],))
    some = [asked(after_shots(shots, prompt), [(7,), (8,)]) for prompt in some_questions(6)]
    score(runner, some)
    own = sum(len(prompt.input_ids) - len(shots.input_ids) for prompt in some)
    assert runner.times.prompt_tokens == own + len(shots.input_ids)


@pytest.mark.parametrize("limit", [1, 3])
def test_where_memory_ends_rows_are_halved(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    some = some_questions(9)
    expected = score(engine(MODELS[0]), some)
    run_out_of_memory(monkeypatch, lambda memory: memory.rows.num_rows > limit)
    for got, wanted in zip(score(engine(MODELS[0], 8), some), expected, strict=True):
        assert_close(got, wanted)


def test_choices_that_do_not_fit_together_are_halved_and_one_too_large_ends_its_prompt_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = some_questions(4, num_choices=5)
    some[2] = asked(some[2], [(5, 6), (7,) * 60, (8,), (9, 9)])
    expected = [plainly(MODELS[0], prompt) for prompt in some]
    run_out_of_memory(monkeypatch, lambda memory: memory.rows.width > 18)
    got = score(engine(MODELS[0]), some)
    assert got.pop(2) == TOO_LARGE and expected.pop(2)
    for scores, wanted in zip(got, expected, strict=True):
        assert_close(scores, wanted)


def test_numbers_that_all_overflow_are_the_formats_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    head = MODELS[0].lm_head
    monkeypatch.setattr(head, "forward", lambda states: type(head).forward(head, states) * torch.nan)
    with pytest.raises(IdeficsError, match="in float32: use another checkpoint"):
        score(engine(MODELS[0]), some_questions(16))
    assert score(engine(MODELS[0]), some_questions(2)) == [Overflows(torch.float32).error] * 2


@pytest.mark.parametrize("rows", [1, 2, 4, 9])
def test_numbers_that_overflow_stay_within_their_row(rows: int) -> None:
    prefix, spoilt = [1, FAKE_ID, IMAGE_ID, FAKE_ID], torch.full_like(IMAGES[0], torch.nan)
    choice_ids = [(5,), (6, 7, 8)]
    good = [
        *(asked(EncodedPrompt([*prefix, *range(5, 6 + extra)], (IMAGES[1],)), choice_ids) for extra in range(3)),
        asked(EncodedPrompt([*prefix, 9, *prefix[1:], 8], (IMAGES[2], IMAGES[3])), choice_ids),
        *(asked(EncodedPrompt([1, *range(5, 7 + extra)]), choice_ids) for extra in range(4)),
    ]
    expected = [plainly(MODELS[0], prompt) for prompt in good]
    for images in (spoilt,), (spoilt, IMAGES[4]):
        for place in 0, 3, 8:
            bad = asked(EncodedPrompt([*prefix, *[9, *prefix[1:]] * (len(images) - 1), 5, 6], images), choice_ids)
            got = score(engine(MODELS[0], rows), [*good[:place], bad, *good[place:]])
            assert got.pop(place) == Overflows(torch.float32).error
            for scores, wanted in zip(got, expected, strict=True):
                assert_close(scores, wanted)


def test_prompts_are_taken_a_few_batches_ahead_only() -> None:
    taken = []

    def endless():
        for prompt in some_questions(60):
            taken.append(prompt)
            yield prompt

    finished = Scoring(engine(MODELS[0], 3)).run(IterableSource(endless()))
    next(finished)
    assert len(taken) == 12  # four batches of three
    assert len(list(finished)) == 59
