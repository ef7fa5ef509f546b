from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.csv import read_delimited
from idefics_cli.readers.inputs import open_inputs
from idefics_cli.rows import InputRow, ReadOptions


def rows(path: Path, data: bytes, **options) -> list[InputRow]:
    path.write_bytes(b"id,image\n" + data)
    return list(open_inputs([str(path)], ReadOptions(**options)).rows)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"x", "line 3 has 1 fields, but 2 columns"),
        (b"x,b.png,", "line 3 has 3 fields"),
        (b'x,"b.png"c', "line 3 is not valid CSV"),
        (b"x,b\xff.png", "line 3 is not valid UTF-8"),
        (b"x,b\r.png", "line 3 is not valid CSV"),
        (b"x," + b"b" * 200_000, "line 3 is not valid CSV: field larger than field limit"),
    ],
)
def test_a_bad_line_is_a_bad_row(tmp_path: Path, line: bytes, reason: str) -> None:
    read = rows(tmp_path / "rows.csv", b"a,a.png\n" + line + b'\nc,"c ""1"".png"\n"d\n",d.png\n')
    assert [row.id for row in read] == ["a", "#1", "c", "d\n"]
    assert [row.error and row.error.code for row in read] == [None, "row_invalid", None, None]
    assert reason in read[1].error.message


def test_an_open_quote_costs_the_lines_up_to_the_next_one(tmp_path: Path) -> None:
    """It is said which lines; where no quote comes, csv's limit for a field ends it."""
    good = b"".join(b'%d,"%d.png"\n' % (i, i) for i in range(3))
    read = rows(tmp_path / "rows.csv", b'a,"a.png\n' + good + b"z,z.png\n")
    assert [row.id for row in read] == ["#0", "1", "2", "z"] and read[0].error.code == "row_invalid"
    assert "lines 2 to 3 are not valid CSV" in read[0].error.message
    plain = b"".join(b"%d,%d.png\n" % (i, i) for i in range(20_000))
    read = rows(tmp_path / "rows.csv", b'a,"a.png\n' + plain + b'z,"z.png\n')
    assert [row.error.code for row in read if row.error] == ["row_invalid"] * 2
    assert re.search("lines 2 to .* are not valid CSV: field larger", read[0].error.message)
    assert read[-1].id == f"#{len(read) - 1}" and "unexpected end of data" in read[-1].error.message


@given(st.lists(st.text('a",\r\n ü', max_size=12), max_size=12))
def test_every_line_is_in_a_record_or_an_error(pieces: list[str]) -> None:
    lines = "\n".join(pieces).encode().split(b"\n")
    numbers = [number for number, _ in read_delimited(iter(lines), ",")]
    assert numbers == sorted(set(numbers)) and set(numbers) <= set(range(1, len(lines) + 1))
    read = dict(read_delimited(iter(lines), ","))
    covered = set()
    for number, fields in read.items():
        last = number + sum(field.count("\n") for field in fields) if isinstance(fields, list) else last_line(fields)
        covered |= set(range(number, last + 1))
    blank = {number for number, line in enumerate(lines, 1) if not line.strip(b"\r")}
    assert covered | blank == set(range(1, len(lines) + 1))


def last_line(error: RowError) -> int:
    return int(re.match(r"lines? (?:\d+ to )?(\d+) (is|are) ", error.message)[1])


def test_byte_order_marks_blank_lines_and_unnamed_columns_are_borne(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbf,image,n\r\n\r\n0,a.png,1\r\n")
    (row,) = open_inputs([str(tmp_path / "rows.csv")], ReadOptions(keep="all")).rows
    assert row.image == "a.png" and row.values == {"": "0", "n": "1"}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"a.png,What?\nb.png,Who?\n", "has no header"),
        (b"image,n,n\na.png,1,2\n", "two columns named 'n'"),
        (b'image,"n\na.png,1\n', "cannot be read"),
        (b"image,\xff\na.png,1\n", "not valid UTF-8"),
        ("image,n\na.png,1\n".encode("utf-16"), "not valid UTF-8"),
        (b"image;n\na.png;1\n", "'image;n'"),
    ],
)
def test_files_whose_header_is_of_no_use_are_refused(tmp_path: Path, header: bytes, reason: str) -> None:
    (tmp_path / "rows.csv").write_bytes(header)
    with pytest.raises(InputError) as caught:
        open_inputs([str(tmp_path / "rows.csv")], ReadOptions(image_column="image"))
    assert reason in str(caught.value)
