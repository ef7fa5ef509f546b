from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import pytest

from idefics_cli.data import writers
from idefics_cli.data.writers import FileWriter, StreamClosed, StreamWriter, json_line, open_writer
from idefics_cli.errors import OutputError


def refusal(path: Path, **options) -> str:
    with pytest.raises(OutputError) as caught:
        open_writer(str(path), stdout=None, **options)
    return str(caught.value)


def test_lines_are_utf8_and_single() -> None:
    assert json_line({"id": "ü\n\u2028", "score": -0.5, "caption": None}) == (
        '{"id": "ü\\n\u2028", "score": -0.5, "caption": null}\n'.encode()
    )


def test_lone_surrogates_are_escaped() -> None:
    line = json_line({"id": "a\udce9ü"})
    assert line.isascii() and json.loads(line) == {"id": "a\udce9ü"}


def test_streams_are_flushed_row_by_row() -> None:
    stream = io.BufferedRandom(raw := io.BytesIO())
    writer = StreamWriter(stream)
    writer.write({"id": 1})
    assert raw.getvalue() == b'{"id": 1}\n'
    writer.finish()
    writer.close()
    assert not stream.closed


def test_a_closed_pipe_is_no_mistake_and_a_full_disk_is_one() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as stream, pytest.raises(StreamClosed):
        StreamWriter(stream).write({})
    with open("/dev/full", "wb", buffering=0) as stream, pytest.raises(OutputError, match="No space left"):
        StreamWriter(stream).write({})
    with pytest.raises(OutputError, match="stdout is closed"):
        open_writer("-", stdout=None)


def test_the_final_name_appears_when_the_run_has_finished(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    writer = open_writer(str(path), stdout=None)
    writer.write({"id": 1})
    writer.write({"id": 2})
    assert not path.exists() and (tmp_path / "f.jsonl.part").read_bytes() == b'{"id": 1}\n{"id": 2}\n'
    writer.finish()
    writer.close()
    assert path.read_bytes() == b'{"id": 1}\n{"id": 2}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["f.jsonl"]


def test_everything_is_synced_before_and_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda file: (steps.append(f"fsync {os.path.isdir(f'/proc/self/fd/{file}')}"), fsync(file))
    )
    monkeypatch.setattr(Path, "rename", lambda self, to: (steps.append("rename"), rename(self, to)))
    writer = FileWriter(tmp_path / "f.jsonl")
    writer.write({})
    writer.finish()
    assert steps == ["fsync False", "rename", "fsync True"]


def test_a_run_that_ends_early_keeps_its_rows_in_the_part_file(tmp_path: Path) -> None:
    writer = FileWriter(tmp_path / "f.jsonl")
    writer.write({"id": 1})
    writer.close()
    writer.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["f.jsonl.part"]
    assert "--overwrite" in refusal(tmp_path / "f.jsonl")
    assert (tmp_path / "f.jsonl.part").read_bytes() == b'{"id": 1}\n'


def test_a_run_without_rows_leaves_nothing(tmp_path: Path) -> None:
    FileWriter(tmp_path / "f.jsonl").close()
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_what_is_there_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text("old\n")
    (tmp_path / "f.jsonl.part").write_text("older\n")
    writer = FileWriter(path, overwrite=True)
    writer.write({"id": 1})
    assert path.read_text() == "old\n"
    writer.finish()
    assert path.read_text() == '{"id": 1}\n'


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    writer = FileWriter(tmp_path / "f.jsonl")
    writer.write({"id": 1})
    assert "another run" in refusal(tmp_path / "f.jsonl")
    assert "another run" in refusal(tmp_path / "f.jsonl", overwrite=True)
    writer.finish()
    assert (tmp_path / "f.jsonl").read_text() == '{"id": 1}\n'


def test_a_part_file_that_was_renamed_while_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = writers.fcntl.flock

    def rename_first(file: int, operation: int) -> None:
        (tmp_path / "f.jsonl.part").rename(tmp_path / "f.jsonl")
        flock(file, operation)

    monkeypatch.setattr(writers.fcntl, "flock", rename_first)
    assert "another run" in refusal(tmp_path / "f.jsonl")


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").touch()
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "dangling.jsonl").symlink_to("nowhere")
    assert "--overwrite" in refusal(tmp_path / "there.jsonl")
    assert "--overwrite" in refusal(tmp_path / "dangling.jsonl")
    assert "is a folder" in refusal(tmp_path / "folder.jsonl")
    assert "is a folder" in refusal(tmp_path)
    assert "there is no folder" in refusal(tmp_path / "none/f.jsonl")
    assert "there is no folder" in refusal(tmp_path / "there.jsonl/f.jsonl")
    assert "ends in .jsonl" in refusal(tmp_path / "f.parquet")
    assert "ends in .jsonl" in refusal(tmp_path / "f")
    assert "File name too long" in refusal(tmp_path / ("f" * 250 + ".jsonl"))


def test_folders_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(writers.os, "open", refuse)
    assert "Permission denied" in refusal(tmp_path / "f.jsonl")


def test_a_full_disk_keeps_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = FileWriter(tmp_path / "f.jsonl")
    writer.write({"id": 1})
    write, room = os.write, [5]

    def write_until_full(file: int, data: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: room.pop()])

    monkeypatch.setattr(writers.os, "write", write_until_full)
    with pytest.raises(OutputError, match="No space left"):
        writer.write({"id": 2})
    writer.close()
    assert (tmp_path / "f.jsonl.part").read_bytes() == b'{"id": 1}\n'


def test_a_write_that_was_interrupted_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = FileWriter(tmp_path / "f.jsonl")
    writer.write({"id": 1})
    write = os.write

    def interrupted(file: int, data: bytes) -> int:
        write(file, data[:4])
        raise KeyboardInterrupt

    monkeypatch.setattr(writers.os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.write({"id": 2})
    writer.close()
    assert (tmp_path / "f.jsonl.part").read_bytes() == b'{"id": 1}\n'


def test_a_failing_sync_is_told_and_nothing_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = FileWriter(tmp_path / "f.jsonl")
    writer.write({"id": 1})

    def fail(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(writers.os, "fsync", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        writer.finish()
    writer.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["f.jsonl.part"]
