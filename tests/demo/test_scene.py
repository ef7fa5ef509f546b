"""The world of the demo: scenes come from their seeds alone, and what is said of them is true."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.demo.scene import COLORS, MIN_HORIZONTAL_GAP, SHAPES, SIZES, Scene, scene

seeds = st.integers(0, 2**40)
SINGULAR = {"circles": "circle", "squares": "square", "triangles": "triangle", "stars": "star", "crosses": "cross"}
NAME = re.compile(rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")


def test_a_seed_is_always_the_same_scene() -> None:
    first, second = scene(7), scene(7)
    assert first.objects == second.objects and first.questions == second.questions
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))


def test_what_is_asked_does_not_depend_on_what_is_drawn_first() -> None:
    drawn, undrawn = scene(11), scene(11)
    drawn.image.load()
    assert drawn.questions == undrawn.questions


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_shapes_stand_apart_and_inside(seed: int) -> None:
    objects = scene(seed).objects
    assert 1 <= len(objects) <= 3
    for left, right in itertools.pairwise(objects):
        assert right.x - left.x > MIN_HORIZONTAL_GAP
    for index, item in enumerate(objects):
        assert item.radius < item.x < 1 - item.radius and item.radius < item.y < 1 - item.radius
        for other in objects[:index]:
            assert np.hypot(item.x - other.x, item.y - other.y) > item.radius + other.radius


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_captions_name_everything_from_left_to_right(seed: int) -> None:
    drawn = scene(seed)
    named = NAME.findall(drawn.caption)
    assert named == [(item.size, item.color, item.shape) for item in drawn.objects]


@settings(max_examples=200, deadline=None)
@given(seeds)
def test_answers_are_right(seed: int) -> None:
    """Each question is read by a second, independent reader."""
    drawn = scene(seed)
    for question, answer in drawn.questions:
        assert answer == read_and_answer(drawn, question), question


def read_and_answer(drawn: Scene, question: str) -> str:
    def having(**wanted: str) -> list[int]:
        return [
            index
            for index, item in enumerate(drawn.objects)
            if all(getattr(item, kind) == value for kind, value in wanted.items())
        ]

    patterns = {
        r"What color is the object\?": lambda: drawn.objects[only(having())].color,
        rf"What color is the ({'|'.join(SHAPES)})\?": lambda shape: drawn.objects[only(having(shape=shape))].color,
        r"What shape is the (\w+) object\?": lambda color: drawn.objects[only(having(color=color))].shape,
        r"What size is the (\w+) (\w+)\?": lambda color, shape: (
            drawn.objects[only(having(color=color, shape=shape))].size
        ),
        r"How many objects are there\?": lambda: str(len(drawn.objects)),
        r"How many (?!objects)(\w+) are there\?": lambda plural: str(len(having(shape=SINGULAR[plural]))),
        r"Is there a (\w+) object\?": lambda color: yes(having(color=color)),
        r"Is there a (\w+) (?!object)(\w+)\?": lambda color, shape: yes(having(color=color, shape=shape)),
        r"Is the (\w+) (\w+) to the (left|right) of the (\w+) (\w+)\?": lambda color, shape, side, *other: yes(
            (
                drawn.objects[only(having(color=color, shape=shape))].x
                < drawn.objects[only(having(color=other[0], shape=other[1]))].x
            )
            == (side == "left")
        ),
        r"What (\w+) is the object on the far (left|right)\?": lambda kind, side: getattr(
            sorted(drawn.objects, key=lambda item: item.x)[0 if side == "left" else -1], kind
        ),
    }
    for pattern, answer in patterns.items():
        if found := re.fullmatch(pattern, question):
            return answer(*found.groups())
    raise AssertionError(f"no reader for {question!r}")


def only(indices: list[int]) -> int:
    (index,) = indices
    return index


def yes(truth: object) -> str:
    return "yes" if truth else "no"


def test_every_kind_of_question_comes_up_with_every_answer() -> None:
    asked = [pair for seed in range(400) for pair in scene(seed).questions]
    answers = {answer for _, answer in asked}
    assert answers == {*COLORS, *SHAPES, *SIZES, "yes", "no", "0", "1", "2", "3"}
    for side in ("left", "right"):
        far = {answer for question, answer in asked if question.endswith(f"far {side}?")}
        assert far == {*COLORS, *SHAPES, *SIZES}


def test_a_pair_that_is_not_there_is_missed_narrowly() -> None:
    """Its colour and its shape are both there wherever two objects differ in both, and one of them otherwise."""
    for drawn in map(scene, range(300)):
        (question,) = [
            asked
            for asked, answer in drawn.questions
            if answer == "no" and re.match("Is there a .* (?!object)", asked) and "object" not in asked
        ]
        color, shape = question.removesuffix("?").split()[-2:]
        colors, shapes = ({getattr(item, kind) for item in drawn.objects} for kind in ("color", "shape"))
        crossed = len({(item.color, item.shape) for item in drawn.objects}) < len(colors) * len(shapes)
        assert (color in colors) + (shape in shapes) == 1 + crossed, drawn.caption


@pytest.mark.parametrize("color", COLORS)
def test_colours_are_what_they_are_called(color: str) -> None:
    """The pixel in the middle of a large shape is of the colour named, or near it."""
    for seed in range(2_000):
        for item in scene(seed).objects:
            if item.size == "large" and item.color == color and item.shape in ("circle", "square"):
                image = np.asarray(scene(seed).image, dtype=float)
                pixel = image[int(item.y * 128), int(item.x * 128)]
                assert np.abs(pixel - COLORS[color]).max() < 30
                return
    raise AssertionError(f"no large {color} circle or square among the scenes")
