from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from written_manifests import read, refusal, write_archive

SAMPLES = [("a/one.png", b"1"), ("a/one.json", b'{"n": 1}'), ("two.JPG", b"2"), ("two.txt", b"What?")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.tar"


def test_members_with_one_stem_are_one_row(path: Path) -> None:
    """The stem ends before the suffixes of known kinds; members of no known kind are passed over."""
    members = [("v1.0/x.png", b"b"), ("v1.0/x.npy", b"?"), ("v1.0/x.jpg", b"a"), ("v1.0/y.seg.webp", b"y"), ("z", b"?")]
    x, y = read(write_archive(path, members))
    assert (x.id, x.sources, x.image) == ("v1.0/x", (b"a", b"b"), '["v1.0/x.jpg", "v1.0/x.png"]')
    assert (y.id, y.sources, y.image) == ("v1.0/y.seg", (b"y",), "v1.0/y.seg.webp")


def test_members_of_the_folder_itself_are_no_hidden_ones(path: Path) -> None:
    """`tar -C folder -cf rows.tar .` puts `./` before every name."""
    rows = read(write_archive(path, [("./a/x.png", b"a"), ("./.b/x.png", b"b"), ("./y.png", b"y")]))
    assert [(row.id, row.image) for row in rows] == [("a/x", "a/x.png"), ("y", "y.png")]


def test_fields_and_questions_are_columns(path: Path) -> None:
    one, two = read(write_archive(path, SAMPLES), keep=("n", "question"))
    assert one.values == {"n": 1, "question": None} and two.values == {"n": None, "question": "What?"}


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("one.json", b"[1]", "object"),
        ("one.json", b"{", "one.json"),
        ("one.txt", b"\xff", "UTF-8"),
        ("three.txt", b"What?", "no image"),
    ],
)
def test_a_bad_field_costs_its_own_row(path: Path, name: str, data: bytes, reason: str) -> None:
    """And so does an image that is missing."""
    members = [("zero.png", b"0"), ("zero.json", b'{"n": 0}'), ("one.png", b"1"), (name, data), ("two.png", b"2")]
    rows = read(write_archive(path, members), keep=("n",))
    (bad,) = [row for row in rows if row.error]
    assert bad.id == name.partition(".")[0] and bad.error.code == "row_invalid" and reason in bad.error.message


def test_links_are_bad_rows_and_devices_and_hidden_members_passed_over(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name, kind in [("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("d.png", tarfile.CHRTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name in [".hidden.png", "__MACOSX/good.png", "good.png"]:
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"1"))
    assert [(row.id, row.error and row.error.code) for row in read(path)] == [
        ("l", "image_not_allowed"),
        ("h", "image_not_allowed"),
        ("good", None),
    ]


def test_an_archive_cut_off_anywhere_is_refused(path: Path) -> None:
    """Behind the last member come two blocks of zeros; an archive that has the first of them is whole."""
    path = write_archive(path, SAMPLES)
    data = path.read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for length in range(0, end + 1, 64):
        path.write_bytes(data[:length])
        refusal(path)
    path.write_bytes(data[: end + 512])
    assert len(read(path)) == 2


def header(kind: bytes, num_bytes: int, **extended: str) -> bytes:
    info = tarfile.TarInfo("a.png")
    info.type, info.size, info.pax_headers = kind, num_bytes, extended
    return info.tobuf(tarfile.PAX_FORMAT if extended else tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data.replace(b"two.JPG", b"Two.JPG"), "rows.tar"),
        (lambda data: data * 2, "joined"),
        (lambda data: header(tarfile.REGTYPE, -1) + data, "header of -1 bytes"),
        (lambda data: header(tarfile.XHDTYPE, 1 << 20) + data, "header of 1,048,576 bytes"),
        (lambda data: header(tarfile.REGTYPE, 0, size="-512") + data, "a file of '-512' bytes"),
    ],
)
def test_a_hostile_archive_is_refused(path: Path, spoil: Callable[[bytes], bytes], reason: str) -> None:
    path.write_bytes(spoil(write_archive(path, SAMPLES).read_bytes()))
    assert reason in refusal(path)


def test_names_that_are_not_utf8_lead_back_to_their_bytes(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as archive:
        info = tarfile.TarInfo("a\udcff.png")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"1"))
    (row,) = read(path)
    assert row.id == r"a\xff" and row.image == r"a\xff.png"
