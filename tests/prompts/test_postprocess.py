"""Decoded texts are cut where the M4 evaluation cuts them, then framed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.prompts.postprocess import PostProcess
from idefics_cli.prompts.templates import TASKS

WORDS = TASKS["vqa"].cut_words


FRAMED = PostProcess(("Image",), "a photo of ", ".")


@pytest.mark.parametrize(
    ("postprocess", "text", "shown"),
    [
        (PostProcess(WORDS), "  red \n", "red"),
        (PostProcess(WORDS), "red What Question", "red"),
        (PostProcess(WORDS), "red\nImage: blue", "red"),
        (PostProcess(WORDS), "Whatever", ""),
        (PostProcess(WORDS), "a question", "a question"),
        (PostProcess(WORDS), "multitasking", "multi"),
        (PostProcess(WORDS), "yes <end_of_utterance>", "yes"),
        (PostProcess(), " What? \n Why? ", "What? \n Why?"),
        (FRAMED, "two dogs Image: x", "a photo of two dogs."),
        (FRAMED, "Image", "a photo of ."),
    ],
)
def test_texts_end_at_the_first_stop_word_and_are_framed(postprocess: PostProcess, text: str, shown: str) -> None:
    assert postprocess(text) == shown


PIECES = st.sampled_from([*WORDS, " ", "red", "quest", "Quest", "ion", "I", "mage"])


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_the_cut_is_that_of_a_regular_expression(text: str) -> None:
    """The M4 evaluation splits at an alternation of the words and keeps what stands before."""
    assert PostProcess(WORDS)(text) == re.split("|".join(map(re.escape, WORDS)), text.strip())[0].rstrip()
