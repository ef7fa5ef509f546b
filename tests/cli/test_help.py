"""Help: its panels and examples, what it may show of each command, how quick it is, and what shells complete."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeCaptioner, save_image
from typer.testing import CliRunner, Result
from written_manifests import write_manifest

from idefics_cli.cli.app import app, command_line
from idefics_cli.cli.help import DOCS, EXAMPLES, PANELS, WIDEST

ROOT = Path(__file__).parents[2]
GROUP = command_line()
COMMANDS = GROUP.commands


def help_of(command: str, width: int = 80) -> str:
    result = CliRunner().invoke(app, [command, "--help"] if command else ["--help"], env={"COLUMNS": str(width)})
    assert result.exit_code == 0, result.output
    return result.stdout


def options_of(command: str) -> Iterator[Any]:
    return (each for each in COMMANDS[command].params if each.param_type_name == "option" and not each.hidden)


# ---- panels


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_its_panel(command: str) -> None:
    titles = re.findall(r"^╭─ (.+?) ─", help_of(command), re.MULTILINE)
    assert titles == [title for title in PANELS if title in titles] and titles[-1] == "Run"
    assert {each.rich_help_panel for each in COMMANDS[command].params} <= set(titles)


def test_a_run_has_all_panels() -> None:
    for command in "caption", "vqa", "generate":
        assert re.findall(r"^╭─ (.+?) ─", help_of(command), re.MULTILINE) == list(PANELS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("width", [36, 80, 200])
def test_help_fits_and_is_plain(command: str, width: int) -> None:
    shown = help_of(command, width)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= min(width, WIDEST) or width < 40
    for strange in "x<=", "x>=", "<list", "<str>", "{INPUT}", "{RESULTS}", "default: (", "None", "…", "...]":
        assert strange not in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_no_word_is_lost_in_narrow_terminals(command: str) -> None:
    """Long names of options apart, which are cut where they must be."""
    words = [re.sub(r"[╭─╮│╰╯\s]", "", help_of(command, width)) for width in (50, 80, 120)]
    assert sorted(words[0]) == sorted(words[1]) == sorted(words[2])


def test_help_ends_with_three_examples_and_the_docs() -> None:
    assert EXAMPLES.keys() == {*COMMANDS, "idefics"}
    for command in "", *COMMANDS:
        examples = EXAMPLES[command or "idefics"]
        end = help_of(command).partition("\nExamples\n")[2]
        assert len(examples) == 3
        assert [line.strip() for line in end.splitlines() if line.startswith("  ")] == [
            line for about, example in examples for line in (f"# {about}", example)
        ]
        assert end.splitlines()[-1] == f"Docs: {DOCS}"


@pytest.mark.parametrize("example", [example for each in EXAMPLES.values() for _, example in each])
def test_examples_are_commands(example: str) -> None:
    """The options are there, and take what they are given."""
    (words,) = (shlex.split(each) for each in example.split("|") if each.split()[0] == "idefics")
    name, *arguments = words[1:]
    COMMANDS[name].make_context(name, arguments)


def test_the_address_of_the_docs_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["urls"]["Documentation"] == DOCS


# ---- other ways to ask


def test_idefics_alone_shows_three_commands() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0 and not result.stderr
    assert re.findall(r"^  (idefics .*)$", result.stdout, re.MULTILINE) == [each for _, each in EXAMPLES["idefics"]]


def test_help_of_a_command_by_name() -> None:
    for command in "caption", "":
        asked = CliRunner().invoke(app, ["help", *([command] if command else [])])
        assert asked.exit_code == 0 and asked.stdout == CliRunner().invoke(app, [*command.split(), "-h"]).stdout
    unknown = CliRunner().invoke(app, ["help", "captoin"])
    assert unknown.exit_code == 2 and "Did you mean 'caption'" in unknown.stderr


def test_a_missing_input_shows_how_the_command_is_used() -> None:
    result = CliRunner().invoke(app, ["caption"], prog_name="idefics")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == "Usage: idefics caption INPUT... [OPTIONS]"
    assert result.stderr.splitlines()[-1] == "Error: Missing argument 'INPUT'."


@pytest.mark.parametrize(
    ("command", "option", "value", "taken"),
    [
        ("caption", "--dtype", "fp8", "'auto', 'bf16', 'fp16', 'fp32', 'bfloat16', 'float16', 'float32'"),
        ("caption", "--format", "csv", "'auto', 'jsonl', 'parquet'"),
        ("vqa", "--format", "csv", "'auto', 'jsonl', 'parquet', 'vqav2'"),
    ],
)
def test_a_value_that_is_not_one_of_a_few_is_told_with_those_that_are(
    command: str, option: str, value: str, taken: str
) -> None:
    result = CliRunner().invoke(app, [command, "a.png", option, value])
    assert result.exit_code == 2
    said = result.stderr.splitlines()[-1]
    assert said == f"Error: Invalid value for '{option}': '{value}' is not one of {taken}"


# ---- no option that the command refuses


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Inputs of all kinds, and what options name."""
    save_image(tmp_path / "a.png")
    row = {"id": "a", "image": "a.png", "question": "Q?", "answer": "red", "caption": "red", "answers": ["red"]}
    row |= {"prompt": ["a.png", "What?"], "words": ["red", "blue"]}
    for name in "rows.jsonl", "rows.csv":
        write_manifest(tmp_path / name, [row])
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [row]}))
    (tmp_path / "run.toml").write_text("limit = 1")
    write_manifest(tmp_path / "shots.jsonl", [{**row, "id": f"{number}"} for number in range(4)])
    return tmp_path


# Processes, folders and weights, which tests of their own have.
NEEDS_MORE = {"--processes", "--ray", "--unit-rows", "--format", "--adapter", "--embeddings"}
FILE = ("-o", "out.jsonl")
WITH: dict[str, tuple[str, ...]] = {  # what options take, and what they need beside them
    **dict.fromkeys(("--overwrite", "--update", "--retry-errors"), FILE),
    "--output": ("out.jsonl",),
    "--answers-column": ("answers", *FILE, "--choices", "red,blue"),
    "--sidecar-existing": ("skip", "--sidecar"),
    "--sidecar-ext": (".text", "--sidecar"),
    "--stdin": ("paths",),
    "--image-column": ("image",),
    "--id-column": ("id",),
    "--image-root": (".",),
    "--json-key": ("rows",),
    "--delimiter": (",",),
    "--encoding": ("utf-8",),
    "--keep": ("id",),
    "--shard": ("1/1",),
    "--frame": ("first",),
    "--config": ("run.toml",),
    "--batch-size": ("2",),
    "--model": ("demo",),
    "--revision": ("main",),
    "--dtype": ("fp32",),
    "--device": ("cpu",),
    "--device-map": ("auto",),
    "--quantize": ("int8",),
    "--attention": ("sdpa",),
    "--template": ("caption",),
    "--prompt": ("{image}",),
    "--shots": ("shots.jsonl",),
    "--num-shots": ("1", "--shots", "shots.jsonl"),
    "--shot-selection": ("first", "--shots", "shots.jsonl"),
    "--allow-self": ("--shot-selection", "similar", "--shots", "shots.jsonl", "--num-shots", "1"),
    "--question": ("Why?",),
    "--question-column": ("question",),
    "--prompt-column": ("prompt",),
    "--choices": ("a,b",),
    "--choices-column": ("words",),
    "--choice-norm": ("tokens", "--choices", "a,b"),
    "--stop-words": ("a",),
    "--dry-run": ("-m", "demo"),
    "--show-prompt": ("1", "-m", "demo"),
    "--early-stopping": (),
    "--min-new-tokens": ("1",),
    "--num-return-sequences": ("2",),
    "--temperature": ("0.5", "--do-sample"),
    "--top-k": ("5", "--do-sample"),
    "--top-p": ("0.5", "--do-sample"),
    "--seed": ("1", "--do-sample"),
}


def tried(command: str, option: Any) -> list[str]:
    """A command with this option and all that it needs."""
    name = option.opts[-1]
    source = {
        **dict.fromkeys(("--null", "--stdin"), "-"),
        **dict.fromkeys(("--delimiter", "--encoding"), "rows.csv"),
        "--json-key": "rows.json",
    }.get(name, "rows.jsonl")
    values = WITH.get(name, () if option.is_flag else ("1",))
    if command == "embed":
        values = tuple(each for each in values if each not in FILE) + (
            ("-o", "out.parquet") if name != "--output" else ()
        )
        values = ("out.parquet",) if name == "--output" else values
    asks = ["-q", "Q?"] if command == "vqa" and source == "-" else []
    if name in ("--template", "--prompt"):
        values = ("vqa",) if name == "--template" else ("{image} {question}",)
    return [command, source, name, *values, *asks]


class Scoring(FakeCaptioner):
    """Ranks choices too."""

    def encode_choices(self, prompt: Any, choices: Any, start: Any = ()) -> str:
        return self.encode(prompt, 1)

    def score_stream(self, source: Any, choice_norm: str) -> Any:
        return self.stream(source)


@pytest.mark.parametrize("command", ["vqa", "generate", "embed"])  # caption has those of vqa
def test_a_shown_option_is_not_refused(
    run: Callable[..., Result], inputs: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(inputs)
    refused = {}
    for option in options_of(command):
        if option.opts[-1] in NEEDS_MORE | {"--help"}:
            continue
        words = tried(command, option)
        if command == "generate" and words[1] == "-":
            continue  # paths on stdin have no prompts
        result = run(*words, captioner=Scoring(), input=b"a.png\n")
        for left in inputs.glob("out.*"):
            left.unlink()
        if result.exit_code not in (0, 3):
            refused[" ".join(words)] = result.stderr.splitlines()[-1]
    assert not refused
