"""Prompts of `generate` as other tools' users have them: transformers' lists, LLaVA's rows, OpenAI's messages."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import FakeCaptioner, prompts_of, rows_of, save_image
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import Result
from written_manifests import write_manifest

from idefics_cli.errors import RowError
from idefics_cli.prompts.interleaved import NEXT_IMAGE, ImageItem, interleaved_prompt

END = "<end_of_utterance>"
Generated = Callable[..., tuple[list[str | None], str]]


@pytest.fixture
def generated(run: Callable[..., Result], tmp_path: Path) -> Generated:
    """`generated(rows)`: what the rows of a manifest beside `1.png` and `2.png` were asked, or their error; and stderr
    but for the summary."""
    for seed in (1, 2):
        save_image(tmp_path / f"{seed}.png", seed)

    def invoke(rows: list[dict[str, Any]] | Path, *options: str, instruct: bool = False) -> tuple[list, str]:
        captioner = FakeCaptioner(is_instruct=instruct)
        manifest = rows if isinstance(rows, Path) else write_manifest(tmp_path / "rows.jsonl", rows)
        result = run("generate", manifest, *options, captioner=captioner)
        found = rows_of(result.stdout)
        assert result.exit_code == (3 if any(row["error"] for row in found) else 0), result.output
        asked = [text or row["error"] for text, row in zip(prompts_of(captioner, found), found, strict=True)]
        said = [line for line in result.stderr.splitlines() if "--text-only" in line]
        return asked, "\n".join(said)

    return invoke


# ---- transformers' own form: strings that name images


def test_a_string_that_names_an_image_is_that_image(generated: Generated) -> None:
    prompts = [["1.png", "Question: What? Answer:"], ["User: ", "2.png", " and ", "./1.png"], "1.png"]
    expected = ["[1]Question: What? Answer:", "User: [2] and [1]", "[1]"]
    assert generated([{"prompt": prompt} for prompt in prompts]) == (expected, "")


def test_in_a_conversation_too(generated: Generated) -> None:
    chat = [{"role": "user", "content": ["1.png", "What?"]}]
    asked, said = generated([{"prompt": chat}], instruct=True)
    assert (asked, said) == ([f"User:[1]What?{END}\nAssistant:"], "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("none.png", "no such image"),
        ("sub/none.jpeg", "no such image"),
        ("../1.png", "leads out of the image root"),
        ("/etc/1.png", "--image-root"),
        ("https://a.example/1.png", "web address"),
    ],
)
def test_a_path_that_is_not_there_stays_text_with_one_warning(generated: Generated, text: str, said: str) -> None:
    rows = [{"prompt": [text, " What?"]}] * 3 + [{"prompt": ["1.png"]}]
    asked, warning = generated(rows)
    assert asked == [f"{text} What?"] * 3 + ["[1]"]
    assert warning.count("\n") == 0 and warning.startswith("row ") and said in warning


def test_a_folder_or_a_link_out_of_the_root_is_no_image(generated: Generated, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    outside = save_image(tmp_path.parent / f"{tmp_path.name}-outside.png", 9)
    (tmp_path / "link.png").symlink_to(outside)
    asked, warning = generated([{"prompt": ["folder.png", "link.png"]}])
    assert asked == ["folder.pnglink.png"] and "folder.png" in warning


def test_words_that_name_no_image_raise_no_doubt(generated: Generated) -> None:
    rows = [{"prompt": ["1.png", "is 1.png among these words?"]}, {"prompt": "Look:\n1.png"}]
    assert generated(rows) == (["[1]is 1.png among these words?", "Look:\n1.png"], "")


def test_text_only(generated: Generated) -> None:
    rows = [{"prompt": ["1.png", " <image>"], "image": "2.png"}, {"prompt": "none.png"}]
    assert generated(rows, "--text-only") == (["1.png <image>", "none.png"], "")


def test_a_run_that_shows_no_image_says_so_once(generated: Generated) -> None:
    rows = [{"prompt": "Once"}, {"prompt": "upon"}]
    asked, warning = generated(rows)
    assert asked == ["Once", "upon"] and "no row shows an image" in warning and "\n" not in warning
    assert generated([*rows, {"prompt": ["1.png"]}])[1] == ""


# ---- places in texts, and images beside them


@pytest.mark.parametrize(
    ("prompt", "image", "expected"),
    [
        ("<image>\nWhat?", "1.png", "[1]\nWhat?"),
        ("What is in <image>?", "1.png", "What is in [1]?"),
        ("<image><image> differ", ["1.png", "2.png"], "[1][2] differ"),
        (["<image> or ", "<image>"], ["1.png", "2.png"], "[1] or [2]"),
        ([{"type": "image"}, {"type": "text", "text": "What?"}], "1.png", "[1]What?"),
        ("What?", "1.png", "[1]What?"),
        (["What?"], ["1.png", "2.png"], "[1][2]What?"),
        ([{"image": "2.png"}, "What?"], "1.png", "[2]What?"),
        (["2.png", "What?"], "1.png", "[2]What?"),
        ("What?", None, "What?"),
        ([{"image": "2.png"}, "What?"], "none.png", "[2]What?"),
        ([{"image": "2.png"}, "What?"], "https://a.example/b.png", "[2]What?"),
        ("<image>", "none.png", "image_missing"),
        ("<image>", "../1.png", "image_not_allowed"),
        ("What?", "https://a.example/b.png", "image_not_allowed"),
        ("<image> <image>", "1.png", "row_invalid: the prompt has 2 places for images, and the row 1 of them"),
        ("<image>", ["1.png", "2.png"], "row_invalid: the prompt has 1 places"),
        ([{"type": "image"}, "What?"], None, "row_invalid: the prompt has 1 places for images, and the row 0"),
    ],
)
@pytest.mark.parametrize("column", ["image", "images"])
def test_the_images_of_the_row_stand_in_its_places(
    generated: Generated, prompt: Any, image: Any, expected: str, column: str
) -> None:
    (asked,), _ = generated([{"prompt": prompt, column: image}])
    assert asked is not None and (asked.startswith(expected) if "_" in expected else asked == expected)


def test_a_place_without_an_image_stays_a_word_with_a_warning(generated: Generated) -> None:
    asked, warning = generated([{"prompt": "<image>\nWhat?"}])
    assert asked == ["<image>\nWhat?"] and "<image> stays a word" in warning and "--image-column" in warning


def test_a_named_column_holds_the_images(generated: Generated) -> None:
    rows = [{"prompt": "<image> or <image>?", "a": "1.png", "b": "2.png", "number": 2}]
    assert generated(rows, "--image-column", "b,a")[0] == ["[2] or [1]?"]
    rows[0]["prompt"] = "<image>?"
    assert generated(rows, "--image-column", "{number}.png")[0] == ["[2]?"]


def test_the_row_shows_its_image(run: Callable[..., Result], generated: Generated, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", [{"prompt": "<image>?", "image": "1.png"}])
    assert rows_of(run("generate", manifest).stdout)[0]["image"] == "1.png"


def test_rows_fill_one_of_two_columns(generated: Generated) -> None:
    rows = [{"prompt": "<image> A", "image": "1.png"}, {"prompt": "<image><image> B", "images": ["2.png", "1.png"]}]
    assert generated(rows) == (["[1] A", "[2][1] B"], "")


def test_images_of_parquet(generated: Generated, tmp_path: Path) -> None:
    """The datasets library's rows: a struct of bytes beside the prompt."""
    data = (tmp_path / "1.png").read_bytes()
    table = pd.DataFrame({"prompt": ["<image> What?", "Once"], "image": [{"bytes": data, "path": "x.png"}, None]})
    table.to_parquet(tmp_path / "m.parquet")
    assert generated(tmp_path / "m.parquet")[0] == ["[1] What?", "Once"]


def test_a_column_of_that_name_that_holds_no_images_is_left_alone(generated: Generated, tmp_path: Path) -> None:
    pd.DataFrame({"prompt": ["Once"], "image": [7]}).to_parquet(tmp_path / "m.parquet")
    assert generated(tmp_path / "m.parquet")[0] == ["Once"]


# ---- LLaVA's files, OpenAI's rows


def llava(*turns: str) -> list[dict[str, str]]:
    speakers = ["human", "gpt"] * len(turns)
    return [{"from": speaker, "value": turn} for speaker, turn in zip(speakers, turns, strict=False)]


def test_llava_rows(generated: Generated) -> None:
    """As in llava_instruct_150k.json: a place on its own line, and an answer at the end, which is left out."""
    rows = [
        {"id": "a", "image": "1.png", "conversations": llava("<image>\nWhat?", "A dog.")},
        {"id": "b", "image": "2.png", "conversations": llava("What?\n<image>", "A dog.", "Its color?", "Red.")},
        {"id": "c", "conversations": llava("Once?", "Yes.")},
    ]
    expected = [
        f"User:[1]What?{END}\nAssistant:",
        f"User: What?[2]{END}\nAssistant: A dog.{END}\nUser: Its color?{END}\nAssistant:",
        f"User: Once?{END}\nAssistant:",
    ]
    assert generated(rows, instruct=True) == (expected, "")
    (error, *_), _ = generated(rows)
    assert error is not None and "instruct model" in error


def test_openai_rows(generated: Generated, tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "2.png").read_bytes()).decode()
    text = {"type": "text", "text": "What?"}
    contents = [
        [text, {"type": "image_url", "image_url": {"url": "1.png", "detail": "low"}}],
        [{"type": "image_url", "image_url": "2.png"}, text],
        [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": "1.png"}],
        [text, {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}],
        [text, {"type": "image_url", "image_url": {"url": url}}],
    ]
    rows = [{"messages": [{"role": "user", "content": content}]} for content in contents]
    *asked, web, data = generated(rows, instruct=True)[0]
    assert asked == [f"User:{each}{END}\nAssistant:" for each in (" What?[1]", "[2]What?", " What?[1]")]
    assert web is not None and web.startswith("image_not_allowed")
    assert data == f"User: What?[2]{END}\nAssistant:"


def test_messages_with_places_and_a_column_of_images(generated: Generated) -> None:
    """As TRL's and the datasets library's rows have them, with the answer to learn at the end."""
    place, text = {"type": "image", "text": None}, {"type": "text", "text": "Which?"}
    messages = [{"role": "user", "content": [place, place, text]}, {"role": "assistant", "content": "The first."}]
    rows = [
        {"messages": messages, "images": ["1.png", "2.png"]},
        {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}],
            "images": ["2.png"],
        },
    ]
    expected = [f"User:[1][2]Which?{END}\nAssistant:", f"Be brief.\nUser:[2]What?{END}\nAssistant:"]
    assert generated(rows, instruct=True) == (expected, "")


def test_the_column_of_prompts(generated: Generated, refused: Callable[..., str], tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Chat?"}]
    assert generated([{"prompt": "Once", "messages": chat}])[0] == ["Once"]
    assert generated([{"asked": "Once", "prompt": "no"}], "--prompt-column", "asked")[0] == ["Once"]
    ends = [{"prompt": [*chat, {"role": "assistant", "content": "Yes."}]}]
    assert "the last one must be the user's" in str(generated(ends, instruct=True)[0])
    assert "no column 'prompt'" in refused("generate", write_manifest(tmp_path / "m.jsonl", [{"text": "Once"}]))


# ---- whatever stands there, images and places are equally many


TEXTS = st.lists(st.sampled_from(["<image>", "a", "<im", "age>", "</s>", "1.png", "\n"]), max_size=4).map("".join)
STRUCTS = st.sampled_from([{"type": "image"}, {"image": "x.png"}, {"type": "image_url", "image_url": {"url": "y.png"}}])
CONTENTS = st.one_of(TEXTS, st.lists(st.one_of(TEXTS, STRUCTS), min_size=1, max_size=4))
CHATS = st.lists(st.builds(lambda content: {"role": "user", "content": content}, CONTENTS), min_size=1, max_size=3)
LLAVA = st.lists(st.builds(lambda text: {"from": "human", "value": text}, TEXTS), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.one_of(CONTENTS, CHATS, LLAVA), st.integers(0, 3), st.booleans())
def test_each_image_of_the_row_is_shown_once_or_none(cell: Any, num_images: int, is_example: bool) -> None:
    prompt = interleaved_prompt(cell, num_images, lambda text: text == "1.png", is_example)
    if isinstance(prompt, RowError):
        return
    places = prompt.count(NEXT_IMAGE)
    assert places in (0, num_images)
    if num_images:
        assert any(isinstance(item, ImageItem) for item in prompt)
        assert not any("<image>" in item for item in prompt if isinstance(item, str) and "<im" not in str(cell))
