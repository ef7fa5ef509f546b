"""Shots that would give the answer away, and prompts that are shown before a run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeCaptioner, prompts_of, rows_of, save_image
from PIL import Image
from tokenizers import Tokenizer
from typer.testing import CliRunner, Result
from written_manifests import write_manifest

from idefics_cli import Idefics
from idefics_cli.checkpoint.find import weights_digest
from idefics_cli.checkpoint.request import DEMO_FOLDER, ModelRequest
from idefics_cli.cli.app import app

SIMILAR = ("--shot-selection", "similar", "--num-shots")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def shown(run: Callable[..., Result]) -> Callable[..., list[list[str]]]:
    """The answers of each row's shots."""

    def invoke(manifest: Path, shots: Path, *options: str) -> list[list[str]]:
        captioner = FakeCaptioner()
        result = run("vqa", manifest, "--shots", shots, *SIMILAR, *options, captioner=captioner)
        assert result.exit_code == 0, result.output
        return [re.findall(r"Answer: (\S+)", prompt or "") for prompt in prompts_of(captioner, rows_of(result.stdout))]

    return invoke


def questions(folder: Path, *images: str, name: str = "train.jsonl") -> Path:
    rows = [{"image": image, "question": "Q?", "answer": f"{i}:{image}"} for i, image in enumerate(images)]
    return write_manifest(folder / name, rows)


def test_the_file_itself_as_shots_shows_no_row_its_own_image(shown: Callable, tmp_path: Path) -> None:
    """Leave-one-out, as people evaluate without a second set: also the other questions about a row's image."""
    for seed in (1, 2, 3):
        save_image(tmp_path / f"{seed}.png", 60 * seed)
    manifest = questions(tmp_path, "1.png", "1.png", "2.png", "3.png")
    assert shown(manifest, manifest, "1") == [["2:2.png"], ["2:2.png"], ["3:3.png"], ["2:2.png"]]
    assert shown(manifest, manifest, "1", "--allow-self")[2:] == [["2:2.png"], ["3:3.png"]]
    assert [len(each) for each in shown(manifest, manifest, "4")] == [2, 2, 3, 3]


def test_a_copy_under_another_name_is_the_same_image(shown: Callable, tmp_path: Path) -> None:
    """By content: a copy, the same pixels in another format, and bytes in a table."""
    original = save_image(tmp_path / "a.png", 60)
    (tmp_path / "pool").mkdir()
    shutil.copy(original, tmp_path / "pool/copy.png")
    Image.open(original).save(tmp_path / "pool/same.bmp")
    Image.open(original).convert("RGB").point(lambda value: value + 1).save(tmp_path / "pool/near.png")
    shots = questions(tmp_path / "pool", "copy.png", "near.png", "same.bmp")
    assert shown(questions(tmp_path, "a.png"), shots, "2") == [["1:near.png"]]


def test_allow_self_is_refused_where_it_means_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    manifest = questions(tmp_path, "a.png")
    assert "--allow-self" in refused("vqa", manifest, "--shots", manifest, "--allow-self")


# ---- --show-prompt, with the demo's tokenizer


IMAGE = "<fake_token_around_image><image><fake_token_around_image>"


@pytest.fixture
def viewed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command line with the demo model, whose weights are never read."""

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("idefics_cli.loaded_model.load_network", never)
    return lambda *arguments, **more: CliRunner().invoke(app, [*map(str, arguments), "-m", "demo"], **more)


def test_prompts_are_shown_as_text_and_ids(viewed: Callable[..., Result], tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        save_image(tmp_path / f"{seed}.png", seed)
    manifest = questions(tmp_path, "1.png", "none.png", "2.png", "3.png")
    output = tmp_path / "out.jsonl"
    result = viewed("vqa", manifest, "-o", output, "--bare", "--answers-column", "answer", "--show-prompt", "3")
    one, error, two = rows_of(result.stdout)
    text = "Instruction: provide an answer to the question. Use the image to answer.\n"
    assert one["prompt"] == two["prompt"] == f"<s>{text}Image:{IMAGE}Question: Q? Answer:"
    assert (one["id"], one["image"], one["error"], error["prompt"]) == ("0", "1.png", None, None)
    assert error["error"].startswith("image_missing") and result.exit_code == 3
    tokenizer = Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
    assert one["token_ids"][0] == tokenizer.token_to_id("<s>")
    assert one["token_ids"].count(tokenizer.token_to_id("<image>")) == 1
    assert "Question: Q?" in tokenizer.decode(one["token_ids"])
    assert not list(tmp_path.glob("out*"))


def test_free_prompts_captions_choices_and_stdin(viewed: Callable[..., Result], tmp_path: Path) -> None:
    image = save_image(tmp_path / "1.png", 1)
    manifest = write_manifest(tmp_path / "m.jsonl", [{"prompt": "<image> or <s>?", "image": "1.png"}] * 3)
    (row,) = rows_of(viewed("generate", manifest, "--show-prompt", "1").stdout)
    assert row["prompt"] == f"<s>{IMAGE} or <s>?"
    (row,) = rows_of(viewed("caption", image, "--prompt", "A {image} ", "--show-prompt", "5").stdout)
    assert row["prompt"] == f"<s>A {IMAGE}"
    asked = "-q", "Is it?", "--choices", "yes,no", "--bare", "--show-prompt", "1"
    (row,) = rows_of(viewed("vqa", "-", *asked, input=f"{image}\n{image}\n").stdout)
    assert row["prompt"].endswith("Question: Is it? Answer:") and row["error"] is None


def test_what_is_shown_is_what_the_model_gets(tmp_path: Path) -> None:
    """Beside the ids of a run with the whole demo model; shots chosen by likeness need it."""
    folder = Path(__file__).parents[2] / "examples"
    options = "--shots", folder / "shots.jsonl", *SIMILAR, "1", "--limit", "3", "-m", "demo"
    arguments = [str(each) for each in ("vqa", folder / "questions.jsonl", *options, "--show-prompt", "2")]
    shown = rows_of(CliRunner().invoke(app, arguments).stdout)
    encoder = Idefics.from_pretrained("demo").encoder
    assert len(shown) == 2
    for row in shown:
        assert row["prompt"].count(IMAGE) == 2 and row["token_ids"].count(encoder.image_token_id) == 2
        items = [part for text in row["prompt"].removeprefix("<s>").split(IMAGE) for part in (text, b"")][:-1]
        assert encoder.encode(tuple(items)) == row["token_ids"]


def test_a_hub_model_of_which_only_the_prompts_were_shown_is_not_there(
    tmp_path: Path, put_into_hub: Callable[..., Path]
) -> None:
    """Its tokenizer is in the hub's cache and its weights are not: as if it had not been fetched."""
    put_into_hub(DEMO_FOLDER, ignore="*.safetensors")
    arguments = ["caption", str(save_image(tmp_path / "1.png")), "-m", "some/model"]
    (row,) = rows_of(CliRunner().invoke(app, [*arguments, "--show-prompt", "1"]).stdout)
    assert row["prompt"].endswith("Caption:")
    assert weights_digest(ModelRequest("some/model")) is None


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_prompts_are_shown_of_whole_checkpoints(name: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    """Without its file, transformers makes up a tokenizer that knows no word."""
    shutil.copytree(DEMO_FOLDER, tmp_path / "model", ignore=shutil.ignore_patterns(name))
    arguments = "caption", save_image(tmp_path / "1.png"), "-m", tmp_path / "model"
    assert f"model has no {name.removesuffix('.json')}" in refused(*arguments, "--show-prompt", "1")
    assert f"model has no {name.removesuffix('.json')}" in refused(*arguments)
