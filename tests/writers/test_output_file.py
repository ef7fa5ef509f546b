from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idefics_cli.columns import Column, json_text
from idefics_cli.errors import OutputError
from idefics_cli.writers.formats import Passthrough
from idefics_cli.writers.output_file import FileOutput, differences, setting_name

SETTINGS = {"model": {"name": "demo"}, "inputs": [{"name": "a.csv"}], "task": {"prompts": {"text": None}}}
COLUMNS = [Column("id", "text"), Column("caption", "text"), Column("error", "text")]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)

both = pytest.mark.parametrize("name", ["f.jsonl", "f.parquet"])


def row(name: str, caption: str | None = None) -> dict[str, Any]:
    return {"id": name, "caption": caption, "error": None if caption else "image_missing: gone"}


OLD = [row("a", "one"), row("b"), row("c", "two"), row("d")]


def append(output: FileOutput, rows: Sequence[dict[str, Any]]) -> None:
    output.journal.append([json_text(each) for each in rows])


def publish(output: FileOutput, num_rows: int = 4) -> None:
    output.journal.end({"rows": num_rows, "failed": {}})
    output.publish(COLUMNS, Passthrough())


def finish(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One run from its beginning to its end."""
    output = FileOutput(path)
    output.begin(SETTINGS)
    append(output, rows)
    publish(output)
    output.close()


def rows_of(path: Path) -> list[dict[str, Any]]:
    output = FileOutput(path)
    try:
        return list(output.finished_rows(["id", "caption", "error"]))
    finally:
        output.close()


# ---- from a journal to a file


@both
def test_a_run_in_two_parts(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    output = FileOutput(path)
    assert (output.settings, output.is_finished, list(output.journal.rows())) == (None, False, [])
    output.begin(SETTINGS)
    append(output, OLD[:1])
    output.close()
    assert not path.exists()
    output = FileOutput(path)
    assert (output.settings, output.is_finished, list(output.journal.rows())) == (SETTINGS, False, OLD[:1])
    output.begin(SETTINGS)
    append(output, OLD[1:])
    output.journal.end({"rows": 4, "failed": {"image_missing": 2}})
    output.publish(COLUMNS, Passthrough())
    output.close()
    output = FileOutput(path)
    assert output.is_finished and output.settings == SETTINGS
    assert (output.record["rows"], output.record["failed"]) == (4, {"image_missing": 2})
    assert list(output.finished_rows(["id", "caption", "error"])) == OLD
    output.close()
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob("*.tmp"))


@both
def test_a_retry_replaces_the_finished_file_and_keeps_it_until_then(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    finish(path, OLD)
    output = FileOutput(path)
    new = [OLD[0], row("b", "new"), *OLD[2:]]
    output.begin(SETTINGS)
    append(output, new[:2])
    output.close()
    assert rows_of(path) == OLD
    output = FileOutput(path)
    assert output.is_retry and not output.is_finished and output.settings == SETTINGS
    append(output, new[2:])
    publish(output)
    output.close()
    assert rows_of(path) == new


@both
def test_what_is_replaced_stays_until_the_end(tmp_path: Path, name: str) -> None:
    finish(tmp_path / name, OLD)
    before = (tmp_path / name).read_bytes()
    output = FileOutput(tmp_path / name, overwrite=True)
    assert output.record is None
    output.begin({"model": {"name": "other"}})
    append(output, OLD[:2])
    assert (tmp_path / name).read_bytes() == before
    publish(output, 2)
    output.close()
    assert rows_of(tmp_path / name) == OLD[:2]


@both
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_at_the_end_leaves_the_journal_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    output = FileOutput(tmp_path / name)
    output.begin(SETTINGS)
    append(output, OLD)
    output.journal.end({"rows": 4, "failed": {}})

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OutputError, match=r"cannot finish .*No space left on device; free some space"):
            output.publish(COLUMNS, Passthrough())
    output.close()
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.part"]
    output = FileOutput(tmp_path / name)
    assert output.journal.summary == {"rows": 4, "failed": {}}
    output.publish(COLUMNS, Passthrough())
    output.close()
    assert rows_of(tmp_path / name) == OLD


# ---- settings


def test_a_difference_is_named(tmp_path: Path) -> None:
    finish(tmp_path / "f.jsonl", OLD)
    output = FileOutput(tmp_path / "f.jsonl")
    output.require_same(SETTINGS)
    output.require_same({**SETTINGS, "model": {**SETTINGS["model"], "weights": "not known then"}, "--unset": None})
    with pytest.raises(OutputError, match="--new: was unset, now 1"):
        output.require_same({**SETTINGS, "--new": 1})
    other = {**SETTINGS, "model": {"name": "other"}, "inputs": [{"name": "b.csv"}]}
    with pytest.raises(OutputError) as caught:
        output.require_same(other)
    assert "inputs 1 name: was 'a.csv', now 'b.csv'; model name: was 'demo', now 'other'" in str(caught.value)
    output.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXTS, JSON, max_size=4))
def test_nothing_differs_from_itself(known: dict[str, Any]) -> None:
    assert not list(differences(known, json.loads(json.dumps(known))))


@given(st.dictionaries(TEXTS, JSON, min_size=1, max_size=4), st.data())
def test_each_other_value_is_a_difference(known: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(known)))
    (told,) = differences(known, {**known, name: ["something", "else", "altogether"]})
    assert told.startswith(f"{setting_name([name])}: was ")


def test_long_values_are_cut() -> None:
    (told,) = differences({"a": "x" * 500}, {"a": 1})
    assert len(told) < 100 and "..." in told


# ---- places


def a_folder(path: Path) -> None:
    path.mkdir()


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def a_file_of_the_users(path: Path) -> None:
    path.write_text('{"id": "mine"}\n')


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (a_folder, "is a folder: name a file in it"),
        (a_link_to_nothing, "is a broken link"),
        (a_file_of_the_users, "not as a run of this program left it"),
    ],
)
def test_places_that_cannot_be(tmp_path: Path, make: Any, said: str) -> None:
    make(tmp_path / "f.jsonl")
    with pytest.raises(OutputError, match=said):
        FileOutput(tmp_path / "f.jsonl")
    assert not (tmp_path / "f.jsonl.part").exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the folder .* does not exist: make it first"):
        FileOutput(tmp_path / "none" / "f.jsonl")


@both
def test_a_result_that_is_removed_while_failed_rows_are_retried(tmp_path: Path, name: str) -> None:
    finish(tmp_path / name, OLD)
    output = FileOutput(tmp_path / name)
    output.begin(SETTINGS)
    append(output, [OLD[0], row("b", "new")])
    output.close()
    (tmp_path / name).unlink()
    with pytest.raises(OutputError, match="was changed or removed while its failed rows were being retried"):
        FileOutput(tmp_path / name)


@pytest.mark.parametrize("address", ["s3://bucket/f.jsonl", "gs://bucket/f.parquet", "https://a.example/f.jsonl"])
def test_an_address_is_refused(address: str) -> None:
    with pytest.raises(OutputError, match="is an address: name a file on this machine"):
        FileOutput(address)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "beside"),
    [("f.jsonl", ".tmp"), ("f.jsonl", ".run"), ("f.jsonl", ".run.tmp"), ("f.parquet", ".tmp")],
)
def test_files_of_others_are_never_overwritten(tmp_path: Path, name: str, beside: str, overwrite: bool) -> None:
    own = tmp_path / f"{name}{beside}"
    own.write_text("[" * 100_000)
    with pytest.raises(OutputError, match=rf"{own.name} is not a file of this program, and would be overwritten"):
        FileOutput(tmp_path / name, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == [own.name] and own.read_text() == "[" * 100_000


@both
def test_what_a_kill_left_of_the_final_file_is_written_over(tmp_path: Path, name: str) -> None:
    output = FileOutput(tmp_path / name)
    output.begin(SETTINGS)
    append(output, OLD)
    output.journal.end({"rows": len(OLD), "failed": {}})
    output.close()
    for beside in ".tmp", ".run.tmp":
        (tmp_path / f"{name}{beside}").write_bytes(b"torn")
    again = FileOutput(tmp_path / name)
    again.publish(COLUMNS, Passthrough())
    again.close()
    assert rows_of(tmp_path / name) == OLD
