"""The kinds of files that people bring: each is read, or refused before a model is loaded in one line that helps."""

from __future__ import annotations

import gzip
import io
import json
import re
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import rows_of, save_image
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import Result
from written_manifests import opened, read, refusal

from idefics_cli.errors import InputError
from idefics_cli.readers.json_array import _Values

ROWS = [{"image": f"{name}.png", "question": f"What is {name}?"} for name in "abc"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, row in enumerate(ROWS):
        save_image(tmp_path / row["image"], number)
    return tmp_path


def asked(result: Result) -> list[tuple[str, str | None, str]]:
    assert result.exit_code == 0, result.output
    return [(row["id"], row["image"], row["question"]) for row in rows_of(result.stdout)]


EXPECTED = [(str(number), row["image"], row["question"]) for number, row in enumerate(ROWS)]

# JSON

VQA_V2 = {"info": {"year": 2017}, "license": {}, "data_subtype": "val2014", "questions": ROWS}
COCO = {"info": {}, "licenses": [{"id": 1}], "images": [{"file_name": "a.png"}], "annotations": [{"id": 3}]}


@pytest.mark.parametrize("write", [json.dumps, lambda value: "\ufeff" + json.dumps(value, indent=1)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("value", [ROWS, VQA_V2, {"questions": ROWS}])
def test_json_arrays_and_objects_with_one_list_are_manifests(
    run: Callable[..., Result], images: Path, write: Callable[[Any], str], packed: bool, value: Any
) -> None:
    path = images / ("rows.json.gz" if packed else "rows.json")
    path.write_bytes(gzip.compress(write(value).encode()) if packed else write(value).encode())
    assert asked(run("vqa", path)) == EXPECTED


def test_json_as_pandas_writes_it(run: Callable[..., Result], images: Path) -> None:
    """An array of records, and JSON lines under the same suffix, as Spark and the datasets library give them too."""
    for lines in False, True:
        pd.DataFrame(ROWS).to_json(images / "rows.json", orient="records", lines=lines)
        assert asked(run("vqa", images / "rows.json")) == EXPECTED
    pd.DataFrame(ROWS[:1]).to_json(images / "rows.json", orient="records", lines=True)
    assert asked(run("vqa", images / "rows.json")) == EXPECTED[:1]


def test_of_several_lists_one_is_named(run: Callable[..., Result], refused: Callable[..., str], images: Path) -> None:
    path = images / "instances.json"
    path.write_text(json.dumps(COCO))
    assert "--json-key: 'licenses', 'images', 'annotations'" in refused("caption", path)
    assert "no list of objects called 'info'" in refused("caption", path, "--json-key", "info")
    result = run("caption", path, "--json-key", "images", "--image-column", "file_name")
    assert [row["image"] for row in rows_of(result.stdout)] == ["a.png"] and result.exit_code == 0
    assert "--json-key needs a manifest" in refused("caption", images / "a.png", "--json-key", "images")


def test_an_object_of_rows_is_told_how_to_become_lines(refused: Callable[..., str], images: Path) -> None:
    (images / "gqa.json").write_text(json.dumps({"0123": ROWS[0], "0124": ROWS[1]}))
    assert "jq -c 'to_entries[]" in refused("caption", images / "gqa.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(), VALUES, max_size=3), min_size=1, max_size=5), st.sampled_from([None, 3]))
@example([{"n": -1.5e300, '\\"': "\\u00e9\U0001f600]}, {["}], None)
def test_arrays_are_read_as_python_reads_them_whatever_the_pieces(rows: list[Any], indent: int | None) -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(3)

    for text in json.dumps(rows, indent=indent), json.dumps(rows, indent=indent, ensure_ascii=False):
        data = text.encode(errors="surrogatepass")
        found = [value for value, _ in _Values(Trickle(data), "rows.json").rows(None)]
        assert found == json.loads(text) or "\\ud" in json.dumps(rows)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_json_that_is_cut_off_is_refused_after_its_whole_rows(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS)[:-cut])
    found = []
    with pytest.raises(InputError, match=r"rows\.json is not valid JSON"):
        found.extend(opened(path).rows)
    assert [row.image for row in found] == [row["image"] for row in ROWS[: len(found)]]


def test_rows_that_are_no_objects_are_error_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(json.dumps([*ROWS, 7, ["a.png"], {"image": "\udc80"}]).encode())
    assert [row.error and row.error.message for row in read(tmp_path / "rows.json")][3:] == [
        "row 4 is a int, not an object",
        "row 5 is a list, not an object",
        "row 6 holds half of a surrogate pair, which UTF-8 cannot hold",
    ]


@pytest.mark.parametrize(
    ("begin", "repeated", "reason"),
    [
        (b"[", b"[", "nested"),
        (b"[", b'{"a":', "nested"),
        (b'["', b"a" * 999, "longer"),
        (b"[1", b"1" * 999, "digits|longer"),
    ],
)
def test_hostile_arrays_are_refused_in_bounded_memory(
    tmp_path: Path, begin: bytes, repeated: bytes, reason: str
) -> None:
    """Nested 100,000 deep, or longer than any row may be."""
    path = tmp_path / "rows.json.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(begin)
        for _ in range(100_000):
            file.write(repeated)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert re.search(reason, refusal(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10


# Kinds that are not read


def test_other_kinds_are_refused_with_the_way(refused: Callable[..., str], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.png", b"")
    files = {
        "rows.xlsx": (tmp_path / "photos.zip").read_bytes(),
        "list.txt": b"a.png\nb.png\n",
        "page.html": b"<!DOCTYPE html><html>",
        "photo": b"<html>not found</html>",
        "paper.pdf": b"%PDF-1.7",
        "clip": b"\0\0\0\x18ftypisom\0\0\0\0",
        "rows.pq": b"PAR1",
        "rows.data": b'{"image": "a.png"}\n',
        "list.gz": gzip.compress(b"a.png"),
        "weights.bin": b"\x80\x02}q\0",
        "nothing": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    said = {name: refused("caption", tmp_path / name) for name in [*files, "photos.zip"]}
    words = {
        "rows.xlsx": "save it as CSV",
        "photos.zip": "`unzip`",
        "list.txt": "`- < list.txt`",
        "page.html": "web page",
        "photo": "web page",
        "paper.pdf": "pdftoppm",
        "clip": "video",
        "rows.pq": "suffix .parquet",
        "rows.data": ".jsonl",
        "list.gz": "unpack it",
        "weights.bin": "of no known kind",
        "nothing": "empty",
    }
    assert {name for name, word in words.items() if word not in said[name]} == set()


def test_an_image_is_known_by_its_content_or_its_name(run: Callable[..., Result], tmp_path: Path) -> None:
    save_image(tmp_path / "photo")
    (tmp_path / "photo.jpg").write_bytes(b"no image")
    result = run("caption", tmp_path / "photo", tmp_path / "photo.jpg")
    assert [row["error"] is None for row in rows_of(result.stdout)] == [True, False]
