"""The engine finds what `generate` finds, whatever stands beside a prompt, comes before it, or is known already."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts_for_tests import (
    END_ID,
    ENDS,
    FAKE_ID,
    IMAGE_ID,
    IMAGES,
    MODELS,
    VOCABULARY,
    after_shots,
    assert_same,
    decode,
    engine,
    model,
    options,
    prompts,
    run_out_of_memory,
    some_prompts,
    tensors_of,
    watch_decoding,
)
from torch.utils._python_dispatch import TorchDispatchMode

from idefics_cli.bench.memory import resident_bytes
from idefics_cli.engine import engine as engine_module
from idefics_cli.engine import memory_budget, reference, scheduler
from idefics_cli.engine.engine import Engine
from idefics_cli.engine.kv_cache import KVStore
from idefics_cli.engine.options import DecodingOptions, Hypothesis
from idefics_cli.engine.prompt_source import EncodedPrompt, IterableSource
from idefics_cli.engine.row_errors import NOTHING_ALLOWED, TOO_LARGE, Overflows
from idefics_cli.engine.scheduler import Scheduler, stream
from idefics_cli.engine.tree_attention import DecodeMemory, PrefillMemory
from idefics_cli.errors import IdeficsError

few = settings(max_examples=25, deadline=None)


@settings(max_examples=40, deadline=None)
@given(model, st.lists(prompts(), min_size=1, max_size=6), options(), st.sampled_from([1, 2, 4, 9]), st.integers(1, 12))
def test_the_engine_finds_what_generate_finds(network, some, chosen, rows, num_ends) -> None:
    vocabulary = replace(VOCABULARY, end_token_ids=(END_ID, *range(40, 39 + num_ends)))
    for prompt, got in zip(some, decode(Engine(network, vocabulary, rows), some, chosen), strict=True):
        assert_same(got, reference.generate(network, tensors_of(prompt), chosen, vocabulary)[0])


@few
@given(model, prompts(max_images=4), st.lists(prompts(max_images=2), min_size=2, max_size=6), options(), st.data())
def test_shots_that_prompts_share_change_nothing(network, shots, some, chosen, data) -> None:
    """Whatever length prompts say that they share: it may hold an image of their own, or all of them."""
    some = [after_shots(shots, prompt) for prompt in some]
    lengths = st.sampled_from([0, len(shots.input_ids), None])
    said = [data.draw(lengths) for _ in some]
    said = [data.draw(st.integers(0, len(p.input_ids))) if n is None else n for p, n in zip(some, said, strict=True)]
    some = [replace(prompt, shared_len=length) for prompt, length in zip(some, said, strict=True)]
    expected = [reference.generate(network, tensors_of(prompt), chosen, VOCABULARY)[0] for prompt in some]
    runner = engine(network)
    for _ in range(2):  # the second time prefix and images are known
        for got, wanted in zip(decode(runner, some, chosen), expected, strict=True):
            assert_same(got, wanted)


@few
@given(model, st.lists(prompts(), min_size=1, max_size=4), options(), st.randoms(use_true_random=False))
def test_banned_sequences_are_not_written(network, some, chosen, chance) -> None:
    banned = bans_that_bite(some, decode(engine(network), some, chosen), chance)
    vocabulary = replace(VOCABULARY, banned_sequences=banned)
    results = sorted(stream(engine(network), IterableSource(some), chosen, banned), key=lambda result: result[0])
    for prompt, (_, got) in zip(some, results, strict=True):
        assert_same(got, reference.generate(network, tensors_of(prompt), chosen, vocabulary)[0])


def bans_that_bite(
    some: list[EncodedPrompt], found: list[list[Hypothesis]], chance: random.Random
) -> tuple[tuple[int, ...], ...]:
    """One to four tokens that end in a text which is written where nothing is banned, and may begin in its prompt."""
    banned = [(7, 8, 9, 10), (ENDS[0],)]
    for prompt, (best, *_) in zip(some, found, strict=True):
        written = [*prompt.input_ids, *best.token_ids]
        if best.token_ids:
            end = chance.randint(len(prompt.input_ids), len(written) - 1)
            # Not the very first token: transformers applies no ban that is as long as all that is written.
            banned.append(tuple(written[max(1, end - chance.randint(0, 3)) : end + 1]))
    return tuple(banned)


@few
@given(model, st.lists(prompts(), min_size=2, max_size=9), options(), st.randoms(use_true_random=False))
def test_company_and_order_change_nothing(network, some, chosen, chance) -> None:
    expected = [decode(engine(network, 1), [prompt], chosen)[0] for prompt in some]
    order = list(range(len(some)))
    chance.shuffle(order)
    runner = engine(network, chance.choice([1, 2, 3, 16]))
    for place, got in zip(order, decode(runner, [some[place] for place in order], chosen), strict=True):
        assert_same(got, expected[place])


def test_each_image_is_encoded_once_and_each_prompt_read_once() -> None:
    runner = engine(MODELS[0], rows=3)
    asked = [EncodedPrompt([1, FAKE_ID, IMAGE_ID, FAKE_ID, 5, word, 9], (IMAGES[word % 2],)) for word in range(10, 20)]
    decode(runner, asked, DecodingOptions(num_beams=4, max_new_tokens=5))
    assert runner.times.images == 2, "ten questions about two images"
    assert runner.times.prompt_tokens == 10 * 7
    decode(runner, asked, DecodingOptions(num_beams=2, max_new_tokens=5))
    assert runner.times.images == 2, "the second call knows them"


def test_images_of_prompts_in_the_queue_fill_the_vision_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, batches = engine(MODELS[0], rows=2), []
    encode = runner.model.model.encode_images

    def watching(pixel_values: torch.Tensor) -> torch.Tensor:
        batches.append(len(pixel_values))
        return encode(pixel_values=pixel_values)

    monkeypatch.setattr(runner.model.model, "encode_images", watching)
    some = [EncodedPrompt([1, FAKE_ID, IMAGE_ID, FAKE_ID, 5 + number], (IMAGES[number],)) for number in range(7)]
    decode(runner, some, DecodingOptions(max_new_tokens=3))
    assert batches == [7]
    runner.image_batch_size.now = 3
    runner.clear_caches()
    decode(runner, some, DecodingOptions(max_new_tokens=3))
    assert batches == [7, 3, 3, 1]


def test_a_shared_start_is_read_once_for_all_calls() -> None:
    runner = engine(MODELS[0])
    shots = EncodedPrompt([1, FAKE_ID, IMAGE_ID, FAKE_ID, *range(3, 23)], (IMAGES[0],))
    some = [after_shots(shots, prompt) for prompt in some_prompts(6)]
    own = sum(len(prompt.input_ids) - len(shots.input_ids) for prompt in some)
    decode(runner, some, DecodingOptions(max_new_tokens=3))
    assert runner.times.prompt_tokens == own + len(shots.input_ids)
    decode(runner, some, DecodingOptions(max_new_tokens=3))
    assert len(runner.prefixes) == 1
    assert runner.times.prompt_tokens == 2 * own + len(shots.input_ids)


@pytest.mark.parametrize("questions", [1, 2])
def test_a_start_that_prompts_say_they_share_is_read_once_whoever_comes_first(questions: int) -> None:
    """Though each call asks about one image alone, and all that its prompts have in common holds it too."""
    runner = engine(MODELS[0])
    shots = [1, *(3 + i % 30 for i in range(100))]
    read = []
    for image in IMAGES[:3]:
        asked = [[*shots, FAKE_ID, IMAGE_ID, FAKE_ID, *range(3, 13), word] for word in range(20, 20 + questions)]
        some = [EncodedPrompt(ids, (image,), shared_len=len(shots)) for ids in asked]
        before = runner.times.prompt_tokens
        got = decode(runner, some, DecodingOptions(max_new_tokens=3))
        for texts, prompt in zip(got, some, strict=True):
            assert_same(texts, decode(engine(MODELS[0]), [prompt], DecodingOptions(max_new_tokens=3))[0])
        read.append(runner.times.prompt_tokens - before)
    own = (len(asked[0]) - len(shots)) * questions
    assert read == [len(shots) + own, own, own]


@pytest.mark.parametrize("said", [True, False])
def test_rows_with_another_shared_start_take_their_turn(said: bool) -> None:
    """Each start that prompts say they share is read once, though prompts of both come in turn."""
    starts = [[1, *range(3, 20)], [1, *range(20, 38)]]
    some = [EncodedPrompt([*starts[i % 2], 5 + i, 7], shared_len=said * len(starts[i % 2])) for i in range(12)]
    some += some_prompts(0 if said else 5)
    runner = engine(MODELS[0], 3)
    chosen = DecodingOptions(num_beams=2, max_new_tokens=4)
    for prompt, got in zip(some, decode(runner, some, chosen), strict=True):
        assert_same(got, reference.generate(MODELS[0], tensors_of(prompt), chosen, VOCABULARY)[0])
    assert not said or runner.times.prompt_tokens == sum(map(len, starts)) + 2 * len(some)


def test_where_memory_ends_images_are_encoded_fewer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [EncodedPrompt([1, FAKE_ID, IMAGE_ID, FAKE_ID, 5], (torch.randn_like(IMAGES[0]),)) for _ in range(20)]
    chosen = DecodingOptions(max_new_tokens=3)
    expected = decode(engine(MODELS[0], 20), some, chosen)
    runner, sizes = engine(MODELS[0], 4), []
    encode = runner.model.model.encode_images

    def scarce(*, pixel_values):
        sizes.append(len(pixel_values))
        if len(pixel_values) > 3:
            raise torch.OutOfMemoryError("no more")
        return encode(pixel_values=pixel_values)

    monkeypatch.setattr(runner.model.model, "encode_images", scarce)
    for got, wanted in zip(decode(runner, some, chosen), expected, strict=True):
        assert_same(got, wanted)
    assert sizes[:3] == [16, 8, 4] and max(sizes[3:]) == 2 and runner.batch_size.now == 4


def test_rows_that_end_make_room_at_once() -> None:
    """With texts of different lengths, far fewer steps than if every batch waited for its longest."""
    some = some_prompts(40)
    chosen = DecodingOptions(num_beams=1, max_new_tokens=24)
    runner = engine(MODELS[0], rows=4)
    lengths = sorted(len(texts[0].token_ids) + 1 for texts in decode(runner, some, chosen))
    assert lengths[0] < 4 and lengths[-1] > 12, "the lengths are to differ for this test to mean anything"
    waiting_for_the_longest = 10 * lengths[-1]
    assert runner.times.steps < 0.75 * waiting_for_the_longest


class CountingOperations(TorchDispatchMode):
    """Counts what reaches the device, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
def steps_of(some: list[EncodedPrompt], chosen: DecodingOptions, rows: int) -> Iterator[Scheduler]:
    """The stream's scheduler: before each decode step, and after it."""
    runner = engine(MODELS[0], rows)
    running = Scheduler(runner, IterableSource(some), chosen, runner.vocabulary)
    running.advance(running.admit())
    while running.rows:
        yield running
        running.decode_step()
        yield running
        running.evict()


@pytest.mark.parametrize("shared", [False, True])
def test_a_step_takes_as_many_operations_for_many_rows_and_beams_as_for_few(shared: bool) -> None:
    counts = set()
    for rows, beams in ((2, 2), (2, 6), (8, 2), (8, 6)):
        some = some_prompts(rows)
        if shared:
            some = [after_shots(EncodedPrompt([1, *range(3, 20)]), prompt) for prompt in some]
        chosen = DecodingOptions(num_beams=beams, max_new_tokens=6, min_new_tokens=6)
        steps = steps_of(some, chosen, rows)
        for _ in steps:
            with CountingOperations() as operations:
                next(steps)
            counts.add(operations.count)
    assert len(counts) == 1, counts


def test_reordering_moves_no_key() -> None:
    """What a step leaves in a slot stays there as long as a path holds it, whichever beams continue."""

    def keys_of(store: KVStore) -> torch.Tensor:
        """(rows, slots, layers, 2, heads, head_dim)."""
        return torch.stack(store.key_values)[..., store.prompt_slots :, :].permute(2, 4, 0, 1, 3, 5)

    reordered = False
    steps = steps_of(some_prompts(3), DecodingOptions(num_beams=5, max_new_tokens=8, min_new_tokens=8), 3)
    for running in steps:
        store = running.store
        seen, tokens = keys_of(store), running.state.tokens
        held = store.ancestors.any(dim=1)  # (rows, slots)
        held &= ~torch.zeros_like(held).scatter(1, store.newest, True)  # written in this step
        next(steps)
        held &= store.ancestors[:, :, : held.shape[1]].any(dim=1)
        assert torch.equal(keys_of(store)[:, : held.shape[1]][held], seen[held])
        written = slice(int(running.state.length[0]) - 1)
        reordered |= not torch.equal(running.state.tokens[..., written], tokens[..., written])
    assert reordered


def test_short_prompts_do_not_read_what_a_long_one_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watch(memory: PrefillMemory | DecodeMemory) -> None:
        if isinstance(memory, DecodeMemory):
            seen.append((memory.store.prompt_slots, memory.slots.stop - memory.slots.start))

    watch_decoding(monkeypatch, watch)
    some = [EncodedPrompt([1, 10 + number, *[9] * length]) for number, length in enumerate((90, 80, *[5] * 8))]
    chosen = DecodingOptions(num_beams=2, max_new_tokens=3, min_new_tokens=3)
    decode(engine(MODELS[0], 1), some, chosen)
    assert seen[-1][0] >= 91, "the space that a long prompt needed is kept"
    assert max(slots for _, slots in seen) > 91 and seen[-1][1] <= 7 + 2 * 3


def test_an_image_is_projected_once_while_prompts_in_the_queue_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    project, projected, held = engine_module.project_images, [], []

    def counting(latents, layers):
        projected.append(len(latents))
        held.append(len(runner.image_key_values.keys()))
        return project(latents, layers)

    monkeypatch.setattr(engine_module, "project_images", counting)
    runner, chosen = engine(MODELS[0], 2), DecodingOptions(max_new_tokens=2)
    # Read two by two, the shortest first: images 0 and 1 are asked about again at the end, 2 and 3 only once.
    shown = [0, 1, 2, 3, 0, 1]
    some = [
        EncodedPrompt([1, *range(10, 11 + number), FAKE_ID, IMAGE_ID, FAKE_ID], IMAGES[number_shown : number_shown + 1])
        for number, number_shown in enumerate(shown)
    ]
    decode(runner, some, chosen)
    assert projected == [2, 2] and held == [0, 2]
    assert runner.image_key_values.num_bytes == 0, "the queue is empty"


@pytest.mark.parametrize("limit", [1, 3])
def test_where_memory_ends_rows_are_halved_and_start_over(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    some = some_prompts(9)
    chosen = DecodingOptions(num_beams=3, max_new_tokens=5)
    expected = decode(engine(MODELS[0], 9), some, chosen)
    run_out_of_memory(monkeypatch, lambda memory: isinstance(memory, DecodeMemory) and memory.rows.num_rows > limit)
    runner = engine(MODELS[0], 8)
    for got, wanted in zip(decode(runner, some, chosen), expected, strict=True):
        assert_same(got, wanted)
    assert runner.batch_size.now == {1: 1, 3: 2}[limit]


def test_rows_are_as_many_as_before_when_memory_has_long_been_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever had taken it; and within one stream, whose texts are the same."""
    monkeypatch.setattr(memory_budget, "PATIENCE", 2)
    some = some_prompts(60)
    chosen = DecodingOptions(num_beams=2, max_new_tokens=4, min_new_tokens=4)
    expected = decode(engine(MODELS[0], 8), some, chosen)
    sizes = []

    def scarce(memory: PrefillMemory | DecodeMemory) -> None:
        if isinstance(memory, DecodeMemory):
            sizes.append(memory.rows.num_rows)
            if len(sizes) < 8 and sizes[-1] > 2:
                raise RuntimeError("MPS backend out of memory")

    watch_decoding(monkeypatch, scarce)
    runner = engine(MODELS[0], 8)
    for got, wanted in zip(decode(runner, some, chosen), expected, strict=True):
        assert_same(got, wanted)
    assert sizes[:3] == [8, 4, 2] and max(sizes[3:8]) == 2 and max(sizes[8:]) == 8 == runner.batch_size.now


def test_a_row_that_does_not_fit_alone_has_no_text_and_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    some = some_prompts(5)
    some[2] = EncodedPrompt([1, *[9] * 50])
    chosen = DecodingOptions(max_new_tokens=3)
    run_out_of_memory(monkeypatch, lambda memory: isinstance(memory, PrefillMemory) and memory.rows.width > 40)
    runner = engine(MODELS[0], 4)
    results = decode(runner, some, chosen)
    assert results.pop(2) == TOO_LARGE and all(isinstance(texts, list) and texts for texts in results)
    assert runner.batch_size.now == 4, "one prompt that is too large says nothing about the others"


def test_values_that_are_never_finite_are_the_formats_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    head = MODELS[0].lm_head
    monkeypatch.setattr(head, "forward", lambda states: type(head).forward(head, states) * torch.nan)
    chosen = DecodingOptions(max_new_tokens=2)
    for rows in 1, 4, 20:
        with pytest.raises(IdeficsError, match=r"non-finite values \(NaN/Inf\) in float32: use another checkpoint"):
            decode(engine(MODELS[0], rows), some_prompts(16), chosen)
        few_left = decode(engine(MODELS[0], rows), some_prompts(15), chosen)
        assert few_left == [Overflows(torch.float32).error] * 15


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("at_token", [0, 2])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_prompt_whose_numbers_overflow_leaves_the_others_their_texts(
    num_beams: int, at_token: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after the prompt or later, among other running rows."""
    some = some_prompts(7)
    some[3] = EncodedPrompt([1, 9, 10, 11])
    # Where n-grams are not to be repeated, all of each prompt is known to a step.
    chosen = DecodingOptions(num_beams=num_beams, max_new_tokens=6, min_new_tokens=4, no_repeat_ngram_size=9)
    expected = decode(engine(MODELS[0], rows), some, chosen)
    step = scheduler.step

    def overflowing(logits, state, rules, context):
        is_spoilt = torch.tensor([ids[-4:] == [1, 9, 10, 11] for ids in context.tolist()])
        logits = torch.where((is_spoilt & (state.length == at_token))[:, None, None], torch.nan, logits)
        return step(logits, state, rules, context)

    monkeypatch.setattr(scheduler, "step", overflowing)
    got = decode(engine(MODELS[0], rows), some, chosen)
    assert got.pop(3) == Overflows(torch.float32).error and expected.pop(3)
    for texts, wanted in zip(got, expected, strict=True):
        assert_same(texts, wanted)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_text_that_is_over_stays_whatever_is_computed_after_it(
    num_beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ends with its first token runs a step longer, since the host has not asked yet."""
    step, spoilt = scheduler.step, []

    def ending(logits, state, rules, context):
        is_first = (state.length == 0)[:, None, None]
        logits = torch.where(is_first, logits.index_fill(2, rules.end_ids, 1e3), logits)
        spoilt.append(state.done.sum().item())
        return step(torch.where(state.done[:, None, None], torch.nan, logits), state, rules, context)

    monkeypatch.setattr(scheduler, "step", ending)
    chosen = DecodingOptions(num_beams=num_beams, max_new_tokens=6, early_stopping=num_beams > 1)
    got = decode(engine(MODELS[0], 3), some_prompts(7), chosen)
    assert [texts[0].token_ids for texts in got] == [()] * 7 and sum(spoilt)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 20])
@pytest.mark.parametrize("where", ["image", "image at the end", "first of two images", "first token", "later token"])
def test_numbers_that_overflow_stay_within_their_row(where: str, rows: int, num_beams: int) -> None:
    """Not those of padding, of slots that are used again, or of images that only fill up a row reach another one."""
    spoilt, bad_token = torch.full_like(IMAGES[0], torch.nan), 60
    prefix, one, two = [1, FAKE_ID, IMAGE_ID, FAKE_ID], (IMAGES[1],), (IMAGES[2], IMAGES[3])
    bad = {
        "image": EncodedPrompt([*prefix, 5, 6, 7], (spoilt,)),
        "image at the end": EncodedPrompt(prefix, (spoilt,)),  # first in the queue of those with an image
        "first of two images": EncodedPrompt([*prefix, 5, *prefix[1:], 6, 7], (spoilt, IMAGES[1])),
        "first token": EncodedPrompt([bad_token, *prefix[1:], 5, 6], one),
        "later token": EncodedPrompt([*prefix, 5, bad_token, 6, 7], one),
    }[where]
    good = [
        *(EncodedPrompt([*prefix, *range(5, 6 + extra)], one) for extra in range(5)),
        *(EncodedPrompt([*prefix, 9, *prefix[1:], *range(8, 9 + extra)], two) for extra in range(5)),
        *(EncodedPrompt([1, *range(5, 7 + extra)]) for extra in range(8)),
    ]
    network = copy.deepcopy(MODELS[0])
    network.model.embed_tokens.weight.data[bad_token] = torch.inf
    chosen = DecodingOptions(num_beams=num_beams, max_new_tokens=5)
    vocabulary = replace(VOCABULARY, banned_token_ids=(*VOCABULARY.banned_token_ids, bad_token))
    expected = decode(Engine(network, vocabulary, rows), good, chosen)
    for place in 0, 3, 9, 17:
        some = [*good[:place], bad, *good[place:]]
        got = decode(Engine(network, vocabulary, rows), some, chosen)
        assert got.pop(place) == Overflows(torch.float32).error
        for texts, wanted in zip(got, expected, strict=True):
            assert_same(texts, wanted)


def test_a_prompt_after_which_nothing_may_be_written_is_told_from_one_that_overflows() -> None:
    """No token twice, ends included once they are forbidden as too early: soon none is left."""
    size = MODELS[0].config.vocab_size + MODELS[0].config.additional_vocab_size
    chosen = DecodingOptions(num_beams=2, max_new_tokens=4, min_new_tokens=4)
    vocabulary = replace(VOCABULARY, banned_token_ids=tuple(range(size)))
    runner = Engine(MODELS[0], vocabulary, 2)
    assert decode(runner, some_prompts(3), chosen) == [NOTHING_ALLOWED] * 3


def test_a_shared_start_that_ends_a_text_hides_its_image() -> None:
    """What follows `</s>` sees no image, though `</s>` itself does."""
    start = EncodedPrompt([1, *range(3, 12), FAKE_ID, IMAGE_ID, FAKE_ID, 7, END_ID], (IMAGES[0],))
    some = [EncodedPrompt([*start.input_ids, word, 9], start.pixels) for word in range(10, 14)]
    chosen = DecodingOptions(num_beams=2, max_new_tokens=4)
    runner = engine(MODELS[0])
    for prompt, got in zip(some, decode(runner, some, chosen), strict=True):
        assert_same(got, reference.generate(MODELS[0], tensors_of(prompt), chosen, VOCABULARY)[0])
    assert len(runner.prefixes) == 1


def test_an_endless_stream_takes_bounded_memory() -> None:
    """What is kept does not grow with the number of prompts."""
    runner = engine(MODELS[0], rows=8)
    runner.latents.max_bytes, runner.image_key_values.max_bytes = 20_000, 200_000
    chance = torch.Generator().manual_seed(0)
    held = []

    def endless():
        for number in range(400):
            length = 1 + number * 7 % 40
            pixels = torch.randn(3, 28, 28, generator=chance)
            held.append(runner.latents.num_bytes + runner.image_key_values.num_bytes)
            yield EncodedPrompt([1, *[5 + number % 30] * length, FAKE_ID, IMAGE_ID, FAKE_ID], (pixels,))

    for _ in stream(runner, IterableSource(endless()), DecodingOptions(num_beams=2, max_new_tokens=3)):
        pass
    assert max(held) <= 220_000 and runner.times.images == 400


@pytest.mark.slow
def test_ten_thousand_prompts_of_mixed_lengths_take_constant_memory() -> None:
    """Resident memory of this process, the caches full from the second thousand on."""
    runner = engine(MODELS[0], rows=16)
    for cache in (runner.latents, runner.image_key_values, runner.prefixes):
        cache.max_bytes = 1 << 20
    chance, choice = torch.Generator().manual_seed(0), random.Random(0)
    resident = []

    def endless():
        for number in range(10_000):
            if number % 1_000 == 0:
                resident.append(resident_bytes())
            num_images = choice.randrange(3)
            words = [choice.randrange(3, 40) for _ in range(choice.randrange(1, 200))]
            images = [FAKE_ID, IMAGE_ID, FAKE_ID] * num_images
            pixels = tuple(torch.randn(num_images, 3, 28, 28, generator=chance))
            yield EncodedPrompt([1, *images, *words], pixels)

    chosen = DecodingOptions(num_beams=3, max_new_tokens=8)
    assert sum(1 for _ in stream(runner, IterableSource(endless()), chosen)) == 10_000
    print([f"{each / 1e6:.0f} MB" for each in resident])
    assert max(resident[2:]) - resident[2] < 16 << 20, resident


def test_memory_decides_how_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    network = MODELS[0]
    plan = memory_budget.MemoryPlan.of(network.config, network.num_parameters(), 4)
    row = plan.row(memory_budget.SLOTS_ASSUMED, memory_budget.TREE_ASSUMED, 1)
    for free, rows in ((0, 1), (6 * row, 3), (10_000 * row, 16)):
        monkeypatch.setattr(memory_budget, "free_bytes", lambda device, free=free: free)
        assert memory_budget.rows_that_fit(network) == rows
    assert plan.rows(1 << 40, is_cuda=True) == 240
    assert plan.rows(1 << 40, is_cuda=True, num_paths=3) == 80
