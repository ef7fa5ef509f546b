"""Seeded mistakes in every file of a checkpoint: refused in one line or rows, within bounds, whatever the file says.

The suite draws some of the 20,000 that `-m slow` goes through.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import IMAGE_SIZE, save_checkpoint
from transformers import IdeficsImageProcessor, IdeficsProcessor, PreTrainedTokenizerFast

from idefics_cli.storage.limited_process import MEMORY_BYTES

ROOT = Path(__file__).parents[2]
KINDS = ("header", "config", "images", "processor", "tokenizer")
SLOWEST, MOST_BYTES = 30, 2 << 30
PIECE = 250


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(tmp_path_factory.mktemp("mutated") / "checkpoint")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    IdeficsProcessor(IdeficsImageProcessor(image_size=IMAGE_SIZE), tokenizer).save_pretrained(folder)
    return folder


def check(folder: Path, kinds: str, first: int, count: int) -> set[tuple[str, str]]:
    """Each kind with each of its ends."""
    command = [sys.executable, ROOT / "tests/mutated_checkpoints.py", folder, kinds, str(first), str(count)]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=3600)
    *found, (own, tried) = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0 and len(found) == count * len(kinds.split(",")), (found[-1:], done.stderr[-2000:])
    assert not [each for each in found if each[2].startswith("bug") or each[3] > SLOWEST]
    assert own < MOST_BYTES and tried < MEMORY_BYTES, (own, tried)  # the latter is held to it by the system
    return {(each[0], each[2].partition(":")[0]) for each in found}


def test_a_mistake_is_refused_or_gives_rows(folder: Path) -> None:
    assert check(folder, ",".join(KINDS), 0, 60) == {(kind, end) for kind in KINDS for end in ("refused", "row")}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_all_mistakes(folder: Path, kind: str) -> None:
    for first in range(0, 4000, PIECE):
        check(folder, kind, first, PIECE)
