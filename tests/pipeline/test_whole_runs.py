"""`idefics caption` from end to end with real models: what users do, and what they get wrong."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest
from conftest import save_image
from safetensors.torch import load_file, save_file
from sdist import sdist
from tiny_models import save_checkpoint
from typer.testing import CliRunner, Result

from idefics_cli.cli import app as cli
from idefics_cli.readers.inputs import open_inputs
from idefics_cli.rows import ReadOptions


def idefics(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("whole"))


def test_a_bad_checkpoint_is_one_line_and_exit_2(whole: Path, tmp_path: Path) -> None:
    """And leaves no output; of what else is wrong with one the commands say what `Idefics` does."""
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    result = idefics("caption", save_image(tmp_path / "a.png"), "-m", folder, "-o", tmp_path / "f.jsonl")
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and "model.norm.weight" in line
    assert not list(tmp_path.glob("f.jsonl*"))


def test_pillows_own_test_images_run_through(whole: Path, tmp_path: Path) -> None:
    """Some hundreds of files, many of them broken on purpose: one row for each, with a caption or a reason."""
    folder = sdist("pillow", metadata.version("pillow")) / "Tests" / "images"
    expected = [row.id for row in open_inputs([str(folder)], ReadOptions()).rows]
    assert len(expected) > 500
    shortest = ("--num-beams", "1", "--max-new-tokens", "2")
    result = idefics("caption", folder, "-m", whole, "-o", tmp_path / "f.jsonl", *shortest)
    assert result.exit_code == 3, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == expected
    outcomes = Counter(row["error"].split(":")[0] if row["error"] else "captioned" for row in rows)
    assert outcomes["captioned"] > 300
    assert set(outcomes) <= {"captioned", "image_unreadable", "image_too_large", "image_not_allowed"}
