"""Manifests of every format, written from the same rows, and read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from idefics_cli.errors import InputError
from idefics_cli.readers.inputs import Inputs, open_inputs
from idefics_cli.rows import InputRow, ReadOptions

Rows = Sequence[Mapping[str, Any]]

TEXT_FORMATS = ["rows.jsonl", "rows.ndjson", "rows.csv", "rows.tsv", "rows.jsonl.gz", "rows.csv.gz", "rows.tsv.gz"]
TABLE_FORMATS = [*TEXT_FORMATS, "rows.parquet"]
ALL_FORMATS = [*TABLE_FORMATS, "rows.tar", "rows.tar.gz"]


def write_manifest(path: Path, rows: Rows) -> Path:
    """A table of the format that the name says, with the columns of the first row; an archive of ids and questions."""
    name = path.name.removesuffix(".gz")
    if name.endswith((".tar", ".tgz")):
        texts = [(f"{row['id']}.txt", row["question"].encode()) for row in rows]
        return write_archive(path, [each for text in texts for each in (text, (text[0].replace("txt", "png"), b"1"))])
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=3)
        return path
    if name.endswith((".csv", ".tsv")):
        data = delimited(rows, "," if name.endswith(".csv") else "\t")
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def delimited(rows: Rows, delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write_archive(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def opened(*inputs: str | Path, stdin: bytes | None = None, **options: Any) -> Inputs:
    stream = None if stdin is None else io.BytesIO(stdin)
    return open_inputs([str(name) for name in inputs], ReadOptions(**options), stream)


def read(*inputs: str | Path, stdin: bytes | None = None, **options: Any) -> list[InputRow]:
    return list(opened(*inputs, stdin=stdin, **options).rows)


def refusal(*inputs: str | Path, stdin: bytes | None = None, **options: Any) -> str:
    """The line that refuses these inputs."""
    with pytest.raises(InputError) as caught:
        read(*inputs, stdin=stdin, **options)
    assert "\n" not in str(caught.value) and str(caught.value).encode()
    return str(caught.value)
