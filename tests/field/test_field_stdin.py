"""What people pipe into `-`: paths, JSON lines, and what is neither."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import rows_of, save_image
from typer.testing import Result

ROWS = [{"image": f"{name}.png", "question": f"What is {name}?", "n": name} for name in "abc"]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number, row in enumerate(ROWS):
        save_image(tmp_path / row["image"], number)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("options", [(), ("--stdin", "jsonl")])
@pytest.mark.parametrize("data", [LINES, b"\xef\xbb\xbf" + LINES, b"\n \n" + LINES])
def test_json_lines_are_a_manifest(run: Callable[..., Result], options: tuple[str, ...], data: bytes) -> None:
    result = run("vqa", "-", *options, "--keep", "n", input=data)
    assert result.exit_code == 0, result.output
    found = [(row["id"], row["image"], row["question"], row["n"]) for row in rows_of(result.stdout)]
    assert found == [(str(i), row["image"], row["question"], row["n"]) for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_json_lines_are_kept_in_files_and_resumed(run: Callable[..., Result], name: str) -> None:
    for _ in range(2):
        result = run("vqa", "-", "--keep", "n", "-o", name, input=LINES)
        assert result.exit_code == 0, result.output
    assert run("vqa", "-", "--keep", "n", "-o", name, "--overwrite", input=LINES).exit_code == 0
    changed = LINES.replace(b"a.png", b"b.png")
    assert run("vqa", "-", "--keep", "n", "-o", name, input=changed).exit_code == 2


def test_a_path_that_begins_like_an_object_is_one_where_that_is_said(run: Callable[..., Result], images: Path) -> None:
    save_image(images / "{a}.png")
    assert [row["id"] for row in rows_of(run("caption", "-", "--stdin", "paths", input=b"{a}.png\n").stdout)] == [
        "{a}.png"
    ]
    assert [row["id"] for row in rows_of(run("caption", "-", "-0", input=b"{a}.png\0").stdout)] == ["{a}.png"]


def test_what_is_neither_is_refused_in_one_line(refused: Callable[..., str], images: Path) -> None:
    assert "stdin holds an image" in refused("caption", "-", input=(images / "a.png").read_bytes())
    assert "stdin holds binary data" in refused("caption", "-", input=b"\x1f\x8b\x08\0\0" * 9)
    for array in json.dumps(ROWS), json.dumps(ROWS, indent=2):
        assert "`jq -c '.[]'`" in refused("caption", "-", input=array.encode())
    assert "write one object per line" in refused("caption", "-", input=json.dumps(ROWS[0], indent=1).encode())
    assert "add - to the inputs" in refused("caption", "a.png", "--stdin", "jsonl")
    assert "leave it out" in refused("caption", "-", "-0", "--stdin", "jsonl", input=LINES)
    assert "no column 'question'" in refused("vqa", "-", input=b'{"image": "a.png"}\n')


PROGRAM = """
import sys
from idefics_cli.readers.inputs import open_inputs
from idefics_cli.rows import ReadOptions
found = open_inputs(["-"], ReadOptions(columns=("question",)), sys.stdin.buffer)
for row in found.rows:
    print(row.id, row.values["question"], flush=True)
"""


def test_rows_of_a_pipe_are_given_as_they_come() -> None:
    """None waits for the one after it, and a long stream takes no more memory than a short one."""
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdin and process.stdout
        for number in range(3):
            process.stdin.write(json.dumps({"image": "a.png", "question": number}).encode() + b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{number} {number}\n".encode()
        process.stdin.close()
        assert process.wait() == 0
