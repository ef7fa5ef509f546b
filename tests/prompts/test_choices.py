"""Answers to choose from: what they are, their tokens after a prompt, and how scores are normalised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import INSTRUCT_TOKENS, llama_tokenizer, verbatim_tokenizer

from idefics_cli import RowError
from idefics_cli.prompts.choices import ChoiceOptions, checked_choices, normalised, split_answers, with_answer
from idefics_cli.prompts.templates import END_OF_UTTERANCE
from idefics_cli.prompts.tokenize import PromptEncoder

ENCODERS = [
    PromptEncoder(make(legacy, added=INSTRUCT_TOKENS))
    for make in (llama_tokenizer, verbatim_tokenizer)
    for legacy in (True, False)
]


def test_an_answer_follows_one_blank_between_texts_only() -> None:
    image = object()
    assert with_answer(("Answer:",), "yes") == ("Answer: yes",)
    assert with_answer(("Answer: ",), "yes") == ("Answer: yes",)
    assert with_answer(("Answer:\n",), "yes") == ("Answer:\nyes",)
    assert with_answer(("a", image), "yes") == ("a", image, "yes")
    assert with_answer((END_OF_UTTERANCE, ""), "yes") == (END_OF_UTTERANCE, "yes")
    assert with_answer((), "yes") == ("yes",)


@given(
    st.sampled_from(ENCODERS),
    st.sampled_from(["Answer:", "Answer: ", "the do", "", "Question: two", "a ", "\n", "é"]),
    st.booleans(),
    st.lists(st.text(min_size=1, max_size=8).filter(str.strip), min_size=1, max_size=4),
)
def test_common_start_and_choice_are_the_tokens_of_the_whole_text(encoder, text, with_image, choices) -> None:
    prompt = (*([object()] if with_image else []), text)
    answered = [encoder.encode(with_answer(prompt, choice)) for choice in choices]
    prompt_ids = encoder.encode(prompt)
    common, choice_ids = split_answers(prompt_ids, answered)
    assert [[*prompt_ids[:common], *ids] for ids in choice_ids] == answered
    assert common >= 1 and all(choice_ids)
    assert common == len(prompt_ids) or any(
        ids[: common + 1] != prompt_ids[: common + 1] or len(ids) == common + 1 for ids in answered
    ), "no more could be common"


def test_an_answer_that_grows_onto_the_prompt_is_judged_with_what_it_changes() -> None:
    """`do` and `dogs` are other tokens; both choices are then judged from the same place on."""
    assert split_answers([1, 5, 6], [[1, 5, 7, 8], [1, 5, 6, 9]]) == (2, [(7, 8), (6, 9)])
    assert split_answers([1, 5, 6], [[1, 5, 6, 9], [1, 5, 6, 3]]) == (3, [(9,), (3,)])
    assert split_answers([1, 5, 6], [[1, 5, 6], [1, 5, 6, 3]]) == (2, [(6,), (6, 3)])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_word_brings_its_own_blank(encoder: PromptEncoder) -> None:
    """LLaMA's pieces hold the blank before a word: all tokens of the prompt stay.

    (The tests' vocabulary has pieces across words, which LLaMA's has not; none of them has a z.)
    """
    prompt = ("Question: how many zz",)
    prompt_ids = encoder.encode(prompt)
    common, (ids,) = split_answers(prompt_ids, [encoder.encode(with_answer(prompt, "two"))])
    assert common == len(prompt_ids)
    assert encoder._tokenizer.id_to_token(ids[0]).startswith("▁t")


def test_norms() -> None:
    assert normalised(-6.0, "äh", 2, "none") == -6.0
    assert normalised(-6.0, "äh", 2, "tokens") == -3.0
    assert normalised(-6.0, "äh", 2, "bytes") == -2.0


@pytest.mark.parametrize("choices", [None, "yes,no", [], ["yes", ""], ["yes", " "], ["yes", None], [1, 2], {"a": 1}])
def test_what_is_no_list_of_texts_is_a_bad_row(choices: object) -> None:
    found = checked_choices(choices)
    assert isinstance(found, RowError) and found.code == "row_invalid"


@pytest.mark.parametrize(
    ("cell", "choices"),
    [
        ("yes,no", ("yes", "no")),
        (["a", "b"], ["a", "b"]),
        (None, None),
    ],
)
def test_a_cell_of_choices_is_a_list_or_a_text_with_commas(cell: object, choices: object) -> None:
    assert ChoiceOptions(column="c").of({"c": cell}) == choices
