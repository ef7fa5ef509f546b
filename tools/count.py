"""How large the house is: `python tools/count.py [FOLDER...]` counts lines, files, classes and functions by folder.

Counted of every `.py` file below a folder: lines as `wc` has them, classes (dataclasses and Protocols among them), and
functions with the number of lines from `def` to the end.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Count:
    files: int = 0
    lines: int = 0
    classes: int = 0
    dataclasses: int = 0
    protocols: int = 0
    functions: list[tuple[int, str]] = field(default_factory=list)

    def add(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self.files += 1
        self.lines += text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                self.classes += 1
                self.dataclasses += any("dataclass" in ast.unparse(each) for each in node.decorator_list)
                self.protocols += any("Protocol" in ast.unparse(each) for each in node.bases)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.functions.append((node.end_lineno - node.lineno + 1, f"{path}:{node.lineno} {node.name}"))


def count(folder: Path) -> dict[str, Count]:
    """By sub-folder, with "." for the files at the top and "all" at the end."""
    counts: dict[str, Count] = defaultdict(Count)
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        for name in (parts[0] if len(parts) > 1 else ".", "all"):
            counts[name].add(path)
    counts["all"] = counts.pop("all", Count())
    return counts


def table(folder: Path) -> Iterator[str]:
    yield f"{folder!s:16} files  lines classes dataclasses Protocols functions"
    for name, each in count(folder).items():
        numbers = f"{each.files:5} {each.lines:6} {each.classes:7} {each.dataclasses:11} {each.protocols:9}"
        yield f"  {name:14} {numbers} {len(each.functions):9}"
    lengths = count(folder)["all"].functions
    if lengths:
        yield f"  median function {statistics.median(size for size, _ in lengths):g} lines, longest {max(lengths)}"


def main() -> None:
    for folder in sys.argv[1:] or ("idefics_cli", "tests"):
        print("\n".join(table(Path(folder))))


if __name__ == "__main__":
    main()
