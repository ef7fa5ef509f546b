"""The official templates, letter by letter."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.prompts import (
    CAPTION,
    END_OF_UTTERANCE,
    INSTRUCT_CAPTION,
    INSTRUCT_QUESTION,
    QUESTION_ANSWER,
    VIZWIZ,
    Shot,
    SpecialToken,
    caption_prompt,
    few_shot_prompt,
    merge_texts,
    question_prompt,
    strip,
)

VQA_PREFIX = "Instruction: provide an answer to the question. Use the image to answer.\n"
VIZWIZ_PREFIX = "Task: Answer the questions based on the image when possible, otherwise say unanswerable.\n"


class Picture:
    """Stands for an image: prompts pass anything on that is neither text nor a special token."""

    def __init__(self, name: str) -> None:
        self.name = name


A, B, C = Picture("a"), Picture("b"), Picture("c")


def written(prompt) -> str:
    """The prompt as one line, for reading: pictures as [a], special tokens by name."""
    return "".join(
        item if isinstance(item, str) else item.name if isinstance(item, SpecialToken) else f"[{item.name}]"
        for item in prompt
    )


def test_captions_of_the_base_model():
    assert caption_prompt(A, instruct=False) == ("Image:", A, "Caption:")


def test_captions_of_the_instruct_model():
    assert caption_prompt(A, instruct=True) == (
        "User:",
        A,
        "Describe the image briefly.",
        END_OF_UTTERANCE,
        "\nAssistant:",
    )


def test_questions_to_the_base_model():
    assert question_prompt(A, "What is it?", instruct=False) == (
        f"{VQA_PREFIX}Image:",
        A,
        "Question: What is it? Answer:",
    )


def test_questions_to_the_instruct_model():
    assert question_prompt(A, "What is it?", instruct=True) == (
        "User:",
        A,
        "What is it?",
        END_OF_UTTERANCE,
        "\nAssistant:",
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CAPTION, "Image:[a]Caption: one\nImage:[b]Caption: two\nImage:[c]Caption:"),
        (
            QUESTION_ANSWER,
            f"{VQA_PREFIX}Image:[a]Question: q1 Answer: one\nImage:[b]Question: q2 Answer: two\n"
            "Image:[c]Question: q3 Answer:",
        ),
        (
            VIZWIZ,
            f"{VIZWIZ_PREFIX}Image:[a]Question: q1 Answer: one\nImage:[b]Question: q2 Answer: two\n"
            "Image:[c]Question: q3 Answer:",
        ),
        (
            INSTRUCT_CAPTION,
            "User:[a]Describe the image briefly.<end_of_utterance>\nAssistant: one<end_of_utterance>\n"
            "User:[b]Describe the image briefly.<end_of_utterance>\nAssistant: two<end_of_utterance>\n"
            "User:[c]Describe the image briefly.<end_of_utterance>\nAssistant:",
        ),
        (
            INSTRUCT_QUESTION,
            "User:[a]q1<end_of_utterance>\nAssistant: one<end_of_utterance>\n"
            "User:[b]q2<end_of_utterance>\nAssistant: two<end_of_utterance>\n"
            "User:[c]q3<end_of_utterance>\nAssistant:",
        ),
    ],
)
def test_two_shots(template, expected):
    shots = [Shot(A, "one", "q1"), Shot(B, "two", "q2")]
    assert written(few_shot_prompt(template, shots, Shot(C, question="q3"))) == expected


def test_a_text_only_shot_leaves_its_image_slot_out():
    prompt = few_shot_prompt(CAPTION, [Shot(None, "one"), Shot(None, "two")], Shot(A))
    assert prompt == ("Image:Caption: one\nImage:Caption: two\nImage:", A, "Caption:")


def test_words_of_a_question_stay_words():
    question = "Is {question} an <image>, </s> or <end_of_utterance>?"
    prompt = question_prompt(A, question, instruct=True)
    assert prompt[2] == question
    assert [item for item in prompt if isinstance(item, SpecialToken)] == [END_OF_UTTERANCE]


def test_the_whole_prompt_is_stripped_and_nothing_within_it():
    assert strip((" \n a ", A, "\n b \t\n")) == ("a ", A, "\n b")
    assert strip(("  ", A, "  ")) == (A,)
    assert strip((A, " ", B)) == (A, " ", B)
    assert strip(("  ",)) == strip(()) == ()


def test_a_query_with_an_answer_is_our_bug():
    with pytest.raises(AssertionError, match="blue"):
        few_shot_prompt(CAPTION, [], Shot(A, "blue"))


ITEMS = st.lists(st.one_of(st.text(max_size=3), st.sampled_from([A, B, END_OF_UTTERANCE])), max_size=8)


@settings(max_examples=50, deadline=None)
@given(ITEMS)
def test_merging_keeps_every_letter_and_leaves_no_two_texts_side_by_side(items):
    merged = merge_texts(items)
    assert written(merged) == written(items)
    assert "" not in merged
    assert not any(isinstance(a, str) and isinstance(b, str) for a, b in pairwise(merged))
    assert merge_texts(merged) == merged
