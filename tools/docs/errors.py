"""docs/troubleshooting.md: every message of the package that ends a run or fails a row, found in its code.

`catalogue` is what tests/errors_produced.py compares with the errors that the tests have produced.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.docs.options import cell

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "idefics_cli"
BELOW = "<!-- Below: made from the code by `python -m tools.docs`. -->"
MISTAKES = ("IdeficsError", "InputError", "OutputError", "CheckpointError", "DeviceError")
GROUPS = {  # by the beginning of a file's name
    "Options": ("cli/", "validation.py", "rows.py", "pipeline/options.py", "tasks/options.py"),
    "Inputs": ("readers/", "storage/", "columns.py", "report/results.py", "evaluation/"),
    "Images": ("images/",),
    "Prompts, shots and choices": ("prompts/", "tasks/"),
    "Models and devices": ("checkpoint/", "model/", "engine/", "loaded_model.py", "bench/"),
    "Outputs, and resuming": ("writers/", "pipeline/", "report/"),
    "Many processes": ("scale/", "ranks.py"),
    "From Python": ("idefics.py", "result.py"),
}


@dataclass(frozen=True)
class Site:
    """A place in the code that makes an error. `kind` is the class, or a row error's code."""

    file: str
    first: int
    last: int
    kind: str
    message: str

    @property
    def is_row(self) -> bool:
        return self.kind not in MISTAKES

    @property
    def group(self) -> str:
        return next(name for name, files in GROUPS.items() if self.file.startswith(files))


def catalogue() -> list[Site]:
    return [
        site
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "errors.py"
        for site in sites(str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8")))
    ]


def sites(file: str, tree: ast.AST) -> Iterator[Site]:
    """Those with a message of their own; what only passes a message on is found where the message is made."""
    for node in ast.walk(tree):
        name = getattr(node.func, "id", None) if isinstance(node, ast.Call) else None
        if name in (*MISTAKES, "require"):
            texts, kind = node.args[-1:], "CheckpointError" if name == "require" else name
        elif name == "RowError" and isinstance(node.args[0], ast.Constant):
            texts, kind = node.args[1:], node.args[0].value
        else:
            continue
        message = written(texts[0]) if texts else ""
        if re.search(r"[a-z]{3}", message):
            yield Site(file, node.lineno, node.end_lineno or node.lineno, kind, message)


def written(node: ast.expr) -> str:
    """The text, with an ellipsis for each value in it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(written, node.values))
    if isinstance(node, ast.BinOp):
        return written(node.left) + written(node.right)
    return "…"


def page() -> str:
    by_hand = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").partition(BELOW)[0]
    return by_hand + "\n".join([BELOW, "", *rows_section(), *mistakes_sections()])


def rows_section() -> Iterator[str]:
    found = [site for site in catalogue() if site.is_row]
    yield "## Messages of rows\n\n| code | message |\n|---|---|"
    for kind, message in sorted({(site.kind, site.message) for site in found}):
        yield f"| `{kind}` | {code(message)} |"
    yield ""


def mistakes_sections() -> Iterator[str]:
    found = [site for site in catalogue() if not site.is_row]
    for group in GROUPS:
        yield f"## Messages: {group[0].lower()}{group[1:]}\n\n| what it says | what to do |\n|---|---|"
        for message in sorted({site.message for site in found if site.group == group}):
            what, _, remedy = message.rpartition(": ")
            yield f"| {code(what or remedy)} | {code(remedy) if what else ''} |"
        yield ""


def code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    padding = " " if "`" in text else ""
    return cell(f"{fence}{padding}{' '.join(text.split())}{padding}{fence}")
