from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from written_manifests import write_archive

from idefics_cli.errors import InputError
from idefics_cli.readers.inputs import open_inputs
from idefics_cli.rows import InputRow, ReadOptions

SAMPLES = [("a/one.png", b"1"), ("a/one.json", b'{"n": 1}'), ("two.JPG", b"2"), ("two.txt", b"What?")]


def read(path: Path, **options: Any) -> list[InputRow]:
    return list(open_inputs([str(path)], ReadOptions(**options)).rows)


def test_members_with_one_stem_are_one_row(tmp_path: Path) -> None:
    """The stem ends at the first dot of the name, and dots of folders are no matter; other members are no images."""
    members = [("v1.0/x.b.png", b"b"), ("v1.0/x.a.png", b"a"), ("v1.0/x.npy", b"?"), ("v1.0/y.webp", b"y")]
    x, y = read(write_archive(tmp_path / "rows.tar", members))
    assert (x.id, x.sources, x.image) == ("v1.0/x", (b"a", b"b"), '["v1.0/x.a.png", "v1.0/x.b.png"]')
    assert (y.id, y.sources, y.image) == ("v1.0/y", (b"y",), "v1.0/y.webp")


def test_members_of_the_folder_itself_are_no_hidden_ones(tmp_path: Path) -> None:
    """`tar -C folder -cf rows.tar .` puts `./` before every name."""
    rows = read(write_archive(tmp_path / "rows.tar", [("./a/x.png", b"a"), ("./.b/x.png", b"b"), ("./y.png", b"y")]))
    assert [(row.id, row.image) for row in rows] == [("a/x", "a/x.png"), ("y", "y.png")]


def test_fields_and_questions_are_columns(tmp_path: Path) -> None:
    one, two = read(write_archive(tmp_path / "rows.tar", SAMPLES), keep=("n", "question"))
    assert one.values == {"n": 1, "question": None} and two.values == {"n": None, "question": "What?"}


@pytest.mark.parametrize(
    "name, data, reason",
    [("one.json", b"[1]", "object"), ("one.json", b"{", "one.json"), ("one.txt", b"\xff", "UTF-8")],
)
def test_a_bad_field_costs_its_own_row(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    members = [("zero.png", b"0"), ("zero.json", b'{"n": 0}'), ("one.png", b"1"), (name, data), ("two.png", b"2")]
    zero, one, two = read(write_archive(tmp_path / "rows.tar", members), keep=("n",))
    assert zero.error is None and two.error is None
    assert one.error.code == "row_invalid" and reason in one.error.message


def test_a_row_without_an_image_is_an_error_row(tmp_path: Path) -> None:
    one, two = read(write_archive(tmp_path / "rows.tar", [("one.txt", b"What?"), ("two.png", b"2")]))
    assert one.error.code == "row_invalid" and two.error is None


def test_links_devices_and_hidden_members_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in [("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("d.png", tarfile.CHRTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name in [".hidden.png", "__MACOSX/good.png", "good.png"]:
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"1"))
    assert [row.id for row in read(path)] == ["good"]


def test_an_archive_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    """Behind the last member come two blocks of zeros; an archive that has the first of them is whole."""
    path = write_archive(tmp_path / "rows.tar", SAMPLES)
    data = path.read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for length in range(0, end + 1, 64):
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            read(path)
    path.write_bytes(data[: end + 512])
    assert len(read(path)) == 2


def test_a_changed_header_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "rows.tar", SAMPLES)
    data = path.read_bytes()
    place = data.index(b"two.JPG")
    path.write_bytes(data[:place] + b"T" + data[place + 1 :])
    with pytest.raises(InputError, match=r"rows\.tar"):
        read(path)


def test_archives_that_were_joined_are_refused(tmp_path: Path) -> None:
    path, other = (write_archive(tmp_path / f"{i}.tar", [(f"{i}.png", b"1")]) for i in range(2))
    path.write_bytes(path.read_bytes() + other.read_bytes())
    with pytest.raises(InputError, match="joined"):
        read(path)


def test_a_stem_that_comes_back_is_a_second_row_with_one_id(tmp_path: Path) -> None:
    members = [("a.png", b"1"), ("b.png", b"2"), ("a.txt", b"What?")]
    with pytest.raises(InputError, match="'a'"):
        read(write_archive(tmp_path / "rows.tar", members))


def test_names_that_are_not_utf8_lead_back_to_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rows.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as archive:
        info = tarfile.TarInfo("a\udcff.png")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"1"))
    (row,) = read(path)
    assert row.id == r"a\xff" and row.image == r"a\xff.png"
