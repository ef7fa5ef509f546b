"""Decoded texts are cut where the M4 evaluation cuts them, then framed."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.prompts.postprocess import PostProcess
from idefics_cli.prompts.templates import TASKS

WORDS = TASKS["vqa"].cut_words


def test_texts_end_at_the_first_stop_word() -> None:
    texts = ["  red \n", "red What Question", "red\nImage: blue", "Whatever", "a question", "multitasking"]
    assert [PostProcess(WORDS)(text) for text in texts] == ["red", "red", "red", "", "a question", "multi"]
    assert PostProcess(WORDS)("yes <end_of_utterance>") == "yes"
    assert PostProcess()(" What? \n Why? ") == "What? \n Why?"


PIECES = st.sampled_from([*WORDS, " ", "red", "quest", "Quest", "ion", "I", "mage"])


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_the_cut_is_that_of_a_regular_expression(text: str) -> None:
    """The M4 evaluation splits at an alternation of the words and keeps what stands before."""
    assert PostProcess(WORDS)(text) == re.split("|".join(map(re.escape, WORDS)), text.strip())[0].rstrip()


def test_prefix_and_suffix_frame_what_is_left() -> None:
    assert PostProcess(("Image",), "a photo of ", ".")("two dogs Image: x") == "a photo of two dogs."
    assert PostProcess(("Image",), "[", "]")("Image") == "[]"
    assert PostProcess()(" red ") == "red"
