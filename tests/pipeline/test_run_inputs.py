"""The inputs that users have, from end to end with a fake captioner: one row for each of theirs, or one clear line."""

from __future__ import annotations

import os
import socket
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import rows_of, save_image
from typer.testing import Result
from written_manifests import TABLE_FORMATS, write_manifest

from idefics_cli.storage.filenames import unescape_name

ADDRESSES = ["https://a.example/1.png", "HTTP://a.example", "data:image/png;base64,aGk=", "file:///etc/passwd"]


def written(output: Path) -> list[dict[str, Any]]:
    if output.suffix == ".parquet":
        return pq.read_table(output).to_pylist()
    return rows_of(output.read_text())


# Names


@pytest.mark.parametrize("name", ["f.jsonl", "f.parquet"])
def test_odd_names_keep_ids_that_lead_back_to_them(run: Callable[..., Result], tmp_path: Path, name: str) -> None:
    accents = ["caf\u00e9.png", unicodedata.normalize("NFD", "caf\u00e9.png")]
    texts = [
        "a\nb.png",
        "\U0001f600.png",
        f"{'x' * 246}.png",
        "-o.png",
        "a\\xff.png",
        "a\\x5cxff.png",
        " .png",
        *accents,
    ]
    names = {os.fsencode(text) for text in texts} | {b"a\xff.png", b"a\xfe.png"}
    for each in names:
        save_image(tmp_path / "photos" / os.fsdecode(each))
    kept_apart = len(os.listdir(tmp_path / "photos"))
    result = run("caption", tmp_path / "photos", "-o", tmp_path / name)
    ids = [row["id"] for row in written(tmp_path / name)]
    assert result.exit_code == 0, result.stderr
    assert len(ids) == len(set(ids)) == kept_apart
    assert {os.fsencode(unescape_name(row_id)) for row_id in ids} == set(os.listdir(os.fsencode(tmp_path / "photos")))
    if sys.platform == "linux":
        assert kept_apart == len(names)


# The network


@pytest.mark.parametrize("name", TABLE_FORMATS)
def test_an_address_in_any_column_causes_no_connection(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked: list[Any] = []
    for function in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, function, lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: asked.append(address))
    save_image(tmp_path / "good.png")
    rows = [{"id": address, "image": address, "note": address} for address in ADDRESSES]
    write_manifest(tmp_path / name, [*rows, {"id": "good", "image": "good.png", "note": ADDRESSES[0]}])
    options = ("--image-column", "image", "--keep", "note", "--prompt", "{image}https://b.example")
    result = run("caption", tmp_path / name, *options, "-o", tmp_path / "f.jsonl")
    *refused, good = written(tmp_path / "f.jsonl")
    assert result.exit_code == 3, result.output
    assert [row["id"] for row in refused] == [row["note"] for row in refused] == ADDRESSES
    whys = ["img2dataset", "img2dataset", "image_unreadable: not an image", "write the path '/etc/passwd'"]
    assert all(why in row["error"] for row, why in zip(refused, whys, strict=True))
    assert good["error"] is None and not asked


# Manifests that are not as they should be


def cut(path: Path, rows: Sequence[dict[str, Any]]) -> int | None:
    write_manifest(path, rows)
    os.truncate(path, path.stat().st_size - 9)
    return None if path.suffix in (".parquet", ".gz") else len(rows)


def mis_encoded(path: Path, rows: Sequence[dict[str, Any]]) -> int | None:
    """In Latin-1: CSV asks for its encoding; formats that say how they are coded cannot be."""
    write_manifest(path, rows)
    if path.suffix not in (".parquet", ".gz"):
        path.write_bytes(path.read_bytes().replace(b"note 1", "not\u00e9 1".encode("latin-1")))
    return None if path.suffix in (".csv", ".tsv") else len(rows)


def wrongly_typed(path: Path, rows: Sequence[dict[str, Any]]) -> int | None:
    write_manifest(path, [{**row, "image": [i]} for i, row in enumerate(rows)])
    return None if path.suffix == ".parquet" else len(rows)


def with_one_id_twice(path: Path, rows: Sequence[dict[str, Any]]) -> int:
    write_manifest(path, [*rows, rows[0]])
    return len(rows) + 1


def without_the_column(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_manifest(path, [{"id": row["id"], "note": 3} for row in rows])


def empty(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", TABLE_FORMATS)
@pytest.mark.parametrize("spoil", [cut, mis_encoded, wrongly_typed, with_one_id_twice, without_the_column, empty])
def test_a_spoilt_manifest_is_one_line_or_loses_no_row(
    run: Callable[..., Result], tmp_path: Path, spoil: Callable[..., int | None], name: str
) -> None:
    rows = [{"id": f"row {i}", "image": f"{i}.png", "note": f"note {i}"} for i in range(5)]
    for row in rows:
        save_image(tmp_path / row["image"])
    num_rows = spoil(tmp_path / name, rows)
    options = ("--image-column", "image", "--keep", "note", "-o", tmp_path / "f.jsonl")
    result = run("caption", tmp_path / name, *options)
    assert "Traceback" not in result.output
    if num_rows is None:
        assert result.exit_code == 2, result.output
        assert result.stderr.splitlines()[-1].startswith("Error: ") and not (tmp_path / "f.jsonl").exists()
    else:
        assert result.exit_code in (0, 3), result.output
        assert len(written(tmp_path / "f.jsonl")) == num_rows
