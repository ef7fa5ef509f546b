"""The kinds of files that people bring: each is read, or refused before a model is loaded in one line that helps."""

from __future__ import annotations

import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest
import webdataset
from conftest import rows_of, save_image
from hypothesis import example, given
from hypothesis import strategies as st
from mistakes import forget_peak, peak
from pyarrow.fs import S3FileSystem
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
    forget_peak()
    before = peak()
    assert re.search(reason, refusal(path))
    assert peak() - before < 600 << 20


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


# Several files as one


def parts(folder: Path, suffix: str, write: Callable[[pd.DataFrame, Path], None], split: int = 2) -> Path:
    """The rows over three files, one of them empty, as Spark and others leave them."""
    table = pd.DataFrame(ROWS)
    folder.mkdir(parents=True)
    for number, part in enumerate([table[:split], table[:0], table[split:]]):
        write(part, folder / f"part-0000{number}-c000.{suffix}")
    (folder / "_SUCCESS").touch()
    (folder / f".part-00000-c000.{suffix}.crc").write_bytes(b"crc")
    (folder / "_temporary").mkdir()
    (folder / f"_temporary/part-00009.{suffix}").write_bytes(b"half of it")
    return folder


WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    "parquet": lambda table, path: table.to_parquet(path),
    "snappy.parquet": lambda table, path: pl.from_pandas(table).write_parquet(path, compression="snappy"),
    "jsonl": lambda table, path: table.to_json(path, orient="records", lines=True),
    "json": lambda table, path: path.write_text(table.to_json(orient="records", lines=True)),
    "csv": lambda table, path: table.to_csv(path, index=False),
    "csv.gz": lambda table, path: table.to_csv(path, index=False),
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("pattern", ["", "/part-*", "/*.{}", "/../set/part-0000[0-2]*"])
def test_a_folder_of_parts_or_a_pattern_is_one_input(
    run: Callable[..., Result], images: Path, suffix: str, pattern: str
) -> None:
    folder = parts(images / "set", suffix, WRITERS[suffix])
    result = run("vqa", f"{folder}{pattern.format(suffix)}", "--image-root", images)
    assert asked(result) == EXPECTED
    pd.DataFrame(ROWS).to_csv(images / "more.csv", index=False)
    result = run("vqa", folder, images / "more.csv", "--image-root", images)
    ids = [f"{place}:{number}" for place in (folder, images / "more.csv") for number in range(3)]
    assert [row["id"] for row in rows_of(result.stdout)] == ids


def test_parts_are_cut_resumed_and_kept_as_one_table(images: Path) -> None:
    folder = parts(images / "set", "parquet", WRITERS["parquet"])
    for shard in None, (1, 2), (2, 2):
        everything = [row.id for row in read(folder, shard=shard)]
        assert everything == {None: ["0", "1", "2"], (1, 2): ["0"], (2, 2): ["1", "2"]}[shard]
        for passed in range(4):
            found = opened(folder, shard=shard, keep="all")
            assert [row.id for row in islice(found.rows, passed)] == everything[:passed]
            assert [row.id for row in found.restarted()] == everything
            kept = [row["question"] for row in found.passthrough_rows()]
            assert kept == [ROWS[int(number)]["question"] for number in everything]
    assert opened(folder).total == 3


def test_parts_whose_types_differ_are_kept_in_one_that_holds_all(run: Callable[..., Result], images: Path) -> None:
    """pandas writes a part whose texts are all missing with a column of another type."""
    (images / "set").mkdir()
    for number, notes in enumerate(([None, None], ["x", None])):
        table = pd.DataFrame({"image": ["a.png", "b.png"], "note": notes})
        table.to_parquet(images / f"set/{number}.parquet")
    result = run("caption", images / "set", "--keep", "note", "--image-root", images, "-o", images / "out.parquet")
    assert result.exit_code == 0, result.output
    assert pl.read_parquet(images / "out.parquet")["note"].to_list() == [None, None, "x", None]


def test_a_part_that_lacks_a_column_is_named_before_the_model_is_loaded(
    refused: Callable[..., str], images: Path
) -> None:
    (images / "set").mkdir()
    pd.DataFrame(ROWS).to_csv(images / "set/0.csv", index=False)
    pd.DataFrame(ROWS)[["image"]].to_csv(images / "set/1.csv", index=False)
    assert "set/1.csv has no column 'question'" in refused("vqa", images / "set")


def test_folders_of_img2dataset_are_read_by_their_archives(run: Callable[..., Result], tmp_path: Path) -> None:
    for shard in "01":
        with webdataset.TarWriter(str(tmp_path / f"0000{shard}.tar")) as sink:
            for number in "01":
                image = save_image(tmp_path / "image", int(number)).read_bytes()
                key = f"0000{shard}000{number}"
                sink.write({"__key__": key, "jpg": image, "txt": "a cat", "json": {"key": key, "status": "success"}})
        pd.DataFrame({"url": ["https://a.example/a.jpg"], "key": ["0"]}).to_parquet(tmp_path / f"0000{shard}.parquet")
        (tmp_path / f"0000{shard}_stats.json").write_text(json.dumps({"count": 2, "status_dict": {"success": 2}}))
    (tmp_path / "image").unlink()
    result = run("caption", tmp_path, "--keep", "key")
    assert [row["id"] for row in rows_of(result.stdout)] == ["000000000", "000000001", "000010000", "000010001"]
    assert [row["key"] for row in rows_of(result.stdout)] == ["000000000", "000000001", "000010000", "000010001"]
    assert "2 .tar files are read, and 2 .json, 2 .parquet beside them are not" in result.stderr


def test_folders_say_what_was_taken_or_what_to_name(
    run: Callable[..., Result], refused: Callable[..., str], images: Path
) -> None:
    pd.DataFrame(ROWS).to_csv(images / "metadata.csv", index=False)
    (images / "a.json").write_text("{}")
    result = run("caption", images)
    assert [row["id"] for row in rows_of(result.stdout)] == ["a.png", "b.png", "c.png"]
    assert "its images are read, and not 'metadata.csv'" in " ".join(result.stderr.split())
    for _ in range(2):  # what a run has written is no input of the next one
        assert "not 'metadata.csv'," in run("caption", images, "-o", images / "found.jsonl").stderr
    (images / "set").mkdir()
    for name in "rows.csv", "rows.parquet":
        (images / "set" / name).touch()
    for several in images / "set", images / "set" / "*", images / "set" / "rows.*":
        assert f"several kinds: name those of one, as '{images}/set/*.csv'" in refused("caption", several)
    assert "files of other kinds" in refused("caption", images / "*")
    assert "no file matches" in refused("caption", images / "*.tiff")
    result = run("caption", images / "*.png")
    assert [row["id"] for row in rows_of(result.stdout)] == [str(images / row["image"]) for row in ROWS]
    (images / "a[b].csv").write_bytes((images / "metadata.csv").read_bytes())
    assert asked(run("vqa", images / "a[b].csv")) == EXPECTED


def test_an_output_never_becomes_a_part_of_the_input(refused: Callable[..., str], images: Path) -> None:
    parts(images / "set", "csv", WRITERS["csv"])
    assert "part of" in refused("vqa", images / "set", "-o", images / "set/new/out.csv")
    assert "matches" in refused("vqa", images / "set/*.csv", "-o", images / "set/out.csv")


def test_parts_and_patterns_on_s3(tmp_path: Path) -> None:
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host = f"127.0.0.1:{server.get_host_and_port()[1]}"
        options = {"endpoint_override": host, "scheme": "http", "region": "us-east-1"}
        remote = S3FileSystem(access_key="key", secret_key="secret", allow_bucket_creation=True, **options)
        remote.create_dir("bucket")
        folder = parts(tmp_path / "set", "parquet", WRITERS["parquet"])
        for row in ROWS:
            save_image(folder / "sub" / row["image"])
        for path in (path for path in folder.rglob("*") if path.is_file()):
            with remote.open_output_stream(f"bucket/{path.relative_to(tmp_path)}", compression=None) as file:
                file.write(path.read_bytes())
        query = "?" + "&".join(f"{name}={value}" for name, value in options.items())
        for pattern in "s3://key:secret@bucket/set/*.parquet", "s3://bucket/se*/part-*":
            found = opened(pattern + query, columns=("question",), image_root=f"s3://bucket/set/sub{query}")
            assert [(row.id, row.image, row.values["question"]) for row in found.rows] == EXPECTED
            assert "secret" not in str(found.identity)
        assert [row.id for row in read(f"s3://key:secret@bucket/set/sub/*.png{query}")] == [
            f"s3://bucket/set/sub/{name}.png" for name in "abc"
        ]
    finally:
        server.stop()
