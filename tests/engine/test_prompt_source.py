"""When the engine asks for prompts, when it waits for them, and in whose company each is read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from prompts_for_tests import IMAGE_ID, IMAGES, MODELS, after_shots, assert_same, decode, engine, some_prompts

from idefics_cli.engine.options import DecodingOptions
from idefics_cli.engine.prefill import WINDOWS_AHEAD, QueuedPrompt, common_start
from idefics_cli.engine.prompt_source import EncodedPrompt, IterableSource, content_key
from idefics_cli.engine.scheduler import Scheduler, stream

OPTIONS = DecodingOptions(num_beams=2, max_new_tokens=6)
SHOTS = EncodedPrompt([1, *range(3, 33)])


@dataclass
class Trickle:
    """Gives one prompt when asked without waiting after every `pause` such calls, and notes who was waited for."""

    prompts: list[EncodedPrompt]
    pause: int = 3
    asked: int = 0
    given: int = 0
    waited: list[int] = field(default_factory=list)

    def take(self, most: int, wait: bool) -> list[EncodedPrompt]:
        assert most > 0, most
        self.asked += 1
        if not wait and self.asked % self.pause:
            return []
        if wait:
            self.waited.append(self.given)
        taken = self.prompts[self.given : self.given + 1]
        self.given += len(taken)
        return taken


def test_prompts_that_trickle_in_are_numbered_as_taken_and_waited_for_only_when_idle() -> None:
    some = some_prompts(12)
    source = Trickle(some)
    idle = []
    runner = engine(MODELS[0], rows=4)
    running = Scheduler(runner, source, OPTIONS, runner.vocabulary)
    take = source.take

    def watching(most: int, wait: bool) -> list[EncodedPrompt]:
        if wait:
            idle.append(not running.rows and not running.queue)
        return take(most, wait)

    source.take = watching
    results = dict(running.run())
    assert all(idle) and source.waited[-1] == len(some)
    for number, prompt in enumerate(some):
        assert_same(results.pop(number), decode(engine(MODELS[0], 1), [prompt], OPTIONS)[0])
    assert not results


def test_looking_ahead_is_bounded() -> None:
    taken = 0

    def counted():
        nonlocal taken
        for prompt in some_prompts(60):
            taken += 1
            yield prompt

    for out, _ in enumerate(stream(engine(MODELS[0], rows=2), IterableSource(counted()), OPTIONS), start=1):
        assert taken - out <= (WINDOWS_AHEAD + 2) * 2


def test_shots_are_shared_though_the_first_prompt_came_alone() -> None:
    some = [after_shots(SHOTS, prompt) for prompt in some_prompts(24)]

    class FirstAlone(IterableSource):
        def take(self, most: int, wait: bool) -> list[EncodedPrompt]:
            return super().take(1 if wait else most, wait)

    own = sum(len(prompt.input_ids) - len(SHOTS.input_ids) for prompt in some)
    for shared_len, times_read in ((0, 2), (len(SHOTS.input_ids), 1)):  # by the first, and for all others
        runner = engine(MODELS[0], rows=4)
        list(stream(runner, FirstAlone([replace(each, shared_len=shared_len) for each in some]), OPTIONS))
        assert runner.times.prompt_tokens - own == len(SHOTS.input_ids) * times_read


def test_a_prompt_unlike_all_others_is_not_left_behind() -> None:
    """Others that share a start keep coming; it is written when it is first in the queue."""
    odd = EncodedPrompt([1, *[9] * 50])
    some = [after_shots(SHOTS, prompt) for prompt in some_prompts(80)]
    some.insert(5, odd)
    order = [number for number, _ in stream(engine(MODELS[0], rows=2), IterableSource(some), OPTIONS)]
    assert order.index(5) < 20
    assert sorted(order) == list(range(81))


def test_what_a_few_prompts_share_does_not_hold_rows_back() -> None:
    """Five questions about each image: no start of its own for every image."""
    some = [
        EncodedPrompt([1, *range(3, 7), 64, IMAGE_ID, 64, *range(5, 12), word], (IMAGES[number // 5],))
        for number, word in enumerate(range(10, 40))
    ]
    runner = engine(MODELS[0], rows=6)
    decode(runner, some, DecodingOptions(num_beams=3, max_new_tokens=12))
    assert len(runner.prefixes) == 0


def test_the_common_start_is_most_of_a_prompt_and_leaves_it_a_token() -> None:
    def start(*prompts: list[int]) -> tuple[int, ...]:
        return common_start([QueuedPrompt.of(0, EncodedPrompt(ids), IMAGE_ID) for ids in prompts])

    assert start([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 7]) == (1, 2, 3)
    assert start([1, 2, 3, 4, 5], [1, 2, 6, 7, 8], [1, 2, 9, 9, 9]) == ()
    assert start([1, 2, 3], [1, 2, 3]) == (1, 2)
    assert start([1], [1, 2]) == ()


def test_keys_tell_images_apart_and_are_made_once() -> None:
    same = EncodedPrompt([1, IMAGE_ID], (IMAGES[0].clone(),))
    assert same.image_keys == EncodedPrompt([1, IMAGE_ID], (IMAGES[0],)).image_keys
    assert len({content_key(pixels) for pixels in IMAGES}) == len(IMAGES)
    assert content_key(torch.zeros(3, 2, 8)) != content_key(torch.zeros(3, 4, 4))
    known = EncodedPrompt([1, IMAGE_ID], (IMAGES[0],), (b"known",))
    assert known.image_keys == (b"known",)
    assert QueuedPrompt.of(0, known, IMAGE_ID).prompt is known
