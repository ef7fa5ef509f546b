"""Inputs that change between runs that are killed: with --update each current row comes out exactly once, in order, and
no row is done again whose inputs are unchanged."""

from __future__ import annotations

import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import save_image
from faulty_run import Settings
from runs import KILLED, Bench, both_formats, expected_rows, make_bench, slow

ROWS, STEPS = 40, 8
TEXT = re.compile(rb"image [0-9a-f]{12}")


class History:
    """A folder whose images come, go and change, and runs over it. No two images are alike, ever."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.random, self.num_images = bench, random.Random(seed), ROWS
        self.log, self.version = bench.folder / "captioned", "0.1.0"

    def images(self) -> list[Path]:
        return sorted(self.bench.images.iterdir())

    def save(self, name: str) -> None:
        self.num_images += 1
        path = save_image(self.bench.images / name, self.num_images)
        os.utime(path, ns=(0, self.num_images))

    # ---- what may happen

    def add(self) -> None:
        for _ in range(self.random.randint(1, 5)):
            self.save(f"{self.random.randint(0, ROWS):04}-{self.num_images}.png")

    def remove(self) -> None:
        for path in self.random.sample(self.images(), self.random.randint(1, 4)):
            path.unlink()

    def change(self) -> None:
        for path in self.random.sample(self.images(), 2):
            self.save(path.name)

    def respell(self) -> None:
        folder = str(self.bench.images)
        spellings = [folder, f"{folder}/", os.path.relpath(folder), f"{folder}/../{self.bench.images.name}"]
        self.bench = replace(self.bench, spelling=self.random.choice(spellings))

    def upgrade(self) -> None:
        self.version = f"0.1.{self.random.randint(1, 99)}"

    def kill(self) -> None:
        self.run(number=self.random.randint(1, 25))

    # ---- runs

    def run(self, number: int | None = None) -> None:
        """To the end, or to the call of this number; rows that were safe before are not captioned."""
        safe = self.safe_texts()
        self.log.write_bytes(b"")
        settings = Settings(commit_rows=5, log=str(self.log), version=self.version)
        if number is None:
            ended = self.bench.run("--update", settings=settings)
            assert ended.code in (0, 3), ended
        else:
            ended = self.bench.run_with_fault(number, "kill", "--update", settings=settings)
            assert ended is None or ended.code == KILLED, ended
        captioned = self.log.read_bytes().splitlines()
        assert len(captioned) == len(set(captioned)) and not safe.intersection(captioned)

    def safe_texts(self) -> set[bytes]:
        texts = set(TEXT.findall(self.bench.part.read_bytes())) if self.bench.part.exists() else set()
        if self.bench.output.exists():
            texts |= {row["caption"].encode() for row in self.bench.rows() if row["caption"]}
        return texts


@both_formats
@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=slow) for seed in range(3, 20))])
def test_a_history_of_changes_and_kills(tmp_path: Path, suffix: str, seed: int) -> None:
    history = History(make_bench(tmp_path, ROWS, suffix), seed)
    kinds = [history.add, history.remove, history.change, history.respell, history.upgrade, history.kill]
    for _ in range(STEPS):
        for happen in history.random.choices([*kinds, history.kill], k=3):
            happen()
        if history.random.random() < 0.5:
            history.run()
            history.bench.verify()
    history.run()
    history.bench.verify()
    before = history.bench.output.stat()
    history.run()
    assert history.bench.output.stat() == before
    assert [row["id"] for row in history.bench.rows()] == [name for name, *_ in expected_rows(history.bench.images)]
