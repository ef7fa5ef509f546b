from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeCaptioner, expected_text, rows_of, save_image
from typer.testing import CliRunner, Result

import idefics_cli
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.cli import app as cli
from idefics_cli.cli import info

ROOT = Path(__file__).parents[2]
TESTS = Path(__file__).parents[1]

# `idefics` with a fake model, in a process of its own. FAKE holds arguments of FakeCaptioner and more.
DRIVER = """
import json, os, sys, time
sys.path.insert(0, os.environ["TESTS"])
from conftest import FakeCaptioner
from idefics_cli.cli import app as cli
from idefics_cli.__main__ import main

fake = json.loads(os.environ.get("FAKE", "{}"))
load, stubborn, length = fake.pop("load", 0), fake.pop("stubborn", False), fake.pop("length", 1)


class Captioner(FakeCaptioner):
    def stream(self, source, **decoding):
        while stubborn:
            try:
                print("busy", file=sys.stderr, flush=True)
                while True:
                    time.sleep(0.1)  # not long: a signal just before a sleep is seen after it
            except KeyboardInterrupt:
                print("ignored", file=sys.stderr, flush=True)
        return super().stream(source, **decoding)

    def _describe(self, prompt, num_texts):
        result = super()._describe(prompt, num_texts)
        return type(result)(result.text * length, result.score, result.tokens, result.candidates)


def load_model(request, batch_size):
    print("loading", file=sys.stderr, flush=True)
    time.sleep(load)
    return Captioner(**fake)


cli.check_model, cli.load_model = lambda request: None, load_model
main()
"""


@contextlib.contextmanager
def started(
    *arguments: str | Path, fake: dict[str, Any] | None = None, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """The command line as a process, killed at the end."""
    command = [sys.executable, "-c", DRIVER, *map(str, arguments)]
    environment = {**os.environ, "TESTS": str(TESTS), "FAKE": json.dumps(fake or {})}
    environment.pop("COLUMNS", None)  # pytest-xdist sets it, and it counts more than a terminal's own width
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, **{**pipes, **options})
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Rows


def test_a_folder_with_a_broken_image(run: Callable[..., Result], photos: Path) -> None:
    result = run("caption", photos)
    rows = rows_of(result.stdout)
    names = ["a.jpg", "b.png", "broken.png", "c.png", "m.gif", "sub/a.png", "z.webp"]
    assert result.exit_code == 3
    assert [row["id"] for row in rows] == names
    assert [row["image"] for row in rows] == [str(photos / name) for name in names]
    assert all(row["caption"] == expected_text(photos / row["id"]) for row in rows if not row["error"])
    assert list(rows[0]) == ["id", "image", "caption", "score", "tokens", "error"]
    assert rows[2]["caption"] is None and rows[2]["error"].startswith("image_unreadable: ")
    assert "image_unreadable: 1 row: broken.png" in result.stderr
    assert "7 rows: 6 with a text, 1 failed" in result.stderr.splitlines()[-1]


def test_paths_from_stdin(run: Callable[..., Result], photos: Path) -> None:
    lines = [str(photos / "a.jpg"), "none.png", "https://a.example/b.png"]
    for separator, options in ("\n", []), ("\0", ["-0"]):
        result = run("caption", "-", *options, input=separator.join(lines).encode())
        found = [(row["id"], row["error"] and row["error"].split(":")[0]) for row in rows_of(result.stdout)]
        assert found == list(zip(lines, [None, "image_missing", "image_not_allowed"], strict=True))


def test_names_that_are_not_utf8(photos: Path) -> None:
    (photos / "a.jpg").rename(photos / os.fsdecode(b"caf\xe9.jpg"))
    with started(
        "caption", os.fsencode(photos / os.fsdecode(b"caf\xe9.jpg")).decode(errors="surrogateescape")
    ) as process:
        stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert rows_of(stdout)[0]["id"] == str(photos / r"caf\xe9.jpg")


def test_enough_errors_stop_the_run(run: Callable[..., Result], tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    result = run("caption", tmp_path, "--max-errors", "2", "-o", tmp_path / "f.jsonl")
    assert result.exit_code == 3
    assert "Stopped early" in result.stderr and "2 rows finished so far: safe in" in result.stderr
    assert "image_unreadable: 2 rows: 0.png, 1.png" in result.stderr
    assert not (tmp_path / "f.jsonl").exists()
    quiet = run("caption", tmp_path, "--max-errors", "1", "-o", tmp_path / "q.jsonl", "--quiet")
    assert quiet.stderr.startswith("Stopped early by --max-errors.") and quiet.stderr.count("\n") == 1


def test_options_reach_the_model(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    seen: list[Any] = []

    class Recorder(FakeCaptioner):
        def stream(self, source: Any, **decoding: Any) -> Any:
            seen.append(decoding)
            return super().stream(source, **decoding)

    def load(request: ModelRequest, batch_size: int | None) -> Recorder:
        seen.append((request, batch_size))
        return Recorder(batch_size=5)

    monkeypatch.setattr(cli, "check_model", lambda request: None)
    monkeypatch.setattr(cli, "load_model", load)
    options = "--num-beams 5 --max-new-tokens 9 --min-new-tokens 2 --length-penalty 0.5 --no-early-stopping"
    options += " --no-repeat-ngram-size 2 --revision main --dtype fp32 --device cpu --allow-pickle"
    options += " --repetition-penalty 1.5 --do-sample --temperature 0.5 --top-k 9 --top-p 0.8 --seed 3 --batch-size 7"
    CliRunner().invoke(cli.app, ["caption", str(photos), *options.split()], env={"IDEFICS_MODEL": "some/model"})
    assert seen[0] == (ModelRequest("some/model", "main", "fp32", "cpu", True), 7)
    assert seen[1] == {
        "banned_words": ("\n", "\n\n"),
        "num_beams": 5,
        "max_new_tokens": 9,
        "min_new_tokens": 2,
        "length_penalty": 0.5,
        "early_stopping": False,
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.5,
        "num_return_sequences": 1,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 9,
        "top_p": 0.8,
        "seed": 3,
    }


# Mistakes


@pytest.mark.parametrize("command", ["caption", "generate"])
def test_more_tokens_than_the_model_has_positions_are_refused_before_it_is_loaded(
    refused: Callable[..., str], tmp_path: Path, command: str
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "image": "a.png", "prompt": "x"}\n')
    said = refused(command, tmp_path / "rows.jsonl", "-m", "demo", "--device", "cpu", "--max-new-tokens", "2048")
    assert said == "Error: --max-new-tokens 2048 leaves no space for a prompt: use fewer than 2048."


def test_mistakes_are_one_line_before_the_model_is_loaded(
    refused: Callable[..., str], photos: Path, tmp_path: Path
) -> None:
    """One of each kind: the rest is tested where it is found."""
    assert "No such file" in refused("caption", tmp_path / "none")
    assert "'auto', 'bf16', 'fp16', 'fp32'" in refused("caption", photos, "--dtype", "int4")
    assert "invalid batch size 'none'" in refused("caption", photos, "--batch-size", "none")
    assert "--max-pixels" in refused("caption", photos, "--max-pixels", "0")
    assert "--num-return-sequences" in refused("caption", photos, "--num-beams", "2", "--num-return-sequences", "3")
    assert "--temperature has no effect unless tokens are drawn: add --do-sample" in refused(
        "caption", photos, "--temperature", "0.5"
    )
    assert "--bogus" in refused("caption", photos, "--bogus")
    assert "INPUT" in refused("caption")
    assert "ends in .jsonl, .parquet or .csv" in refused("caption", photos, "-o", tmp_path / "f.txt")
    assert "add -o E.parquet" in refused("embed", photos, "-o", tmp_path / "f.jsonl")
    assert "ask one question" in refused("vqa", photos, "-q", "a", "-q", "b", "--sidecar")
    assert "-m has no effect on --random tiny" in refused("bench", "--random", "tiny", "-m", "demo")
    assert not list(tmp_path.glob("f.*"))


def test_terminal_commands_in_names_are_shown_not_obeyed(refused: Callable[..., str], tmp_path: Path) -> None:
    assert r"\x1b[31mred" in refused("caption", tmp_path / "\x1b[31mred")


# Bugs


def test_a_bug_is_one_line_and_a_traceback_with_debug(run: Callable[..., Result], photos: Path) -> None:
    def fail(images: Any) -> None:
        raise ValueError("shapes\ndiffer")

    result = run("caption", photos / "sub", captioner=FakeCaptioner(before_call=fail))
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: a bug: ValueError: shapes differ\. Please report it .*--debug.*\n", result.stderr)
    result = run("caption", photos / "sub", "--debug", captioner=FakeCaptioner(before_call=fail))
    assert result.exit_code == 1 and "Traceback" in result.stderr


# Signals and pipes, in processes


def test_a_signal_while_the_model_loads(photos: Path, tmp_path: Path) -> None:
    with started("caption", photos, "-o", tmp_path / "f.jsonl", fake={"load": 60}) as process:
        assert process.stderr.readline() == b"loading\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=5)
    assert (process.returncode, stderr) == (130, b"Stopped by SIGINT.\n")
    assert not list(tmp_path.glob("f.jsonl*"))


def test_a_library_may_raise_an_interrupt_of_its_own_for_a_signal(run: Callable[..., Result], photos: Path) -> None:
    def hear(prompts: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    result = run("caption", photos / "sub", captioner=FakeCaptioner(before_call=hear))
    assert result.exit_code == 143 and result.stderr == "Stopped by SIGTERM.\n"


def test_rows_of_a_slow_stdin_come_at_once_and_a_signal_ends_the_waiting(photos: Path) -> None:
    with started("caption", "-", stdin=subprocess.PIPE) as process:
        process.stdin.write(os.fsencode(photos / "a.jpg") + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == str(photos / "a.jpg")
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 143
        assert process.stderr.read().endswith(b"Stopped by SIGTERM. 1 row written so far.\n")


def test_a_signal_ends_a_run_whose_stdout_is_not_read(tmp_path: Path) -> None:
    for i in range(4):
        save_image(tmp_path / f"{i}.png", i)
    with started("caption", tmp_path, fake={"batch_size": 1, "length": 50_000}) as process:
        pending = lambda: fcntl.ioctl(process.stdout, termios.FIONREAD, bytes(4))  # noqa: E731
        wait_for(lambda: int.from_bytes(pending(), sys.byteorder) >= 4096)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 143


def test_a_second_interrupt_ends_at_once(photos: Path) -> None:
    with started("caption", photos, fake={"stubborn": True}) as process:
        for expected in b"loading\n", b"busy\n":
            assert process.stderr.readline() == expected
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == b"ignored\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130


def test_stdout_to_a_full_disk_is_one_line(photos: Path) -> None:
    with open("/dev/full", "wb") as full, started("caption", photos, stdout=full) as process:
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 2
    assert stderr.splitlines()[1:] == [
        b"Error: cannot write to stdout: No space left on device; free some space and run again."
    ]


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """A result with a group to score by."""
    row = {"id": "a", "question": "Why?", "answer": "so", "score": 0.0, "tokens": 1, "error": None}
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({**row, "answers": ["so"], "kind": "é"}) + "\n")
    return path


@pytest.fixture
def closed() -> Iterator[int]:
    """A pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def test_a_stderr_that_takes_nothing_changes_no_exit_code(scored: Path, tmp_path: Path, closed: int) -> None:
    with open("/dev/full", "wb") as full:
        for stderr in closed, full:
            for arguments, code in (["score", scored], 0), (["caption", tmp_path / "none"], 2):
                with started(*arguments, stderr=stderr) as process:
                    stdout, _ = process.communicate(timeout=20)
                assert process.returncode == code and len(stdout.splitlines()) == (code == 0)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_that_has_no_room_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full, started(*arguments, stdout=full) as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr == b"Error: cannot write to stdout: No space left on device\n"


@pytest.mark.parametrize("command", ["score", "info"])
def test_other_data_on_stdout_ends_as_rows_do(scored: Path, closed: int, command: str) -> None:
    """Where its reader is gone, and where the disk is full."""
    arguments = [command, *([scored, "--by", "kind"] if command == "score" else [])]
    with open("/dev/full", "wb") as full:
        for stdout, code, said in (closed, 0, b""), (full, 2, b"Error: cannot write to stdout: No space left"):
            with started(*arguments, stdout=stdout) as process:
                _, stderr = process.communicate(timeout=20)
            assert process.returncode == code and said in stderr and b"a bug" not in stderr


def test_what_is_told_never_comes_among_the_data(scored: Path) -> None:
    script = '"$0" -c "$1" score "$2" --by kind 2>&-'
    command = ["bash", "-c", script, sys.executable, DRIVER, str(scored)]
    done = subprocess.run(command, env={**os.environ, "TESTS": str(TESTS)}, cwd=ROOT, capture_output=True, timeout=30)
    assert done.returncode == 0
    assert json.loads(done.stdout)["groups"].keys() == {"é"}


# Terminals


def terminal_output(*arguments: str | Path, width: int = 120, **options: Any) -> tuple[int, bytes]:
    """Exit code and what a terminal that is stdout and stderr has shown."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 25, width, 0, 0))
    shown = b""
    with started(*arguments, **{"stdout": theirs, "stderr": theirs, **options}) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while select.select([ours], [], [], 20)[0] and (data := os.read(ours, 4096)):
                shown += data
        os.close(ours)
        return process.wait(timeout=5), shown


def test_a_bar_on_a_terminal(photos: Path) -> None:
    code, shown = terminal_output("caption", photos, fake={"batch_size": 1, "delay": 0.15})
    assert code == 3
    assert b"/7 [" in shown and b"failed=1" in shown and b"row/s" in shown
    assert shown.count(b'"id": ') == 7
    assert b"image_unreadable: 1 row: broken.png" in shown
    assert b"7 rows: 6 with a text, 1 failed" in shown.splitlines()[-1]


def test_errors_are_coloured_on_a_terminal_only(tmp_path: Path) -> None:
    code, shown = terminal_output("caption", tmp_path / "none")
    assert code == 2 and b"\x1b[1;31mError: \x1b[0m" in shown


# Help, versions, packaging


def test_version_and_module() -> None:
    done = subprocess.run([sys.executable, "-m", "idefics_cli", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == f"idefics {idefics_cli.__version__}\n"


def test_info_prints_versions_and_the_device() -> None:
    result = CliRunner().invoke(cli.app, ["info", "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    facts = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert facts["idefics"] == idefics_cli.__version__
    assert (facts["device"], facts["dtype"]) == ("cpu", "float32")


def test_info_names_the_extras_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*info.EXTRAS} == extras.keys() - {"docs", "test"}
    monkeypatch.setattr(info, "find_spec", lambda module: None if module in ("pillow_heif", "ray") else module)
    result = CliRunner().invoke(cli.app, ["info", "--device", "cpu"])
    said = "missing: heif (HEIC images), ray (--ray): pip install 'idefics-cli[heif,ray]'"
    assert said in result.stdout.splitlines()
    monkeypatch.setattr(info, "find_spec", lambda module: module)
    assert "missing: nothing" in CliRunner().invoke(cli.app, ["info", "--device", "cpu"]).stdout.splitlines()


def test_ci_runs_the_command_of_the_readme() -> None:
    command = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert command.startswith("python3 -m venv ")
    assert command in (ROOT / "README.md").read_text().splitlines()


def test_what_was_tested_is_pinned() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    declared = re.findall(r'^    "([A-Za-z0-9_-]+)[><=]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared and {name.lower().replace("_", "-") for name in declared} <= pinned
