"""Free prompts of a manifest's cell: lists of texts and images, conversations, and what is neither."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.errors import RowError
from idefics_cli.prompts.interleaved import ImageItem, interleaved_prompt
from idefics_cli.prompts.templates import END_OF_UTTERANCE, SpecialToken

DATA = b"\x89PNG"
END = END_OF_UTTERANCE


def user(*content: Any) -> dict:
    return {"role": "user", "content": list(content)}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


TEXT, IMAGE = {"type": "text", "text": "what is it?"}, {"type": "image", "image": "cat.jpg"}


# ---- lists


def test_a_list_stands_as_it_is() -> None:
    assert interleaved_prompt(["a ", DATA, " b", "c"]) == ("a ", ImageItem(DATA), " bc")
    assert interleaved_prompt("only a text") == ("only a text",)


@pytest.mark.parametrize("text", ["cat.jpg", "https://example.org/cat.jpg", "<image>", "</s>", "{question}", "  "])
def test_a_string_is_text_whatever_it_says(text: str) -> None:
    assert interleaved_prompt([text]) == (text,)


@pytest.mark.parametrize(
    ("struct", "source"),
    [
        ({"type": "image", "image": "cat.jpg"}, "cat.jpg"),
        ({"type": "image", "url": "cat.jpg"}, "cat.jpg"),
        ({"image": DATA}, DATA),
        ({"image": {"bytes": DATA, "path": None}}, {"bytes": DATA, "path": None}),
        ({"bytes": DATA, "path": None}, {"bytes": DATA}),
        ({"bytes": None, "path": "cat.jpg"}, {"path": "cat.jpg"}),
        ({"type": "image", "text": None, "image": "cat.jpg", "url": None}, "cat.jpg"),
    ],
)
def test_images_are_bytes_or_structs(struct: dict, source: Any) -> None:
    assert interleaved_prompt([struct, "x"]) == (ImageItem(source), "x")


def test_a_struct_of_parquet_has_all_fields_and_the_others_are_null() -> None:
    assert interleaved_prompt([{"type": "text", "text": "a", "image": None}]) == ("a",)


# ---- conversations


SURE = {"type": "text", "text": "Sure?"}
FIRST = ("User:", ImageItem("cat.jpg"), "what is it?", END)


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([user(IMAGE, TEXT)], (*FIRST, "\nAssistant:")),
        (
            [user(IMAGE, TEXT), assistant("A cat."), user(SURE)],
            (*FIRST, "\nAssistant: A cat.", END, "\nUser: Sure?", END, "\nAssistant:"),
        ),
        ([{"role": "user", "content": "Hello"}], ("User: Hello", END, "\nAssistant:")),
        ([{"role": "system", "content": "Be brief."}, user(SURE)], ("Be brief.\nUser: Sure?", END, "\nAssistant:")),
    ],
)
def test_a_conversation_is_written_as_instruct_models_were_taught(messages: list, prompt: tuple) -> None:
    assert interleaved_prompt(messages) == prompt


# ---- malformed prompts


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "nothing"),
        ([], "must be a list"),
        (7, "int 7"),
        ({"role": "user"}, "must be a list"),
        ([7], "int 7"),
        ([None], "nothing"),
        ([{}], "a struct of none"),
        ([{"a\nb": 1}], r"a struct of 'a\nb'"),
        ([{"text": "a", "image": "b"}], "either a text or an image"),
        ([{"text": None, "image": None}], "either a text or an image"),
        ([user(TEXT), assistant("A cat.")], "the last one must be the user's"),
        ([user(TEXT), "and then?"], "message of None"),
        ([user(TEXT), {"role": "system", "content": "x"}], "system for the first one"),
        ([{"role": "tool", "content": "x"}], "'tool'"),
        ([user()], "an empty message of the user"),
        ([{"role": "user", "content": None}], "content is nothing"),
        ([{"role": "user"}], "content is nothing"),
        ([{"role": ["user"], "content": "x"}], "message of"),
    ],
)
def test_a_malformed_prompt_is_a_bad_row_that_says_why(value: Any, said: str) -> None:
    error = interleaved_prompt(value)
    assert isinstance(error, RowError) and error.code == "row_invalid", error
    assert said in error.message


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.binary(max_size=3))
NAMES = st.sampled_from(["role", "content", "text", "image", "url", "bytes", "path", "user"])
CELLS = st.recursive(
    st.one_of(SCALARS, st.sampled_from(["user", "assistant", "system"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(CELLS)
def test_any_cell_is_a_prompt_or_a_bad_row(value: Any) -> None:
    prompt = interleaved_prompt(value)
    if isinstance(prompt, RowError):
        assert prompt.code == "row_invalid" and "\n" not in prompt.message
    else:
        assert all(isinstance(item, str | ImageItem | SpecialToken) for item in prompt)
