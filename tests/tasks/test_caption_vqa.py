"""What `caption` and `vqa` ask the model: the prompts of a run with a fake model, read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FakeCaptioner, prompts_of, rows_of, save_image
from typer.testing import Result
from written_manifests import write_manifest

from idefics_cli.prompts.templates import TASKS

CAPTION_SHOTS = "".join(f"Image:Caption: {shot.answer}\n" for shot in TASKS["caption"].text_only_shots)
VQA_PREFIX = "Instruction: provide an answer to the question. Use the image to answer.\n"
VQA_SHOTS = "".join(f"Image:Question: {shot.question} Answer: {shot.answer}\n" for shot in TASKS["vqa"].text_only_shots)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rows = [
        {"id": name, "image": f"{seed}.png", "question": f"What is {name}?", "place": f"{name} street", "year": seed}
        for seed, name in ((1, "x"), (2, "y"))
    ]
    for seed in (1, 2):
        save_image(tmp_path / f"{seed}.png", seed)
    return write_manifest(tmp_path / "rows.jsonl", rows)


@pytest.fixture
def prompts(run: Callable[..., Result]) -> Callable[..., list[str | None]]:
    """`prompts(*arguments)`: what the rows of a command are asked."""

    def invoke(*arguments: str | Path, captioner: FakeCaptioner | None = None) -> list[str | None]:
        captioner = captioner or FakeCaptioner()
        result = run(*arguments, captioner=captioner)
        assert result.exit_code == 0, result.output
        return prompts_of(captioner, rows_of(result.stdout))

    return invoke


Prompts = Callable[..., list[str | None]]


# The published prompts


def test_captions_are_asked_for_as_published(prompts: Prompts, manifest: Path) -> None:
    assert prompts("caption", manifest) == [f"{CAPTION_SHOTS}Image:[{seed}]Caption:" for seed in (1, 2)]
    instruct = prompts("caption", manifest, captioner=FakeCaptioner(is_instruct=True))
    assert instruct[0] == "User:[1]Describe the image briefly.<end_of_utterance>\nAssistant:"


def test_questions_are_asked_as_published(prompts: Prompts, manifest: Path) -> None:
    asked = [f"Image:[{seed}]Question: What is {name}? Answer:" for seed, name in ((1, "x"), (2, "y"))]
    assert prompts("vqa", manifest) == [VQA_PREFIX + VQA_SHOTS + query for query in asked]
    assert prompts("vqa", manifest, "--bare") == [VQA_PREFIX + query for query in asked]
    assert prompts("vqa", manifest, "--template", "vizwiz", "--bare")[0].startswith("Task: Answer the questions")
    instruct = prompts("vqa", manifest, captioner=FakeCaptioner(is_instruct=True))
    assert instruct == [
        f"User:[{seed}]What is {name}?<end_of_utterance>\nAssistant:" for seed, name in ((1, "x"), (2, "y"))
    ]


# Own prompts


def test_an_own_prompt_has_fields_for_columns(prompts: Prompts, manifest: Path) -> None:
    text = "In {place}, {year}: {image} {{really}} {question}"
    expected = ["In x street, 1: [1] {really} What is x?", "In y street, 2: [2] {really} What is y?"]
    assert prompts("vqa", manifest, "--prompt", text) == expected
    assert prompts("caption", manifest, "--prompt", text) == expected


def test_prompts_that_need_other_columns_are_refused_before_the_model_is_loaded(
    refused: Callable[..., str], manifest: Path, photos: Path
) -> None:
    assert "rows.jsonl has no column 'colour'" in refused("caption", manifest, "--prompt", "{colour} {image}")
    assert "'image', 'question', 'place', 'year'" in refused("vqa", manifest, "--prompt", "{colour}")
    assert "colour, size" in refused("caption", photos, "--prompt", "{colour} and {size}")
    assert "question" in refused("caption", photos, "--template", "vqa")
    assert "place" in refused("vqa", photos, "-q", "Why?", "--prompt", "{place} {question}")
    assert "asks no question" in refused("vqa", manifest, "--template", "caption")


# Questions of a manifest


def test_questions_that_are_missing_everywhere(refused: Callable[..., str], photos: Path, manifest: Path) -> None:
    said = refused("vqa", photos)
    assert "is not a manifest" in said and "-q QUESTION" in said and "'question'" in said
    assert "has no column 'ask'" in refused("vqa", manifest, "--question-column", "ask")
    assert "-q" in refused("vqa", photos, "-q", " ")
    assert "-q QUESTION" in refused("vqa", "-", input=b"a.png\n")


def test_rows_without_a_question_are_rows_with_an_error(run: Callable[..., Result], tmp_path: Path) -> None:
    save_image(tmp_path / "1.png", 1)
    rows = [{"id": str(k), "image": "1.png", "ask": question} for k, question in enumerate(["What?", None, " ", 7])]
    manifest = write_manifest(tmp_path / "rows.jsonl", rows)
    found = rows_of(run("vqa", manifest, "--question-column", "ask").stdout)
    assert [row["question"] for row in found] == ["What?", None, None, "7"]
    assert [row["error"] and row["error"][:13] for row in found] == [None, "row_invalid: ", "row_invalid: ", None]


def test_rows_ask_about_several_images(prompts: Prompts, tmp_path: Path) -> None:
    for seed in (1, 2):
        save_image(tmp_path / f"{seed}.png", seed)
    manifest = write_manifest(tmp_path / "r.jsonl", [{"image": ["1.png", "2.png"], "question": "Which?"}])
    assert prompts("vqa", manifest, "--bare") == [f"{VQA_PREFIX}Image:[1][2]Question: Which? Answer:"]
    assert prompts("vqa", manifest, "--prompt", "{image} or {image}? {question}") == ["[1] or [2]? Which?"]


# What the model and the result are told


def test_banned_words_reach_the_model_and_stop_words_cut(run: Callable[..., Result], manifest: Path) -> None:
    captioner = FakeCaptioner(answer=lambda text: " red bus\nQuestion: What? Answer: no")
    rows = rows_of(run("vqa", manifest, captioner=captioner).stdout)
    assert captioner.decoding["banned_words"] == ("\n", "\n\n")
    assert captioner.decoding["max_new_tokens"] == 15
    assert [row["answer"] for row in rows] == ["red bus", "red bus"]
    rows = rows_of(run("vqa", manifest, "--stop-words", "bus,no", captioner=captioner).stdout)
    assert rows[0]["answer"] == "red"
    rows = rows_of(run("vqa", manifest, "--stop-words", "", captioner=captioner).stdout)
    assert rows[0]["answer"] == "red bus"
