from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from written_manifests import read, refusal

from idefics_cli.errors import RowError
from idefics_cli.readers import csv
from idefics_cli.readers.csv import Dialect, read_delimited
from idefics_cli.rows import DelimitedOptions


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.csv"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"x", "line 3 has 1 fields, but 2 columns"),
        (b"x,b.png,", "line 3 has 3 fields"),
        (b'x,"b.png"c', "line 3 is not valid CSV"),
        (b"x,b\xff.png", "line 3 is not valid UTF-8"),
        (b"x,b\r.png", "line 3 is not valid CSV"),
    ],
)
def test_a_bad_line_is_a_bad_row(path: Path, line: bytes, reason: str) -> None:
    path.write_bytes(b"id,image\na,\xc3\xa4.png\n" + line + b'\nc,"c ""1"".png"\n"d\n",d.png\n')
    rows = read(path)
    assert [row.id for row in rows] == ["a", "#1", "c", "d\n"]
    assert [row.error and row.error.code for row in rows] == [None, "row_invalid", None, None]
    assert reason in rows[1].error.message


def test_an_open_quote_costs_its_line(path: Path) -> None:
    good = b"".join(b'%d,"%d.png"\n' % (i, i) for i in range(3))
    path.write_bytes(b'id,image\na,"a.png\n' + good + b"z,z.png\n")
    rows = read(path)
    assert [row.id for row in rows] == ["#0", "0", "1", "2", "z"] and rows[0].error.code == "row_invalid"
    assert "line 2 is not valid CSV" in rows[0].error.message
    plain = b"".join(b"%d,%d.png\n" % (i, i) for i in range(20_000))
    path.write_bytes(b'id,image\na,"a.png\n' + plain + b'z,"z.png\n')
    rows = read(path)
    assert [row.index for row in rows if row.error] == [0, 20_001] and len(rows) == 20_002
    assert "line 20003 is not valid CSV: unexpected end of data" in rows[-1].error.message


def test_lines_are_read_again_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv, "REREAD_BYTES", 6 + 4 * csv.LINE_BYTES)
    lines = [b'"a', b"b", b"c", b'"d', b"e", b"f"]
    read = [(number, str(fields)) for number, fields in read_delimited(iter(lines), Dialect(","))]
    assert [number for number, _ in read] == [1, 2, 3, 4] and "lines 4 to 6 are not valid CSV" in read[-1][1]


@given(st.lists(st.text('a",\r\n ü', max_size=12), max_size=12))
def test_every_line_is_in_a_record_or_an_error(pieces: list[str]) -> None:
    lines = "\n".join(pieces).encode().split(b"\n")
    records = list(read_delimited(iter(lines), Dialect(",")))
    numbers = [number for number, _ in records]
    assert numbers == sorted(set(numbers)) and set(numbers) <= set(range(1, len(lines) + 1))
    covered = set()
    for number, fields in records:
        last = number + sum(field.count("\n") for field in fields) if isinstance(fields, list) else last_line(fields)
        covered |= set(range(number, last + 1))
    blank = {number for number, line in enumerate(lines, 1) if not line.strip(b"\r")}
    assert covered | blank == set(range(1, len(lines) + 1))


def last_line(error: RowError) -> int:
    return int(re.match(r"lines? (?:\d+ to )?(\d+) (is|are) ", error.message)[1])


def test_byte_order_marks_blank_lines_and_unnamed_columns_are_borne(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf,image,n\r\n\r\n0,a.png,1\r\n")
    (row,) = read(path, keep="all")
    assert row.image == "a.png" and row.values == {"": "0", "n": "1"}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"a.png,What?\nb.png,Who?\n", "has no header"),
        (b"image,n,n\na.png,1,2\n", "two columns named 'n'"),
        (b'image,"n\na.png,1\n', "cannot be read"),
        (b"image,\xff\na.png,1\n", "not valid UTF-8"),
        ("image,n\na.png,1\n".encode("utf-16-le"), "--encoding utf-16-le"),
        (b"image:n\na.png:1\n", "'image:n'"),
    ],
)
def test_files_whose_header_is_of_no_use_are_refused(path: Path, header: bytes, reason: str) -> None:
    path.write_bytes(header)
    assert reason in refusal(path, image_column="image")


def test_an_encoding_that_needs_a_mark_is_refused_without_one(path: Path) -> None:
    path.write_bytes("image,n\na.png,1\n".encode("utf-16-le"))
    reason = refusal(path, delimited=DelimitedOptions(encoding="utf-16"))
    assert "BOM" in reason and "utf-16-le" in reason


def test_a_cell_may_have_very_many_lines(path: Path) -> None:
    cell = "x\n" * 300_000
    path.write_text(f'image,question\na.png,"{cell}"\nb.png,q\n')
    assert [row.values["question"] for row in read(path, columns=("question",))] == [cell, "q"]


def test_records_that_are_too_long_cost_their_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv, "MAX_ROW_BYTES", 8)
    lines = [b'"a', b"b", b'c"', b'"d', b"e", b"f", b'g"', b"h", None, b"i", b'"j', None, b"k"]
    found = [
        (number, fields.message if isinstance(fields, RowError) else fields)
        for number, fields in read_delimited(iter(lines), Dialect(","))
    ]
    assert found[0] == (1, ["a\nb\nc"])
    assert [number for number, _ in found] == [1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert [number for number, fields in found if "longer than 64 MB" in fields] == [4, 9, 11, 12]
