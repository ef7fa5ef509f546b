"""Manifests of every format, written from the same rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = Sequence[Mapping[str, Any]]

TEXT_FORMATS = ["rows.jsonl", "rows.ndjson", "rows.csv", "rows.tsv", "rows.jsonl.gz", "rows.csv.gz", "rows.tsv.gz"]
TABLE_FORMATS = [*TEXT_FORMATS, "rows.parquet"]


def write_manifest(path: Path, rows: Rows) -> Path:
    """A table of the format that the name says, with the columns of the first row."""
    name = path.name.removesuffix(".gz")
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


def unescape_name(text: str) -> str:
    """The name that `escape_name` made `text` from; `os.fsencode` of it gives the name's bytes."""

    def restore(match: re.Match[str]) -> str:
        byte = int(match[1], 16)
        return chr(byte) if byte < 0x80 else chr(0xDC00 + byte)

    return re.sub(r"\\x(5c|[89a-f][0-9a-f])", restore, text)
