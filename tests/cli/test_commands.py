"""`vqa` and `score` as users run them, with a fake model: resuming, refusing to, scoring."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeCaptioner, prompts_of, rows_of, save_image
from typer.testing import Result
from written_manifests import write_manifest


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rows = []
    for seed in range(6):
        save_image(tmp_path / f"{seed}.png", seed)
        answers = ["red"] * 8 + ["blue"] * 2
        rows.append({"id": f"r{seed}", "image": f"{seed}.png", "question": f"Q{seed}?", "answers": answers})
    return write_manifest(tmp_path / "rows.jsonl", rows)


# Questions


def test_every_question_is_asked_about_every_image(run: Callable[..., Result], photos: Path) -> None:
    captioner = FakeCaptioner()
    result = run("vqa", photos, "-q", "What?", "-q", "Where?", "--bare", captioner=captioner)
    rows, asked = rows_of(result.stdout), prompts_of(captioner, rows_of(result.stdout))
    assert result.exit_code == 3
    assert [row["id"] for row in rows[:3]] == ["a.jpg#1", "a.jpg#2", "b.png#1"]
    assert [row["question"] for row in rows] == ["What?", "Where?"] * 7
    assert [row["image"] for row in rows[:2]] == [str(photos / "a.jpg")] * 2
    assert list(rows[0]) == ["id", "image", "question", "answer", "score", "tokens", "error"]
    assert asked[3].endswith("Image:[0]Question: Where? Answer:")
    assert [row["id"] for row in rows if row["error"]] == ["broken.png#1", "broken.png#2"]
    assert "14 rows: 12 with a text, 2 failed" in result.stderr


def test_the_manifests_own_question_is_kept_beside_the_asked_one(run: Callable[..., Result], manifest: Path) -> None:
    rows = rows_of(run("vqa", manifest, "-q", "Why?", "--keep", "question").stdout)
    assert [(row["question"], row["input_question"]) for row in rows[:2]] == [("Why?", "Q0?"), ("Why?", "Q1?")]


# Runs that have changed


def test_shots_and_questions_may_not_change(run: Callable[..., Result], manifest: Path, tmp_path: Path) -> None:
    shots = write_manifest(tmp_path / "shots.jsonl", shot_rows("red"))
    command = "vqa", manifest, "--shots", shots, "--num-shots", "2", "--workers", "1", "-o", tmp_path / "f.jsonl"
    stops = iter((0, 0, signal.SIGINT))
    captioner = FakeCaptioner(1, before_call=lambda prompts: os.kill(os.getpid(), next(stops)))
    assert run(*command, captioner=captioner).exit_code == 130
    write_manifest(shots, shot_rows("green"))
    result = run(*command)
    assert result.exit_code == 2
    assert "shots_file 1 digest: was" in result.stderr and "--overwrite" in result.stderr
    write_manifest(shots, shot_rows("red"))
    for changed, named in [
        (("--num-shots", "1"), "(--num-shots: was 2, now 1)"),
        (("--shot-selection", "random"), "--shot-selection: was 'first', now 'random'"),
        (("-q", "Why?"), "(--question: was [], now ['Why?'])"),
    ]:
        result = run(*command, *changed)
        assert result.exit_code == 2 and named in result.stderr
    assert run(*command).exit_code == 0


def shot_rows(answer: str) -> list[dict[str, str]]:
    return [{"image": f"{seed}.png", "question": "Colour?", "answer": answer} for seed in range(3)]


# Scores


def scored(result: Result) -> dict[str, Any]:
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def red(text: str) -> str:
    return "red"


def test_answers_are_scored_at_the_end(run: Callable[..., Result], manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "5.png").write_bytes(b"broken")
    command = "vqa", manifest, "-o", tmp_path / "f.parquet", "--answers-column", "answers"
    result = run(*command, captioner=FakeCaptioner(answer=red))
    assert result.exit_code == 3
    found = scored(result)
    assert (found["rows"], found["errors"]) == (6, 1)
    assert found["vqa_accuracy"] == pytest.approx(5 / 6)
    assert "VQA accuracy" in result.stderr and "83.33" in result.stderr
    again = run(*command)
    assert scored(again) == found and "is finished" in again.stderr
    assert scored(run("score", tmp_path / "f.parquet")) == found


def test_a_column_of_the_results_own_name_is_scored(run: Callable[..., Result], tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    manifest = write_manifest(tmp_path / "rows.jsonl", [{"image": "a.png", "question": "Q?", "answer": "red"}])
    command = "vqa", manifest, "-o", tmp_path / "f.jsonl", "--answers-column", "answer"
    result = run(*command, captioner=FakeCaptioner(answer=red))
    assert result.exit_code == 0, result.output
    assert scored(result)["exact_match"] == 1.0
    assert rows_of((tmp_path / "f.jsonl").read_text())[0]["input_answer"] == "red"


def test_a_run_that_stopped_early_is_not_scored(run: Callable[..., Result], manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"broken")
    command = "vqa", manifest, "-o", tmp_path / "f.jsonl", "--answers-column", "answers", "--max-errors", "1"
    result = run(*command)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "VQA accuracy" not in result.stderr


def test_what_cannot_be_scored_is_refused_before_the_model_is_loaded(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, manifest: Path, tmp_path: Path
) -> None:
    assert "-o F.jsonl" in refused("vqa", manifest, "--answers-column", "answers")
    assert "no column 'truth'" in refused("vqa", manifest, "-o", tmp_path / "f.jsonl", "--answers-column", "truth")
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    captions = "caption", manifest, "-o", tmp_path / "f.jsonl", "--answers-column", "answers"
    assert "needs pycocoevalcap" in refused(*captions)
    results = write_manifest(tmp_path / "results.jsonl", [{"id": "a", "answer": "red", "error": None}])
    assert "no column 'answers'" in refused("score", results)


def test_answers_that_are_none_leave_the_finished_file(run: Callable[..., Result], tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "Q?", "answers": None}]
    result = run(
        "vqa", write_manifest(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "f.jsonl", "--answers-column", "answers"
    )
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("Error: none of the 1 rows has references")
    assert ".part" not in result.stderr and (tmp_path / "f.jsonl").exists()
