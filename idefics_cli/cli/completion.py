"""What a shell may complete besides the names of options: models, templates, words that an option takes.

Where nothing of that fits, shells complete the names of files. Imports nothing heavy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from idefics_cli.checkpoint.request import DEFAULT_MODEL, DEMO
from idefics_cli.prompts.templates import TEMPLATES

MODEL, TEMPLATE = "model", "template"
CACHED = "models--"


def model_names(incomplete: str) -> list[str]:
    return [name for name in (DEMO, DEFAULT_MODEL, *_cached()) if name.startswith(incomplete)]


def template_names(incomplete: str) -> list[str]:
    return [name for name in TEMPLATES if name.startswith(incomplete)]


def words_of(metavar: str) -> Callable[[str], list[str]]:
    """Those that are typed as they stand in `auto|N`."""
    words = [word for word in metavar.split("|") if word.islower()]

    def completed(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return completed


def _cached() -> Iterator[str]:
    """IDEFICS models in the hub's cache, whose library takes long to import."""
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    for folder in sorted(cache.glob(f"{CACHED}*idefics*")):
        name = folder.name.removeprefix(CACHED).replace("--", "/")
        if name != DEFAULT_MODEL:
            yield name
