"""What all formats of manifest share: rows in order, columns, ids, and what is refused."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import save_image
from hypothesis import given, settings
from hypothesis import strategies as st
from written_manifests import TABLE_FORMATS, write_archive, write_manifest

from idefics_cli.errors import InputError
from idefics_cli.readers.inputs import Inputs, open_inputs
from idefics_cli.rows import InputRow, ReadOptions

ROWS = [
    {"id": "x", "image": "a.png", "question": "What?"},
    {"id": "y", "image": "sub/b.jpg", "question": ""},
    {"id": "z", "image": "c.webp", "question": 'Say "é",\nor not'},
]
ARCHIVE = [("x.png", b"1"), ("x.txt", b"What?"), ("y.png", b"2"), ("y.txt", b""), ("z.png", b"3"), ("z.txt", b"no")]


def opened(*inputs: Path, **options: Any) -> Inputs:
    return open_inputs([str(path) for path in inputs], ReadOptions(**options))


def rows(*inputs: Path, **options: Any) -> list[InputRow]:
    return list(opened(*inputs, **options).rows)


def refusal(*inputs: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        rows(*inputs, **options)
    assert "\n" not in str(caught.value) and str(caught.value).encode()
    return str(caught.value)


@pytest.fixture(params=[*TABLE_FORMATS, "rows.tar", "rows.tar.gz"])
def manifest(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if "tar" in request.param:
        return write_archive(tmp_path / request.param, ARCHIVE)
    return write_manifest(tmp_path / request.param, ROWS)


# The same rows from every format

NAMES = st.text(st.characters(categories=["L", "N", "So", "Zs", "Mn"]), min_size=1, max_size=9)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
TABLES = st.lists(
    st.fixed_dictionaries({"id": TEXTS.filter(bool), "image": NAMES.map(lambda name: f"d/{name}.png"), "text": TEXTS}),
    min_size=1,
    max_size=12,
    unique_by=lambda row: row["id"],
)


@settings(max_examples=60, deadline=None)
@given(TABLES, st.sampled_from(TABLE_FORMATS), st.integers(1, 4))
def test_any_table_comes_out_as_it_went_in(table: list[dict], name: str, shards: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_manifest(Path(folder) / name, table)
        read = rows(path, columns=("text",))
        assert [(row.index, row.id, row.image, dict(row.values), row.error) for row in read] == [
            (index, row["id"], row["image"], {"text": row["text"]}, None) for index, row in enumerate(table)
        ]
        assert [row.sources for row in read] == [(Path(folder) / row["image"],) for row in table]
        parts = [rows(path, shard=(i + 1, shards), columns=("text",)) for i in range(shards)]
        assert [row for part in parts for row in part] == [row for i in range(shards) for row in read[i::shards]]
        assert rows(path, columns=("text",), limit=2) == read[:2]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z0-9_é-]{1,4}(/[a-z]{1,2})?", fullmatch=True),
            st.binary(min_size=1),
            TEXTS,
            st.integers(),
        ),
        min_size=1,
        unique_by=lambda sample: sample[0],
    ),
    st.sampled_from(["rows.tar", "rows.tar.gz", "rows.tgz"]),
)
def test_any_archive_comes_out_as_it_went_in(samples: list[tuple[str, bytes, str, int]], name: str) -> None:
    members = [
        member
        for stem, image, text, number in samples
        for member in [
            (f"{stem}.jpg", image),
            (f"{stem}.txt", text.encode()),
            (f"{stem}.json", json.dumps({"n": number}).encode()),
        ]
    ]
    with tempfile.TemporaryDirectory() as folder:
        read = rows(write_archive(Path(folder) / name, members), columns=("question",), keep=("n",))
    expected = [
        (stem, (image,), {"question": text.removeprefix("\ufeff"), "n": number})
        for stem, image, text, number in samples
    ]
    assert [(row.id, row.sources, row.values) for row in read] == expected


# Passing over, shards, limits


@pytest.mark.parametrize("shard", [None, (1, 2), (2, 2)])
@pytest.mark.parametrize("limit", [None, 2])
def test_passing_over_is_reading_and_dropping(manifest: Path, shard: tuple[int, int] | None, limit: int | None) -> None:
    for inputs in [
        [manifest],
        [manifest, write_manifest(manifest.parent / "more.csv", [{"id": "w", "image": "w.png"}])],
    ]:
        everything = rows(*inputs, shard=shard, limit=limit)
        for passed in range(len(everything) + 1):
            found = opened(*inputs, shard=shard, limit=limit)
            skipped = list(found.skip(passed))
            assert [(row.index, row.id) for row in skipped] == [(row.index, row.id) for row in everything[:passed]]
            assert list(found.rows) == everything[passed:]


def test_skipping_ends_where_the_input_or_the_limit_does(manifest: Path) -> None:
    assert [row.id for row in opened(manifest).skip(9)] == ["x", "y", "z"]
    assert [row.id for row in opened(manifest, limit=1).skip(9)] == ["x"]


def test_rows_that_were_passed_over_keep_their_ids(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "rows.jsonl", [{"id": i, "image": "a.png"} for i in "abca"])
    found = opened(path)
    assert [row.id for row in found.skip(2)] == ["a", "b"]
    assert next(found.rows).id == "c"
    with pytest.raises(InputError, match="rows 1 and 4 have the same id, 'a'"):
        next(found.rows)


def test_bad_rows_are_passed_over_by_the_ids_they_were_given(tmp_path: Path) -> None:
    lines = [
        '{"id": "a", "image": "a.png"}',
        "{",
        '{"id": null, "image": "a.png"}',
        '{"id": "b"}',
        '{"id": "c", "image": 7}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    everything = rows(tmp_path / "rows.jsonl")
    assert [row.id for row in everything] == ["a", "#1", "#2", "b", "c"]
    assert [row.error and row.error.code for row in everything] == [None, *["row_invalid"] * 4]
    for passed in range(6):
        found = opened(tmp_path / "rows.jsonl")
        assert [row.id for row in found.skip(passed)] == [row.id for row in everything[:passed]]
        assert list(found.rows) == everything[passed:]


def test_totals_are_told_where_they_are_known(tmp_path: Path) -> None:
    parquet = write_manifest(tmp_path / "rows.parquet", ROWS)
    assert opened(parquet).total == 3
    assert opened(parquet, shard=(1, 2)).total == 2 and opened(parquet, shard=(2, 2)).total == 1
    assert opened(parquet, shard=(1, 2), limit=1).total == 1
    assert opened(write_manifest(tmp_path / "short.csv", ROWS)).total == 3
    assert opened(write_manifest(tmp_path / "rows.csv", [{"image": "a.png"}] * 101)).total is None


# Ids


def test_rows_without_ids_are_numbered(tmp_path: Path) -> None:
    table = [{"image": f"{i}.png"} for i in range(3)]
    for name in TABLE_FORMATS:
        assert [row.id for row in rows(write_manifest(tmp_path / name, table))] == ["0", "1", "2"]
    first, second = tmp_path / "rows.csv", tmp_path / "rows.parquet"
    expected = [f"{path}:{i}" for path in (first, second) for i in range(3)]
    assert [row.id for row in rows(first, second)] == expected
    assert [row.id for row in rows(first, shard=(2, 2))] == ["1"]


def test_another_id_column_can_be_named(manifest: Path) -> None:
    assert [row.id for row in rows(manifest, id_column="question", limit=1)] == ["What?"]
    assert "no column 'nothing': name one of" in refusal(manifest, id_column="nothing")


@pytest.mark.parametrize(
    ("value", "expected"), [(7, "7"), (1.5, "1.5"), (True, "True"), ("é", "é"), (r"\xe9", r"\xe9"), ("a\nb", "a\nb")]
)
def test_ids_become_text(tmp_path: Path, value: object, expected: str) -> None:
    (row,) = rows(write_manifest(tmp_path / "rows.jsonl", [{"id": value, "image": "a.png"}]))
    assert row.id == expected and row.error is None


@pytest.mark.parametrize("value", [None, "", [], {}, ["a"], "x" * 20_000])
def test_rows_whose_id_is_of_no_use_are_given_one(tmp_path: Path, value: object) -> None:
    (row,) = rows(write_manifest(tmp_path / "rows.jsonl", [{"id": value, "image": "a.png"}]))
    assert row.id == "#0" and row.error.code == "row_invalid" and "'id'" in row.error.message


def test_given_ids_are_unique_too(tmp_path: Path) -> None:
    table = [{"id": "#2", "image": "a.png"}, {"id": "##2", "image": "a.png"}, {"id": None, "image": "a.png"}]
    assert [row.id for row in rows(write_manifest(tmp_path / "rows.jsonl", table))] == ["#2", "##2", "###2"]


def test_two_rows_with_one_id_are_refused_at_the_second(tmp_path: Path) -> None:
    table = [{"id": i, "image": "a.png"} for i in ("a", "b", "a", "c")]
    for name in TABLE_FORMATS:
        found = opened(write_manifest(tmp_path / name, table)).rows
        assert [next(found).id, next(found).id] == ["a", "b"]
        with pytest.raises(InputError, match="rows 1 and 3 have the same id, 'a'"):
            next(found)


def test_equal_ids_of_several_inputs_are_refused(manifest: Path) -> None:
    other = write_manifest(manifest.parent / "more.csv", [{"id": "w", "image": "a.png"}, {"id": "y", "image": "a.png"}])
    assert "rows 2 and 5 have the same id, 'y'" in refusal(manifest, other)


# Columns


def test_values_are_those_that_were_asked_for(manifest: Path) -> None:
    assert [dict(row.values) for row in rows(manifest)] == [{}] * 3
    assert next(opened(manifest, columns=("question",)).rows).values == {"question": "What?"}
    assert list(opened(manifest, keep="all").passthrough) == ["question"]
    assert next(opened(manifest, columns=("question",), keep=("question",)).rows).values == {"question": "What?"}


def test_columns_that_are_missing_are_named_with_those_that_are_there(manifest: Path) -> None:
    for options in [{"columns": ("answer",)}, {"keep": ("answer",)}]:
        message = refusal(manifest, **options)
        assert "no column 'answer'" in message and "'question'" in message


def test_kept_columns_have_types(tmp_path: Path) -> None:
    table = [{"id": "a", "image": "a.png", "n": 1, "text": "t"}]
    parquet, lines = write_manifest(tmp_path / "rows.parquet", table), write_manifest(tmp_path / "rows.jsonl", table)
    assert opened(parquet, keep="all").passthrough == {"n": pa.int64(), "text": pa.string()}
    assert opened(parquet, keep=("text", "id")).passthrough == {"text": pa.string(), "id": pa.string()}
    assert opened(write_manifest(tmp_path / "rows.csv", table), keep="all").passthrough == {
        "n": pa.string(),
        "text": pa.string(),
    }
    assert opened(lines, keep="all").passthrough == {"n": None, "text": None}
    assert opened(parquet, lines, keep="all").passthrough == {"n": None, "text": None}


@pytest.mark.parametrize("name", TABLE_FORMATS)
def test_the_image_column_is_found(tmp_path: Path, name: str) -> None:
    table = [{"n": "1", "photo": "a.JPG", "url": "https://a.example/a.jpg"}, {"n": "2", "photo": "b.png", "url": ""}]
    path = write_manifest(tmp_path / name, table)
    assert [row.image for row in rows(path)] == ["a.JPG", "b.png"]
    assert [row.error.code for row in rows(path, image_column="url")] == ["image_not_allowed", "row_invalid"]
    assert "no column 'photos'" in refusal(path, image_column="photos")


@pytest.mark.parametrize("name", TABLE_FORMATS)
def test_the_image_column_is_not_guessed(tmp_path: Path, name: str) -> None:
    message = refusal(write_manifest(tmp_path / name, [{"left": "a.png", "right": "b.png", "n": "1"}]))
    assert "--image-column: 'left', 'right'" in message
    assert "--image-column: 'n', 'm'" in refusal(write_manifest(tmp_path / name, [{"n": "1", "m": "2"}]))


def test_rows_need_no_image_where_none_is_wanted(manifest: Path) -> None:
    read = rows(manifest, needs_image=False, columns=("question",))
    assert [(row.id, row.image, row.sources, row.error) for row in read] == [(i, None, (), None) for i in "xyz"]
    assert read[0].values == {"question": "What?"}
    path = write_manifest(manifest.parent / "texts.jsonl", [{"prompt": ["a", "b"]}])
    assert rows(path, needs_image=False, columns=("prompt",))[0].values == {"prompt": ["a", "b"]}


# Whole files that are of no use


@pytest.mark.parametrize("name", [*TABLE_FORMATS, "rows.tar", "rows.tgz", "rows.parquet.gz", "rows.csv.zst"])
@pytest.mark.parametrize("data", [b"", b"\0", b"\n\n", b"\xff\xfe\xfd", b"PAR1", b"\x1f\x8b", b"%PDF-1.4 \0\xff" * 999])
def test_files_of_another_kind_are_refused(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert str(path) in refusal(path)


def test_tables_without_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,image\n\n")
    (tmp_path / "rows.jsonl").write_text("\n \n")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b""))
    pq.write_table(pa.table({"image": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    write_archive(tmp_path / "rows.tar", [])
    for path in tmp_path.iterdir():
        assert re.search("no rows|no files|only blank lines", refusal(path)), path


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz", "rows.tsv.gz", "rows.tar.gz"])
def test_packed_files_that_are_cut_off_are_refused_behind_their_good_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    noise = random.Random(0).randbytes(200_000).hex()
    if "tar" in name:
        write_archive(path, [(f"{i}.png", bytes.fromhex(noise[100 * i : 100 * i + 100])) for i in range(4000)])
    else:
        table = [{"image": f"{noise[100 * i : 100 * i + 100]}.png"} for i in range(4000)]
        write_manifest(path, table)
    whole, data = rows(path), path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])
    read: list[InputRow] = []
    with pytest.raises(InputError, match="ended before"):
        read.extend(opened(path).rows)
    assert read == whole[: len(read)]
    path.write_bytes(data[: len(data) // 2] + b"garbage" + data[len(data) // 2 :])
    assert str(path) in refusal(path)


def test_identities_tell_changed_inputs(manifest: Path) -> None:
    identity, data = opened(manifest).identity, manifest.read_bytes()
    assert json.loads(json.dumps(identity)) == identity == opened(manifest).identity
    manifest.write_bytes(data + b"\0")
    with contextlib.suppress(InputError):
        assert opened(manifest).identity != identity
    os.utime(manifest, (1, 1))
    manifest.write_bytes(data)
    assert opened(manifest).identity == identity


def test_neither_arrow_nor_numpy_is_imported_for_rows_of_text(tmp_path: Path) -> None:
    write_manifest(tmp_path / "rows.csv", ROWS)
    write_manifest(tmp_path / "rows.jsonl.gz", ROWS[:1])
    save_image(tmp_path / "photos/a.png")
    write_archive(tmp_path / "rows.tar", [("w.png", b"1")])
    code = """
import sys
from idefics_cli.readers.inputs import ReadOptions, open_inputs
names = ["photos", "rows.csv", "rows.tar"]
print(len(list(open_inputs(names, ReadOptions()).rows)), {"pyarrow", "numpy", "torch"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "5 set()\n"
