"""Unseen scenes on disk: true, apart from the shots, and read by the package as it reads any manifest."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from idefics_cli.demo.manifest import write_manifests
from idefics_cli.demo.scene import EVALUATION_SEEDS, scene
from idefics_cli.readers.inputs import open_inputs
from idefics_cli.rows import ReadOptions


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_manifests(tmp_path_factory.mktemp("unseen"), scenes=300, shots=5)


def seed_of(row: dict) -> int:
    return int(row["id"].removeprefix("scene-"))


def test_rows_are_true_of_their_scenes(manifests: tuple[Path, Path]) -> None:
    for row in pq.read_table(manifests[0]).to_pylist():
        drawn = scene(seed_of(row))
        assert row["captions"] == [drawn.caption]
        assert (row["question"], row["answers"][0]) in drawn.questions
        assert row["answers"] == row["answers"][:1] * 10
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["image"]))), np.asarray(drawn.image))


def test_scenes_are_unseen_and_no_shot_is_among_them(manifests: tuple[Path, Path]) -> None:
    scenes, shots = ([seed_of(row) for row in pq.read_table(path).to_pylist()] for path in manifests)
    assert len({*scenes, *shots}) == 305
    assert min(*scenes, *shots) >= EVALUATION_SEEDS


def test_every_kind_of_question_comes_up(manifests: tuple[Path, Path]) -> None:
    kinds = pq.read_table(manifests[0], columns=["kind"])["kind"].to_pylist()
    lookups = {"is there by shape", "left or right of", "what color by shape"}
    assert set(kinds) == {"how many", "is there", "left or right", "what color", "what shape", "what size"} | lookups


def test_all_questions_are_rows_of_their_own(tmp_path: Path) -> None:
    rows = pq.read_table(write_manifests(tmp_path, scenes=3, all_questions=True)[0]).to_pylist()
    drawn = [scene(EVALUATION_SEEDS + number) for number in range(3)]
    assert [(row["question"], row["answers"][0]) for row in rows] == [pair for each in drawn for pair in each.questions]
    assert len({row["id"] for row in rows}) == len(rows)


def test_the_package_reads_them(manifests: tuple[Path, Path]) -> None:
    inputs = open_inputs((str(manifests[0]),), ReadOptions(keep="all"))
    rows = list(inputs.rows)
    assert len(rows) == 300 and not any(row.error for row in rows)
    assert rows[0].id == f"scene-{EVALUATION_SEEDS}" and len(rows[0].sources) == 1
