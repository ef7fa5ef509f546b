from __future__ import annotations

import io
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import save_image
from hypothesis import example, given
from hypothesis import strategies as st
from written_manifests import opened, read, refusal

from idefics_cli.readers.inputs import open_inputs
from idefics_cli.rows import InputRow, ReadOptions
from idefics_cli.storage.filenames import escape_name, unescape_name


def ids(*inputs: str | Path, stdin: bytes | None = None, **options) -> list[str]:
    return [row.id for row in read(*inputs, stdin=stdin, **options)]


# Names


@given(st.binary(min_size=1), st.binary(min_size=1))
@example(b"\xff", rb"\xff")
@example(rb"\x5cxff", rb"\xff")
@example(b"\\\xff", rb"\\xff")
@example(b"\\x5\xff", rb"\x5\xff")
def test_escaped_names_are_unique_and_reversible(name: bytes, other: bytes) -> None:
    text = escape_name(os.fsdecode(name))
    assert os.fsencode(unescape_name(text)) == name
    assert json.loads(json.dumps(text)) == text
    assert text.encode()
    assert (text == escape_name(os.fsdecode(other))) == (name == other)


@pytest.mark.parametrize("name", ["a.png", "año 1/ü.jpg", r"C:\photos\x.png", r"a\x41.png", "日本.png", "a\nb.png"])
def test_ordinary_names_stay_as_they_are(name: str) -> None:
    assert escape_name(name) == name


# Files and folders


def test_rows_say_where_the_image_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was named has its path as id, and needs no telling name; one in a folder its path in there."""
    save_image(tmp_path / "d/a.data")
    save_image(tmp_path / "e/f/z.png")
    monkeypatch.chdir(tmp_path)
    name = "./d/../d/a.data"
    assert read(name) == [InputRow(0, name, name, (Path(name),), {})]
    assert read("e") == [InputRow(0, "f/z.png", "e/f/z.png", (Path("e/f/z.png"),), {})]


def without_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # the tests may run as root, who may read everything
    return save_image(folder / "a.png")


def a_pipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    os.mkfifo(folder / "a.png")
    return folder / "a.png"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder, _: folder / "none.png", "No such file"),
        (lambda folder, _: folder, "no images in"),
        (lambda folder, _: "/dev/null", "not a regular file"),
        (lambda folder, _: "HTTPS://a.example/b.png", "img2dataset"),
        (lambda folder, _: "data:image/png;base64,AA", "write it to a file first"),
        (a_pipe, "not a regular file"),
        (without_permission, "permission"),
    ],
)
def test_inputs_that_cannot_be_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., str | Path], reason: str
) -> None:
    assert re.search(reason, refusal(make(tmp_path, monkeypatch)))


def test_folders_are_sorted_by_path(tmp_path: Path) -> None:
    for name in ["b.png", "a/z.png", "a.png", "a/b/c.JPG", "B.Jpeg"]:
        save_image(tmp_path / "above/photos" / name)
    above, photos = tmp_path / "above", tmp_path / "above/photos"
    assert ids(photos) == sorted(["b.png", "a/z.png", "a.png", "a/b/c.JPG", "B.Jpeg"])
    assert ids(photos, recursive=False) == ["B.Jpeg", "a.png", "b.png"]
    assert "--no-recursive" in refusal(above, recursive=False)


def test_other_files_are_passed_over_and_odd_images_found(tmp_path: Path) -> None:
    """What is hidden or the system's; and pipes and sockets, which are not waited for."""
    for name in [".a.png", ".git/a.png", "__MACOSX/a.png", "Thumbs.db", "desktop.ini", ".DS_Store", "@eaDir/a.png"]:
        save_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("a list of images")
    (tmp_path / "empty").touch()
    (tmp_path / "drawing.psd").write_bytes(b"8BPS")
    save_image(tmp_path / "without-suffix")
    save_image(tmp_path / "photo.jpg.bak")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        assert ids(tmp_path) == ["drawing.psd", "photo.jpg.bak", "without-suffix"]


def test_links_out_of_the_folder_are_error_rows(tmp_path: Path) -> None:
    """Linked folders are not entered, and loops end; the folder that was named may be a link itself."""
    secret = save_image(tmp_path / "outside/secret.png")
    save_image(tmp_path / "root/sub/a.png")
    links = {"b.png": secret, "c.png": "../outside/none.png", "d.png": "../rootless.png", "e.png": "sub/a.png"}
    for name, target in (links | {"out": tmp_path / "outside", "sub/up": "..", "self": "self"}).items():
        (tmp_path / "root" / name).symlink_to(target)
    (tmp_path / "link").symlink_to("root")
    good = {"e.png": None, "sub/a.png": None}
    for folder in "root", "link":
        codes = {row.id: row.error and row.error.code for row in read(tmp_path / folder)}
        assert codes == dict.fromkeys(["b.png", "c.png", "d.png"], "image_not_allowed") | good


# Several inputs


@pytest.mark.parametrize("limit", [None, 1, 2, 9])
def test_inputs_follow_each_other_up_to_the_limit(tmp_path: Path, limit: int | None) -> None:
    file = save_image(tmp_path / "z.png")
    save_image(tmp_path / "one/b.png")
    save_image(tmp_path / "two/a.png")
    found = opened(file, tmp_path / "one", tmp_path / "two", limit=limit)
    expected = [(0, str(file)), (1, "b.png"), (2, "a.png")][:limit]
    assert found.total == len(expected)
    assert [(row.index, row.id) for row in found.rows] == expected


def test_two_rows_with_one_id_are_refused_naming_both(tmp_path: Path) -> None:
    first, second = save_image(tmp_path / "one/a.png"), save_image(tmp_path / "two/a.png")
    message = refusal(tmp_path / "one", tmp_path / "two")
    assert str(first) in message and str(second) in message and "folder above" in message


# Paths on stdin


def test_stdin_gives_a_path_a_line() -> None:
    assert ids("-", stdin=b"b.png\na b.png \r\n\n/c.png") == ["b.png", "a b.png ", "/c.png"]


@given(st.lists(st.binary(min_size=1, max_size=9).map(lambda name: name.replace(b"\0", b"x")), min_size=1, unique=True))
@example([b"a\n.png", b"b\r", b"\xff.png"])
def test_stdin_is_cut_at_separators_whatever_the_pieces(names: list[bytes]) -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(3)

    rows = list(open_inputs(["-"], ReadOptions(null=True), Trickle(b"\0".join(names))).rows)
    assert [os.fsencode(unescape_name(row.id)) for row in rows] == names
    assert all(row.sources == (Path(os.fsdecode(name)),) for row, name in zip(rows, names, strict=True) if row.sources)


def test_missing_files_and_addresses_on_stdin_are_rows() -> None:
    missing, address, mixed = read("-", stdin=b"none.png\nhttp://a.example/b.png\nb\0c.png\n")
    assert (missing.sources, missing.error) == ((Path("none.png"),), None)
    assert address.error.code == "image_not_allowed" and "img2dataset" in address.error.message
    assert mixed.error.code == "row_invalid"


@pytest.mark.parametrize(
    ("stdin", "reason"),
    [(b"\n\n", "no paths on stdin"), (None, "stdin is closed"), (b"a.png\0b.png\0", "--null")],
)
def test_stdin_that_gives_no_paths_is_refused(stdin: bytes | None, reason: str) -> None:
    assert reason in refusal("-", stdin=stdin)


def test_stdin_can_be_named_once() -> None:
    assert "twice" in refusal("-", "-", stdin=b"a.png")
