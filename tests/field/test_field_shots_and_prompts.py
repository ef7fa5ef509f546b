"""Shots that would give the answer away, and prompts that are shown before a run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FakeCaptioner, prompts_of, rows_of, save_image
from PIL import Image
from typer.testing import Result
from written_manifests import write_manifest

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
