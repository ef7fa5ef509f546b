"""What a user sees of the package: its names, its types, and how little `--help` imports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import idefics_cli
from idefics_cli.model import modeling

ROOT = Path(__file__).parent.parent
CALLER = Path(__file__).with_name("api_caller.py")
FACE = [ROOT / "idefics_cli" / name for name in ("idefics.py", "result.py", "errors.py", "__init__.py")]
HEAVY = {"torch", "transformers", "numpy", "PIL", "pyarrow", "huggingface_hub", "safetensors", "tqdm", "fsspec"}
HEAVY |= {"pydantic", "rich.markdown", "rich.traceback"}  # what Typer would import


def test_dir_names_all_that_can_be_imported() -> None:
    assert set(idefics_cli.__all__) <= set(dir(idefics_cli))
    assert {"Candidate", "Idefics", "IdeficsError", "Result", "RowError"} <= set(idefics_cli.__all__)
    assert all(getattr(idefics_cli, name) is not None for name in idefics_cli.__all__)
    with pytest.raises(AttributeError, match="Ideficks"):
        idefics_cli.Ideficks  # noqa: B018


def test_the_networks_classes_are_named_by_their_package() -> None:
    from idefics_cli.model import IdeficsForVisionText2Text, IdeficsModel

    assert (IdeficsForVisionText2Text, IdeficsModel) == (modeling.IdeficsForVisionText2Text, modeling.IdeficsModel)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["caption", "--help"], ["help", "info"], ["-V"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "idefics_cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "import time:" in line}
    assert "idefics_cli.cli.app" in imported
    assert not imported & HEAVY


@pytest.mark.timeout(900)
def test_the_public_api_is_typed(tmp_path: Path) -> None:
    """pyright finds nothing in a strict caller nor in the face itself, and does find what is wrong elsewhere."""
    assert (ROOT / "idefics_cli" / "py.typed").is_file()
    wrong = tmp_path / "wrong.py"
    calls = "caption(3)", "caption('a.png', num_beans=3)", "answer('a.png', 3)", "caption('a.png', num_beams='3')"
    lines = [
        "from idefics_cli import Idefics",
        "model = Idefics.from_pretrained('demo')",
        *map("model.{}".format, calls),
    ]
    wrong.write_text("\n".join(lines), encoding="utf-8")
    errors = pyright(CALLER, wrong, *FACE)
    places = {(Path(each["file"]).name, each["range"]["start"]["line"]) for each in errors}
    assert places == {("wrong.py", 2 + number) for number in range(len(calls))}, errors


def pyright(*files: Path) -> list[dict]:
    """The errors it reports; the test is skipped where it cannot be run."""
    program = shutil.which("pyright", path=str(Path(sys.executable).parent)) or shutil.which("pyright")
    if program is None:
        pytest.skip("pyright is not installed")
    command = [program, "--outputjson", "--pythonpath", sys.executable, *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if not result.stdout.startswith("{"):
        pytest.skip(f"pyright cannot be run: {result.stderr[-200:]}")
    return [each for each in json.loads(result.stdout)["generalDiagnostics"] if each["severity"] == "error"]
