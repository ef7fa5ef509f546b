from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.errors import OutputError
from idefics_cli.writers.sidecars import Existing, SidecarWriter

NAMES = st.lists(
    st.from_regex(r"(a|b|a\.png|\.a)\.(png|jpg|PNG|webp|txt)", fullmatch=True), min_size=1, max_size=8, unique=True
)


@given(NAMES)
@settings(deadline=None)
def test_no_two_images_share_a_text(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        images = [Path(folder) / name for name in names if not name.endswith(".txt")]
        for image in images:
            image.touch()
        writer = SidecarWriter()
        for row, image in enumerate(images):
            writer.write(image, image.name, row)
        texts = [path.read_text() for path in Path(folder).iterdir() if path not in images]
        assert sorted(texts) == sorted(f"{image.name}\n" for image in images)


def test_a_stem_alone_is_the_name_and_else_the_whole_name_is(tmp_path: Path) -> None:
    for name in "a.png", "b.png", "b.jpg", "notes.md":
        (tmp_path / name).touch()
    for name in "a.png", "b.png", "b.jpg":
        SidecarWriter().write(tmp_path / name, name, 0)
    assert {path.name for path in tmp_path.glob("*.txt")} == {"a.txt", "b.png.txt", "b.jpg.txt"}


def test_a_text_of_the_user_goes_only_where_that_is_said(tmp_path: Path) -> None:
    image, text = tmp_path / "a.png", tmp_path / "a.txt"
    text.write_text("mine\n")
    with pytest.raises(OutputError, match=r"a\.txt exists already: .* --sidecar-existing skip, overwrite"):
        SidecarWriter().write(image, "a dog", 0)
    assert text.read_text() == "mine\n"
    SidecarWriter("overwrite").write(image, "a dog", 0)
    SidecarWriter().write(image, "a dog", 0)
    assert text.read_text() == "a dog\n"


@pytest.mark.parametrize("data", [b"my dog", b"my dog\n", b"my dog\r\n", b"\xef\xbb\xbfmy dog\r\n"])
def test_what_an_editor_adds_is_not_of_a_kept_text(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    writer = SidecarWriter("skip")
    assert writer.before(tmp_path / "a.png", 0, done="a dog") == "my dog"
    assert writer.before(tmp_path / "a.png", 0, done="my dog") is None
    writer.write(tmp_path / "a.png", "my dog", 0)
    assert (tmp_path / "a.txt").read_bytes() == data


def test_a_kept_text_that_is_not_utf8_is_taken_over_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    text = SidecarWriter("skip").before(tmp_path / "a.png", 0, done="a dog")
    assert text == "caf\ufffd"
    assert SidecarWriter("skip").before(tmp_path / "a.png", 0, done=text) is None


@pytest.mark.parametrize("existing", get_args(Existing))
def test_a_text_of_another_row_of_the_run_never_goes(tmp_path: Path, existing: Existing) -> None:
    writer = SidecarWriter(existing)
    for row, text in enumerate(("a dog", "a dog", "two dogs", "two dogs")):
        writer.write(tmp_path / f"{text}.png", text, row)
    with pytest.raises(OutputError, match=r"rows 1 and 5 show one image .*a dog\.txt holds one: leave --sidecar out"):
        writer.write(tmp_path / "a dog.png", "a cat", 4)
    assert (tmp_path / "a dog.txt").read_text() == "a dog\n"


def test_an_image_is_the_same_however_its_folder_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p" / "q").mkdir(parents=True)
    (tmp_path / "link").symlink_to("p")
    monkeypatch.chdir(tmp_path)
    for folder in "p", "p/q/..", "./p", "link", str(tmp_path / "p"):
        writer = SidecarWriter("overwrite")
        writer.write(Path("p/a.png"), "a dog", 0)
        with pytest.raises(OutputError, match="rows 1 and 2 show one image"):
            writer.write(Path(folder, "a.png"), "a cat", 1)


def test_what_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SidecarWriter()
    with pytest.raises(OutputError, match=r"cannot write a text beside .*a\.png: No such file or directory"):
        writer.write(tmp_path / "none" / "a.png", "a dog", 0)

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OutputError, match=r"beside .*a\.png: Read-only file system; .*, or leave --sidecar out"):
        writer.write(tmp_path / "a.png", "a dog", 0)
    assert not list(tmp_path.iterdir())
