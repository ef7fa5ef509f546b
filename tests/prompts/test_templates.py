"""The official templates letter by letter, own ones, shots, and what becomes of a row."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.errors import IdeficsError, RowError
from idefics_cli.prompts.templates import (
    CAPTION,
    END_OF_UTTERANCE,
    INSTRUCT_CAPTION,
    INSTRUCT_QUESTION,
    QUESTION_ANSWER,
    TASKS,
    TEMPLATES,
    VIZWIZ,
    PromptOptions,
    Shot,
    SpecialToken,
    Template,
    build_prompt,
    choose_template,
    few_shot_prompt,
    leading_shots,
    merge_texts,
    shared_start,
    shot_answer,
    strip,
)

VQA_PREFIX = "Instruction: provide an answer to the question. Use the image to answer.\n"


class ImageItem:
    """Stands for an image: prompts pass anything on that is neither text nor a special token."""

    def __init__(self, name: str) -> None:
        self.name = name


A, B, C = ImageItem("a"), ImageItem("b"), ImageItem("c")
POOL = tuple(
    Shot(image, question, answer)
    for image, answer, question in ((A, "one", "q1"), (B, "two", "q2"), (C, "three", "q3"))
)


def written(prompt) -> str:
    """The prompt as one line, for reading: images as [a], special tokens by name."""
    return "".join(
        item if isinstance(item, str) else item.name if isinstance(item, SpecialToken) else f"[{item.name}]"
        for item in prompt
    )


def test_the_whole_prompt_is_stripped_and_nothing_within_it():
    assert strip((" \n a ", A, "\n b \t\n")) == ("a ", A, "\n b")
    assert strip(("  ", A, "  ")) == (A,)
    assert strip((A, " ", B)) == (A, " ", B)
    assert strip(("  ",)) == strip(()) == ()


ITEMS = st.lists(st.one_of(st.text(max_size=3), st.sampled_from([A, B, END_OF_UTTERANCE])), max_size=8)


@settings(max_examples=50, deadline=None)
@given(ITEMS)
def test_merging_keeps_every_letter_and_leaves_no_two_texts_side_by_side(items):
    merged = merge_texts(items)
    assert written(merged) == written(items)
    assert "" not in merged
    assert not any(isinstance(a, str) and isinstance(b, str) for a, b in pairwise(merged))
    assert merge_texts(merged) == merged


# ---- own texts


def own_template(text: str, instruct: bool = False) -> Template:
    return choose_template(PromptOptions("caption", text=text), instruct)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("What is this?", "[a]What is this?"),
        ("Photo: {image} Title:", "Photo: [a] Title:"),
        ("{name}, {{name}} and {{}}", "[a]{image} {{ }, {name} and {}"),
    ],
)
def test_an_own_text_stands_as_it_is_with_its_fields_filled_once(text: str, shown: str) -> None:
    query = Shot((A,), fields={"name": "{image} {{ }"})
    assert written(few_shot_prompt(own_template(text), (), query)) == shown
    turn = f"User:{shown}<end_of_utterance>\nAssistant:"
    assert written(few_shot_prompt(own_template(text, instruct=True), (), query)) == turn


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12), st.booleans())
def test_any_text_can_be_written_with_its_braces_doubled(text: str, instruct: bool) -> None:
    doubled = text.replace("{", "{{").replace("}", "}}")
    prompt = few_shot_prompt(own_template(doubled, instruct), (), Shot((A,)))
    items = ("User:", A, text, END_OF_UTTERANCE, "\nAssistant:") if instruct else (A, text)
    assert prompt == strip(merge_texts(items))


# ---- images have places


def test_all_images_stand_at_the_only_place_or_one_at_each() -> None:
    assert written(few_shot_prompt(CAPTION, (), Shot((A, B)))) == "Image:[a][b]Caption:"
    between = own_template("from {image} to {image}:")
    assert written(few_shot_prompt(between, (), Shot((A, B)))) == "from [a] to [b]:"
    assert written(few_shot_prompt(between, [Shot(answer="none")], Shot((A, B)))) == "from  to : none\nfrom [a] to [b]:"


def test_images_without_a_place_are_a_bad_row() -> None:
    options = PromptOptions("caption", text="from {image} to {image}:")
    assert build_prompt(options, {}, (A, B, C), (), instruct=False) == RowError(
        "row_invalid", "3 images for the 2 places in the prompt"
    )


# ---- which template


def test_a_checkpoint_gets_the_template_that_it_was_published_with_or_the_one_named() -> None:
    assert choose_template(PromptOptions("caption"), instruct=False) is CAPTION
    assert choose_template(PromptOptions("caption"), instruct=True) is INSTRUCT_CAPTION
    assert choose_template(PromptOptions("vqa"), instruct=False) is QUESTION_ANSWER
    assert choose_template(PromptOptions("vqa"), instruct=True) is INSTRUCT_QUESTION
    assert choose_template(PromptOptions("vqa", template="vizwiz"), instruct=False) is VIZWIZ
    assert choose_template(PromptOptions("vqa", template="vqa"), instruct=True) is QUESTION_ANSWER


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"template": "haiku"}, "'haiku': use one of 'caption', 'vqa', 'vizwiz'"),
        ({"template": "instruct-vqa"}, "this is a base model: use 'vqa'"),
        ({"template": "caption"}, "asks no question: use 'vqa'"),
        ({"template": "vqa", "text": "{question}"}, "--prompt"),
        ({"num_shots": -1}, "-1 shots"),
        ({"bare": True, "num_shots": 2}, "--bare"),
        *(({"text": text}, r"write \{\{ or \}\} for a brace") for text in ("a { b", "a } b", "{name", "{{name}")),
        *(({"text": text}, "more than a column's name") for text in ("{}", "{name!r}", "{name:>9}")),
        ({"text": "{title}: {image}"}, "field 'title', and the rows have 'question', 'name': name one of these"),
    ],
)
def test_prompts_that_cannot_be(options: dict, said: str) -> None:
    with pytest.raises(IdeficsError, match=said):
        build_prompt(PromptOptions("vqa", **options), {"question": "?", "name": "x"}, (A,), (), instruct=False)


# ---- shots


@pytest.mark.parametrize("task", TASKS)
def test_without_shots_base_models_are_shown_two_without_images(task: str) -> None:
    options = PromptOptions(task)
    assert leading_shots(options, (), instruct=False) == TASKS[task].text_only_shots
    of_the_pool = leading_shots(options, POOL, instruct=False)
    assert of_the_pool == (Shot((), "q1", "one"), Shot((), "q2", "two"))


def test_the_published_zero_shot_prompt_as_a_whole() -> None:
    options = PromptOptions("vqa")
    shots = leading_shots(options, (), instruct=False)
    prompt = build_prompt(options, {"question": "What is it?"}, (A,), shots, instruct=False)
    assert written(prompt) == (
        f"{VQA_PREFIX}Image:Question: What color is the bus? Answer: red\n"
        "Image:Question: How many people are there? Answer: 2\nImage:[a]Question: What is it? Answer:"
    )


def test_there_are_none_for_instruct_models_own_texts_and_the_bare() -> None:
    assert leading_shots(PromptOptions("vqa"), POOL, instruct=True) == ()
    assert leading_shots(PromptOptions("vqa", bare=True), POOL, instruct=False) == ()
    assert leading_shots(PromptOptions("vqa", text="{question}"), POOL, instruct=False) == ()


def test_shots_are_the_first_of_the_pool_with_their_images() -> None:
    assert leading_shots(PromptOptions("vqa", num_shots=2), POOL, instruct=True) == POOL[:2]
    with pytest.raises(IdeficsError, match="there are 3 shots for --num-shots 4: lower it"):
        leading_shots(PromptOptions("vqa", num_shots=4), POOL, instruct=False)


def test_a_shot_shows_the_most_common_answer_and_the_first_caption() -> None:
    assert shot_answer("vqa", ["red", "blue", "blue", "green"]) == "blue"
    assert shot_answer("vqa", ["red", "blue"]) == "red"
    assert shot_answer("caption", ["a bus", "a coach", "a coach"]) == "a bus"


# ---- rows


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "the column 'question' is empty"), (["Why?"], "holds list, not text"), (True, "holds bool, not text")],
)
def test_a_row_without_a_question_is_a_bad_row(value: object, said: str) -> None:
    error = build_prompt(PromptOptions("vqa"), {"question": value}, (A,), (), instruct=False)
    assert isinstance(error, RowError) and error.code == "row_invalid" and said in error.message


def test_numbers_are_written_out() -> None:
    options = PromptOptions("caption", text="{year} {share}")
    assert build_prompt(options, {"year": 1999, "share": 0.5}, (A,), (), instruct=False) == (A, "1999 0.5")


# ---- what ends a text


def test_texts_end_where_the_published_evaluation_ends_them() -> None:
    published = {
        "caption": "Caption Description User Image task <end_of_utterance>",
        "vqa": "Question User Image task What Who When Where Why How <end_of_utterance>",
    }
    for name, words in published.items():
        assert TASKS[name].cut_words == (*words.split(), "\n", "\n\n")


def test_the_documentation_shows_every_template_and_stop_word() -> None:
    page = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for name, template in TEMPLATES.items():
        fields, answer = (("image",), "{caption}") if "caption" in name else (("image", "question"), "{answer}")
        assert template.fields == fields
        shown = Shot((ImageItem("IMG"),), "{question}", answer)
        shot = written(template.shot(shown)).replace("[IMG]", "IMG")
        row = next(row for row in rows if row.startswith(f"| `{name}` |"))
        assert (name == "vizwiz" and "as `vqa`" in row) or shot.replace("\n", r"\n") in row
        assert template.prefix.replace("\n", r"\n") in row
    for name, task in TASKS.items():
        assert any(row.startswith(f"| `{name}` | {', '.join(task.stop_words[:-1])}, `") for row in rows), name


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("shots", [(), POOL])
def test_what_prompts_share_is_what_they_begin_with(template, shots):
    start = shared_start(template, shots)
    assert bool(start) is bool(template.prefix or shots)
    for query in Shot((B,), fields={"question": "how?"}), Shot((C,), fields={"question": "who?"}):
        assert written(few_shot_prompt(template, shots, query)).startswith(written(start))
