"""How large the code is: `python tools/count.py [FOLDER...]` counts lines, files, classes and functions by folder.

Of every `.py` file below a folder: lines as `wc` counts them, classes (dataclasses and Protocols among them), and
functions, the median and the longest from `def` to the end. Then the forms that a row and an image take on their way:
the lists below, whose names must exist in the package.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "idefics_cli"
FORMS = {  # the class, or the function that makes the tensors
    "row": {
        "InputRow": "as a reader gives it",
        "Prompt": "texts and images in order",
        "EncodedPrompt": "token ids, pixels and what they share",
        "QueuedPrompt": "in the engine's queue",
        "Result": "its texts with their scores",
        "Column": "a row of the output, one value for each column",
    },
    "image": {
        "ImageSource": "path, address or bytes",
        "EncodedImage": "pixels and a key of their content",
        "encode_images": "latents (seq, dim)",
        "project_images": "keys and values of each gated layer",
    },
}


@dataclass
class Count:
    files: int = 0
    lines: int = 0
    classes: int = 0
    dataclasses: int = 0
    protocols: int = 0
    functions: list[tuple[int, str]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

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
            self.names.update(_names(node))

    @property
    def median(self) -> float:
        return statistics.median(size for size, _ in self.functions) if self.functions else 0


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


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
    counts = count(folder)
    yield f"{folder!s:16} files  lines classes dataclasses Protocols functions median"
    for name, each in counts.items():
        numbers = f"{each.files:5} {each.lines:6} {each.classes:7} {each.dataclasses:11} {each.protocols:9}"
        yield f"  {name:14} {numbers} {len(each.functions):9} {each.median:6g}"
    yield "  longest functions: " + ", ".join(
        f"{size} {where}" for size, where in sorted(counts["all"].functions)[:-4:-1]
    )


def forms(names: set[str]) -> Iterator[str]:
    for thing, listed in FORMS.items():
        yield f"forms of {'an' if thing == 'image' else 'a'} {thing}: {len(listed)}"
        for name, meaning in listed.items():
            yield f"  {name:14} {meaning}{'' if name in names else ' (MISSING: correct the list)'}"


def main() -> None:
    for folder in sys.argv[1:] or (PACKAGE, "tests"):
        print("\n".join(table(Path(folder))))
    print("\n".join(forms(count(Path(PACKAGE))["all"].names)))


if __name__ == "__main__":
    main()
