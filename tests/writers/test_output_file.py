from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idefics_cli.columns import Column, json_text
from idefics_cli.errors import OutputError
from idefics_cli.writers.formats import Passthrough
from idefics_cli.writers.output_file import FileOutput, differences, setting_name

DIGEST = 24 * "7"
SETTINGS = {"model": {"name": "demo"}, "inputs": [{"name": "a.csv"}], "task": {"prompts": {"text": None}}}
COLUMNS = [Column("id", "text"), Column("caption", "text"), Column("error", "text")]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


def row(name: str, caption: str | None = None) -> dict[str, Any]:
    return {"id": name, "caption": caption, "error": None if caption else "image_missing: gone"}


OLD = [row("a", "one"), row("b"), row("c", "two"), row("d")]
SUMMARY = {"rows": 4, "failed": {"image_missing": 2}}


@contextmanager
def opened(path: Path, rows: Sequence[dict[str, Any]] = (), **options: Any) -> Iterator[FileOutput]:
    """An output to which these rows are added."""
    with closing(FileOutput(path, **options)) as output:
        if rows:
            output.begin(SETTINGS, COLUMNS)
            output.journal.append([json_text({**each, "digest": output.tag + DIGEST}) for each in rows])
        yield output


def finish(path: Path, rows: Sequence[dict[str, Any]] = OLD, **options: Any) -> None:
    """A run to its end."""
    with opened(path, rows, **options) as output:
        publish(output)


def publish(output: FileOutput) -> None:
    output.journal.end(SUMMARY)
    output.publish(COLUMNS, Passthrough())


def done(output: FileOutput) -> list[dict[str, Any]]:
    rows = list(output.done(["id", "caption", "error"]))
    assert all(digest == DIGEST for _, digest in rows)
    return [row for row, _ in rows]


def rows_of(path: Path) -> list[dict[str, Any]]:
    with opened(path) as output:
        return list(output.finished_rows(["id", "caption", "error"]))


@pytest.fixture(params=["f.jsonl", "f.parquet"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


# ---- from a journal to a file


def test_a_run_in_two_parts(path: Path) -> None:
    with opened(path) as output:
        assert (output.settings, output.is_finished, done(output)) == (None, False, [])
    with opened(path, OLD[:1]):
        assert not path.exists()
    with opened(path) as output:
        assert (output.settings, output.is_finished, done(output)) == (SETTINGS, False, OLD[:1])
    finish(path, OLD[1:])
    with opened(path) as output:
        assert output.is_finished and output.settings == SETTINGS
        assert output.record.items() >= SUMMARY.items()
        assert done(output) == OLD
    assert rows_of(path) == OLD
    assert not list(path.parent.glob("*.part")) + list(path.parent.glob("*.tmp"))


def test_a_retry_replaces_the_finished_file_and_keeps_it_until_then(path: Path) -> None:
    finish(path)
    new = [OLD[0], row("b", "new"), *OLD[2:]]
    with opened(path, new[:2]):
        pass
    assert rows_of(path) == OLD
    with opened(path) as output:
        assert output.record and not output.is_finished and output.settings == SETTINGS
    finish(path, new[2:])
    assert rows_of(path) == new


def test_what_is_replaced_stays_until_the_end(path: Path) -> None:
    finish(path)
    before = path.read_bytes()
    with opened(path, OLD[::-1], overwrite=True) as output:
        assert output.record is None and path.read_bytes() == before
        publish(output)
    assert rows_of(path) == OLD[::-1]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_at_the_end_leaves_the_journal_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(path, OLD) as output, monkeypatch.context() as patch:
        output.journal.end(SUMMARY)
        patch.setattr(os, call, full)
        with pytest.raises(OutputError, match=r"cannot finish .*No space left on device; free some space"):
            output.publish(COLUMNS, Passthrough())
    assert list(path.parent.iterdir()) == [path.with_name(f"{path.name}.part")]
    for beside in ".tmp", ".run.tmp":
        path.with_name(f"{path.name}{beside}").write_bytes(b"torn by a kill")
    with opened(path) as output:
        assert output.journal.summary == SUMMARY
        output.publish(COLUMNS, Passthrough())
    assert rows_of(path) == OLD


# ---- settings


def test_a_difference_is_named(tmp_path: Path) -> None:
    finish(tmp_path / "f.jsonl")
    other = {**SETTINGS, "model": {"name": "other"}, "inputs": [{"name": "b.csv"}]}
    with opened(tmp_path / "f.jsonl") as output:
        output.require_same({**SETTINGS, "model": {**SETTINGS["model"], "weights": "not known then"}, "--unset": None})
        output.require_same({**SETTINGS, "--new": False})
        with pytest.raises(OutputError, match="--new: was unset, now 1"):
            output.require_same({**SETTINGS, "--new": 1})
        with pytest.raises(OutputError) as caught:
            output.require_same(other)
    assert "inputs 1 name: was 'a.csv', now 'b.csv'; model name: was 'demo', now 'other'" in str(caught.value)


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


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.symlink_to("nowhere"), "is a broken link"),
        (lambda path: path.write_text('{"id": "mine"}\n'), "not as a run of this program left it"),
        (lambda path: path.parent.rmdir(), r"the folder .* does not exist: make it first"),
    ],
)
def test_places_that_cannot_be(tmp_path: Path, make: Callable[[Path], Any], said: str) -> None:
    path = tmp_path / "results" / "f.jsonl"
    path.parent.mkdir()
    make(path)
    with pytest.raises(OutputError, match=said):
        FileOutput(path)
    assert not path.with_name("f.jsonl.part").exists()


def test_a_result_that_is_removed_while_failed_rows_are_retried(path: Path) -> None:
    finish(path)
    with opened(path, [OLD[0], row("b", "new")]):
        path.unlink()
    with pytest.raises(OutputError, match="was changed or removed while its failed rows were being retried"):
        FileOutput(path)


@pytest.mark.parametrize("address", ["s3://bucket/f.jsonl", "https://a.example/f.jsonl"])
def test_an_address_is_refused(address: str) -> None:
    with pytest.raises(OutputError, match="is an address: name a file on this machine"):
        FileOutput(address)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "beside"),
    [("f.jsonl", ".run"), ("f.csv", ".run"), ("f.jsonl", ".part"), ("f.parquet", ".run")],
)
def test_files_of_others_are_never_overwritten(tmp_path: Path, name: str, beside: str, overwrite: bool) -> None:
    own = tmp_path / f"{name}{beside}"
    own.write_text("[" * 100_000)
    with pytest.raises(OutputError, match=rf"{own.name} is not a file of this program, and would be (over)?written"):
        FileOutput(tmp_path / name, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == [own.name] and own.read_text() == "[" * 100_000
