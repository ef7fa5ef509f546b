from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path

import pytest
from written_manifests import read, refusal

from idefics_cli.rows import InputRow
from idefics_cli.storage import files

GOOD, LAST = b'{"id": "good", "image": "a.png"}\n', b'{"id": "last", "image": "a.png"}\n'


def rows(path: Path, data: bytes, **options) -> list[InputRow]:
    path.write_bytes(data)
    return read(path, **options)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "x", "image"', "line 2 is not valid JSON at character 20"),
        (b"[" * 100_000, "line 2"),
        (b'{"id": ' * 100_000 + b"1" + b"}" * 100_000, "line 2"),
        (b'{"id": "\xff"}', "line 2 is not valid UTF-8 at byte 9"),
        (b'["id"]', "line 2 is a list, not an object"),
        (b"null", "line 2 is a NoneType, not an object"),
        (b'{"id": ' + b"1" * 5000 + b"}", "line 2 cannot be read"),
        (b'{"id": "x", "image": "a.png", "n": "\\ud800"}', "line 2 holds half of a surrogate pair"),
        (b'{"id": "x", "image": "a\\udce9.png"}', "line 2 holds half of a surrogate pair"),
        (b"\0" * 100, "line 2 is not valid JSON"),
        (b'{"id": "x", "image": null}', "no image"),
        (b'{"id": "x"}', "no image"),
        (b'{"id": "x", "image": ""}', "the path is empty"),
        (b'{"id": "x", "image": "a\\u0000.png"}', "NUL"),
        (b'{"id": "x", "image": 7}', "an image is a path or bytes, not int"),
        (b'{"id": "x", "image": []}', "the list is empty"),
        (b'{"id": "x", "image": [["a.png"]]}', "not list"),
        (b'{"id": "x", "image": {"bytes": "?"}}', "not base64"),
        (b'{"id": "x", "image": {"path": 7}}', "no image"),
        (b'{"id": "x", "image": {}}', "no image"),
        (b'{"\\u0000error": 7, "\\u0000images": 7, "id": "x", "image": 7}', "not int"),
    ],
)
def test_a_bad_line_is_a_bad_row(tmp_path: Path, line: bytes, reason: str) -> None:
    first, bad, last = rows(tmp_path / "rows.jsonl", GOOD + line + b"\n" + LAST)
    assert (first.id, first.error, last.id, last.error) == ("good", None, "last", None)
    assert bad.error.code == "row_invalid" and reason in bad.error.message
    assert bad.id == ("#1" if b'"x"' not in line or "line" in reason else "x")
    assert bad.sources == ()


def test_a_line_that_is_too_long_is_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_PIECE_BYTES", 1000)
    monkeypatch.setattr(files, "READ_BYTES", 64)
    long = json.dumps({"id": "x" * 2000, "image": "b.png"}).encode()
    good, bad, last = rows(tmp_path / "rows.jsonl", GOOD + long + b"\n" + LAST)
    assert [row.id for row in (good, bad, last)] == ["good", "#1", "last"]
    assert "line 2 is longer than" in bad.error.message


def test_a_packed_bomb_streams(tmp_path: Path) -> None:
    data = gzip.compress(GOOD) + gzip.compress(b" " * (200 << 20), 1) + gzip.compress(b"\n" + LAST)
    assert [row.id for row in rows(tmp_path / "rows.jsonl.gz", data)] == ["good", "#1", "last"]


def test_blank_lines_are_no_rows_and_line_numbers_count_them(tmp_path: Path) -> None:
    good, bad, last = rows(tmp_path / "rows.jsonl", b"\xef\xbb\xbf\n" + GOOD + b"\r\n  \n{\r\n" + LAST.strip())
    assert [row.id for row in (good, bad, last)] == ["good", "#1", "last"]
    assert "line 5 " in bad.error.message


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    (row,) = rows(tmp_path / "rows.jsonl", b'{"image": "a.png", "n": [NaN, -Infinity, 1]}', keep=("n",))
    assert row.values == {"n": [None, None, 1]}


def test_images_come_as_base64_too(tmp_path: Path) -> None:
    struct = {"bytes": base64.b64encode(b"image").decode(), "path": "a.png"}
    lines = [{"image": struct}, {"image": ["b.png", struct]}, {"image": {"bytes": None, "path": "c.png"}}]
    found = rows(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, lines)).encode())
    assert [row.sources for row in found] == [(b"image",), (tmp_path / "b.png", b"image"), (tmp_path / "c.png",)]
    assert [row.image for row in found] == ["a.png", '["b.png", "a.png"]', "c.png"]


def test_values_that_a_row_lacks_are_none(tmp_path: Path) -> None:
    lines = b'{"image": "a.png", "question": "q"}\n{"image": "b.png"}'
    found = rows(tmp_path / "rows.jsonl", lines, columns=("question",))
    assert [row.values["question"] for row in found] == ["q", None]


@pytest.mark.parametrize("data", [b'[{"image": "a.png"}]', '{"image": "a.png"}'.encode("utf-16"), b"a,b\n1,2\n"])
def test_files_without_a_single_object_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(data)
    assert "cannot be read: line 1" in refusal(tmp_path / "rows.jsonl")
