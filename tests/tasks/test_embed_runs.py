"""`embed` as a run: every row once, with latents or a reason; stopped and taken up again; failed rows done again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import save_image
from tiny_models import save_checkpoint
from typer.testing import CliRunner

from idefics_cli import Idefics, IdeficsError
from idefics_cli.checkpoint.find import weights_digest
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.cli import app as cli
from idefics_cli.model.vision import IdeficsVisionTransformer
from idefics_cli.pipeline.options import RunOptions
from idefics_cli.pipeline.prefetch import RunStats
from idefics_cli.pipeline.run import Run
from idefics_cli.pipeline.task import Observer
from idefics_cli.rows import ImageOptions
from idefics_cli.tasks.embed import Embed
from idefics_cli.writers.embeddings_file import EmbeddingFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Idefics:
    return Idefics.from_pretrained(folder, batch_size=2, device="cpu")


class Stop(Exception):
    """A run is stopped from outside."""


class Watcher(Observer):
    """Lets so many rows through."""

    def __init__(self, rows: int = 1000) -> None:
        self.left = rows

    def on_row(self, number: int = 1) -> None:
        self.left -= number
        if self.left == 0:
            raise Stop


def embed(folder: Path, model: Idefics, photos: Path, output: Path, rows: int = 1000, **more: object) -> tuple:
    request = ModelRequest(str(folder))
    options = RunOptions((str(photos),), str(output), request, images=ImageOptions(workers=2), **more)
    stats = RunStats()
    run = Run(options, Embed(request), weights_digest, lambda request, batch_size: model, stats, Watcher(rows))
    return run.run(None), stats


def test_every_image_is_there_by_its_id_and_the_broken_one_with_its_reason(
    folder: Path, model: Idefics, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "e.parquet"
    _, stats = embed(folder, model, photos, output)
    assert (stats.rows, stats.failed["image_unreadable"]) == (7, 1)
    file = EmbeddingFile(output)
    file.require_model(model.fingerprint, model.latents_shape)
    for path in sorted(photos.rglob("*.*")):
        found = file.latents(path.relative_to(photos).as_posix())
        if path.name == "broken.png":
            assert found.code == "image_unreadable"
        else:
            assert torch.allclose(found, model.embed([path])[0], atol=1e-5)
    assert not embed(folder, model, photos, output)[0]


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_a_stopped_run_resumes_and_ends_as_an_undisturbed_one(
    folder: Path, model: Idefics, photos: Path, tmp_path: Path, rows: int
) -> None:
    embed(folder, model, photos, tmp_path / "whole.parquet")
    with pytest.raises(Stop):
        embed(folder, model, photos, tmp_path / "e.parquet", rows)
    embed(folder, model, photos, tmp_path / "e.parquet")
    assert table(tmp_path / "e.parquet") == table(tmp_path / "whole.parquet")


def table(path: Path) -> list[tuple]:
    """Ids and errors, and latents to four digits: batches of other images round otherwise."""
    from idefics_cli.columns import tensor_numbers
    from idefics_cli.writers.formats import format_of

    rows = format_of(path).rows(path, ["id", "error", "latents"])
    return [
        (row["id"], row["error"], row["latents"] and tensor_numbers(row["latents"]).round(4).tolist()) for row in rows
    ]


def test_failed_rows_can_be_done_again(folder: Path, model: Idefics, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "e.parquet"
    embed(folder, model, photos, output)
    before = table(output)
    save_image(photos / "broken.png", 9)
    embed(folder, model, photos, output, retry_errors=True)
    after = table(output)
    assert [row for row in after if row[0] != "broken.png"] == [row for row in before if row[0] != "broken.png"]
    mended = EmbeddingFile(output).latents("broken.png")
    assert torch.allclose(mended, model.embed([photos / "broken.png"])[0], atol=1e-5)


def test_another_model_does_not_go_on_with_it(folder: Path, model: Idefics, photos: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(Stop):
        embed(folder, model, photos, tmp_path / "e.parquet", 2)
    with pytest.raises(IdeficsError, match="vision: was"):
        embed(other, model, photos, tmp_path / "e.parquet")


# ---- through the command line, with the demo model

IMAGES = Path(__file__).parents[2] / "examples" / "images"
QUESTIONS = ["-q", "How many objects are there?", "-q", "Is there a red object?"]


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, [str(each) for each in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("embeddings") / "e.parquet"
    code, _, err = invoke("embed", IMAGES, "-m", "demo", "-o", file, "--limit", 3)
    assert code == 0 and "3 rows: 3 with latents, 0 failed" in err
    return file


def test_answers_are_the_same_and_no_image_is_seen(embeddings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["vqa", IMAGES, "-m", "demo", "--limit", 3, *QUESTIONS]
    code, expected, _ = invoke(*asked)
    assert code == 0

    def never(*arguments: object, **keywords: object) -> None:
        raise AssertionError("the vision tower was run")

    monkeypatch.setattr(IdeficsVisionTransformer, "forward", never)
    assert invoke(*asked, "--embeddings", embeddings)[:2] == (0, expected)


def test_a_row_that_is_not_among_them_is_an_error_row(embeddings: Path) -> None:
    short = "--num-beams", 1, "--max-new-tokens", 4
    code, out, _ = invoke("caption", IMAGES, "-m", "demo", "--embeddings", embeddings, "--limit", 4, *short)
    *good, last = [json.loads(line) for line in out.splitlines()]
    assert code == 3
    assert all(row["caption"] for row in good)
    assert last["caption"] is None and last["error"].startswith("image_missing: ")


def test_free_prompts_name_embeddings_by_id(embeddings: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    name = min(IMAGES.glob("*.png")).name
    rows = [{"prompt": ["Image:", item, "Caption:"]} for item in ({"embedding": name}, {"embedding": "nobody"})]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = invoke("generate", prompts, "-m", "demo", "--embeddings", embeddings, "--max-new-tokens", 12)
    known, unknown = [json.loads(line) for line in out.splitlines()]
    assert code == 3 and known["text"] and unknown["error"].startswith("image_missing: ")
    _, out, _ = invoke("generate", prompts, "-m", "demo", "--max-new-tokens", 12, "--limit", 1)
    assert "--embeddings" in json.loads(out)["error"]


def test_another_models_file_is_refused_before_that_model_is_loaded(
    embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    other = save_checkpoint(tmp_path / "other")
    monkeypatch.setattr(cli, "load_model", never)
    code, out, err = invoke("caption", IMAGES, "-m", other, "--embeddings", embeddings, "--limit", 1)
    assert (code, out) == (2, "") and "embedded by another model" in err
