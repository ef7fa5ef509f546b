"""`vqa` and `score` as users run them, with a fake model: resuming, refusing to, scoring."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeCaptioner, prompts_of, rows_of, save_image
from typer.testing import Result
from written_manifests import write_manifest

QUESTIONS = "-q", "What?", "-q", "Where?", "-q", "Why?"
NAMES = ["a.png", "b.png", "broken.png", "d.png"]
IDS = [f"{name}#{k}" for name in NAMES for k in (1, 2, 3)]


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A folder of four images, the third of them broken."""
    for seed, name in enumerate(NAMES):
        save_image(tmp_path / "album" / name, seed)
    (tmp_path / "album" / "broken.png").write_bytes(b"broken")
    return tmp_path / "album"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rows = []
    for seed in range(6):
        save_image(tmp_path / f"{seed}.png", seed)
        answers = ["red"] * 8 + ["blue"] * 2
        rows.append({"id": f"r{seed}", "image": f"{seed}.png", "question": f"Q{seed}?", "answers": answers})
    return write_manifest(tmp_path / "rows.jsonl", rows)


def stopping_at(number: int) -> Callable[[Sequence[Any]], None]:
    """For `before_call`: the signal that Ctrl-C sends, as the model gets its `number`-th batch."""
    calls = 0

    def stop(prompts: Sequence[Any]) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGINT)

    return stop


# Several questions


def test_every_question_is_asked_about_every_image(run: Callable[..., Result], album: Path) -> None:
    captioner = FakeCaptioner()
    result = run("vqa", album, *QUESTIONS, "--bare", captioner=captioner)
    rows = rows_of(result.stdout)
    assert result.exit_code == 3
    assert [row["id"] for row in rows] == IDS
    assert [row["question"] for row in rows] == ["What?", "Where?", "Why?"] * 4
    assert [row["image"] for row in rows] == [str(album / name) for name in NAMES for _ in range(3)]
    assert list(rows[0]) == ["id", "image", "question", "answer", "score", "tokens", "error"]
    asked = prompts_of(captioner, rows)
    assert asked[4].endswith("Image:[1]Question: Where? Answer:")
    assert [row["error"] is None for row in rows] == [name != "broken.png" for name in NAMES for _ in range(3)]
    assert "12 rows: 9 with a text, 3 failed" in result.stderr


def test_the_manifests_own_question_is_kept_beside_the_asked_one(run: Callable[..., Result], manifest: Path) -> None:
    rows = rows_of(run("vqa", manifest, "-q", "Why?", "--keep", "question").stdout)
    assert [(row["question"], row["input_question"]) for row in rows[:2]] == [("Why?", "Q0?"), ("Why?", "Q1?")]


@pytest.mark.parametrize("name", ["f.jsonl", "f.parquet"])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_run_resumes_in_the_middle_of_a_rows_questions(
    run: Callable[..., Result], album: Path, tmp_path: Path, name: str, batch_size: int
) -> None:
    run("vqa", album, *QUESTIONS, "-o", tmp_path / f"whole-{name}")
    whole = read_rows(tmp_path / f"whole-{name}")
    part = tmp_path / f"{name}.part"
    command = "vqa", album, *QUESTIONS, "-o", tmp_path / name, "--workers", "1"
    seen = set()
    for stop in range(2, 5):
        result = run(*command, captioner=FakeCaptioner(batch_size, before_call=stopping_at(stop)))
        if part.exists():
            assert result.exit_code == 130 and "The same command continues from there" in result.stderr
            seen.add(len(part.read_bytes().splitlines()) - 1)
    assert any(number % 3 for number in seen), f"no run was stopped within a row's questions: {seen}"
    assert run(*command).exit_code == 3
    assert read_rows(tmp_path / name) == whole and [row["id"] for row in whole] == IDS
    assert not part.exists()
    assert "is finished: 12 rows" in run(*command).stderr


def read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return rows_of(path.read_text())
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def test_failed_rows_of_several_questions_are_done_again(
    run: Callable[..., Result], album: Path, tmp_path: Path
) -> None:
    command = "vqa", album, *QUESTIONS, "-o", tmp_path / "f.jsonl"
    run(*command)
    kept = [row for row in rows_of((tmp_path / "f.jsonl").read_text()) if not row["error"]]
    save_image(album / "broken.png", 9)
    captioner = FakeCaptioner()
    result = run(*command, "--retry-errors", captioner=captioner)
    rows = rows_of((tmp_path / "f.jsonl").read_text())
    assert [row["id"] for row in rows] == IDS and not any(row["error"] for row in rows), result.output
    assert [row for row in rows if not row["id"].startswith("broken")] == kept
    assert sum(captioner.calls) == 3


# Runs that have changed


def started(run: Callable[..., Result], output: Path, *command: str | Path) -> tuple[str | Path, ...]:
    """The command, stopped after a few rows."""
    command = (*command, "-o", output)
    result = run(
        *command, "--batch-size", "1", "--workers", "1", captioner=FakeCaptioner(1, before_call=stopping_at(3))
    )
    assert result.exit_code == 130, result.output
    assert output.with_name(output.name + ".part").exists()
    return command


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--prompt", "{image} {question}"), "(--prompt: was unset, now '{image} {question}')"),
        (("--template", "vizwiz"), "(--template: was unset, now 'vizwiz')"),
        (("--bare",), "(--bare: was False, now True)"),
        (("-q", "Why?"), "(--question: was [], now ['Why?'])"),
        (("--prefix", "a "), "(--prefix: was '', now 'a ')"),
        (("--stop-words", "dog"), "(--stop-words: was unset, now ['dog'])"),
        (("--num-beams", "2"), "(--num-beams: was 3, now 2)"),
    ],
)
def test_what_decides_the_texts_may_not_change(
    run: Callable[..., Result], manifest: Path, tmp_path: Path, changed: tuple[str, ...], named: str
) -> None:
    command = started(run, tmp_path / "f.jsonl", "vqa", manifest)
    result = run(*command, *changed)
    assert result.exit_code == 2
    assert named in result.stderr and "--overwrite" in result.stderr
    assert run(*command).exit_code == 0


def test_shots_may_not_change(run: Callable[..., Result], manifest: Path, tmp_path: Path) -> None:
    shots = write_manifest(tmp_path / "shots.jsonl", shot_rows("red"))
    command = started(run, tmp_path / "f.jsonl", "vqa", manifest, "--shots", shots, "--num-shots", "2")
    write_manifest(shots, shot_rows("green"))
    result = run(*command)
    assert result.exit_code == 2
    assert "shots_file 1 digest: was" in result.stderr and "--overwrite" in result.stderr
    write_manifest(shots, shot_rows("red"))
    changed = run(*command, "--num-shots", "1")
    assert changed.exit_code == 2 and "(--num-shots: was 2, now 1)" in changed.stderr
    changed = run(*command, "--shot-selection", "random")
    assert changed.exit_code == 2 and "--shot-selection: was 'first', now 'random'" in changed.stderr
    assert run(*command).exit_code == 0


def shot_rows(answer: str) -> list[dict[str, str]]:
    return [{"image": f"{seed}.png", "question": "Colour?", "answer": answer} for seed in range(3)]


# Scores


def scored(result: Result) -> dict[str, Any]:
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def red(text: str) -> str:
    return "red"


@pytest.mark.parametrize("name", ["f.jsonl", "f.parquet"])
def test_answers_are_scored_at_the_end(run: Callable[..., Result], manifest: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "5.png").write_bytes(b"broken")
    command = "vqa", manifest, "-o", tmp_path / name, "--answers-column", "answers"
    result = run(*command, captioner=FakeCaptioner(answer=red))
    assert result.exit_code == 3
    found = scored(result)
    assert (found["rows"], found["errors"]) == (6, 1)
    assert found["vqa_accuracy"] == pytest.approx(5 / 6)
    assert "VQA accuracy" in result.stderr and "83.33" in result.stderr
    again = run(*command)
    assert scored(again) == found and "is finished" in again.stderr
    assert scored(run("score", tmp_path / name)) == found


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
    assert "No such file" in refused("score", tmp_path / "none.jsonl")
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
