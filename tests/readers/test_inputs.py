from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from conftest import save_image
from hypothesis import example, given
from hypothesis import strategies as st
from written_manifests import unescape_name

from idefics_cli.errors import InputError
from idefics_cli.readers.inputs import open_inputs
from idefics_cli.rows import InputRow, ReadOptions
from idefics_cli.storage.filenames import escape_name


def read(*inputs: str | Path, stdin: BinaryIO | None = None, **options) -> Iterator[InputRow]:
    return open_inputs([str(name) for name in inputs], ReadOptions(**options), stdin).rows


def ids(*inputs: str | Path, **options) -> list[str]:
    return [row.id for row in read(*inputs, **options)]


def refusal(*inputs: str | Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        ids(*inputs, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    save_image(tmp_path / r"caf\xe9.png")
    rows = list(read(tmp_path))
    assert sorted(row.id for row in rows) == [r"caf\x5cxe9.png", r"caf\xe9.png"]
    assert all(row.sources[0].read_bytes() for row in rows)


# Files


def test_a_file_has_its_path_as_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(tmp_path / "d/a.png")
    monkeypatch.chdir(tmp_path)
    assert list(read("./d/../d/a.png")) == [
        InputRow(0, "./d/../d/a.png", "./d/../d/a.png", (Path("./d/../d/a.png"),), {})
    ]


def test_a_file_that_was_named_needs_no_telling_name(tmp_path: Path) -> None:
    path = save_image(tmp_path / "image.data")
    assert ids(path) == [str(path)]


def test_missing_files_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.png")


@pytest.mark.parametrize(
    "name", ["http://a.example/b.png", "HTTPS://a.example/b.png", "data:image/png;base64,AA", "file:///b"]
)
def test_addresses_are_refused_and_the_downloader_named(name: str) -> None:
    assert "img2dataset" in refusal(name)


def test_only_regular_files_are_taken(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert "not a regular file" in refusal(tmp_path / "a.png")
    assert "not a regular file" in refusal("/dev/null")


def test_files_without_permission_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_image(tmp_path / "a.png")
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # the tests may run as root, who may read everything
    assert "permission" in refusal(path)


# Folders


def test_folders_are_sorted_by_path(tmp_path: Path) -> None:
    for name in ["b.png", "a/z.png", "a.png", "a/b/c.JPG", "B.Jpeg"]:
        save_image(tmp_path / name)
    assert ids(tmp_path) == sorted(["b.png", "a/z.png", "a.png", "a/b/c.JPG", "B.Jpeg"])
    assert ids(tmp_path, recursive=False) == ["B.Jpeg", "a.png", "b.png"]


def test_rows_say_where_the_image_is(tmp_path: Path) -> None:
    save_image(tmp_path / "a/z.png")
    path = tmp_path / "a/z.png"
    assert list(read(tmp_path)) == [InputRow(0, "a/z.png", str(path), (path,), {})]


def test_hidden_and_system_files_are_passed_over(tmp_path: Path) -> None:
    names = [".a.png", ".git/a.png", "__MACOSX/a.png", "Thumbs.db", "desktop.ini", ".DS_Store", "@eaDir/a.png"]
    for name in [*names, "a.png"]:
        save_image(tmp_path / name)
    assert ids(tmp_path) == ["a.png"]


def test_other_files_are_passed_over_and_odd_images_found(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a list of images")
    (tmp_path / "empty").touch()
    (tmp_path / "drawing.psd").write_bytes(b"8BPS")
    save_image(tmp_path / "without-suffix")
    save_image(tmp_path / "photo.jpg.bak")
    assert ids(tmp_path) == ["drawing.psd", "photo.jpg.bak", "without-suffix"]


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    assert "no images in" in refusal(tmp_path)
    save_image(tmp_path / "a/b.png")
    assert "--no-recursive" in refusal(tmp_path, recursive=False)


def test_folders_that_cannot_be_listed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "locked/b.png")
    scandir = os.scandir

    def refuse_locked(path: str):
        if path.rstrip("/").endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_locked)
    message = refusal(tmp_path)
    assert "locked" in message and "Permission denied" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    assert "Permission denied" in refusal(tmp_path / "locked")


def test_special_files_in_folders_are_not_waited_for(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        assert ids(tmp_path) == ["a.png"]


# Links


def test_links_within_the_folder_are_rows(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    assert [(row.id, row.error) for row in read(tmp_path)] == [("a.png", None), ("b.png", None)]


def test_links_out_of_the_folder_are_error_rows(tmp_path: Path) -> None:
    secret = save_image(tmp_path / "outside/secret.png")
    save_image(tmp_path / "root/a.png")
    (tmp_path / "root/b.png").symlink_to(secret)
    (tmp_path / "root/c.png").symlink_to("../outside/none.png")
    (tmp_path / "root/d.png").symlink_to("../rootless.png")
    codes = [row.error and row.error.code for row in read(tmp_path / "root")]
    assert codes == [None, "image_not_allowed", "image_not_allowed", "image_not_allowed"]


def test_linked_folders_are_not_entered_and_loops_end(tmp_path: Path) -> None:
    save_image(tmp_path / "outside/secret.png")
    save_image(tmp_path / "root/sub/a.png")
    (tmp_path / "root/out").symlink_to(tmp_path / "outside")
    (tmp_path / "root/sub/up").symlink_to("..")
    (tmp_path / "root/self").symlink_to("self")
    assert ids(tmp_path / "root") == ["sub/a.png"]


def test_a_linked_folder_that_was_named_is_read(tmp_path: Path) -> None:
    save_image(tmp_path / "root/a.png")
    (tmp_path / "link").symlink_to("root")
    assert [(row.id, row.error) for row in read(tmp_path / "link")] == [("a.png", None)]


# Several inputs


def test_inputs_follow_each_other(tmp_path: Path) -> None:
    file = save_image(tmp_path / "z.png")
    save_image(tmp_path / "one/b.png")
    save_image(tmp_path / "two/a.png")
    found = open_inputs([str(file), str(tmp_path / "one"), str(tmp_path / "two")], ReadOptions())
    assert found.total == 3
    assert [(row.index, row.id) for row in found.rows] == [(0, str(file)), (1, "b.png"), (2, "a.png")]


def test_two_rows_with_one_id_are_refused_naming_both(tmp_path: Path) -> None:
    first, second = save_image(tmp_path / "one/a.png"), save_image(tmp_path / "two/a.png")
    with pytest.raises(InputError) as caught:
        open_inputs([str(tmp_path / "one"), str(tmp_path / "two")], ReadOptions())
    assert str(first) in str(caught.value) and str(second) in str(caught.value)
    assert "folder above" in str(caught.value)


@pytest.mark.parametrize(("limit", "total"), [(1, 1), (2, 2), (9, 3)])
def test_limit_keeps_the_first_rows(tmp_path: Path, limit: int, total: int) -> None:
    for name in ["a.png", "b.png", "c.png"]:
        save_image(tmp_path / name)
    found = open_inputs([str(tmp_path)], ReadOptions(limit=limit))
    assert found.total == total == len(list(found.rows))


# Paths on stdin


def test_stdin_gives_a_path_a_line() -> None:
    assert ids("-", stdin=io.BytesIO(b"b.png\na b.png \r\n\n/c.png")) == ["b.png", "a b.png ", "/c.png"]


def test_stdin_with_nul_keeps_every_byte() -> None:
    rows = list(read("-", null=True, stdin=io.BytesIO(b"a\n.png\0b\r\0\xff.png\0")))
    assert [row.id for row in rows] == ["a\n.png", "b\r", r"\xff.png"]
    assert [os.fsencode(row.sources[0]) for row in rows] == [b"a\n.png", b"b\r", b"\xff.png"]


@given(st.lists(st.binary(min_size=1, max_size=9).map(lambda name: name.replace(b"\0", b"x")), min_size=1, unique=True))
def test_stdin_is_cut_at_separators_whatever_the_pieces(names: list[bytes]) -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(3)

    assert [os.fsencode(unescape_name(i)) for i in ids("-", null=True, stdin=Trickle(b"\0".join(names)))] == names


def test_missing_files_and_addresses_on_stdin_are_rows() -> None:
    rows = list(read("-", stdin=io.BytesIO(b"none.png\nhttp://a.example/b.png\n")))
    assert [row.sources for row in rows] == [(Path("none.png"),), ()]
    assert rows[1].error.code == "image_not_allowed" and "img2dataset" in rows[1].error.message


def test_empty_stdin_is_refused() -> None:
    assert "no paths on stdin" in refusal("-", stdin=io.BytesIO(b"\n\n"))
    assert "stdin is closed" in refusal("-", stdin=None)


def test_stdin_can_be_named_once() -> None:
    assert "twice" in refusal("-", "-", stdin=io.BytesIO(b"a.png"))


def test_forgotten_null_is_noticed() -> None:
    assert "--null" in refusal("-", stdin=io.BytesIO(b"a.png\0b.png\0"))
    rows = list(read("-", stdin=io.BytesIO(b"a.png\nb\0c.png\n")))
    assert rows[1].error is not None and rows[1].error.code == "row_invalid"


def test_two_rows_with_one_id_on_stdin_are_refused_at_the_second() -> None:
    rows = read("-", stdin=io.BytesIO(b"a.png\nb.png\na.png\n"))
    assert [next(rows).id, next(rows).id] == ["a.png", "b.png"]
    with pytest.raises(InputError, match=r"rows 1 and 3 have the same id, 'a.png'"):
        next(rows)
