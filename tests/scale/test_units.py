"""Folders of numbered parts: whatever the input, the units, the processes and the shards, the rows are those of one."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import save_image
from typer.testing import Result

from idefics_cli.scale import processes

Run = Callable[..., Result]
NUM_ROWS = 60


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes have the fake model of the test."""
    monkeypatch.setattr(processes, "START", "fork")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as every kind of input, with bad ones among them."""
    folder = tmp_path_factory.mktemp("inputs")
    for i in range(NUM_ROWS):
        save_image(folder / f"images/{i:03}.png", i)
    for i in range(3, NUM_ROWS, 17):
        (folder / f"images/{i:03}.png").write_bytes(b"broken")
    rows = [{"image": f"images/{i:03}.png", "note": f'a "{i}",\nb' * (i % 3)} for i in range(NUM_ROWS)]
    rows[20]["image"] = "images/missing.png"
    lines = [json.dumps(row).encode() for row in rows]
    lines[7], lines[30] = b"{", b"\n[1]"
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["image", "note"])
    writer.writeheader()
    writer.writerows(rows)
    (folder / "rows.csv").write_text(text.getvalue() + 'images/000.png,"never closed\n')
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=8)
    with tarfile.open(folder / "rows.tar", "w") as archive:
        for path in sorted((folder / "images").iterdir()):
            archive.add(path, path.name)
    return folder


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def joined(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in parts(folder))


def left_over(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {path.name for path in parts(folder)}


COMMANDS = {
    "jsonl": ("rows.jsonl", "--keep", "note"),
    "csv": ("rows.csv", "--keep", "note"),
    "parquet": ("rows.parquet", "--keep", "all"),
    "tar": ("rows.tar",),
    "folder": ("images",),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_parts_are_the_rows_of_one_process(run: Run, inputs: Path, tmp_path: Path, kind: str) -> None:
    name, *more = COMMANDS[kind]
    command = "caption", inputs / name, *more
    alone = run(*command, "-o", tmp_path / "alone.jsonl")
    assert alone.exit_code == 3, alone.output
    expected = (tmp_path / "alone.jsonl").read_bytes()
    for unit_rows in 1, 7, 50, 4096:
        folder = tmp_path / f"units{unit_rows}"
        options = "-o", f"{folder}/", "--format", "jsonl", "--unit-rows", unit_rows, "--processes", "2"
        result = run(*command, *options)
        assert result.exit_code == 3, result.output
        assert joined(folder) == expected
        assert left_over(folder) == {"_run.json", "_summary.json"}
        assert result.stderr.splitlines()[:-1] == alone.stderr.splitlines()[:-1]  # all but the time
        again = run(*command, *options)
        assert again.exit_code == 3 and "is finished" in again.stderr
    for place in 2, 1, 3:
        options = "-o", f"{tmp_path}/shards/", "--format", "jsonl", "--unit-rows", 7, "--shard", f"{place}/3"
        result = run(*command, *options)
        assert result.exit_code in (0, 3), result.output
    assert joined(tmp_path / "shards") == expected
    assert left_over(tmp_path / "shards") == {"_run.json", "_summary.json"}
