"""Runs that are repeated: what users change between two of them, and what ends one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from conftest import expected_text, rows_of, save_image
from typer.testing import CliRunner, Result

from idefics_cli.cli import app as cli
from idefics_cli.writers.embeddings_file import EmbeddingFile


def test_one_id_twice_in_a_manifest_costs_that_row_alone(run: Callable[..., Result], tmp_path: Path) -> None:
    """And in an output's Parquet as well; the remedy that the summary names helps."""
    images = [save_image(tmp_path / f"{seed}.png", seed) for seed in range(130)]
    ids = [f"r{number}" for number in range(130)]
    ids[110] = "r7"
    pd.DataFrame({"id": ids, "image": [path.name for path in images], "key": range(130)}).to_csv(
        tmp_path / "m.csv", index=False
    )
    for suffix in ".jsonl", ".parquet":
        output = tmp_path / f"f{suffix}"
        result = run("caption", tmp_path / "m.csv", "-o", output)
        rows = rows_of(output.read_text()) if suffix == ".jsonl" else pq.read_table(output).to_pylist()
        assert result.exit_code == 3 and len(rows) == 130
        assert [row["id"] for row in rows] == ids
        assert rows[110]["error"] == "duplicate_id: row 111 has the id of row 8, 'r7'"
        assert [row["id"] for row in rows if row["error"]] == ["r7"]
        assert rows[129]["caption"] == expected_text(images[129])
        assert "duplicate_id: name a column of unique ids with --id-column." in result.stderr
    assert run("caption", tmp_path / "m.csv", "--id-column", "key", "-o", tmp_path / "g.jsonl").exit_code == 0


def test_embeddings_of_an_id_that_comes_twice_are_those_of_its_first_row(tmp_path: Path) -> None:
    names = [save_image(tmp_path / f"{seed}.png", seed).name for seed in range(3)]
    pd.DataFrame({"id": ["a", "b", "a"], "image": names}).to_json(tmp_path / "m.jsonl", orient="records", lines=True)
    embed = ["embed", str(tmp_path / "m.jsonl"), "-o", str(tmp_path / "e.parquet"), "-m", "demo"]
    assert CliRunner().invoke(cli.app, embed).exit_code == 3
    file = EmbeddingFile(tmp_path / "e.parquet")
    assert file.latents("a").shape == file.latents("b").shape == file.shape
