"""Rows with several image columns, with paths made of columns, and without an image: as people's files have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import FakeCaptioner, prompts_of, rows_of, save_image
from typer.testing import Result
from written_manifests import read, refusal, write_manifest

Asked = Callable[..., list[str | None]]


@pytest.fixture
def asked(run: Callable[..., Result]) -> Asked:
    """What each row was asked, up to the question; None for a row with an error."""

    def invoke(*arguments: Any, exit_code: int = 0) -> list[str | None]:
        captioner = FakeCaptioner()
        result = run("vqa", *arguments, "--bare", captioner=captioner)
        assert result.exit_code == exit_code, result.output
        prompts = prompts_of(captioner, rows_of(result.stdout))
        return [prompt and prompt.partition("Image:")[2].partition("Question:")[0] for prompt in prompts]

    return invoke


def nlvr2(folder: Path, suffix: str) -> Path:
    for seed in range(1, 5):
        save_image(folder / f"{seed}.png", seed)
    table = pd.DataFrame(
        {"question": ["Both?", "One?"], "left_image": ["1.png", "3.png"], "right_image": ["2.png", "4.png"]}
    )
    path = folder / f"nlvr2{suffix}"
    if suffix == ".parquet":
        for name in ("left_image", "right_image"):
            table[name] = [{"bytes": (folder / each).read_bytes(), "path": each} for each in table[name]]
        table.to_parquet(path)
    elif suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("columns", ["left_image,right_image", "left_image, right_image", "*_image"])
def test_two_columns_are_two_images(asked: Asked, tmp_path: Path, suffix: str, columns: str) -> None:
    assert asked(nlvr2(tmp_path, suffix), "--image-column", columns) == ["[1][2]", "[3][4]"]


def test_the_order_is_that_of_the_names_given(asked: Asked, tmp_path: Path) -> None:
    columns = "right_image,left_image"
    assert asked(nlvr2(tmp_path, ".csv"), "--image-column", columns) == ["[2][1]", "[4][3]"]


def test_numbered_columns_stand_in_the_order_of_their_numbers(asked: Asked, tmp_path: Path) -> None:
    """MMMU's image_1 to image_7, of which most are null; here up to 12, and in any order."""
    numbers = [10, 2, 1, 12]
    row = {"question": "Which?", **{f"image_{i}": str(save_image(tmp_path / f"{i}.png", i).name) for i in numbers}}
    other = {"question": "Why?", "image_1": "12.png", "image_2": None}
    manifest = write_manifest(tmp_path / "mmmu.jsonl", [row, other])
    assert asked(manifest, "--image-column", "image_*") == ["[1][2][10][12]", "[12]"]


def test_empty_ones_are_passed_over(tmp_path: Path) -> None:
    data = save_image(tmp_path / "1.png", 1).read_bytes()
    images = [{"bytes": data, "path": None}, None, {"bytes": None, "path": None}]
    pd.DataFrame({f"image_{i}": [image, None] for i, image in enumerate(images, 1)}).to_parquet(tmp_path / "m.parquet")
    one, none = read(tmp_path / "m.parquet", image_column="image_*")
    assert one.sources == (data,) and one.error is None
    assert none.sources == () and none.error is not None and "no image" in none.error.message
    assert [row.error for row in read(tmp_path / "m.parquet", image_column="image_*", allow_no_image=True)] == [
        None
    ] * 2


def test_a_column_of_a_list_joins_the_others(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", [{"image": "1.png", "more": ["2.png", "", "3.png"]}])
    (row,) = read(manifest, image_column="image,more", keep="all")
    assert [source.name for source in row.sources] == ["1.png", "2.png", "3.png"]
    assert json.loads(row.image) == ["1.png", "2.png", "3.png"] and row.values == {}


def test_a_column_whose_name_has_a_comma_is_one_column(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.csv", [{"image, large": "1.png"}])
    assert [source.name for source in read(manifest, image_column="image, large")[0].sources] == ["1.png"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("image_*", "no column 'image_*'"),
        ("image,other", "no column 'other'"),
        ("image,", "no column ''"),
        ("{number}.png", "no column 'number'"),
        ("{}.png", "no column ''"),
        ("{image.real}.png", "no column 'image.real'"),
        ("{{image}}", "no column '{{image}}'"),
        ("image}.png", "no column 'image}.png'"),
        ("{image.png", "a brace on its own"),
    ],
)
def test_columns_that_are_not_there_are_refused(tmp_path: Path, columns: str, said: str) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", [{"image": "1.png"}])
    assert said in refusal(manifest, image_column=columns)


# ---- paths made of columns


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_path_is_made_of_a_number(asked: Asked, tmp_path: Path, suffix: str) -> None:
    """COCO's images as VQAv2 and OK-VQA name them."""
    save_image(tmp_path / "val2014/COCO_val2014_000000000042.jpg", 1)
    rows = [{"question_id": 42000, "image_id": 42, "question": "What?"}]
    manifest = write_manifest(tmp_path / f"questions{suffix}", rows)
    path = "val2014/COCO_val2014_{image_id:012d}.jpg"
    assert asked(manifest, "--image-column", path) == ["[1]"]
    (row,) = read(manifest, image_column=path, keep="all")
    assert row.image == "val2014/COCO_val2014_000000000042.jpg" and str(row.values["image_id"]) == "42"


def test_a_path_is_made_of_several_texts(asked: Asked, tmp_path: Path) -> None:
    save_image(tmp_path / "train/n1.png", 7)
    manifest = write_manifest(tmp_path / "m.csv", [{"question": "What?", "split": "train", "imageId": "n1"}])
    assert asked(manifest, "--image-column", "{split}/{imageId}.png") == ["[7]"]


def test_whole_numbers_that_pandas_made_floats_stay_whole(tmp_path: Path) -> None:
    pd.DataFrame({"image_id": [42.0, None]}).to_parquet(tmp_path / "m.parquet")
    one, none = read(tmp_path / "m.parquet", image_column="{image_id}.png", allow_no_image=True)
    assert (one.image, none.image, none.sources, none.error) == ("42.png", None, (), None)


@pytest.mark.parametrize(
    ("value", "path", "said"),
    [
        ("x", "{id:012d}.png", "cannot be made"),
        (4.5, "{id:03d}.png", "cannot be made"),
        (["a"], "{id}.png", "holds list"),
        (True, "{id}.png", "holds bool"),
        (None, "{id}.png", "no image"),
        ("../x", "{id}.png", "leads out of the image root"),
        ("https://a.example/x", "{id}.png", "web address"),
    ],
)
def test_a_path_that_cannot_be_made_is_a_bad_row(tmp_path: Path, value: Any, path: str, said: str) -> None:
    rows = [{"id": value}, {"id": 7}]
    bad, good = read(write_manifest(tmp_path / "m.jsonl", rows), image_column=path, needs_id=False)
    assert bad.error is not None and said in bad.error.message and bad.sources == ()
    assert good.error is None


# ---- rows without an image


def test_rows_without_an_image_are_asked_in_text_where_allowed(asked: Asked, tmp_path: Path) -> None:
    save_image(tmp_path / "1.png", 1)
    images = ["1.png", None, "", []]
    manifest = write_manifest(tmp_path / "m.jsonl", [{"question": "What?", "image": image} for image in images])
    assert asked(manifest, exit_code=3) == ["[1]", None, None, None]
    assert asked(manifest, "--allow-no-image") == ["[1]", "", "", ""]


def test_an_image_that_is_not_there_stays_an_error(asked: Asked, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", [{"question": "What?", "image": "none.png"}])
    assert asked(manifest, "--allow-no-image", exit_code=3) == [None]


def test_a_manifest_of_texts_only(run: Callable[..., Result], refused: Callable[..., str], tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.csv", [{"question": "What?"}])
    assert "--image-column" in refused("vqa", manifest)
    result = run("vqa", manifest, "--allow-no-image")
    assert result.exit_code == 0 and "no row shows an image" in result.stderr.replace("\n", " ")


def test_shots_without_an_image(run: Callable[..., Result], tmp_path: Path) -> None:
    """ScienceQA's train rows, half of which have none."""
    save_image(tmp_path / "1.png", 1)
    rows = [{"question": "A?", "answer": "a", "image": "1.png"}, {"question": "B?", "answer": "b", "image": None}]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    captioner = FakeCaptioner()
    result = run("vqa", manifest, "--shots", manifest, "--num-shots", "2", "--allow-no-image", captioner=captioner)
    shots = "Image:[1]Question: A? Answer: a\nImage:Question: B? Answer: b\n"
    assert [shots in prompt for prompt in prompts_of(captioner, rows_of(result.stdout))] == [True, True]


def test_there_is_no_text_beside_an_image_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", [{"image": None}])
    assert "--allow-no-image" in refused("caption", manifest, "--sidecar", "--allow-no-image")
