"""Worked examples from a file, as the prompts of a run with a fake model show them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeCaptioner, prompts_of, rows_of, save_image
from typer.testing import CliRunner, Result
from written_manifests import write_manifest

from idefics_cli.cli import app as cli
from idefics_cli.engine import prompt_source

PREFIX = "Instruction: provide an answer to the question. Use the image to answer.\n"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rows = []
    for seed in range(100, 106):
        save_image(tmp_path / f"{seed}.png", seed)
        rows.append({"id": str(seed), "image": f"{seed}.png", "question": "Q?", "hint": f"hint {seed}"})
    return write_manifest(tmp_path / "rows.jsonl", rows)


@pytest.fixture
def shots(tmp_path: Path) -> Callable[..., Path]:
    """`shots(columns..., number=...)`: a file of shots with these columns, whose images are 0, 1, 2..."""

    def write(number: int = 6, name: str = "shots.jsonl", **columns: Callable[[int], Any]) -> Path:
        for seed in range(number):
            save_image(tmp_path / "pool" / f"{seed}.png", seed)
        columns = columns or {"question": lambda k: f"Q{k}?", "answer": lambda k: f"a{k}"}
        rows = [{"image": f"{k}.png", **{key: of(k) for key, of in columns.items()}} for k in range(number)]
        return write_manifest(tmp_path / "pool" / name, rows)

    return write


Shots = Callable[..., Path]


def shown(prompt: str | None) -> list[int]:
    """The images of a prompt, its own last."""
    assert prompt is not None
    return [int(seed) for seed in re.findall(r"\[(\d+)\]", prompt)]


def asked(run: Callable[..., Result], *arguments: str | Path, captioner: FakeCaptioner | None = None) -> list[str]:
    captioner = captioner or FakeCaptioner()
    result = run(*arguments, captioner=captioner)
    assert result.exit_code == 0, result.output
    return [prompt or "" for prompt in prompts_of(captioner, rows_of(result.stdout))]


# Which


def test_the_first_shots_stand_before_every_row(run: Callable[..., Result], manifest: Path, shots: Shots) -> None:
    prompts = asked(run, "vqa", manifest, "--shots", shots(), "--num-shots", "2")
    two = "Image:[0]Question: Q0? Answer: a0\nImage:[1]Question: Q1? Answer: a1\n"
    assert prompts == [f"{PREFIX}{two}Image:[{seed}]Question: Q? Answer:" for seed in range(100, 106)]


def test_shots_need_no_ids(run: Callable[..., Result], manifest: Path, shots: Shots) -> None:
    """Several answers about one image have its id in common; that of a question may be missing."""
    of_one = shots(id=lambda k: ["a", "a", None][k % 3], answer=lambda k: f"a{k}", question=lambda k: f"Q{k}?")
    prompts = asked(run, "vqa", manifest, "--shots", of_one, "--num-shots", "3")
    assert [shown(prompt) for prompt in prompts] == [[0, 1, 2, seed] for seed in range(100, 106)]


def test_shots_that_are_shown_as_texts_need_no_images(run: Callable[..., Result], manifest: Path) -> None:
    rows = [{"question": f"Q{k}?", "answer": f"a{k}"} for k in range(2)]
    texts = write_manifest(manifest.with_name("texts.jsonl"), rows)
    prompt = asked(run, "vqa", manifest, "--shots", texts, "--num-shots", "0")[0]
    assert "Q0?" in prompt and "a1" in prompt and "[0]" not in prompt


def test_a_seed_decides_which_random_shots_all_rows_have(
    run: Callable[..., Result], manifest: Path, shots: Shots
) -> None:
    random = "--shots", shots(), "--num-shots", "3", "--shot-selection", "random"
    drawn = {}
    for seed in range(4):
        rows = [tuple(shown(prompt)[:-1]) for prompt in asked(run, "vqa", manifest, *random, "--seed", str(seed))]
        assert len(set(rows)) == 1 and len(set(rows[0])) == 3
        drawn[seed] = rows[0]
    assert len(set(drawn.values())) > 1
    assert tuple(shown(asked(run, "vqa", manifest, *random, "--seed", "2")[0])[:-1]) == drawn[2]


@pytest.mark.parametrize("selection", ["first", "random", "similar"])
def test_no_shots_are_the_published_two_without_images_of_the_pool(
    run: Callable[..., Result], manifest: Path, shots: Shots, selection: str
) -> None:
    prompts = asked(run, "vqa", manifest, "--shots", shots(2), "--num-shots", "0", "--shot-selection", selection)
    assert shown(prompts[0]) == [100]
    assert {"Q0? Answer: a0", "Q1? Answer: a1"} == set(re.findall(r"Q\d\? Answer: a\d", prompts[0]))


# What they show


def test_of_several_answers_the_most_common_one_is_shown(
    run: Callable[..., Result], manifest: Path, shots: Shots
) -> None:
    answers = ["no", "yes", "no"], ["a", "b"], ["c", None, "d", "d"]
    pool = shots(3, "shots.parquet", question=lambda k: "Q?", answers=lambda k: answers[k])
    prompt = asked(run, "vqa", manifest, "--shots", pool, "--num-shots", "3")[0]
    assert re.findall(r"Answer: (\w+)", prompt) == ["no", "a", "d"]


def test_shots_fill_the_fields_of_an_own_prompt(run: Callable[..., Result], manifest: Path, shots: Shots) -> None:
    pool = shots(1, hint=lambda k: 7, answer=lambda k: "yes")
    options = "--prompt", "{image} {hint}:", "--shots", pool, "--num-shots", "1"
    assert asked(run, "vqa", manifest, *options)[0] == "[0] 7: yes\n[100] hint 100:"


# How many fit


def test_too_many_shots_lose_the_furthest_and_it_is_said_once(
    run: Callable[..., Result], manifest: Path, shots: Shots
) -> None:
    captioner = FakeCaptioner(room=len(f"{PREFIX}Image:Question: Q? Answer:") + 2 * 35)
    result = run("vqa", manifest, "--shots", shots(), captioner=captioner)
    assert result.exit_code == 0, result.output
    images = [shown(prompt) for prompt in prompts_of(captioner, rows_of(result.stdout))]
    assert images == [[2, 3, seed] for seed in range(100, 106)]
    assert result.stderr.count("too long for all shots") == 1
    alone = run("vqa", manifest, "--shots", shots(), captioner=FakeCaptioner(room=20))
    assert all(row["error"].startswith("prompt_too_long: ") for row in rows_of(alone.stdout))
    assert "too long for all shots" not in alone.stderr


# Mistakes


def test_files_that_hold_no_shots_are_refused_before_the_model_is_loaded(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, manifest: Path, shots: Shots, tmp_path: Path
) -> None:
    monkeypatch.setattr("idefics_cli.cli.app.check_model", lambda request: None)
    vqa = "vqa", manifest, "-o", tmp_path / "f.jsonl", "--shots"
    assert "No such file" in refused(*vqa, tmp_path / "none.jsonl")
    assert "--shots needs a manifest" in refused(*vqa, save_image(tmp_path / "a.png"), "--num-shots", "1")
    assert "--shots needs a manifest" in refused(*vqa, "-")
    assert "shots.jsonl has, 3: lower it" in refused(*vqa, shots(3))
    assert "--num-shots 4 is more than" in refused(*vqa, shots(3), "--shot-selection", "random")
    said = refused(*vqa, shots(question=lambda k: "Q?", reply=lambda k: "a"))
    assert "row 1 of" in said and "answer or answers" in said and "question, reply" in said
    assert "no text in the column 'question'" in refused(*vqa, shots(answer=lambda k: "a"))
    assert "row 3 of" in refused(*vqa, shots(question=lambda k: None if k == 2 else "Q?", answer=lambda k: "a"))
    assert "its answers is empty" in refused(*vqa, shots(question=lambda k: "Q?", answers=lambda k: []))
    assert "'hint'" in refused(*vqa, shots(), "--prompt", "{image}{hint}")
    assert not list(tmp_path.glob("f.jsonl*"))


@pytest.mark.parametrize("selection", ["first", "similar"])
def test_a_bad_image_is_one_line_and_leaves_no_output(
    run: Callable[..., Result], manifest: Path, shots: Shots, tmp_path: Path, selection: str
) -> None:
    pool = shots(2)
    (pool.parent / "1.png").write_bytes(b"broken")
    command = "vqa", manifest, "--shots", pool, "--num-shots", "2", "--shot-selection", selection
    result = run(*command, "-o", tmp_path / "f.jsonl")
    *_, line = result.stderr.splitlines()
    assert result.exit_code == 2 and result.stderr.count("Error: ") == 1
    assert line.startswith("Error: ") and "image_unreadable" in line and "fix or remove it" in line
    assert not list(tmp_path.glob("f.jsonl*"))


def test_only_images_that_are_shown_must_be_good(run: Callable[..., Result], manifest: Path, shots: Shots) -> None:
    pool = shots()
    (pool.parent / "5.png").write_bytes(b"broken")
    assert run("vqa", manifest, "--shots", pool).exit_code == 0
    (pool.parent / "0.png").write_bytes(b"broken")
    assert run("vqa", manifest, "--shots", pool, "--num-shots", "0").exit_code == 0


def test_what_tells_a_shot_from_others_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real demo: of each shot once in a run, and once of each row's own image."""
    seen: list[object] = []
    content_key = prompt_source.content_key
    monkeypatch.setattr(prompt_source, "content_key", lambda pixels: seen.append(pixels) or content_key(pixels))
    examples = Path(__file__).parents[2] / "examples"
    arguments = ["vqa", examples / "questions.jsonl", "-m", "demo", "--limit", 6, "--shots", examples / "shots.jsonl"]
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert len(seen) == 4 + 6
