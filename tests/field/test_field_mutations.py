"""Files of rows with seeded mistakes: rows or one line, in bounded time and memory; never a bug, never a crash.

The suite draws some of the 20,000 of each kind that `-m slow` goes through.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mistakes import damaged, peak_with_children
from written_manifests import opened

from idefics_cli.errors import InputError

SLOWEST, MOST_BYTES = 30.0, 2 << 30
ROWS = [{"id": f"{i}", "image": f"{i}.png", "x": ["ä", i, {"b": '"'}], "n": i / 3} for i in range(40)]
FRAME = pd.DataFrame(ROWS)
COLUMNS: dict[str, Any] = {
    "image": ["a.png", None, "c.png"] * 4,
    "bytes": [b"1" * 90, b"", None] * 4,
    "struct": [{"bytes": b"1", "path": None}] * 12,
    "list": [["x", "y"], [], None] * 4,
    "n": list(range(12)),
    "time": pa.array(range(12), pa.timestamp("ns", "UTC")),
    "kind": pa.array(["x", "y"] * 6).dictionary_encode(),
}

Files = Iterator[tuple[str, bytes]]


def csv_files() -> Files:
    yield "m.csv", FRAME.to_csv(index=False).encode()
    yield "m.csv", FRAME.to_csv(index=False, sep=";").encode("utf-16")
    yield "m.tsv", FRAME.drop(columns="x").to_csv(index=False, sep="\t").encode()


def json_files() -> Files:
    for value in ROWS, {"info": {"year": 2017}, "license": {}, "data_subtype": "val2014", "questions": ROWS[:5]}:
        for indent in None, 1:
            yield "m.json", json.dumps(value, indent=indent).encode()
    yield "m.jsonl", FRAME.to_json(orient="records", lines=True).encode()


def parquet_files() -> Files:
    for table in pa.table(FRAME.drop(columns="x")), pa.table(COLUMNS):
        for options in {"row_group_size": 5}, {"compression": "zstd", "write_page_checksum": True}:
            pq.write_table(table, stream := io.BytesIO(), **options)
            yield "m.parquet", stream.getvalue()
    pl.DataFrame(ROWS[:9], schema=["id", "image", "n"]).write_parquet(stream := io.BytesIO())
    yield "m.parquet", stream.getvalue()


def arrow_files() -> Files:
    table = pa.table(COLUMNS | {"view": pa.array(["long enough to be seen elsewhere"] * 12, pa.string_view())})
    for compression in None, "lz4", "zstd":
        for make in pa.ipc.new_file, pa.ipc.new_stream:
            stream = io.BytesIO()
            with make(stream, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
                writer.write_table(table, max_chunksize=5)
            yield "m.arrow", stream.getvalue()


def tar_files() -> Files:
    members = [("a.png", b"1" * 700), ("a.json", b'{"n": 1}'), ("b/" + "x" * 120 + ".png", b"2"), ("b.txt", b"What?")]
    for form in tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
            for name, data in members:
                info = tarfile.TarInfo(name if form != tarfile.USTAR_FORMAT else name[:90])
                info.size, info.pax_headers = len(data), {"mtime": "1.5"} if form == tarfile.PAX_FORMAT else {}
                archive.addfile(info, io.BytesIO(data))
        yield "m.tar", stream.getvalue()


def packed_files() -> Files:
    for files in csv_files, json_files, tar_files:
        yield from ((f"{name}.gz", data) for name, data in files())


WRITERS: dict[str, Callable[[], Files]] = {
    "CSV": csv_files,
    "JSON": json_files,
    "Parquet": parquet_files,
    "Arrow": arrow_files,
    "tar": tar_files,
    "gzip": packed_files,
}


def spoilt(name: str, data: bytes, draw: random.Random) -> bytes:
    """Of an archive the headers, too, are mostly looked at; of a packed file what is in it, the packing, or both."""
    if not name.endswith(".gz"):
        data = damaged(data, draw)
        return with_checksums(data) if name == "m.tar" and draw.random() < 0.7 else data
    inner, outer = draw.choice([(True, False), (False, True), (True, True)])
    data = gzip.compress(spoilt(name.removesuffix(".gz"), data, draw) if inner else data, 1)
    return damaged(data, draw) if outer else data


def with_checksums(data: bytes) -> bytes:
    """The archive with the checksums that its headers should have."""
    blocks = [bytearray(data[place : place + 512]) for place in range(0, len(data), 512)]
    for block in blocks:
        if len(block) == 512 and block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def rows_or_refusal(path: Path) -> tuple[int, bool]:
    """How many rows come before the end or the one line that ends them; anything else that is raised is a bug."""
    number = 0
    try:
        inputs = opened(path, keep="all", image_column=None if ".tar" in path.name else "image")
        for row in inputs.rows:
            number += 1
            assert str(row.error) if row.error else row.sources
        for batch in inputs.passthrough_batches():
            batch.validate(full=True)
    except InputError as error:
        assert str(error) and "\n" not in str(error)
        return number, True
    return number, False


def mutate(folder: Path, kind: str, count: int) -> tuple[int, int, int]:
    """How many rows `count` changed files gave, how many ended in one line, and the most bytes held meanwhile."""
    files, draw, num_rows, num_refused = list(WRITERS[kind]()), random.Random(f"{kind} {count}"), 0, 0
    for number in range(count):
        name, data = draw.choice(files)
        (folder / name).write_bytes(spoilt(name, data, draw))
        started = time.monotonic()
        found, was_refused = rows_or_refusal(folder / name)
        assert time.monotonic() - started < SLOWEST, (number, name)
        num_rows, num_refused = num_rows + found, num_refused + was_refused
    return num_rows, num_refused, peak_with_children()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", WRITERS)
def test_mutated_files_are_rows_or_one_line(tmp_path: Path, kind: str, count: int) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # whose memory is its own
        num_rows, num_refused, most = process.submit(mutate, tmp_path, kind, count).result()
    assert num_rows > count / 2 and num_refused > count / 10, (num_rows, num_refused)
    assert most < MOST_BYTES
