"""Imports run downwards, as the contract in pyproject.toml has it, and never in a circle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
TURNED_ROUND = {
    "a base imports a command": ("errors.py", "from idefics_cli.cli import console"),
    "the same only for types": (
        "engine/options.py",
        "if TYPE_CHECKING:\n    from idefics_cli.loaded_model import LoadedModel",
    ),
    "one sibling another": ("readers/inputs.py", "from idefics_cli.writers import journal"),
    "a module that no layer names": ("unplanned.py", ""),
}


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    """What the contract says of the package in this folder."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def test_imports_run_downwards() -> None:
    found = lint(ROOT)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(("module", "line"), TURNED_ROUND.values(), ids=TURNED_ROUND)
def test_an_import_that_runs_upwards_is_found(tmp_path: Path, module: str, line: str) -> None:
    shutil.copytree(
        ROOT / "idefics_cli", tmp_path / "idefics_cli", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "idefics_cli" / module, "a") as file:
        file.write(f"\n{line}\n")
    found = lint(tmp_path)
    assert found.returncode == 1 and "BROKEN" in found.stdout, found.stdout + found.stderr


def test_no_modules_import_each_other() -> None:
    """Not through others either, nor for types only. The package itself gives names on, and is left out."""
    graph = grimp.build_graph("idefics_cli", exclude_type_checking_imports=False, cache_dir=None)
    modules = graph.modules - {"idefics_cli"}
    imports = {module: graph.find_modules_directly_imported_by(module) & modules for module in modules}
    TopologicalSorter(imports).prepare()  # raises CycleError
