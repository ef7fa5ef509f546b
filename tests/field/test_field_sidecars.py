"""Texts beside images where some are there already, and what others have put where they are written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeCaptioner, expected_text, rows_of, save_image
from typer.testing import Result

from idefics_cli.writers import formats

Run = Callable[..., Result]
KEPT = {"01.txt": "mine", "03.txt": "also mine\n"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five images, two of which have a text already."""
    for number in range(5):
        save_image(tmp_path / "images" / f"{number:02}.png", number)
    for name, text in KEPT.items():
        (tmp_path / "images" / name).write_text(text)
    return tmp_path / "images"


def texts_beside(images: Path, suffix: str = ".txt") -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(images.iterdir()) if path.suffix == suffix}


def made(images: Path) -> dict[str, str]:
    return {f"{path.stem}.txt": expected_text(path) for path in sorted(images.glob("*.png"))}


# ---- what becomes of a text that is there


def test_existing_texts_are_refused_before_the_model_is_loaded(
    images: Path, tmp_path: Path, refused: Callable[..., str], run: Run
) -> None:
    for where in ["-o", tmp_path / "f.jsonl"], []:
        said = refused("caption", images, "--sidecar", *where, "-m", "demo")
        assert "01.txt exists already" in said and "--sidecar-existing skip, overwrite, append or prepend" in said
        assert texts_beside(images) == KEPT
    assert not list(tmp_path.glob("f.jsonl*"))
    assert run("caption", images, "--sidecar", "--sidecar-existing", "overwrite").exit_code == 0


@pytest.mark.parametrize("where", [[], ["-o"]])
def test_skipped_images_are_rows_with_their_texts_and_are_not_looked_at(
    images: Path, tmp_path: Path, run: Run, where: list[str]
) -> None:
    (images / "03.png").write_bytes(b"not even an image")
    captioner, output = FakeCaptioner(), tmp_path / "f.jsonl"
    options = ["--sidecar", "--sidecar-existing", "skip", *(["-o", str(output)] if where else [])]
    ended = run("caption", images, *options, captioner=captioner)
    assert ended.exit_code == 0 and sum(captioner.calls) == 3 and "2 of them done before" in ended.stderr
    rows = rows_of(output.read_bytes() if where else ended.stdout)
    new = [expected_text(images / f"{number:02}.png") for number in (0, 2, 4)]
    assert [row["caption"] for row in rows] == [new[0], "mine", new[1], "also mine", new[2]]
    assert [row["score"] for row in rows] == [-0.5, None, -0.5, None, -0.5]
    assert [row["error"] for row in rows] == [None] * 5
    assert texts_beside(images) == {**KEPT, **{f"0{2 * i}.txt": f"{text}\n" for i, text in enumerate(new)}}


def test_a_corrected_text_is_kept_and_known_before_the_model_is_loaded(
    images: Path, tmp_path: Path, refused: Callable[..., str], run: Run
) -> None:
    for name in KEPT:
        (images / name).unlink()
    command = ["caption", images, "--sidecar", "-o", tmp_path / "f.jsonl"]
    assert run(*command).exit_code == 0
    (images / "01.txt").write_text("corrected\n")
    save_image(images / "05.png", 5)
    assert "01.txt exists already" in refused(*command, "--update")
    captioner = FakeCaptioner()
    ended = run(*command, "--update", "--sidecar-existing", "skip", captioner=captioner)
    assert ended.exit_code == 0 and sum(captioner.calls) == 1
    rows = rows_of((tmp_path / "f.jsonl").read_bytes())
    expected = {**made(images), "01.txt": "corrected"}
    assert [row["caption"] for row in rows] == list(expected.values())
    assert [row["score"] is None for row in rows] == [number == 1 for number in range(6)]
    assert texts_beside(images) == {name: f"{text}\n" for name, text in expected.items()}


@pytest.mark.parametrize("line_break", ["", "\n"])
def test_an_update_takes_corrected_texts_over_without_a_new_image_or_a_model(
    images: Path, tmp_path: Path, run: Run, line_break: str
) -> None:
    command = ["caption", images, "--sidecar", "--sidecar-existing", "skip", "-o", tmp_path / "f.jsonl"]
    assert run(*command).exit_code == 0
    (images / "02.txt").write_text(f"corrected{line_break}")
    assert "is finished" in run(*command).stderr
    captioner = FakeCaptioner()
    ended = run(*command, "--update", captioner=captioner)
    assert ended.exit_code == 0 and not captioner.calls and "done: 1 row corrected (02.png)" in ended.stderr
    rows = rows_of((tmp_path / "f.jsonl").read_bytes())
    expected = {**made(images), "01.txt": "mine", "02.txt": "corrected", "03.txt": "also mine"}
    assert [row["caption"] for row in rows] == list(expected.values())
    assert (images / "02.txt").read_text() == f"corrected{line_break}"
    assert "is finished" in run(*command, "--update").stderr


JOINED = {
    "overwrite": lambda old, new: f"{new}\n",
    "append": lambda old, new: f"{old.rstrip()}\n{new}\n" if old else f"{new}\n",
    "prepend": lambda old, new: f"{new}\n{old}",
}


@pytest.mark.parametrize("existing", JOINED)
def test_texts_are_joined_once_however_often_the_command_is_repeated(
    images: Path, tmp_path: Path, run: Run, existing: str
) -> None:
    command = ["caption", images, "-o", tmp_path / "f.jsonl", "--sidecar", "--sidecar-existing", existing]

    def crash(prompts: Sequence[Any]) -> None:
        if len(prompts) == 1:  # the last row
            raise RuntimeError("a bug")

    assert run(*command, captioner=FakeCaptioner(before_call=crash)).exit_code == 1
    for _ in range(3):
        assert run(*command).exit_code == 0
        expected = {name: JOINED[existing](KEPT.get(name, ""), text) for name, text in made(images).items()}
        assert texts_beside(images) == expected


def test_another_suffix(images: Path, run: Run, refused: Callable[..., str]) -> None:
    assert run("caption", images, "--sidecar", "--sidecar-ext", ".caption").exit_code == 0
    assert texts_beside(images) == KEPT
    beside = texts_beside(images, ".caption")
    assert beside == {name.replace(".txt", ".caption"): f"{text}\n" for name, text in made(images).items()}
    for suffix in "caption", ".png", "./a", ".", "..", ".a/b", "":
        assert "invalid suffix" in refused("caption", images, "--sidecar", "--sidecar-ext", suffix)
    assert "without --sidecar" in refused("caption", images, "--sidecar-ext", ".caption")
    assert "without --sidecar" in refused("caption", images, "--sidecar-existing", "skip")
    assert "--sidecar-existing overwrite" in refused("caption", images, "--sidecar", "--overwrite")


def test_images_of_one_stem_have_texts_of_their_own(tmp_path: Path, run: Run) -> None:
    for number, name in enumerate(["a.jpg", "a.png", "b.png"]):
        save_image(tmp_path / "images" / name, number)
    assert run("caption", tmp_path / "images", "--sidecar").exit_code == 0
    assert texts_beside(tmp_path / "images").keys() == {"a.jpg.txt", "a.png.txt", "b.txt"}


def test_what_a_power_cut_has_left_empty_is_written_again(images: Path, run: Run, tmp_path: Path) -> None:
    for name in KEPT:
        (images / name).write_text("")
    assert run("caption", images, "--sidecar", "-o", tmp_path / "f.jsonl").exit_code == 0
    (images / "02.txt").write_text("")
    assert run("caption", images, "--sidecar", "-o", tmp_path / "f.jsonl").exit_code == 0
    assert texts_beside(images) == {name: f"{text}\n" for name, text in made(images).items()}


# ---- what others have put there


@pytest.mark.parametrize("existing", ["error", "skip", *JOINED])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("../secret")])
def test_only_regular_files_are_read_or_replaced(
    tmp_path: Path, refused: Callable[..., str], make: Callable[[Path], None], existing: str
) -> None:
    save_image(tmp_path / "images" / "a.png")
    (tmp_path / "secret").write_text("of others")
    make(tmp_path / "images" / "a.txt")
    said = refused("caption", tmp_path / "images", "--sidecar", "--sidecar-existing", existing, "-m", "demo")
    assert "a.txt is a link, a pipe or " in said
    assert (tmp_path / "secret").read_text() == "of others"


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, Path.touch, lambda path: path.symlink_to("../secret")])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_stands_where_files_are_made_is_neither_followed_nor_waited_for(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], suffix: str
) -> None:
    """The names of old, and those of now if they could be foreseen."""
    save_image(tmp_path / "images" / "a.png")
    (tmp_path / "secret").write_text("of others")
    output = tmp_path / "out" / f"f{suffix}"
    output.parent.mkdir()
    for name in f"{output.name}.tmp", f"{output.name}.run.tmp":
        make(output.with_name(name))
    make(tmp_path / "images" / ".a.txt.tmp")
    command = ["caption", tmp_path / "images", "--sidecar", "-o", output]
    assert run(*command).exit_code == 0

    output.unlink()
    (tmp_path / "images" / "a.txt").unlink()
    monkeypatch.setattr(formats.secrets, "token_hex", lambda number: "foreseen")
    foreseen = tmp_path / "images" / f".idefics-{formats.mark_of(output)}-foreseen.tmp"
    make(foreseen)
    is_own = foreseen.is_file() and not foreseen.is_symlink()  # as a killed run leaves it
    ended = run(*command)
    assert ended.exit_code == (0 if is_own else 2) and ("File exists" in ended.stderr) != is_own
    assert os.path.lexists(foreseen) != is_own and (tmp_path / "secret").read_text() == "of others"


def test_a_text_is_on_the_disk_before_it_has_its_name(images: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, rename = os.fsync, os.rename

    def note_sync(file: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{file}") else "fsync")
        sync(file)

    def note_rename(old: Any, new: Any) -> None:
        calls.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    assert run("caption", images, "--sidecar", "--sidecar-existing", "append").exit_code == 0
    assert calls == ["fsync", "rename"] * 5 + ["folder"]


def test_names_too_long_for_a_text_are_rows_with_an_error(tmp_path: Path, run: Run) -> None:
    """A name may have 255 bytes, which is 83 Chinese characters and a suffix."""
    name = "名" * 83
    save_image(tmp_path / "one" / f"{name}.png")
    for suffix in ".png", ".jpg":
        save_image(tmp_path / "two" / f"{name}{suffix}")
    save_image(tmp_path / "two" / "b.png")
    ended = run("caption", tmp_path / "one", "--sidecar")
    assert ended.exit_code == 0 and texts_beside(tmp_path / "one").keys() == {f"{name}.txt"}
    ended = run("caption", tmp_path / "two", "--sidecar", "-o", tmp_path / "f.jsonl")
    errors = [row["error"] for row in rows_of((tmp_path / "f.jsonl").read_bytes())]
    assert ended.exit_code == 3 and texts_beside(tmp_path / "two").keys() == {"b.txt"}
    assert errors[0] is None and len(errors) == 3
    assert all(error.startswith("row_invalid: the name of its text") for error in errors[1:])


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "free some space"), (errno.EIO, "check the disk")])
def test_a_full_disk_leaves_no_temporary_file_and_the_same_command_completes(
    images: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, call: str, code: int, said: str
) -> None:
    command = ["caption", images, "--sidecar", "--sidecar-existing", "overwrite", "-o", tmp_path / "f.jsonl"]
    real, calls = getattr(os, call), iter(range(9))

    def fail_later(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail_later)
        ended = run(*command)
    assert ended.exit_code == 2 and "cannot write a text beside" in ended.stderr and said in ended.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    assert run(*command).exit_code == 0
    assert texts_beside(images) == {name: f"{text}\n" for name, text in made(images).items()}
