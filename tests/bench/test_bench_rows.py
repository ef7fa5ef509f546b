"""The benches of rows and images run, and count what they say they count."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from conftest import save_image
from PIL import Image

from benchmarks.engine_idle import WaitOptions
from benchmarks.engine_idle import measure as measure_waiting
from benchmarks.image_decoding import find_images, measure_draft, measure_rates
from benchmarks.rows import measure


def test_runs_go_to_their_end_and_halves_are_continued(tmp_path: Path) -> None:
    report = measure(tmp_path, ["csv", "folder"], Namespace(rows=400, files=30))
    rows = {name: found["rows"] for name, found in report.items()}
    assert 200 <= rows.pop("csv, half done") <= 300, "rows that were ready after others were not written yet"
    assert rows == {"csv": 400, "folder": 30}
    assert all(found["peak_bytes"] > 0 and found["first_row_seconds"] > 0 for found in report.values())


def test_rows_are_captioned_from_what_was_embedded(tmp_path: Path) -> None:
    report = measure(tmp_path, ["embeddings"], Namespace(rows=150))
    assert {name: found["rows"] for name, found in report.items()} == {"embed": 150, "embeddings": 150}
    assert not (tmp_path / "latents.parquet").exists()


def test_only_good_images_are_compared_and_drafts_only_where_they_differ(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    small, large = save_image(tmp_path / "small.png"), tmp_path / "large.jpg"
    Image.effect_noise((2000, 2000), 50).save(large)
    assert find_images([tmp_path]) == [large, small]
    rates = measure_rates([large, small], workers=1, rounds=1)
    assert rates["plain"]["of_plain"] == 1 and all(way["images_per_second"] > 0 for way in rates.values())
    rough, fine = (measure_draft([large], kept) for kept in (1, 4))
    assert rough["differ"] == fine["differ"] == 1 and rough["mean_levels"] > fine["mean_levels"] > 0


@pytest.mark.parametrize("draft", [False, True])
def test_the_waiting_is_measured_twice(tmp_path: Path, draft: bool) -> None:
    paths = [save_image(tmp_path / f"{i}.png", i) for i in range(6)]
    found = measure_waiting(paths, WaitOptions("tiny", rows=3, batch_size=2, max_new_tokens=2, draft=draft))
    assert all(found[run]["rows"] == 3 and 0 <= found[run]["waited_share"] <= 1 for run in ("first", "then"))
