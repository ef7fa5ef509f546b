"""Shots chosen by likeness, with a fake model that sees nothing but colours."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FakeCaptioner, prompts_of, rows_of, save_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import Result
from written_manifests import write_manifest

from idefics_cli.tasks.similar_shots import nearest

COLOURS = {"red": (250, 9, 1), "green": (8, 250, 2), "blue": (7, 3, 250), "violet": (200, 4, 200)}


def save_colour(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Three rows, each of the colour of its id."""
    colours = {name: COLOURS[name] for name in ("blue", "red", "green")}
    for name, colour in colours.items():
        save_colour(tmp_path / f"{name}.png", colour)
    return write_manifest(
        tmp_path / "rows.jsonl", [{"id": name, "image": f"{name}.png", "question": "Q?"} for name in colours]
    )


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A shot of each colour, whose answer is its name."""
    for name, colour in COLOURS.items():
        save_colour(tmp_path / "pool" / f"{name}.png", colour)
    rows = [{"image": f"{name}.png", "question": "Colour?", "answer": name} for name in COLOURS]
    return write_manifest(tmp_path / "pool" / "shots.jsonl", rows)


def chosen(
    run: Callable[..., Result], captioner: FakeCaptioner, manifest: Path, pool: Path, number: int = 2
) -> dict[str, list[str]]:
    """For each row the answers of its shots, in their order."""
    options = "--shots", pool, "--shot-selection", "similar", "--num-shots", str(number), "--allow-self"
    result = run("vqa", manifest, *options, captioner=captioner)
    assert result.exit_code == 0, result.output
    rows = rows_of(result.stdout)
    prompts = prompts_of(captioner, rows)
    return {row["id"]: re.findall(r"Answer: (\w+)", prompt or "") for row, prompt in zip(rows, prompts, strict=True)}


EXPECTED = {"blue": ["violet", "blue"], "red": ["violet", "red"], "green": ["red", "green"]}


def test_each_row_has_the_shots_most_like_it_the_nearest_last(
    run: Callable[..., Result], manifest: Path, pool: Path
) -> None:
    assert chosen(run, FakeCaptioner(), manifest, pool) == EXPECTED


def test_a_second_run_does_not_look_at_the_pool_again(run: Callable[..., Result], manifest: Path, pool: Path) -> None:
    first, second = FakeCaptioner(), FakeCaptioner()
    assert chosen(run, first, manifest, pool) == chosen(run, second, manifest, pool) == EXPECTED
    assert sum(first.looks) == 4 + 3 and sum(second.looks) == 3
    assert sum(looked_at(run, manifest, pool, number=1)) == 3


def looked_at(run: Callable[..., Result], manifest: Path, pool: Path, **changes: Any) -> list[int]:
    number = changes.pop("number", 2)
    captioner = FakeCaptioner(**changes)
    chosen(run, captioner, manifest, pool, number)
    return captioner.looks


def test_a_changed_image_or_model_is_looked_at(run: Callable[..., Result], manifest: Path, pool: Path) -> None:
    chosen(run, FakeCaptioner(), manifest, pool)
    save_colour(pool.parent / "green.png", (1, 0, 255))
    captioner = FakeCaptioner()
    assert chosen(run, captioner, manifest, pool)["blue"] == ["green", "blue"]
    assert sum(captioner.looks) == 4 + 3
    assert sum(looked_at(run, manifest, pool, fingerprint="another")) == 4 + 3


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY no more"])
def test_vectors_that_cannot_be_read_are_made_again(
    run: Callable[..., Result], manifest: Path, pool: Path, cache: Path, damage: bytes
) -> None:
    chosen(run, FakeCaptioner(), manifest, pool)
    (kept,) = cache.rglob("*.npy")
    whole = kept.read_bytes()
    kept.write_bytes(damage or whole[:-4])
    assert sum(looked_at(run, manifest, pool)) == 4 + 3
    assert kept.read_bytes() == whole


def test_a_place_that_cannot_be_written_costs_no_run(
    run: Callable[..., Result], manifest: Path, pool: Path, cache: Path
) -> None:
    cache.write_text("a file where a folder is to be")
    assert chosen(run, FakeCaptioner(), manifest, pool) == EXPECTED


def test_bad_rows_are_rows_with_an_error(run: Callable[..., Result], pool: Path) -> None:
    cells = ("red.png", "Q?"), ("red.png", None), ("no.png", "Q?")
    rows = [{"image": image, "question": question} for image, question in cells]
    manifest = write_manifest(pool.with_name("rows.jsonl"), rows)
    result = run("vqa", manifest, "--shots", pool, "--shot-selection", "similar", "--num-shots", "1")
    errors = [row["error"] and row["error"].split(":")[0] for row in rows_of(result.stdout)]
    assert (result.exit_code, errors) == (3, [None, "row_invalid", "image_missing"])


def test_the_furthest_of_similar_shots_go_first(run: Callable[..., Result], manifest: Path, pool: Path) -> None:
    alone = len("Instruction: provide an answer to the question. Use the image to answer.\nImage:Question: Q? Answer:")
    captioner = FakeCaptioner(room=alone + len("Image:Question: Colour? Answer: green\n"))
    assert chosen(run, captioner, manifest, pool, 3) == {name: [name] for name in ("blue", "red", "green")}


def test_a_shot_without_an_image_is_one_line(run: Callable[..., Result], manifest: Path, tmp_path: Path) -> None:
    save_image(tmp_path / "pool" / "a.png")
    rows = [{"image": each, "question": "Q?", "answer": "a"} for each in (["a.png"], [])]
    shots = write_manifest(tmp_path / "pool" / "shots.jsonl", rows)
    result = run("vqa", manifest, "--shots", shots, "--num-shots", "1", "--shot-selection", "similar")
    (line,) = result.stderr.splitlines()
    assert (result.exit_code, result.stdout) == (2, "")
    assert line.startswith("Error: row 2 of ") and "shots.jsonl" in line


vectors = st.lists(st.integers(-9, 9), min_size=3, max_size=3).filter(any)


@given(vectors, st.lists(vectors, min_size=1, max_size=9), st.integers(0, 9))
def test_nearest_is_by_the_angle(query: list[int], pool: list[list[int]], number: int) -> None:
    """Beside a slow reference; of equals, whose order rounding may decide, only the likeness is compared."""

    def likeness(vector: list[int]) -> float:
        dot = sum(a * b for a, b in zip(vector, query, strict=True))
        return round(dot / (sum(a * a for a in vector) * sum(b * b for b in query)) ** 0.5, 4)

    found = nearest(torch.tensor(query, dtype=torch.float32), torch.tensor(pool, dtype=torch.float32), number)
    assert len(set(found)) == len(found) == min(number, len(pool))
    assert [likeness(pool[i]) for i in found] == pytest.approx(sorted(map(likeness, pool))[len(pool) - len(found) :])
