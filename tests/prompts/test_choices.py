"""Answers to choose from: their tokens after a prompt, how scores are normalised, and `Idefics.score` over both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import save_checkpoint
from tiny_tokenizers import INSTRUCT_TOKENS, llama_tokenizer, verbatim_tokenizer

from idefics_cli import Candidate, Idefics, IdeficsError, RowError
from idefics_cli.engine.reference import collate
from idefics_cli.prompts.choices import ChoiceOptions, checked_choices, normalised, split_answers, with_answer
from idefics_cli.prompts.templates import END_OF_UTTERANCE
from idefics_cli.prompts.tokenize import PromptEncoder

ENCODERS = [
    PromptEncoder(make(legacy, added=INSTRUCT_TOKENS))
    for make in (llama_tokenizer, verbatim_tokenizer)
    for legacy in (True, False)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Idefics:
    return Idefics.from_pretrained(save_checkpoint(tmp_path_factory.mktemp("base")), batch_size=3)


def image(seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (30, 40, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


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


def log_likelihood(model: Idefics, prompt: list, choice: Candidate) -> float:
    """By a plain forward pass over prompt and choice as one text, which ends with the choice's tokens."""
    row = model.encode([*prompt[:-1], f"{prompt[-1]} {choice.text}"], 0)
    length = len(choice.token_ids)
    assert tuple(row.input_ids[-length:]) == choice.token_ids
    with torch.no_grad():
        logits = model.model(**vars(collate([row], model.engine.vocabulary, model.images.image_size))).logits[0]
    return float(logits.log_softmax(-1)[-length - 1 : -1].gather(-1, torch.tensor([choice.token_ids]).T).sum())


@pytest.mark.parametrize("norm", ["none", "tokens", "bytes"])
def test_the_likeliest_choice_is_the_answer_and_all_are_candidates(base: Idefics, norm: str) -> None:
    choices = ["yes", "no", "two small dogs", "a red cat on the mat"]
    prompts = [["Image:", image(seed), "Question: what is this? Answer:"] for seed in range(4)] + [["Answer:"]]
    for prompt, result in zip(prompts, base.score([(p, choices) for p in prompts], choice_norm=norm), strict=True):
        expected = {
            each.text: log_likelihood(base, prompt, each)
            / {"none": 1, "tokens": each.tokens, "bytes": len(each.text)}[norm]
            for each in result.candidates
        }
        assert {each.text: each.score for each in result.candidates} == pytest.approx(expected, abs=1e-4)
        assert expected.keys() == set(choices) and result.text == max(expected, key=expected.get)
        assert result.score == result.candidates[0].score


def test_bad_rows_are_errors_among_good_ones(base: Idefics, tmp_path: Path) -> None:
    good = (["Answer:"], ["yes", "no"])
    asked = [good, ([tmp_path / "gone.png", "?"], ["yes"]), (["a"], []), (["word " * 400], ["yes"]), good]
    results = base.score(asked)
    codes = [result.error.code if result.error else None for result in results]
    assert codes == [None, "image_missing", "row_invalid", "prompt_too_long", None]
    assert results[0] == results[4] and results[0].text in ("yes", "no")


def test_a_prompt_with_its_longest_choice_may_fill_the_model(base: Idefics) -> None:
    room = base.model.config.max_position_embeddings
    per_word = len(base.encoder.encode(("a a",))) - len(base.encoder.encode(("a",)))
    fitting = ["a" + " a" * ((room - len(base.encoder.encode(("a a",)))) // per_word)]
    assert base.score([(fitting, ["a"])])[0].error is None
    assert base.score([(fitting, ["a", "a a a"])])[0].error.code == "prompt_too_long"


def test_an_unknown_norm_is_refused(base: Idefics) -> None:
    with pytest.raises(IdeficsError, match="use 'none', 'tokens', 'bytes'"):
        base.score([], choice_norm="length")


@pytest.mark.parametrize(
    ("cell", "choices"),
    [
        ("yes,no", ("yes", "no")),
        ('["a, b", "c"]', ["a, b", "c"]),
        (' ["a"]', ["a"]),
        ("[a], [b]", ("[a]", "[b]")),
        ("[" * 100_000, ("[" * 100_000,)),
        (["a", "b"], ["a", "b"]),
        (None, None),
    ],
)
def test_a_cell_of_choices_is_a_list_or_a_text_with_commas(cell: object, choices: object) -> None:
    assert ChoiceOptions(column="c").of({"c": cell}) == choices
