"""What is measured once on a machine and then remembered.

A choice by the clock also decides how numbers round, so all processes of a run, and the same command tomorrow, must
make the same one. The cache folder may be deleted at any time, and may be shared by machines of several kinds.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

Found = TypeVar("Found", float, list[int])  # what JSON gives back as it was
KIND_OF_PROCESSOR = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features")


def cache_folder() -> Path:
    """Of a user without a home: no folder, but a name below which none can be made."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache if os.path.isabs(cache) else os.devnull) / "idefics"


def once_per_machine(measured: str, measure: Callable[[], Found]) -> Found:
    """What `measure` has once found here for `measured`, which has to name all that it depends on but the processor.

    Of processes that measure at the same time all take what the first has found.
    """
    key = blake2b(f"{measured}\n{_processor()}".encode(), digest_size=16).hexdigest()
    path = cache_folder() / "measured" / f"{key}.json"
    with contextlib.suppress(OSError):
        return _whole(path)
    found = measure()
    with contextlib.suppress(OSError):  # a place that cannot be written costs the next process the same
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_once(path, json.dumps(found))
        return _whole(path)
    return found


def _whole(path: Path) -> Any:
    """What the file holds. Raises OSError where there is none, or a damaged one, which goes."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{path} is damaged") from error


def _write_once(path: Path, text: str) -> None:
    """The file is whole wherever it is seen, and the first one stays."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp") as file:
        file.write(text)
        file.flush()
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)


@cache
def _processor() -> str:
    try:
        first, *_ = Path("/proc/cpuinfo").read_text().split("\n\n")
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(line for line in first.splitlines() if line.startswith(KIND_OF_PROCESSOR))
