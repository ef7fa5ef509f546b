"""Starts that prompts share, in the odd cases: texts and scores stay those of `generate`, prompt by prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from prompts_for_tests import (
    END_ID,
    FAKE_ID,
    IMAGE_ID,
    IMAGES,
    MODELS,
    VOCABULARY,
    assert_same,
    decode,
    engine,
    some_prompts,
    tensors_of,
    watch_decoding,
)
from test_likelihood import asked, assert_close, plainly, score

from idefics_cli.engine import reference
from idefics_cli.engine.options import DecodingOptions, Hypothesis
from idefics_cli.engine.prompt_source import EncodedPrompt, IterableSource
from idefics_cli.engine.row_errors import TOO_LARGE
from idefics_cli.engine.scheduler import stream
from idefics_cli.engine.tree_attention import DecodeMemory, PrefillMemory

CHOSEN = DecodingOptions(num_beams=2, max_new_tokens=3, min_new_tokens=2)
IMAGE_IDS = [FAKE_ID, IMAGE_ID, FAKE_ID]
LONG = [1, *IMAGE_IDS, *range(3, 30)]  # a start with an image


def after_long(*words: int, image: int = 0) -> EncodedPrompt:
    return EncodedPrompt([*LONG, *words], (IMAGES[image],), shared_len=len(LONG))


def expected(prompt: EncodedPrompt) -> list[Hypothesis]:
    return reference.generate(MODELS[0], tensors_of(prompt), CHOSEN, VOCABULARY)[0]


@pytest.mark.parametrize("rows", [1, 3])
def test_prompts_that_share_differently_may_come_in_any_order(rows: int) -> None:
    """Shared up to every token of a start with images and an end token, or nothing, or all of the prompt."""
    ids = [1, 5, *IMAGE_IDS, 6, END_ID, 7, *IMAGE_IDS]
    ends = [EncodedPrompt([*ids, 9], IMAGES[:2], shared_len=length) for length in range(len(ids) + 2)]
    others = [EncodedPrompt([1, 5, *IMAGE_IDS, 8 + n, 9], (IMAGES[n % 3],), shared_len=n % 6) for n in range(12)]
    some = [prompt for pair in zip(ends, others, strict=False) for prompt in pair]
    for prompt, got in zip(some, decode(engine(MODELS[0], rows), some, CHOSEN), strict=True):
        assert_same(got, expected(prompt))


def test_a_prompt_may_be_nothing_but_the_start_that_others_share() -> None:
    some = [after_long(), *(after_long(word) for word in range(5, 9)), replace(after_long(), shared_len=0)]
    for prompt, got in zip(some, decode(engine(MODELS[0]), some, CHOSEN), strict=True):
        assert_same(got, expected(prompt))


@pytest.mark.parametrize("choices", [False, True])
def test_a_start_larger_than_the_cache_or_dropped_from_it_serves_the_rows_that_run(choices: bool) -> None:
    some = [after_long(*range(5, 6 + number)) for number in range(4)] + [after_long(5, 6, image=1)]
    runner = engine(MODELS[0], rows=2)
    runner.prefixes.max_bytes = 1
    if choices:
        some = [asked(prompt, [(7,), (8, 9)]) for prompt in some]
        for prompt, got in zip(some, score(runner, some), strict=True):
            assert_close(got, plainly(MODELS[0], prompt))
        return
    results = {}
    for number, texts in stream(runner, IterableSource(some), CHOSEN):
        assert len(runner.prefixes) <= 1
        runner.clear_caches()
        results[number] = texts
    for number, prompt in enumerate(some):
        assert_same(results[number], expected(prompt))


def test_where_memory_does_not_hold_a_start_only_its_prompts_have_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    some = some_prompts(8)
    for place in 1, 4, 9:
        some.insert(place, after_long(5, place))
    fitting = [expected(prompt) for prompt in some if not prompt.shared_len]

    def scarce(memory: PrefillMemory | DecodeMemory) -> None:
        if isinstance(memory, PrefillMemory) and memory.rows.width >= len(LONG):
            raise torch.OutOfMemoryError("no more")

    watch_decoding(monkeypatch, scarce)
    runner = engine(MODELS[0])
    got = decode(runner, some, CHOSEN)
    assert [got[place] for place in (1, 4, 9)] == [TOO_LARGE] * 3 and len(runner.prefixes) == 0
    for texts, wanted in zip([texts for texts in got if texts != TOO_LARGE], fitting, strict=True):
        assert_same(texts, wanted)
    assert score(runner, [asked(some[1], [(7,), (8, 9)])]) == [TOO_LARGE]


@pytest.mark.parametrize("fails_at", [1, 2, 4])  # the start, the first prompts, a later step
def test_where_memory_ends_once_the_start_is_read_again(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    some = [after_long(5, number) for number in range(6, 11)]
    wanted = [expected(prompt) for prompt in some]
    passes = []

    def scarce(memory: PrefillMemory | DecodeMemory) -> None:
        passes.append(memory.rows.width)
        if len(passes) == fails_at:
            raise torch.OutOfMemoryError("no more")

    watch_decoding(monkeypatch, scarce)
    for got, texts in zip(decode(engine(MODELS[0]), some, CHOSEN), wanted, strict=True):
        assert_same(got, texts)
    assert passes.count(len(LONG)) == 2


def test_streams_of_one_engine_may_take_turns_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """One finds that a single row fits, while more rows of the other are running."""
    some, chosen = some_prompts(8), DecodingOptions(num_beams=1, max_new_tokens=12)
    wanted = decode(engine(MODELS[0], 1), some, chosen)
    runner, most, refused = engine(MODELS[0], 8), [8], []

    def scarce(memory: PrefillMemory | DecodeMemory) -> None:
        if isinstance(memory, DecodeMemory) and memory.rows.num_rows > most[0]:
            refused.append(memory.rows.num_rows)
            raise torch.OutOfMemoryError("no more")

    watch_decoding(monkeypatch, scarce)
    first = stream(runner, IterableSource(some), chosen)
    results = dict([next(first)])
    most[0] = 1
    for got, texts in zip(decode(runner, some, chosen), wanted, strict=True):
        assert_same(got, texts)
    assert runner.batch_size.now == 1
    refused.clear()
    results |= dict(first)
    assert len(refused) == 1 < refused[0]
    for number, texts in enumerate(wanted):
        assert_same(results[number], texts)
