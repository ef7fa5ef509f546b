"""Arrow files and streams, Feather, and what the datasets library saves: read as they are, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import datasets
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from conftest import rows_of, save_image
from typer.testing import Result
from written_manifests import opened, read, refusal

from idefics_cli.readers import arrow

ROWS = [{"image": f"{i:02d}.png", "question": f"What is {i}?", "n": i} for i in range(30)]
TABLE = pa.Table.from_pylist(ROWS)


def written(table: pa.Table, path: Path, compression: str | None, stream: bool, batch_rows: int = 7) -> Path:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return path


WRITERS: dict[str, Callable[[Path], object]] = {
    "feather.feather": lambda path: pyarrow.feather.write_feather(TABLE, str(path)),
    "pandas.feather": lambda path: pd.DataFrame(ROWS).to_feather(path),
    "polars.arrow": lambda path: pl.DataFrame(ROWS).write_ipc(path, compression="zstd"),
    "polars.ipc": lambda path: pl.DataFrame(ROWS).write_ipc_stream(path),
    **{
        f"{compression}-{stream}.arrow": lambda path, c=compression, s=stream: written(TABLE, path, c, s)
        for compression in (None, "lz4", "zstd")
        for stream in (False, True)
    },
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for row in ROWS:
        save_image(tmp_path / row["image"], row["n"])
    return tmp_path


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_is_read(run: Callable[..., Result], images: Path, name: str) -> None:
    WRITERS[name](images / name)
    result = run("vqa", images / name, "--keep", "n", "-o", images / "out.parquet")
    assert result.exit_code == 0, result.output
    found = pl.read_parquet(images / "out.parquet")
    assert found.select("id", "image", "question", "n").rows() == [
        (str(row["n"]), row["image"], row["question"], row["n"]) for row in ROWS
    ]
    for shard in (1, 1), (2, 3):
        everything = [row.id for row in read(images / name, shard=shard)]
        assert everything == [str(n) for n in range(30)][30 * (shard[0] - 1) // shard[1] : 30 * shard[0] // shard[1]]
        later = opened(images / name, shard=shard)
        assert [row.id for row in islice(later.rows, 4)] + [row.id for row in later.rows] == everything
        assert [row.id for row in later.restarted()] == everything


def test_what_datasets_saves_is_read(run: Callable[..., Result], refused: Callable[..., str], images: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string")})
    rows = [{"image": str(images / row["image"]), "question": row["question"]} for row in ROWS]
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.save_to_disk(str(images / "set/one"), num_shards=3)
    (images / "set/one/cache-1.arrow").write_bytes(b"left by map")
    result = run("vqa", images / "set/one")
    assert result.exit_code == 0, result.output
    assert [(row["id"], row["question"]) for row in rows_of(result.stdout)] == [
        (str(row["n"]), row["question"]) for row in ROWS
    ]
    splits = datasets.DatasetDict({"train": dataset, "test": dataset.select([0, 2])})
    splits.save_to_disk(str(images / "set/both"))
    said = refused("vqa", images / "set/both")
    assert f"{str(images / 'set/both/train')!r}, {str(images / 'set/both/test')!r}" in said
    result = run("vqa", images / "set/both/test")
    assert [row["question"] for row in rows_of(result.stdout)] == ["What is 0?", "What is 2?"]
    (images / "set/one/state.json").write_text(json.dumps({"_data_files": [{"filename": "../../passwd"}]}))
    assert "not in it" in refused("vqa", images / "set/one")


def test_images_in_bytes_and_types_that_repeat_values(images: Path) -> None:
    data = save_image(images / "a").read_bytes()
    categories = pa.array(["x", "y"] * 15).dictionary_encode()
    columns = {"image": pa.array([{"bytes": data, "path": None}] * 30), "kind": categories}
    written(pa.table(columns), images / "a.arrow", "lz4", stream=False)
    rows = read(images / "a.arrow", keep=("kind",))
    assert [row.values["kind"] for row in rows] == ["x", "y"] * 15 and {row.sources for row in rows} == {(data,)}


# Hostile ones


def test_offsets_that_lie_are_refused(tmp_path: Path) -> None:
    texts = TABLE.select(["image"]).to_batches()[0]
    _, offsets, values = texts.column(0).buffers()
    for wrong in (1 << 30, -5):
        numbers = list(memoryview(offsets).cast("i"))[:31]
        numbers[7] = wrong
        array = pa.Array.from_buffers(
            pa.string(), 30, [None, pa.py_buffer(pa.array(numbers, pa.int32()).buffers()[1]), values]
        )
        for stream in False, True:
            path = written(pa.Table.from_arrays([array], ["image"]), tmp_path / "a.arrow", None, stream, 100)
            assert "cannot read" in refusal(path)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("stream", [False, True])
def test_batches_that_unpack_to_too_much_are_refused_before_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, stream: bool
) -> None:
    monkeypatch.setattr(arrow, "MAX_BATCH_BYTES", 8 << 20)
    columns = {"image": ["a.png"] * 2, "note": pa.array(["a", "b" * (9 << 20)])}
    path = written(pa.table(columns), tmp_path / "a.arrow", compression, stream)
    before = pa.total_allocated_bytes()
    assert "too many for memory" in refusal(path)
    assert pa.total_allocated_bytes() - before < 1 << 20
    kinds = pa.table({"image": columns["image"], "note": columns["note"].dictionary_encode()})
    assert "too many for memory" in refusal(written(kinds, path, compression, stream))


def test_rows_of_nothing_are_no_rows_without_end(tmp_path: Path) -> None:
    table = pa.table({"image": pa.Array.from_buffers(pa.null(), 1 << 30, [None])})
    assert "more rows than it has bits" in refusal(
        written(table, tmp_path / "a.arrow", None, stream=True, batch_rows=1 << 30)
    )


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([TABLE["image"]] * 2, ["image", "image"])
    assert "two columns named 'image'" in refusal(written(table, tmp_path / "a.arrow", None, stream=True))
    pq.write_table(table, tmp_path / "a.parquet")
    assert "two columns named 'image'" in refusal(tmp_path / "a.parquet")
