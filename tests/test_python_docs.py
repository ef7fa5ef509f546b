"""The code of docs/python.md runs as it stands, and prints what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAIN, ADAPTERS = (ROOT / "docs" / "python.md").read_text(encoding="utf-8").split("## With datasets and with Ray")
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
SAID = re.compile(r"(?:^|.*print\(.*\)  )# (.*)")


def runs(folder: Path, *blocks: str) -> None:
    """In one process, in a folder with the examples; worker processes and the libraries' own ones included."""
    (folder / "examples").symlink_to(ROOT / "examples")
    script = folder / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    env = {**os.environ, **settings, "PYTHONPATH": path, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    done = subprocess.run([sys.executable, script], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [found[1] for line in "\n".join(blocks).splitlines() if (found := SAID.fullmatch(line))]
    assert done.stdout.splitlines() == expected


def test_the_page(tmp_path: Path) -> None:
    runs(tmp_path, *BLOCK.findall(MAIN))


@pytest.mark.slow
@pytest.mark.parametrize("library", ["datasets", "ray"])
def test_adapters(tmp_path: Path, library: str) -> None:
    pytest.importorskip(library)
    adapter, *uses = BLOCK.findall(ADAPTERS)
    (use,) = [block for block in uses if f"import {library}" in block or f"from {library} " in block]
    runs(tmp_path, "from pathlib import Path\n", adapter, use)
