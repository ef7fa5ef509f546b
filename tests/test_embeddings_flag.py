"""`--embeddings` in place of pictures, through the command line and the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import save_checkpoint
from typer.testing import CliRunner

from idefics_cli import cli
from idefics_cli.model.vision import IdeficsVisionTransformer

PICTURES = Path(__file__).parent.parent / "examples" / "images"
QUESTIONS = ["-q", "How many objects are there?", "-q", "Is there a red object?"]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, [str(each) for each in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("embeddings") / "e.parquet"
    assert run("embed", PICTURES, "-m", "demo", "-o", file, "--limit", 3)[0] == 0
    return file


def test_answers_are_the_same_and_no_picture_is_seen(embeddings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["vqa", PICTURES, "-m", "demo", "--limit", 3, *QUESTIONS]
    code, expected, _ = run(*asked)
    assert code == 0

    def never(*arguments: object, **keywords: object) -> None:
        raise AssertionError("the vision tower was run")

    monkeypatch.setattr(IdeficsVisionTransformer, "forward", never)
    assert run(*asked, "--embeddings", embeddings)[:2] == (0, expected)


def test_a_row_that_is_not_among_them_is_an_error_row(embeddings: Path) -> None:
    code, out, _ = run("caption", PICTURES, "-m", "demo", "--embeddings", embeddings, "--limit", 4)
    *good, last = [json.loads(line) for line in out.splitlines()]
    assert code == 3
    assert all(row["caption"] for row in good)
    assert last["caption"] is None and last["error"].startswith("image_missing: ")


def test_free_prompts_name_embeddings_by_id(embeddings: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    name = min(PICTURES.glob("*.png")).name
    rows = [{"prompt": ["Image:", item, "Caption:"]} for item in ({"embedding": name}, {"embedding": "nobody"})]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = run("generate", prompts, "-m", "demo", "--embeddings", embeddings, "--max-new-tokens", 12)
    known, unknown = [json.loads(line) for line in out.splitlines()]
    assert code == 3 and known["text"] and unknown["error"].startswith("image_missing: ")
    _, out, _ = run("generate", prompts, "-m", "demo", "--max-new-tokens", 12, "--limit", 1)
    assert "--embeddings" in json.loads(out)["error"]


def test_another_models_file_is_refused(embeddings: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other")
    code, out, err = run("caption", PICTURES, "-m", other, "--embeddings", embeddings, "--limit", 1)
    assert (code, out) == (2, "") and "embedded by another model" in err


def test_latents_go_into_parquet_only(tmp_path: Path) -> None:
    code, _, err = run("embed", PICTURES, "-m", "demo", "-o", tmp_path / "e.jsonl")
    assert code == 2 and "Parquet" in err and not list(tmp_path.iterdir())
