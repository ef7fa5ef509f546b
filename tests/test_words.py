"""Whatever users can read is plain: help, README, docs, and the messages in the package's own code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from idefics_cli.cli.app import app

ROOT = Path(__file__).parent.parent
WORDS = (
    "picture",
    "(?:begin|start)s? anew",
    "goes on",
    r"mend(?:s|ed)?\b",
    "told apart",
    "behind",
    "nobody",
    "(?:is|are) no ",
)
FORBIDDEN = re.compile(rf"\b(?:{'|'.join(WORDS)})", re.IGNORECASE)
GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands  # type: ignore[attr-defined]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
MODULES = sorted((ROOT / "idefics_cli").rglob("*.py"))


def found(text: str) -> list[str]:
    """The forbidden words, each with what stands around it."""
    text = " ".join(text.split())
    return [text[max(0, match.start() - 30) : match.end() + 30] for match in FORBIDDEN.finditer(text)]


def messages(tree: ast.AST) -> Iterator[str]:
    """Every literal that is not a docstring; of an f-string the text between its fields."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(each.value if isinstance(each, ast.Constant) else "{}" for each in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str) -> None:
    result = CliRunner().invoke(app, [*([command] if command else []), "--help"])
    assert result.exit_code == 0 and not found(result.stdout)


@pytest.mark.parametrize("page", PAGES)
def test_pages(page: str) -> None:
    assert not found((ROOT / page).read_text(encoding="utf-8"))


def test_help_and_pages_name_the_same_options() -> None:
    options = {
        name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in ({"": GROUP} | COMMANDS).items()
    }
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"(?<![\w-])--?[a-z0][a-z-]*", pages)) - {
        "--nproc-per-node",
        *("--array", "--now", "--beside", "--tokens", "--beams"),
        *("--folder", "--threads", "--all-questions"),
        *("--extra-index-url", "--torch-backend", "--pip-args"),
        *("--address", "--head", "--port", "--sort", "--train", "--enable-beam-search", "--help"),
    }  # of torchrun, SLURM, systemd, benchmarks, our tools, Ray, installers, tar, diffusers, SGLang; and of all
    assert not {flag for flag in named if flag.startswith("--")} - set().union(*options.values())
    for command in "caption", "vqa", "generate", "embed", "info":
        for parameter in COMMANDS[command].params:
            assert (
                parameter.name == "debug" or named.intersection(parameter.opts) or not parameter.opts[0].startswith("-")
            )


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    assert not [each for message in messages(tree) for each in found(message)]


def test_forbidden_words_are_found() -> None:
    bad = "f is no manifest: mend it, or begin anew"
    assert len(found(bad)) == 3 and not found("recommended; the beginning of a pause")
    assert found(next(messages(ast.parse('f"{x} is no {y}"'))))
