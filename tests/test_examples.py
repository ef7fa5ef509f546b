"""The examples run as they stand, and what they say of the images beside them is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idefics_cli.demo.scene import EVALUATION_SEEDS, scene

EXAMPLES = Path(__file__).parent.parent / "examples"
IMAGES = sorted((EXAMPLES / "images").glob("*.png"))


def seed_of(path: Path) -> int:
    """The number in `scene-<seed>.png`."""
    return int(path.stem.removeprefix("scene-"))


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_images_are_those_of_the_world(path: Path) -> None:
    drawn = np.asarray(scene(seed_of(path)).image)
    assert np.array_equal(np.asarray(Image.open(path)), drawn)
    assert seed_of(path) >= EVALUATION_SEEDS, "the demo was trained on this image"


def test_caption_folder(tmp_path: Path) -> None:
    """The README's first command captions this folder too: every caption is right."""
    done = run(["bash", str(EXAMPLES / "caption_folder.sh")], OUTPUT_FOLDER=str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [path.name for path in IMAGES]
    assert [row["caption"] for row in rows] == [scene(seed_of(path)).caption for path in IMAGES]
    said, *piped = done.stdout.splitlines()
    assert said.split() == ["rows", "in", "the", "file:", str(len(IMAGES))]
    assert [json.loads(line)["caption"] for line in piped] == [row["caption"] for row in rows[:3]]


def test_questions(tmp_path: Path) -> None:
    """Both images are asked both questions, and every answer that is scored is right."""
    done = run(["bash", str(EXAMPLES / "questions.sh")], OUTPUT_FOLDER=str(tmp_path))
    *rows, scores, by_kind = [json.loads(line) for line in done.stdout.splitlines()]
    shown = [scene(seed_of(path)).objects for path in IMAGES[:2]]
    assert [row["id"] for row in rows] == [f"{path.name}#{k}" for path in IMAGES[:2] for k in (1, 2)]
    leftmost = [min(objects, key=lambda item: item.x) for objects in shown]
    right = [text for objects, left in zip(shown, leftmost, strict=True) for text in (str(len(objects)), left.color)]
    assert [row["answer"] for row in rows] == right
    assert scores["rows"] == by_kind["rows"] == 12
    assert scores["vqa_accuracy"] == by_kind["vqa_accuracy"] == 1.0
    assert sum(group["rows"] for group in by_kind["groups"].values()) == 12


def test_free_prompts() -> None:
    done = run(["bash", str(EXAMPLES / "free_prompts.sh")])
    rows = {row["id"]: row["text"] for row in map(json.loads, done.stdout.splitlines())}
    assert rows["caption"] == scene(seed_of(IMAGES[4])).caption
    assert rows["two-images"] == scene(seed_of(IMAGES[5])).caption
    assert rows["question"] == scene(seed_of(IMAGES[6])).questions[0][1]


def test_embeddings(tmp_path: Path) -> None:
    """What is said of latents is what is said of the images."""
    done = run(["bash", str(EXAMPLES / "embeddings.sh")], OUTPUT_FOLDER=str(tmp_path))
    captions = [json.loads(line)["caption"] for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert captions == [scene(seed_of(path)).caption for path in IMAGES]
    answers = [json.loads(line)["answer"] for line in done.stdout.splitlines()]
    assert answers == [str(len(scene(seed_of(path)).objects)) for path in IMAGES[:4]]


def test_python_api() -> None:
    lines = run([sys.executable, str(EXAMPLES / "python_api.py")]).stdout.splitlines()
    assert lines[:-2] == [f"{path.name}: {scene(seed_of(path)).caption}" for path in IMAGES]
    has_red = any(item.color == "red" for item in scene(seed_of(IMAGES[0])).objects)
    assert lines[-2] == f"{IMAGES[0].name}: is there a red shape? {'yes' if has_red else 'no'}"
    count = len(scene(seed_of(IMAGES[0])).objects)
    assert lines[-1].startswith(f"{IMAGES[0].name}: how many objects are there? {count} (score -0.")
