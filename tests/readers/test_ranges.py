"""Any range of an input gives the rows that it has when all are read, and reads little else."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import save_image
from hypothesis import given, settings
from hypothesis import strategies as st
from written_manifests import opened

from idefics_cli.readers.inputs import Inputs
from idefics_cli.storage import files

LINES = st.sampled_from(
    [b'{"n": "a", "image": "b.png"}', b'{"image": "c.png", "text": "\xc3\xa9"}', b"{", b"", b"  ", b"[1]", b"\xff"]
)
CELLS = st.sampled_from(["a.png,1", '"b\nc.png",2', '"d,""e",3', 'bad"', '"open', "", "f.png,4,5", "é.png,6", "\xa0"])
MEMBERS = st.lists(
    st.tuples(st.sampled_from(["x", "y" * 120, "s/é"]), st.sampled_from([("png",), ("png", "txt"), ("json", "b.jpg")])),
    max_size=9,
)


def parts_of(inputs: Inputs, rows_each: int) -> list[Inputs]:
    """As other processes get them."""
    cuts = list(inputs.cuts(rows_each))
    return [pickle.loads(pickle.dumps(inputs.part(*pair))) for pair in pairwise(cuts)]


def check(path: Path, rows_each: int, **options: object) -> None:
    whole = list(opened(path, **options).rows)
    parts = parts_of(opened(path, **options), rows_each)
    found = [list(part.rows) for part in parts]
    assert [row for rows in found for row in rows] == whole
    assert [len(rows) for rows in found] == [part.total for part in parts]
    for number in 1, 3:
        shards = [list(opened(path, **options, shard=(place + 1, number)).rows) for place in range(number)]
        assert [row for rows in shards for row in rows] == whole


@settings(max_examples=60, deadline=None)
@given(st.lists(LINES, max_size=12), st.integers(1, 5), st.booleans(), st.sampled_from(["jsonl", "csv"]), st.data())
def test_lines(lines: list[bytes], rows_each: int, marked: bool, kind: str, data: st.DataObject) -> None:
    first = b'{"image": "a.png"}'
    if kind == "csv":
        lines, first = [each.encode() for each in data.draw(st.lists(CELLS, max_size=12))], b"image,text"
        lines = [b"z.png,0", *lines]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"rows.{kind}")
        path.write_bytes(b"\xef\xbb\xbf" * marked + b"\r\n".join([first, *lines]))
        check(path, rows_each)


@settings(max_examples=30, deadline=None)
@given(MEMBERS, st.integers(1, 4), st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_archives(members: list[tuple[str, tuple[str, ...]]], rows_each: int, form: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.tar")
        with tarfile.open(path, "w", format=form) as archive:
            for number, (stem, suffixes) in enumerate([("first", ("png",)), *members]):
                for suffix in (*suffixes, "ignored"):
                    info = tarfile.TarInfo(f"{number}{stem}.{suffix}")
                    data = b"{}" if suffix == "json" else b"x" * (number * 300)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        check(path, rows_each)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 12), st.sampled_from(["parquet", "arrow"]))
def test_columns(groups: list[int], rows_each: int, kind: str) -> None:
    """Row groups that fit are not cut."""
    groups = [*groups, 1]
    table = pa.table({"image": [f"{i}.png" for i in range(sum(groups))]})
    with tempfile.TemporaryDirectory() as folder:
        path, offset = Path(folder, f"rows.{kind}"), 0
        new = pq.ParquetWriter if kind == "parquet" else pa.ipc.new_file
        with new(str(path), table.schema) as writer:
            for number in groups:
                writer.write_table(table.slice(offset, number))
                offset += number
        check(path, rows_each)


def test_several_inputs_and_parts(tmp_path: Path) -> None:
    for i in range(5):
        save_image(tmp_path / f"images/{i}.png", i)
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / f"set/{i}.jsonl").write_text('{"image": "a.png"}\n' * (i % 3 + 1))
    inputs = tmp_path / "images", tmp_path / "set", tmp_path / "images/3.png"
    whole = list(opened(*inputs).rows)
    assert len(whole) == 5 + 9 + 1
    for rows_each in range(1, 17):
        parts = parts_of(opened(*inputs), rows_each)
        assert [row for part in parts for row in part.rows] == whole
        assert max(part.total for part in parts) == min(rows_each, 15)
        limited = parts_of(opened(*inputs, limit=8), rows_each)
        assert [row for part in limited for row in part.rows] == whole[:8]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "tar"])
def test_parts_read_their_own_bytes(tmp_path: Path, kind: str, count_bytes: Callable[[], int]) -> None:
    rows = [{"id": str(i), "image": f"{i:07}.png", "text": "x" * 300} for i in range(3000)]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        unlike = [row | {"text": os.urandom(1500).hex()} for row in rows]
        pq.write_table(pa.Table.from_pylist(unlike), path, row_group_size=300, use_dictionary=False)
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            for row in rows:
                info = tarfile.TarInfo(row["image"])
                info.size = 300
                archive.addfile(info, io.BytesIO(b"x" * 300))
    elif kind == "csv":
        path.write_text("id,image,text\n" + "".join(f'{row["id"]},{row["image"]},"{row["text"]}"\n' for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = parts_of(opened(path, columns=() if kind == "tar" else ("text",)), 300)
    before = count_bytes()
    assert sum(len(list(part.rows)) for part in parts) == 3000 and len(parts) == 10
    read = count_bytes() - before
    assert path.stat().st_size * 0.5 < read <= path.stat().st_size * 1.1, read / path.stat().st_size


@pytest.fixture
def count_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many bytes have been read of files."""
    counts = [0]

    def counting(self: files.Positioned, buffer: bytearray) -> int:
        number = original(self, buffer)
        counts[0] += number
        return number

    original = files.Positioned.readinto
    monkeypatch.setattr(files.Positioned, "readinto", counting)
    return lambda: counts[0]
