from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import save_image
from written_manifests import opened, read, refusal, write_manifest

from idefics_cli.errors import RowError
from idefics_cli.readers.image_paths import LocalRoot
from idefics_cli.rows import InputRow
from idefics_cli.storage.filenames import unescape_name


def rows(folder: Path, values: list[object], **options) -> list[InputRow]:
    return read(write_manifest(folder / "rows.jsonl", [{"image": value} for value in values]), **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_image(tmp_path / "secret.png")
    save_image(tmp_path / "rootless/a.png")
    save_image(tmp_path / "root/sub/a.png")
    (tmp_path / "root/in.png").symlink_to("sub/a.png")
    (tmp_path / "root/out.png").symlink_to("../secret.png")
    (tmp_path / "root/away").symlink_to("..")
    (tmp_path / "root/round").symlink_to("round")
    return tmp_path / "root"


def test_paths_that_stay_inside_are_resolved(root: Path) -> None:
    inside = ["sub/a.png", "./sub/../sub/a.png", "none.png", "in.png", "away/root/sub/a.png", str(root / "sub/a.png")]
    found = rows(root, inside)
    assert [row.error for row in found] == [None] * len(inside)
    assert [row.image for row in found] == inside
    assert [row.sources[0] for row in found] == [root / path for path in inside]


def test_paths_that_lead_out_are_refused(root: Path) -> None:
    outside = ["../secret.png", "sub/../../secret.png", "out.png", "away/secret.png", "../rootless/a.png"]
    outside += ["/etc/passwd", "away/root/../secret.png", "../none.png", "..", "away", f"{root}less/a.png"]
    for row in rows(root, [*outside, "sub/../../root/../x"]):
        assert row.error and row.error.code == "image_not_allowed" and row.sources == (), row


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ({"path": "http://a.example/b.png"}, "img2dataset"),
        (["sub/a.png", " HTTPS://a.example/b.png"], "img2dataset"),
        ("s3://k:secret@bucket/a.png?key=secret", "--image-root"),
        ("gs://[bucket/a.png", "--image-root"),
    ],
)
def test_addresses_are_refused_with_a_remedy(root: Path, value: object, remedy: str) -> None:
    (row,) = rows(root, [value])
    assert row.error.code == "image_not_allowed" and remedy in row.error.message
    assert "secret" not in row.error.message


def test_another_root_can_be_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = rows(root, ["sub/a.png"], image_root=str(root.parent / "rootless"))
    assert row.sources == (root.parent / "rootless/sub/a.png",)
    assert rows(root, ["../secret.png", "/etc/passwd"], image_root="/")[1].error is None
    monkeypatch.chdir(root.parent)
    (row,) = rows(root, ["a.png"], image_root="rootless")
    assert row.sources == (Path("rootless/a.png"),)
    assert "not a folder" in refusal(root / "rows.jsonl", image_root=str(root / "none"))
    assert "img2dataset" in refusal(root / "rows.jsonl", image_root="https://a.example")


def test_a_manifest_in_this_folder_reads_from_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    good, bad = rows(Path(), ["sub/a.png", "../secret.png"])
    assert good.sources == (Path("sub/a.png"),) and bad.error.code == "image_not_allowed"


def test_a_root_without_links_agrees_with_the_plain_rule(root: Path) -> None:
    """The parents' paths are remembered; here every path is resolved whole."""
    parts = ["", ".", "..", "sub", "a.png", "in.png", "out.png", "away", "root", "none", "round"]
    found = LocalRoot(str(root))
    for path in ["/".join((a, b, c)) for a in parts[1:] for b in parts for c in parts]:
        real = os.path.realpath(root / path)
        inside = real == str(root) or real.startswith(f"{root}/")
        assert isinstance(found.resolve(path), RowError) != inside, path


def test_odd_names_stay_themselves(tmp_path: Path) -> None:
    names = ["a\nb.png", "-rf.png", "🦆.png", "é.png", "e\u0301.png", r"a\xe9.png", " .png", "a#?.png"]
    names.append(f"{'n' * 250}.png")
    found = rows(tmp_path, names)
    assert [row.error for row in found] == [None] * len(names)
    assert [unescape_name(row.image) for row in found] == [row.sources[0].name for row in found] == names
    assert len({row.image for row in found}) == len(names)


def test_images_within_prompts_are_resolved_where_their_row_stands(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name / "rows.jsonl", [{"prompt": ["x.png"]}] * 2)
    found = opened(*(tmp_path / name / "rows.jsonl" for name in "ab"), columns=("prompt",), needs_image=False)
    resolved = [found.resolve(row.values["prompt"][0], row.index) for row in found.rows]
    assert resolved == [tmp_path / name / "x.png" for name in "aabb"]
    assert found.resolve(b"image") == b"image"
    assert found.resolve({"bytes": b"image", "path": "x.png"}) == b"image"
    assert found.resolve("../x.png").code == "image_not_allowed"
    assert found.resolve(None).code == "row_invalid"
