"""Source distributions of the packages we build on, for the test data that their wheels leave out.

Fetched with pip as it is configured, once, and kept; a test that cannot have one is skipped with the reason.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

DOWNLOAD_SECONDS = 240
KEPT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "idefics-cli-tests"  # not the tests' own


def sdist(package: str, version: str) -> Path:
    """The unpacked source distribution of `package`, kept between runs; or the test is skipped."""
    folder = KEPT / f"{package}-{version}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            unpacked = Path(scratch) / "unpacked"
            shutil.unpack_archive(_download(package, version, Path(scratch)), unpacked, filter="data")
            (top,) = unpacked.iterdir()
            with contextlib.suppress(OSError):  # another test process was faster
                top.rename(folder)
    return folder


def _download(package: str, version: str, folder: Path) -> Path:
    # pip asks the source for its name before it hands it over, and for that it sets up the build system it names.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", package, "--dest", str(folder)]
    try:
        result = subprocess.run(
            [*command, f"{package}=={version}"], capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"the source of {package} {version} did not arrive within {DOWNLOAD_SECONDS} s")
    archives = list(folder.glob("*.tar.gz"))
    if result.returncode or not archives:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        pytest.skip(f"the source of {package} {version} cannot be had here: {reason}")
    return archives[0]
