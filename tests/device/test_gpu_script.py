"""benchmarks/gpu.sh to its end on the device in software: a benchmark that breaks is found before a GPU is at hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from idefics_cli.engine.options import DecodingOptions

ROOT = Path(__file__).parents[2]
ON_SOFTWARE = """#!{python}
import runpy, sys
sys.path[:0] = [{root!r}, {device!r}, {engine!r}]
module, sys.argv = sys.argv[2], sys.argv[2:]
if module == "pytest":
    runpy.run_module(module, run_name="__main__", alter_sys=True)
from software_cuda import SoftwareCuda
from idefics_cli.bench import compare, floor
floor.FLOOR_BYTES, floor.FLOOR_SECONDS = 1 << 16, 0.001
compare.copy_bandwidth = lambda device: floor.copy_bandwidth(device, 1 << 20)
with SoftwareCuda():
    runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
SMALL = {
    "SIZE": "tiny",
    "CHECKED": "tiny",
    "SCENES": "4",
    "PHOTOS": "8",
    "ROWS": "8",
    "BATCHES": "1 4",
    "PATIENCE": "5",
}
ONE_TEST = "tests/device/test_on_device.py::test_a_step_is_one_graph"


def test_the_checks_take_the_engine_as_it_is() -> None:
    subject = gpu_check.subject_on(gpu_check.CPU, "fp32", "tiny", 2)
    found = gpu_check.texts(subject, subject.prompts.draw(1), DecodingOptions(2, 3), 2)
    assert [type(ids) for ids in found] == [tuple, tuple], found
    assert gpu_check.latents_difference(gpu_check.CPU, "tiny") == 0.0


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the script itself runs there")
@pytest.mark.parametrize("call", "ABCDEFG")
def test_the_script_runs_to_its_end(call: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    folders = {"root": str(ROOT), "device": str(ROOT / "tests/device"), "engine": str(ROOT / "tests/engine")}
    python.write_text(ON_SOFTWARE.format(python=sys.executable, **folders))
    python.chmod(0o755)
    settings = os.environ | SMALL | {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "TESTS": ONE_TEST}
    script = ["bash", str(ROOT / "benchmarks/gpu.sh"), call]
    done = subprocess.run(script, env=settings, capture_output=True, text=True, timeout=2300)
    codes = re.findall(r"^== (\S+): exit code (\d+)", done.stdout, re.MULTILINE)
    assert codes and not [name for name, code in codes if code != "0"], done.stdout + done.stderr
    with tarfile.open(tmp_path / "out/gpu-results.tgz") as archive:
        assert {f"./{name}.json" for name, _ in codes} <= set(archive.getnames())
