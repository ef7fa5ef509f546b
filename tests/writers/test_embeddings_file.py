"""Embeddings in Parquet: what was written comes back by id, in any order, and of one model only."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from idefics_cli.columns import Column, json_text
from idefics_cli.errors import IdeficsError, InputError, RowError
from idefics_cli.writers import embeddings_file as embeddings
from idefics_cli.writers import formats
from idefics_cli.writers.embeddings_file import EmbeddingFile, latents_value
from idefics_cli.writers.formats import Parquet, Passthrough, row_chunks

COLUMNS = [Column("id", "text"), Column("latents", "latents"), Column("error", "text")]
SHAPE = (2, 3)


def latents_of(number: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(6.0).reshape(SHAPE) + number).to(dtype)


def embedded(number: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"id": f"row {number}", "latents": latents_value(latents_of(number, dtype)), "error": None}


def write(
    path: Path, rows: Sequence[dict[str, Any]], fingerprint: str = "abc", columns: Sequence[Column] = COLUMNS
) -> Path:
    texts = [json_text(row) for row in rows]
    run = {"settings": {"task": {"vision": fingerprint}}, "rows": len(rows), "failed": {}}
    Parquet().write(path, lambda: iter(texts), columns, Passthrough(), run)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_latents_come_back_as_they_were(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write(tmp_path / "e.parquet", [embedded(number, dtype) for number in range(5)])
    stored = torch.float32 if dtype == torch.float32 else torch.float16
    kind = pq.read_schema(path).field("latents").type
    assert kind == pa.fixed_shape_tensor(pa.float32() if dtype == torch.float32 else pa.float16(), SHAPE)
    file = EmbeddingFile(path)
    assert (file.shape, file.fingerprint) == (SHAPE, "abc")
    for number in (3, 0, 4, 3):
        found = file.latents(f"row {number}")
        assert found.dtype == stored and torch.equal(found, latents_of(number, stored))


def test_a_failed_row_has_its_error_and_one_that_is_not_there_another(tmp_path: Path) -> None:
    failed = {"id": "bad", "latents": None, "error": "image_unreadable: it is torn"}
    for others in [], [embedded(1), {**failed, "id": "odd", "error": None}]:
        file = EmbeddingFile(write(tmp_path / "e.parquet", [failed, *others]))
        assert file.latents("bad") == RowError("image_unreadable", "it is torn")
        assert file.latents("row 2").code == "image_missing"
    assert file.latents("odd") == RowError("image_missing", "it has no latents")
    assert torch.equal(file.latents("row 1"), latents_of(1))


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddingFile:
    """500 rows in groups of 30."""
    monkeypatch.setattr(formats, "CHUNK_ROWS", 10)
    monkeypatch.setattr(formats, "ROW_GROUP_BYTES", 900)
    file = EmbeddingFile(write(tmp_path / "many.parquet", [embedded(number) for number in range(500)]))
    assert pq.read_metadata(file.path).num_row_groups > 10
    return file


def test_in_the_files_order_every_row_group_is_read_once(many: EmbeddingFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even by several threads, whose rows come nearly in order."""
    seen, chance, read = list[int](), random.Random(0), pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda file, i, **more: seen.append(i) or read(file, i, **more)
    )
    order = sorted(range(500), key=lambda number: number + chance.uniform(0, 8))
    for number in order:
        assert torch.equal(many.latents(f"row {number}"), latents_of(number))
    assert seen == list(range(pq.read_metadata(many.path).num_row_groups))


def test_threads_may_ask_at_once_and_in_any_order(many: EmbeddingFile) -> None:
    numbers = random.Random(1).sample(range(500), 200)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda number: many.latents(f"row {number}"), numbers)
        assert all(torch.equal(row, latents_of(number)) for row, number in zip(found, numbers, strict=True))


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    file = EmbeddingFile(write(tmp_path / "e.parquet", [embedded(1)], "abc"))
    file.require_model("abc", SHAPE)
    for wrong in (("abd", SHAPE), ("abc", (2, 4))):
        with pytest.raises(InputError, match="embedded by another model"):
            file.require_model(*wrong)


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "latents": [[1.0]]}), tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("no Parquet")
    write(tmp_path / "typed.parquet", [{"id": "a", "latents": "b"}], columns=[COLUMNS[0], Column("latents", "text")])
    for name in ("other.parquet", "text.parquet", "typed.parquet"):
        with pytest.raises(InputError, match=name):
            EmbeddingFile(tmp_path / name)
    with pytest.raises(InputError, match=r"no file .*gone\.parquet: name one that `idefics embed` has written"):
        EmbeddingFile(tmp_path / "gone.parquet")


def test_row_groups_too_large_for_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "e.parquet", [embedded(number) for number in range(50)])
    monkeypatch.setattr(embeddings, "LARGEST_GROUP_BYTES", 100)
    with pytest.raises(InputError, match="too large for memory"):
        EmbeddingFile(path)


def test_damage_is_told_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "e.parquet", [embedded(number) for number in range(50)])
    column, whole = pq.read_metadata(path).row_group(0).column(1), path.read_bytes()
    place = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 20
    path.write_bytes(whole[:place] + b"\xff" * 8 + whole[place + 8 :])
    with pytest.raises(InputError, match="cannot read"):
        EmbeddingFile(path).latents("row 1")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cannot read .*e\.parquet.* embed the images again"):
        EmbeddingFile(path)


def test_numbers_beyond_fp16_are_told() -> None:
    with pytest.raises(IdeficsError, match="--dtype fp32"):
        latents_value(torch.full(SHAPE, 1e6, dtype=torch.bfloat16))
    assert latents_value(torch.full(SHAPE, 1e6))["dtype"] == "float32"


@given(st.lists(st.integers(1, 3000), max_size=30), st.integers(1, 7), st.integers(10, 5000))
def test_rows_come_in_pieces_that_hold_all_of_them_in_order(lengths, most_rows, most_bytes) -> None:
    texts = [json.dumps({"n": number, "fill": "x" * length}).encode() for number, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "CHUNK_ROWS", most_rows)
        patch.setattr(formats, "CHUNK_BYTES", most_bytes)
        chunks = list(row_chunks(iter(texts)))
    assert [row["n"] for chunk in chunks for row in chunk] == list(range(len(lengths)))
    for chunk in chunks:
        assert 0 < len(chunk) <= most_rows
        assert sum(len(texts[row["n"]]) for row in chunk[:-1]) < most_bytes
