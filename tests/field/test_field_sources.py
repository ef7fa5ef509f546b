"""Images where people have them: pointers, paths of other systems, links, base64, closed folders, S3 that is away."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import rows_of, save_image

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


def manifest(path: Path, images: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"image": image}) + "\n" for image in images))
    return path


# Pointers


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.tsv", "a.jsonl", "a.jsonl.gz", "a.tar", "a.tar.gz"])
def test_a_manifest_that_is_a_git_lfs_pointer_is_named(refused: Callable[..., str], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LFS)
    assert refused("caption", tmp_path / name) == f"Error: {tmp_path / name} is a Git LFS pointer: run `git lfs pull`."


def test_images_that_are_pointers_are_named_and_read_once_they_are_pulled(run: Callable, tmp_path: Path) -> None:
    save_image(tmp_path / "in/a.png")
    (tmp_path / "in/b.png").write_bytes(LFS)
    (tmp_path / "in/c.png").write_bytes(b"/annex/objects/SHA256E-s8--ab.png\n")
    command = "caption", tmp_path / "in", "-o", tmp_path / "out.jsonl"
    assert run(*command).exit_code == 3
    good, lfs, annex = rows_of((tmp_path / "out.jsonl").read_text())
    assert good["error"] is None
    assert lfs["error"] == "image_unreadable: a Git LFS pointer: run `git lfs pull`"
    assert annex["error"] == "image_unreadable: a git-annex pointer: run `git annex get`"
    save_image(tmp_path / "in/b.png", 1)
    save_image(tmp_path / "in/c.png", 2)
    assert run(*command, "--retry-errors").exit_code == 0


def test_shots_and_results_that_are_pointers_are_named(refused: Callable[..., str], tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.png"]}), tmp_path / "in.parquet")
    for name in "shots.parquet", "out.parquet", "out.jsonl":
        (tmp_path / name).write_bytes(LFS)
    shots = tmp_path / "shots.parquet"
    assert "git lfs pull" in refused("caption", tmp_path / "in.parquet", "--shots", shots, "--num-shots", "1")
    for name in "out.parquet", "out.jsonl":
        assert "git lfs pull" in refused("score", tmp_path / name, "--answers-column", "answers")
