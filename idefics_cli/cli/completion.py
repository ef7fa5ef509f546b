"""What a shell may complete besides the names of options: models, templates, words that an option takes.

Where nothing of that fits, shells complete the names of files. Imports nothing heavy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from idefics_cli.checkpoint.request import DEFAULT_MODEL, DEMO
from idefics_cli.prompts.templates import TEMPLATES
from idefics_cli.storage.once_per_machine import cache_folder

CACHED = "models--"
SHELLS = ("bash", "zsh", "fish")


Completion: TypeAlias = Callable[[str], list[str]]


def model_names(incomplete: str) -> list[str]:
    return [name for name in (DEMO, DEFAULT_MODEL, *_cached()) if name.startswith(incomplete)]


def one_of(*words: str) -> Completion:
    def completed(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return completed


def completion_of(name: str, metavar: str) -> Completion | None:
    """Of an option's values: those of its name, or words that are typed as they stand in `auto|N`."""
    words = [word for word in metavar.split("|") if word.islower()]
    return BY_NAME.get(name) or (one_of(*words) if words else None)


def _cached() -> Iterator[str]:
    """IDEFICS models in the hub's cache, whose library takes long to import."""
    home = Path(os.environ.get("HF_HOME") or cache_folder().parent / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    for folder in sorted(cache.glob(f"{CACHED}*idefics*")):
        name = folder.name.removeprefix(CACHED).replace("--", "/")
        if name != DEFAULT_MODEL:
            yield name


BY_NAME = {
    "model": model_names,
    "template": one_of(*TEMPLATES),
    "device": one_of("auto", "cuda", "cpu", "mps"),
    "frame": one_of("first", "middle"),
}
