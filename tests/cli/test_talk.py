"""What a run says on stderr: start, status, first errors, summary; in JSON, off and on terminals, and in any width."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import FakeCaptioner
from test_cli import ROOT, started, terminal_output
from typer.testing import Result

from idefics_cli.cli.status import memory_in_use
from idefics_cli.pipeline.task import About, Observer, Relay, told

Run = Callable[..., Result]
CPU = ("cpu", "fp32")
STATUS = re.compile(
    r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d \d/7 rows, \d+\.\d\d per second(, \d:\d\d:\d\d left)?, \d failed,"
    r" model idle \d+% of the time, [\d,]+ MB of memory$",
    re.MULTILINE,
)


def events_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stderr.splitlines()]


# ---- off terminals


def test_a_run_begins_and_ends_with_a_line(run: Run, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    lines = run("caption", photos, "-o", output, captioner=FakeCaptioner(place=CPU)).stderr.splitlines()
    model = "HuggingFaceM4/idefics-9b-instruct"
    assert lines[0] == f"{model} on cpu in fp32, 3 beams, 4 rows at a time: {photos} to {output}."
    assert lines[1].startswith("First image_unreadable: ") and lines[1].endswith(" (row broken.png)")
    assert lines[2] == "image_unreadable: 1 row: broken.png"
    assert lines[3].startswith("7 rows: 6 with a text, 1 failed, in ") and lines[3].endswith(f" They are in {output}.")
    assert len(lines) == 4


def test_embeddings_have_no_beams(run: Run, photos: Path, tmp_path: Path) -> None:
    lines = run("embed", photos, "-o", tmp_path / "e.parquet", captioner=FakeCaptioner(place=CPU)).stderr.splitlines()
    assert " on cpu in fp32, 4 rows at a time: " in lines[0]


def test_each_event_is_an_object(run: Run, photos: Path, tmp_path: Path) -> None:
    """Names of events and of their fields are a promise: docs/overnight.md has them."""
    output = tmp_path / "out.jsonl"
    command = "caption", photos, "-o", output, "--log-json"
    events = events_of(run(*command, captioner=FakeCaptioner(place=CPU)))
    assert [event["event"] for event in events] == ["loading", "start", "row_failed", "failures", "end"]
    assert all({"time", "event", "text"} <= event.keys() for event in events)
    fields = {event["event"]: set(event) - {"time", "event", "text"} for event in events}
    counts = {"rows", "resumed", "failed", "seconds", "rate", "idle", "stopped_early", "output"}
    assert fields == {
        "loading": {"model"},
        "start": {"model", "device", "dtype", "beams", "rows_at_once", "input", "output"},
        "row_failed": {"id", "code", "error"},
        "failures": {"code", "rows", "ids"},
        "end": counts,
    }
    assert events[-1]["failed"] == 1 and events[-1]["output"] == str(output)
    assert [event["event"] for event in events_of(run(*command))] == ["end"]  # it is finished
    (mistake,) = events_of(run("caption", tmp_path / "none", "--log-json"))
    assert (mistake["event"], mistake["exit"]) == ("error", 2)
    page = (ROOT / "docs" / "overnight.md").read_text(encoding="utf-8")
    named = {each for event, names in fields.items() for each in (event, *names)} | {
        "status",
        "seconds_left",
        "memory_mb",
    }
    assert not {name for name in named if f"`{name}`" not in page}


def test_quiet_lets_through_what_ends_a_run(run: Run, photos: Path, tmp_path: Path) -> None:
    result = run("caption", photos, "--quiet", captioner=FakeCaptioner(place=CPU))
    assert (result.exit_code, result.stderr) == (3, "")
    assert run("caption", tmp_path / "none", "--quiet").stderr.startswith("Error: ")


def test_verbose_shows_each_failed_row_and_what_is_logged(run: Run, photos: Path) -> None:
    for name in "broken2.png", "broken3.png":
        (photos / name).write_bytes(b"no image")
    log = logging.getLogger("idefics_cli.model.fused")
    captioner = FakeCaptioner(before_call=lambda prompts: log.info("a detail"))
    for options, shown, told_of in ([], 1, False), (["-v"], 3, True):
        lines = run("caption", photos, *options, captioner=captioner).stderr.splitlines()
        assert sum("(row broken" in line for line in lines) == shown
        assert ("a detail" in lines) == told_of
    assert log.getEffectiveLevel() == logging.WARNING  # as before


@pytest.mark.parametrize("form", [[], ["--log-json"]])
def test_a_status_line_now_and_then(photos: Path, form: list[str]) -> None:
    fake = {"batch_size": 1, "delay": 0.3}
    with started("caption", photos, "--status-every", "0.4", *form, fake=fake) as process:
        stderr = process.communicate(timeout=60)[1].decode()
    if not form:
        assert len(STATUS.findall(stderr)) >= 2
        return
    events = [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]
    status = [event for event in events if event["event"] == "status" and "rows" in event]
    fields = {"time", "event", "text", "rows", "total", "rate", "seconds_left", "failed", "idle", "memory_mb"}
    assert len(status) >= 2 and all(event.keys() == fields for event in status)
    assert status[0]["total"] == 7 and status[0]["memory_mb"] > 10
    assert [event["rows"] for event in status] == sorted(event["rows"] for event in status)


def test_no_status_line_where_none_is_wanted(photos: Path) -> None:
    with started("caption", photos, "--status-every", "0", fake={"batch_size": 1, "delay": 0.1}) as process:
        assert b" per second," not in process.communicate(timeout=60)[1]


def test_memory_counts_processes_that_were_started() -> None:
    alone = memory_in_use()
    with subprocess.Popen([sys.executable, "-c", "x = b'1' * 10**8; input()"], stdin=subprocess.PIPE) as child:
        while memory_in_use() < alone + 10**8 and child.poll() is None:
            pass
        assert child.poll() is None
        child.communicate(b"\n")


def test_memory_where_torch_is_half_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A status line may come while a thread of the run imports it."""
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    assert memory_in_use() > 10**6


def test_processes_tell_their_driver_what_it_is_to_say() -> None:
    class Heard(Observer):
        def __init__(self) -> None:
            self.words: list[Any] = []

        def __getattribute__(self, name: str) -> Any:
            words = object.__getattribute__(self, "__dict__").get("words", [])
            return (lambda *given: words.append((name, *given))) if name.startswith(("on_", "say")) else words

    class Sender(Relay):
        def tell(self, kind: str, value: Any) -> None:
            hash(value)
            told(heard, kind, value)

    heard = Heard()
    sender, about = Sender(), About("demo", "cpu", "fp32", 3, 16)
    sender.on_loading("demo")
    sender.on_ready(about)
    sender.say("a word")
    for row_id, error in ("a", None), ("b", "row_invalid: no"), ("c", "row_invalid: no"), ("d", "image_missing: no"):
        sender.on_result({"id": row_id, "error": error, "caption": None})
    assert heard.words == [
        ("on_loading", "demo"),
        ("on_ready", about),
        ("say", "a word"),
        ("on_result", {"id": "b", "error": "row_invalid: no"}),
        ("on_result", {"id": "d", "error": "image_missing: no"}),
    ]


def test_parts_talk_as_one_file_does(photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "idefics_cli", "caption", photos, "-m", "demo", "--device", "cpu", "--log-json"]
    command += ["--status-every", "0.2"]
    done = subprocess.run(
        [*map(str, command), "-o", f"{tmp_path / 'parts'}/"], capture_output=True, cwd=ROOT, timeout=240
    )
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 3
    wanted = ["loading", "start", "row_failed", "failures", "end"]
    assert [event["event"] for event in events if event["event"] in wanted] == wanted
    places = [event["event"] for event in events]
    first_count = next((i for i, event in enumerate(events) if event["event"] == "status" and "rows" in event), 10**6)
    assert places.index("loading") < places.index("status") and places.index("start") < first_count
    assert next(event for event in events if event["event"] == "start")["output"] == f"{tmp_path / 'parts'}/"


def test_no_library_talks_where_a_model_is_loaded_from_python() -> None:
    script = "from idefics_cli import Idefics; Idefics.from_pretrained('demo', device='cpu')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- terminals


def shown_lines(data: bytes) -> list[str]:
    """What is left standing: after a carriage return a line is written again."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", data.decode())
    return [line.rstrip("\r").split("\r")[-1].rstrip() for line in text.split("\n")]


@pytest.mark.parametrize("width", [20, 33, 80, 200])
def test_lines_break_between_words(photos: Path, tmp_path: Path, width: int) -> None:
    output = tmp_path / "a-name-with-hyphens.jsonl"
    code, shown = terminal_output("caption", photos, "-o", output, "--status-every", "0", width=width)
    lines = shown_lines(shown)
    begin = next(number for number, line in enumerate(lines) if line.startswith("image_unreadable: 1"))
    end = " ".join(line for line in lines[begin:] if line)
    assert code == 3
    assert re.fullmatch(
        r"image_unreadable: 1 row: broken\.png 7 rows: 6 with a text, 1 failed, in \d+\.\d s \(\d+\.\d per second\);"
        rf" the model waited for images \d+% of the time\. They are in {re.escape(str(output))}\.",
        end,
    )
    too_long = [line for line in lines[begin:] if len(line) >= width and " " in line]
    assert not too_long, too_long


def test_a_spinner_while_the_model_is_loaded(photos: Path) -> None:
    code, shown = terminal_output("caption", photos, fake={"load": 1.0})
    turns = re.findall(rb"\r([-/|\\]) loading HuggingFaceM4/idefics-9b-instruct", shown)
    assert code == 3 and len(turns) > 3 and len(set(turns)) > 2
    assert not any("loading Hugging" in line for line in shown_lines(shown))


def test_no_bar_where_objects_are_wanted(photos: Path, tmp_path: Path) -> None:
    options = "-o", tmp_path / "f.jsonl", "--log-json", "--status-every", "0"
    _, shown = terminal_output("caption", photos, *options, fake={"load": 0.5})
    lines = [line for line in shown.decode().splitlines() if line and line != "loading"]
    assert [json.loads(line)["event"] for line in lines] == ["loading", "row_failed", "failures", "end"]
