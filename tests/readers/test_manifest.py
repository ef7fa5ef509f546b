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
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import save_image
from hypothesis import given, settings
from hypothesis import strategies as st
from written_manifests import ALL_FORMATS, TABLE_FORMATS, opened, read, refusal, write_archive, write_manifest

from idefics_cli.errors import InputError
from idefics_cli.rows import InputRow

ROWS = [
    {"id": "x", "image": "a.png", "question": "What?"},
    {"id": "y", "image": "sub/b.jpg", "question": ""},
    {"id": "z", "image": "c.webp", "question": 'Say "é",\nor not'},
]


@pytest.fixture(params=ALL_FORMATS)
def manifest(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_manifest(tmp_path / request.param, ROWS)


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """JSON lines of these rows."""
    return lambda *table: write_manifest(tmp_path / "rows.jsonl", table)


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
        rows = read(path, columns=("text",))
        assert [(row.index, row.id, row.image, dict(row.values), row.error) for row in rows] == [
            (index, row["id"], row["image"], {"text": row["text"]}, None) for index, row in enumerate(table)
        ]
        assert [row.sources for row in rows] == [(Path(folder) / row["image"],) for row in table]
        parts = [read(path, shard=(i + 1, shards), columns=("text",)) for i in range(shards)]
        assert parts == [rows[len(rows) * i // shards : len(rows) * (i + 1) // shards] for i in range(shards)]
        assert read(path, columns=("text",), limit=2) == rows[:2]


STEMS = st.from_regex(r"[a-z0-9_é-]{1,4}(/[a-z]{1,2})?", fullmatch=True)
SAMPLES = st.lists(
    st.tuples(STEMS, st.binary(min_size=1), TEXTS, st.integers()), min_size=1, unique_by=lambda sample: sample[0]
)


@settings(max_examples=30, deadline=None)
@given(SAMPLES, st.sampled_from(["rows.tar", "rows.tar.gz", "rows.tgz"]))
def test_any_archive_comes_out_as_it_went_in(samples: list[tuple[str, bytes, str, int]], name: str) -> None:
    members = [
        (f"{stem}.{suffix}", data)
        for stem, image, text, number in samples
        for suffix, data in [("jpg", image), ("txt", text.encode()), ("json", b'{"n": %d}' % number)]
    ]
    with tempfile.TemporaryDirectory() as folder:
        rows = read(write_archive(Path(folder) / name, members), columns=("question",), keep=("n",))
    for row, (stem, image, text, number) in zip(rows, samples, strict=True):
        assert (row.id, row.sources) == (stem, (image,))
        assert row.values == {"question": text.removeprefix("\ufeff"), "n": number}


# Beginning again, shards, limits


@pytest.mark.parametrize("shard", [None, (1, 2), (2, 2)])
@pytest.mark.parametrize("limit", [None, 2])
def test_rows_begin_again_wherever_they_are(manifest: Path, shard: tuple[int, int] | None, limit: int | None) -> None:
    """They end where the inputs do or the limit is."""
    more = write_manifest(manifest.parent / "more.csv", [{"id": "w", "image": "w.png"}])
    for inputs in [manifest], [manifest, more]:
        everything = read(*inputs, shard=shard, limit=limit)
        for passed in range(len(everything) + 2):
            found = opened(*inputs, shard=shard, limit=limit)
            assert list(islice(found.rows, passed)) == everything[:passed]
            assert list(found.restarted()) == everything


def test_rows_that_begin_again_have_their_ids_again(lines: Callable[..., Path]) -> None:
    found = opened(lines(*({"id": i, "image": "a.png"} for i in "abca")))
    assert [row.id for row in islice(found.rows, 2)] == ["a", "b"]
    assert [row.id for row in islice(found.restarted(), 3)] == ["a", "b", "c"]
    assert str(next(found.rows).error) == "duplicate_id: row 4 has the id of row 1, 'a'"


def test_bad_rows_begin_again_with_the_ids_they_were_given(tmp_path: Path) -> None:
    good = '{"id": "a", "image": "a.png"}'
    bad = ["{", '{"id": null, "image": "a.png"}', '{"id": "b"}', '{"id": "c", "image": 7}']
    (tmp_path / "rows.jsonl").write_text("\n".join([good, *bad]))
    everything = read(tmp_path / "rows.jsonl")
    assert [row.id for row in everything] == ["a", "#1", "#2", "b", "c"]
    assert [row.error and row.error.code for row in everything] == [None, *["row_invalid"] * 4]
    for passed in range(6):
        found = opened(tmp_path / "rows.jsonl")
        assert list(islice(found.rows, passed)) == everything[:passed]
        assert list(found.restarted()) == everything


def test_totals_are_told_where_they_are_known(tmp_path: Path) -> None:
    parquet = write_manifest(tmp_path / "rows.parquet", ROWS)
    assert opened(parquet).total == 3
    assert opened(parquet, shard=(1, 2)).total == 1 and opened(parquet, shard=(2, 2)).total == 2
    assert opened(parquet, shard=(2, 2), limit=1).total == 1
    assert opened(write_manifest(tmp_path / "short.csv", ROWS)).total == 3
    assert opened(write_manifest(tmp_path / "rows.csv", [{"image": "a.png"}] * 101)).total is None


# Ids


def test_rows_without_ids_are_numbered(tmp_path: Path) -> None:
    table = [{"image": f"{i}.png"} for i in range(3)]
    first, second = (write_manifest(tmp_path / name, table) for name in ("rows.csv", "rows.parquet"))
    for path in first, second:
        assert [row.id for row in read(path)] == ["0", "1", "2"]
    assert [row.id for row in read(first, second)] == [f"{path}:{i}" for path in (first, second) for i in range(3)]
    assert [row.id for row in read(first, shard=(2, 2))] == ["1", "2"]


def test_another_id_column_can_be_named(manifest: Path) -> None:
    assert [row.id for row in read(manifest, id_column="question", limit=1)] == ["What?"]
    assert "no column 'nothing': name one of" in refusal(manifest, id_column="nothing")


@pytest.mark.parametrize(
    ("value", "expected"), [(7, "7"), (1.5, "1.5"), (True, "True"), ("é", "é"), (r"\xe9", r"\xe9"), ("a\nb", "a\nb")]
)
def test_ids_become_text(lines: Callable[..., Path], value: object, expected: str) -> None:
    (row,) = read(lines({"id": value, "image": "a.png"}))
    assert row.id == expected and row.error is None


@pytest.mark.parametrize("value", [None, "", [], {}, ["a"], "x" * 20_000])
def test_rows_whose_id_is_of_no_use_are_given_one(lines: Callable[..., Path], value: object) -> None:
    """One that no other row has."""
    rows = read(lines(*({"id": i, "image": "a.png"} for i in ("#2", "##2", value))))
    assert [row.id for row in rows] == ["#2", "##2", "###2"]
    assert rows[2].error.code == "row_invalid" and "'id'" in rows[2].error.message


def test_the_second_of_two_rows_with_one_id_is_a_bad_row(manifest: Path) -> None:
    other = write_manifest(manifest.parent / "more.csv", [{"id": i, "image": "a.png"} for i in "wyv"])
    found = opened(manifest, other).rows
    assert [next(found).id for _ in range(4)] == ["x", "y", "z", "w"]
    second, last = found
    assert (second.id, str(second.error)) == ("y", "duplicate_id: row 5 has the id of row 2, 'y'")
    assert (last.id, last.error) == ("v", None)


# Columns


def test_values_are_those_that_were_asked_for(manifest: Path) -> None:
    assert [dict(row.values) for row in read(manifest)] == [{}] * 3
    for keep in (), ("question",):
        assert next(opened(manifest, columns=("question",), keep=keep).rows).values == {"question": "What?"}
    assert list(opened(manifest, keep="all").passthrough) == ["question"]
    for options in [{"columns": ("answer",)}, {"keep": ("answer",)}]:
        message = refusal(manifest, **options)
        assert "no column 'answer'" in message and "'question'" in message


def test_kept_columns_have_types(tmp_path: Path) -> None:
    table = [{"id": "a", "image": "a.png", "n": 1, "text": "t"}]
    parquet, text, lines = (write_manifest(tmp_path / f"rows.{kind}", table) for kind in ("parquet", "csv", "jsonl"))
    assert opened(parquet, keep="all").passthrough == {"n": pa.int64(), "text": pa.string()}
    assert opened(parquet, keep=("text", "id")).passthrough == {"text": pa.string(), "id": pa.string()}
    assert opened(text, keep="all").passthrough == {"n": pa.string(), "text": pa.string()}
    for inputs in [lines], [parquet, lines]:
        assert opened(*inputs, keep="all").passthrough == {"n": None, "text": None}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_the_image_column_is_found_and_not_guessed(tmp_path: Path, name: str) -> None:
    table = [{"n": "1", "photo": "a.JPG", "url": "https://a.example/a.jpg"}, {"n": "2", "photo": "b.png", "url": ""}]
    path = write_manifest(tmp_path / name, table)
    assert [row.image for row in read(path)] == ["a.JPG", "b.png"]
    assert [row.error.code for row in read(path, image_column="url")] == ["image_not_allowed", "row_invalid"]
    assert "no column 'photos'" in refusal(path, image_column="photos")
    for columns, said in [({"left": "a.png", "right": "b.png"}, "'left', 'right'"), ({"m": "2"}, "'n', 'm'")]:
        assert f"--image-column: {said}" in refusal(write_manifest(path, [{"n": "1", **columns}]))


def test_rows_need_no_image_where_none_is_wanted(manifest: Path) -> None:
    rows = read(manifest, needs_image=False, columns=("question",))
    assert [(row.id, row.image, row.sources, row.error) for row in rows] == [(i, None, (), None) for i in "xyz"]
    assert rows[0].values == {"question": "What?"}


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


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz", "rows.tar.gz"])
def test_packed_files_that_are_cut_off_are_refused_behind_their_good_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    noise = random.Random(0).randbytes(200_000).hex()
    if "tar" in name:
        write_archive(path, [(f"{i}.png", bytes.fromhex(noise[100 * i : 100 * i + 100])) for i in range(4000)])
    else:
        write_manifest(path, [{"image": f"{noise[100 * i : 100 * i + 100]}.png"} for i in range(4000)])
    whole, data = read(path), path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])
    found: list[InputRow] = []
    with pytest.raises(InputError, match="ended before"):
        found.extend(opened(path).rows)
    assert found == whole[: len(found)]
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
