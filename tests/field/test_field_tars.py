"""Tars as people make them, and as nobody should: rows or one line, never without end, and in bounded memory."""

from __future__ import annotations

import gzip
import io
import os
import random
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from conftest import rows_of, save_image
from typer.testing import Result
from written_manifests import opened, read, refusal, write_archive

from idefics_cli.errors import InputError
from idefics_cli.pipeline import prefetch
from idefics_cli.rows import InputRow

END = bytes(1024)


@pytest.fixture
def image(tmp_path: Path) -> bytes:
    return save_image(tmp_path / "image").read_bytes()


# As people make them


def test_dots_in_names_split_no_stem(run: Callable[..., Result], tmp_path: Path, image: bytes) -> None:
    names = [f"Screen Shot 2024-01-01 at 10.00.0{i}.png" for i in range(3)]
    members = [(name, image) for name in names] + [
        ("v1.5/IMG.0001.JPG", image),
        ("v1.5/IMG.0001.jpg.json", b'{"n": 1}'),
    ]
    result = run("caption", write_archive(tmp_path / "a.tar", members), "--keep", "n")
    assert result.exit_code == 0, result.output
    assert [(row["id"], row["image"], row["n"]) for row in rows_of(result.stdout)] == [
        *((name.removesuffix(".png"), name, None) for name in names),
        ("v1.5/IMG.0001", "v1.5/IMG.0001.JPG", 1),
    ]


def test_what_webdataset_writes_is_read(run: Callable[..., Result], tmp_path: Path, image: bytes) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for number in range(3):
            key = f"sample-{number:04d}"
            sink.write(
                {"__key__": key, "png": image, "cls": number, "txt": f"What is {number}?", "json": {"n": number}}
            )
    result = run("vqa", tmp_path / "a.tar", "--keep", "n,cls")
    assert [(row["id"], row["question"], row["n"], row["cls"]) for row in rows_of(result.stdout)] == [
        (f"sample-{number:04d}", f"What is {number}?", number, number) for number in range(3)
    ]


def test_members_that_stand_apart_are_refused_before_a_row_is_written(
    refused: Callable[..., str], run: Callable[..., Result], tmp_path: Path, image: bytes
) -> None:
    """As `tar` leaves them in the order of the disk; the command that the line names makes an archive that is read."""
    numbers = range(300)
    members = [*((f"{n:04d}.png", image) for n in numbers), *((f"{n:04d}.txt", b"What?") for n in numbers)]
    path = write_archive(tmp_path / "a.tar", members)
    said = refused("vqa", path, "-o", tmp_path / "out.jsonl")
    assert "the members of '0000' do not stand together: make the archive with `tar --sort=name`" in said
    for name, data in members:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    subprocess.run(["tar", "--sort=name", "-cf", path, "-C", tmp_path / "in", "."], check=True)
    assert run("vqa", path, "-o", tmp_path / "out.jsonl").exit_code == 0


def test_members_that_stand_apart_in_a_packed_archive_end_it_where_they_come(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(1 << 20)
    members = [(f"{n}.png", noise) for n in range(20)] + [("3.txt", b"What?")]
    found: list[InputRow] = []
    with pytest.raises(InputError, match="sort=name"):
        found.extend(opened(write_archive(tmp_path / "a.tar.gz", members)).rows)
    assert len(found) == 20


def test_hard_links_of_tar_are_error_rows_with_the_remedy(
    run: Callable[..., Result], tmp_path: Path, image: bytes
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(image)
    os.link(tmp_path / "in/a.png", tmp_path / "in/b.png")
    os.symlink("a.png", tmp_path / "in/c.png")
    command = ["tar", "--sort=name", "-C", str(tmp_path / "in"), "-cf", str(tmp_path / "a.tar"), "."]
    subprocess.run(command, check=True)
    result = run("caption", tmp_path / "a.tar")
    a, b, c = rows_of(result.stdout)
    assert result.exit_code == 3 and a["error"] is None
    assert "--hard-dereference" in b["error"] and "--dereference" in c["error"]
    subprocess.run([*command[:1], "--hard-dereference", "--dereference", *command[1:]], check=True)
    assert run("caption", tmp_path / "a.tar").exit_code == 0


# As nobody should


def header(name: bytes, size: int, kind: bytes = b"0", field: bytes = b"", gnu: int | None = None) -> bytes:
    info = bytearray(512)
    info[: len(name)] = name
    info[100:124] = b"0000644\0" + b"0000000\0" * 2
    info[124:136] = field or b"%011o\0" % size
    info[136:148], info[156:157] = b"%011o\0" % 0, kind
    info[257:265] = b"ustar\x0000" if gnu is None else b"ustar  \0"
    if gnu is not None:
        info[386:410], info[483:495] = b"%011o\0" % 0 * 2, b"%011o\0" % gnu
    info[148:156] = b" " * 8
    info[148:156] = b"%06o\0 " % sum(info)
    return bytes(info)


def member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


def negative(number: int) -> bytes:
    return b"\xff" + (number & ((1 << 88) - 1)).to_bytes(11, "big")


def extended(*records: tuple[bytes, bytes]) -> bytes:
    data = b""
    for key, value in records:
        length = next(n for n in range(9999) if len(b"%d %s=%s\n" % (n, key, value)) == n)
        data += b"%d %s=%s\n" % (length, key, value)
    return member(b"x", data, b"x")


SPARSE = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"100")]
GOOD = member(b"a.png", b"1") + member(b"b.png", b"2")
HOSTILE = {
    "negative": header(b"b.png", 0, field=negative(-1024)),
    "negative block": header(b"b.png", 0, field=negative(-512)),
    "huge": header(b"b.png", 0, field=b"\x80" + b"\x7f" * 11),
    "digits": member(b"x", b"1" * 200_000, b"x"),
    "some digits": member(b"x", b"1" * 60_000, b"x"),
    "negative size": extended((b"size", b"-1024")),
    "huge size": extended((b"size", b"9" * 4000)),
    "float size": extended((b"size", b"1e3")),
    "no number": member(b"x", b"x path=a\n", b"x"),
    "sparse 1.0": extended(*SPARSE) + member(b"b.png", b"hello world no numbers" * 30),
    "sparse 1.0 without end": extended(*SPARSE) + header(b"b.png", 10**6) + b"99999999\n" + b"1" * 503,
    "sparse 0.1": extended((b"GNU.sparse.map", b"abc,def"), (b"GNU.sparse.size", b"100")),
    "sparse": b"".join(header(b"%04d.png" % i, 0, b"S", gnu=255 << 20) for i in range(60)),
    "without end": header(b"b.png", 8**11 - 1),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_headers_decide_neither_time_nor_memory(tmp_path: Path, name: str, packed: bool) -> None:
    data = member(b"0.png", b"0") + HOSTILE[name] + GOOD + END
    path = tmp_path / ("a.tar.gz" if packed else "a.tar")
    path.write_bytes(gzip.compress(data) if packed else data)
    started = time.perf_counter()
    assert str(path) in refusal(path)
    assert time.perf_counter() - started < 2


def test_thousands_of_long_names_cost_no_more_than_their_bytes(tmp_path: Path) -> None:
    """The last one counts, as tar has it."""
    names = b"".join(member(b"././@LongLink", b"c%d.png\0" % i, b"L") for i in range(3000))
    (tmp_path / "a.tar").write_bytes(member(b"a.png", b"1") + names + member(b"b.png", b"2") + END)
    assert [row.id for row in read(tmp_path / "a.tar")] == ["a", "c2999"]


def test_names_of_posix_and_of_gnu_are_read(tmp_path: Path) -> None:
    long = "folder/" * 30 + "n\u00e4me\udcff"
    for form in tarfile.PAX_FORMAT, tarfile.GNU_FORMAT:
        with tarfile.open(tmp_path / "a.tar", "w", format=form, errors="surrogateescape") as archive:
            info = tarfile.TarInfo(f"{long}.png")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"1"))
        (row,) = read(tmp_path / "a.tar")
        assert row.id == long.replace("\udcff", r"\xff") and row.sources == (b"1",)


def test_a_row_has_a_limit_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idefics_cli.readers.webdataset.MAX_ROW_BYTES", 100)
    members = [(f"a.{kind}", b"1" * 60) for kind in ("png", "jpg")] + [("b.png", b"1" * 101), ("c.png", b"1" * 100)]
    codes = [row.error and row.error.code for row in read(write_archive(tmp_path / "a.tar", members))]
    assert codes == ["image_too_large", "image_too_large", None]


def test_bytes_in_flight_are_bounded(
    run: Callable[..., Result], tmp_path: Path, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows the window has space for."""
    path = write_archive(tmp_path / "a.tar", [(f"{n:02d}.png", image) for n in range(60)])
    monkeypatch.setattr(prefetch, "MAX_BYTES_IN_FLIGHT", 3 * len(image))
    most = 0
    count = prefetch._num_bytes

    class Counting(prefetch.RowFlow):
        def _read(self) -> None:
            nonlocal most
            super()._read()
            most = max(most, self._num_bytes)

    monkeypatch.setattr(prefetch, "RowFlow", Counting)
    result = run("caption", path)
    assert [row["id"] for row in rows_of(result.stdout)] == [f"{n:02d}" for n in range(60)]
    assert len(image) <= most <= 4 * len(image) and count is prefetch._num_bytes
