"""Images where people have them: pointers, paths of other systems, links, base64, closed folders, S3 that is away."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FakeCaptioner, expected_text, rows_of, save_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from idefics_cli.errors import RowError
from idefics_cli.images.decode import load_image
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.images.worker_pool import WorkerPool
from idefics_cli.readers.image_paths import LocalRoot, any_place, read_image, shown_images
from idefics_cli.rows import ImageOptions

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


def manifest(path: Path, images: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"image": image}) + "\n" for image in images))
    return path


# Pointers


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.tsv", "a.jsonl", "a.jsonl.gz", "a.tar", "a.tar.gz"])
def test_a_manifest_that_is_a_git_lfs_pointer_is_named(refused: Callable[..., str], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LFS)
    assert refused("caption", tmp_path / name) == f"Error: {tmp_path / name} is a Git LFS pointer: run `git lfs pull`."


def test_images_that_are_pointers_are_named_and_read_once_they_are_pulled(run: Callable, tmp_path: Path) -> None:
    save_image(tmp_path / "in/a.png")
    (tmp_path / "in/b.png").write_bytes(LFS)
    (tmp_path / "in/c.png").write_bytes(b"/annex/objects/SHA256E-s8--ab.png\n")
    command = "caption", tmp_path / "in", "-o", tmp_path / "out.jsonl"
    assert run(*command).exit_code == 3
    good, lfs, annex = rows_of((tmp_path / "out.jsonl").read_text())
    assert good["error"] is None
    assert lfs["error"] == "image_unreadable: a Git LFS pointer: run `git lfs pull`"
    assert annex["error"] == "image_unreadable: a git-annex pointer: run `git annex get`"
    save_image(tmp_path / "in/b.png", 1)
    save_image(tmp_path / "in/c.png", 2)
    assert run(*command, "--retry-errors").exit_code == 0


def test_shots_and_results_that_are_pointers_are_named(refused: Callable[..., str], tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.png"]}), tmp_path / "in.parquet")
    for name in "shots.parquet", "out.parquet", "out.jsonl":
        (tmp_path / name).write_bytes(LFS)
    shots = tmp_path / "shots.parquet"
    assert "git lfs pull" in refused("caption", tmp_path / "in.parquet", "--shots", shots, "--num-shots", "1")
    for name in "out.parquet", "out.jsonl":
        assert "git lfs pull" in refused("score", tmp_path / name, "--answers-column", "answers")


# Paths of other systems, and links


@pytest.fixture
def no_socket(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What any socket was asked for."""
    asked: list[Any] = []
    for function in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, function, lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: asked.append(address))
    return asked


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.jsonl"])
def test_paths_of_windows_and_accents_of_macos_find_the_one_file_they_mean(
    run: Callable, tmp_path: Path, name: str
) -> None:
    nfc, nfd = (unicodedata.normalize(form, "caf\u00e9/\u00fc") for form in ("NFC", "NFD"))
    images = [save_image(tmp_path / "in" / path, i) for i, path in enumerate([f"{nfd}.png", "imgs/a b.png"])]
    paths = [f"{nfc}.png", "imgs\\a b.png", ".\\imgs\\a b.png", nfc.replace("/", "\\") + ".png", "none\\a.png"]
    table = pandas.DataFrame({"image": [*paths, "C:\\imgs\\a b.png", "C:/imgs/a b.png"]})
    write = {"csv": table.to_csv, "parquet": table.to_parquet}.get(name[5:], partial(table.to_json, orient="records"))
    write(tmp_path / "in" / name, **({"lines": True} if name == "rows.jsonl" else {"index": False}))
    result = run("caption", tmp_path / "in" / name)
    rows = rows_of(result.stdout)
    assert [row["caption"] for row in rows[:4]] == [expected_text(images[i]) for i in (0, 1, 1, 0)]
    assert [row["image"] for row in rows[:4]] == paths[:4]
    assert rows[4]["error"].startswith("image_missing: file not found")
    assert all("is a path of Windows: write it relative to --image-root" in row["error"] for row in rows[5:])
    assert result.stderr.count(" is read as ") == 1


def test_the_rows_of_a_run_name_images_whose_names_are_not_utf8(run: Callable, tmp_path: Path) -> None:
    """As a manifest, and as the page of `report` finds them."""
    image = save_image(tmp_path / "in" / os.fsdecode(b"lat\xe9.png"))
    assert run("caption", tmp_path / "in", "-o", tmp_path / "rows.jsonl").exit_code == 0
    again = run("caption", tmp_path / "rows.jsonl", "--image-root", "/")
    assert [row["caption"] for row in rows_of(again.stdout)] == [expected_text(image)]
    assert " is read as " not in again.stderr
    assert run("report", tmp_path / "rows.jsonl", "--image-root", "/", "-o", tmp_path / "page.html").stderr == (
        f"1 row in {tmp_path / 'page.html'}.\n"
    )


def test_two_files_that_a_path_may_mean_are_not_guessed(run: Callable, tmp_path: Path) -> None:
    nfc, nfd = "\u00e9\u00fc.png", "e\u0301u\u0308.png"
    for name in nfc, nfd:
        save_image(tmp_path / name)
    both = run("caption", manifest(tmp_path / "rows.jsonl", [nfc, nfd, "\u00e9u\u0308.png"]))
    if len(list(tmp_path.glob("*.png"))) == 2:
        assert [row["error"] and row["error"][:13] for row in rows_of(both.stdout)] == [None, None, "image_missing"]
    assert " is read as " not in both.stderr


def test_absolute_paths_name_a_remedy_that_works(run: Callable, tmp_path: Path) -> None:
    image = save_image(tmp_path / "imgs/a.png")
    rows = manifest(tmp_path / "tables/rows.jsonl", [str(image), "../imgs/a.png", f"file://{image}"])
    outside, above, address = (row["error"] for row in rows_of(run("caption", rows).stdout))
    assert outside.startswith("image_not_allowed: ") and outside.endswith(" --image-root, as / for any absolute path")
    assert above.endswith("name a folder that holds all images with --image-root")
    assert address.endswith(f"is the address of a local file: write the path '{image}'")
    fixed = manifest(tmp_path / "tables/fixed.jsonl", [str(image)])
    for root in "/", tmp_path:
        assert run("caption", fixed, "--image-root", root).exit_code == 0
    assert (
        run("caption", manifest(tmp_path / "tables/fixed.jsonl", ["imgs/a.png"]), "--image-root", tmp_path).exit_code
        == 0
    )


def test_an_input_that_is_an_address_of_a_file_is_told_as_a_path(refused: Callable[..., str], tmp_path: Path) -> None:
    save_image(tmp_path / "a b.png")
    for start in "file://", "file://localhost", "file:":
        assert f"write the path '{tmp_path}/a b.png'" in refused("caption", f"{start}{tmp_path}/a%20b.png")


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A snapshot as huggingface_hub's cache has them: every file is a link into another folder."""
    snapshot = tmp_path / "hub/snapshots/1f"
    for i, name in enumerate(["a.png", "sub/b.png"]):
        blob = save_image(tmp_path / f"hub/blobs/{i}", i)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    manifest(tmp_path / "hub/blobs/rows", ["a.png", "sub/b.png", "sub/../../../blobs/0", "../../blobs/0"])
    (snapshot / "rows.jsonl").symlink_to("../../blobs/rows")
    return snapshot


def test_folders_of_links_are_read_where_that_is_asked_for(run: Callable, tmp_path: Path, hub_cache: Path) -> None:
    texts = [expected_text(tmp_path / "hub/blobs" / name) for name in "01"]
    for name, input in ("folder", hub_cache), ("rows", hub_cache / "rows.jsonl"):
        command = "caption", input, "-o", tmp_path / f"{name}.jsonl"
        assert run(*command).exit_code == 3
        refused = [row["error"] for row in rows_of((tmp_path / f"{name}.jsonl").read_text())]
        assert all(why.startswith("image_not_allowed") and "--follow-links" in why for why in refused[:2])
        done = run(*command, "--retry-errors", "--follow-links")
        rows = rows_of((tmp_path / f"{name}.jsonl").read_text())
        assert [row["caption"] for row in rows[:2]] == texts, done.stderr
        assert all("leads out of the image root" in row["error"] for row in rows[2:])  # links may, paths may not
    assert len(rows) == 4


def test_linked_folders_are_walked_where_that_is_asked_for_and_never_round(run: Callable, tmp_path: Path) -> None:
    for name in "in/own.png", "data/sub/a.png":
        save_image(tmp_path / name)
    (tmp_path / "in/linked").symlink_to(tmp_path / "data")
    (tmp_path / "data/round").symlink_to(tmp_path / "in")
    (tmp_path / "data/self").symlink_to(".")
    (tmp_path / "in/broken").symlink_to("nowhere")
    assert [row["id"] for row in rows_of(run("caption", tmp_path / "in").stdout)] == ["own.png"]
    found = run("caption", tmp_path / "in", "--follow-links")
    assert [row["id"] for row in rows_of(found.stdout)] == ["linked/sub/a.png", "own.png"]
    assert found.exit_code == 0


def test_no_link_leads_to_anything_but_a_regular_file(run: Callable, tmp_path: Path, no_socket: list[Any]) -> None:
    os.mkfifo(tmp_path / "fifo")
    save_image(tmp_path / "in/real.png")
    targets = {"fifo": tmp_path / "fifo", "device": "/dev/zero", "memory": "/proc/self/mem", "folder": tmp_path}
    for name, target in targets.items():
        (tmp_path / f"in/{name}.png").symlink_to(target)
    rows = manifest(tmp_path / "in/rows.jsonl", [f"{name}.png" for name in targets])
    for input in tmp_path / "in", rows:
        for options in (), ("--follow-links",):
            found = rows_of(run("caption", input, *options, "--decode-timeout", "5").stdout)
            assert {row["error"] is None for row in found if row["id"] != "real.png"} == {False}
    assert not no_socket


def test_shots_are_linked_as_their_rows_are(run: Callable, tmp_path: Path, hub_cache: Path) -> None:
    shots = hub_cache / "shots.jsonl"
    shots.write_text('{"image": "a.png", "caption": "a cat"}\n')
    command = "caption", tmp_path / "hub/blobs/0", "--shots", shots, "--num-shots", "1"
    refusal = run(*command)
    assert refusal.exit_code == 2 and "--follow-links" in refusal.stderr
    assert run(*command, "--follow-links").exit_code == 0


# The root changes while the run goes on


def test_no_image_is_read_from_where_the_root_was_swapped_to(run: Callable, tmp_path: Path) -> None:
    secret = {expected_text(save_image(tmp_path / f"secret/{i}.png", 1000 + i)) for i in range(60)}
    for i in range(60):
        save_image(tmp_path / f"in/{i}.png", i)
    rows = manifest(tmp_path / "in/rows.jsonl", [f"{i}.png" for i in range(60)])
    for input in tmp_path / "in", rows:

        def swap(prompts: Sequence[Any]) -> None:
            if not (tmp_path / "in").is_symlink():
                (tmp_path / "in").rename(tmp_path / "was")
                (tmp_path / "in").symlink_to("secret")

        result = run("caption", input, captioner=FakeCaptioner(1, before_call=swap))
        found = rows_of(result.stdout)
        codes = {row["error"].split(":")[0] for row in found if row["error"]}
        assert len(found) == 60 and not secret & {row["caption"] for row in found}
        assert "image_not_allowed" in codes <= {"image_not_allowed", "image_missing"}  # missing between the two steps
        (tmp_path / "in").unlink()
        (tmp_path / "was").rename(tmp_path / "in")


def test_a_root_that_is_swapped_between_the_check_and_the_opening_does_not_lead_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, outside = (save_image(tmp_path / name / "a.png", seed) for name, seed in (("in", 1), ("out", 2)))
    secret, source = load_image(outside), LocalRoot(str(tmp_path / "in")).resolve("a.png")
    assert load_image(source).tobytes() == load_image(inside).tobytes()
    opened = os.open

    def swap(to: str = "out") -> None:
        (tmp_path / "in").rename(tmp_path / "was")
        (tmp_path / "in").symlink_to(to)

    def swapped(path: str, *options: Any, **more: Any) -> int:
        swap()
        try:
            return opened(path, *options, **more)
        finally:
            (tmp_path / "in").unlink()
            (tmp_path / "was").rename(tmp_path / "in")

    monkeypatch.setattr(os, "open", swapped)
    assert load_image(inside).tobytes() == secret.tobytes()  # an image without a root may be anywhere
    assert load_image(source).code == "image_not_allowed"
    monkeypatch.undo()
    swap()
    with WorkerPool(ImageProcessor(), ImageOptions(workers=1)) as pool:  # in the processes that open images
        assert pool.prepare(source).code == "image_not_allowed"
        assert not isinstance(pool.prepare(inside), RowError)


# Folders that are closed


def test_a_closed_sub_folder_is_a_row_and_the_rest_is_done(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir, closed = os.scandir, {"b", "deep"}

    def refuse_closed(path: str) -> Any:
        if os.path.basename(path) in closed:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_closed)
    for name in "a.png", "b/1.png", "c/deep/2.png", "c/3.png":
        save_image(tmp_path / "in" / name)
    result = run("caption", tmp_path / "in")
    rows = {row["id"]: row["error"] for row in rows_of(result.stdout)}
    assert list(rows) == ["a.png", "b/", "c/3.png", "c/deep/"] and result.exit_code == 3
    assert rows["a.png"] is rows["c/3.png"] is None
    assert re.fullmatch(r"folder_unreadable: .*in/b: Permission denied.*", rows["b/"])
    assert "folder_unreadable: 2 rows: b/, c/deep/" in result.stderr
    closed.clear()  # as the message says
    assert [row["id"] for row in rows_of(run("caption", tmp_path / "in").stdout)][1] == "b/1.png"
    closed.add("in")
    assert run("caption", tmp_path / "in").exit_code == 2


# Base64


def payload(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_an_image_in_base64_or_a_data_uri_is_decoded(run: Callable, tmp_path: Path, kind: str, no_socket: list) -> None:
    path = tmp_path / f"a.{kind.lower()}"
    Image.effect_noise((40, 40), 50).convert("RGB").save(path, kind)
    text, data = payload(path), path.read_bytes()
    url_safe = base64.urlsafe_b64encode(data).decode().rstrip("=")
    values = [
        *(text, base64.encodebytes(data).decode(), url_safe, f" {text}\n"),
        *(f"data:image/{kind.lower()};base64,{text}", f"DATA:image/x;name=a.b;base64,{text.replace('+', '%2B')}"),
        f"data:,{quote(data)}",
        *({"bytes": text}, {"bytes": text, "path": None}, {"path": f"data:;base64,{text}"}, [text]),
    ]
    rows = rows_of(run("caption", manifest(tmp_path / "rows.jsonl", values)).stdout)
    assert {row["caption"] for row in rows} == {expected_text(path)}, rows
    shown = f"sha256:{hashlib.sha256(data).hexdigest()} ({len(data):,} bytes)"
    assert [row["image"] for row in rows] == [shown] * 7 + [None] * 2 + [shown] * 2
    assert not no_socket


def test_a_column_of_base64_is_found_and_may_be_called_anything(run: Callable, tmp_path: Path) -> None:
    paths = [save_image(tmp_path / f"{i}.png", i) for i in range(2)]
    table = pandas.DataFrame({"index": ["x", "y"], "photo_b64": [payload(path) for path in paths]})
    table.to_csv(tmp_path / "rows.tsv", sep="\t", index=False)
    table.to_parquet(tmp_path / "rows.parquet")
    for name in "rows.tsv", "rows.parquet":
        found = rows_of(run("caption", tmp_path / name).stdout)
        assert [row["caption"] for row in found] == [expected_text(path) for path in paths]


def test_what_is_neither_a_file_nor_base64_is_a_short_message(run: Callable, tmp_path: Path) -> None:
    image = payload(save_image(tmp_path / "a.png"))
    values = {
        "x" * 1_000_000: "image_missing: 1,000,000 letters are neither a path nor an image in base64",
        "\u00e9" * 5_000: "image_missing: 5,000 letters are neither",
        "y" * 300: "image_missing: ",
        f"data:image/png;base64,{image[:-8]}*": "row_invalid: the image's bytes are not base64",
        "data:image/png;base64": "row_invalid: ",
        "data:image/png;base64,": "image_unreadable: the file is empty",
        f"data:image/png;base64,{image[: len(image) // 2]}": "image_unreadable: ",
        "data:text/html,<img src=http://a.example/b.png>": "image_unreadable: not an image",
        f"{image}.png": "image_missing: ",
        f"{image}A" * 50_000: "image_missing: ",
        image[:84] + "A" * (63 << 20): "",  # its pixels stand before that
    }
    result = run("caption", manifest(tmp_path / "rows.jsonl", list(values)))
    rows = rows_of(result.stdout)
    for row, why in zip(rows, values.values(), strict=True):
        assert (row["error"] or "none").startswith(why), row
    assert all(len(json.dumps(row)) < 3000 for row in rows) and len(result.stderr) < 3000
    for bomb in "data:;base64," + "A" * (64 << 20), image[:84] + "A" * (64 << 20), {"bytes": "A" * (65 << 20)}:
        assert read_image(bomb, any_place).code == "image_too_large"


@given(st.text() | st.text("ABCD/+=- \n9j", max_size=200).map("iVBORw0KGgo".__add__) | st.text().map("data:".__add__))
def test_any_text_is_a_path_or_a_row_that_says_why_not(text: str) -> None:
    found = read_image(text, any_place)
    assert isinstance(found, Path | bytes | RowError)
    assert not isinstance(found, RowError) or len(found.message) < 400
    assert isinstance(shown := shown_images(text), str) and len(shown.encode()) <= max(400, len(text.encode()))


# Runs whose first rows all fail


def test_a_run_whose_first_rows_all_fail_stops_and_runs_with_the_remedy(run: Callable, tmp_path: Path) -> None:
    images = [str(save_image(tmp_path / "imgs/a.png"))] * 20_000
    rows = manifest(tmp_path / "tables/rows.jsonl", images)
    command = "caption", rows, "-o", tmp_path / "out.jsonl"
    for output in (), ("-o", tmp_path / "out.jsonl"):
        stopped = run("caption", rows, *output)
        assert stopped.exit_code == 2 and len(stopped.stdout.splitlines()) == (0 if output else 64)
        last = stopped.stderr.splitlines()[-1]
        assert last.startswith("Error: the first 64 rows all failed with image_not_allowed: ")
        assert "--image-root, as / for any absolute path" in last and "--max-errors N" in last
        assert ("64 rows written so far" in last) == (not output)
    assert not list(tmp_path.glob("out*"))  # else other settings would be refused
    assert run(*command, "--limit", "100", "--image-root", "/").exit_code == 0
    manifest(rows, ["none.png"] * 200)
    missing = run("caption", rows, "-o", tmp_path / "missing.jsonl")
    assert missing.exit_code == 2 and "--image-column" in missing.stderr


def test_max_errors_says_how_many_of_the_first_rows_may_fail(run: Callable, tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    rows = manifest(tmp_path / "rows.jsonl", ["none.png"] * 70 + ["a.png"])
    assert run("caption", rows).exit_code == 2
    assert len(rows_of(run("caption", rows, "--max-errors", "100").stdout)) == 71
    stopped = run("caption", rows, "--max-errors", "66")
    assert len(rows_of(stopped.stdout)) == 66 and "Stopped early by --max-errors" in stopped.stderr


@pytest.mark.parametrize("images", [["none.png"] * 63, ["none.png", "../a.png"] * 50, ["a.png"] + ["none.png"] * 99])
def test_other_runs_with_many_errors_finish(run: Callable, tmp_path: Path, images: list[str]) -> None:
    save_image(tmp_path / "in/a.png")
    result = run("caption", manifest(tmp_path / "in/rows.jsonl", images))
    assert (result.exit_code, len(rows_of(result.stdout))) == (3, len(images))


def test_a_run_that_is_resumed_or_retried_is_not_stopped_for_its_first_rows(run: Callable, tmp_path: Path) -> None:
    rows = manifest(tmp_path / "rows.jsonl", ["none.png"] * 70 + ["a.png"] * 80)
    command = "caption", rows, "-o", tmp_path / "out.jsonl"
    save_image(tmp_path / "a.png")
    assert run(*command, "--max-errors", "64").exit_code == 3
    assert run(*command).exit_code == 3  # resumes after the 64
    assert len(rows_of((tmp_path / "out.jsonl").read_text())) == 150
    retried = run(*command, "--retry-errors")  # and all of them fail again
    assert retried.exit_code == 3 and "150 rows" in retried.stderr
    save_image(tmp_path / "none.png")
    assert run(*command, "--retry-errors").exit_code == 0
