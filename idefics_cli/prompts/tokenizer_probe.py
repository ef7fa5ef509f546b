"""A `tokenizer.json` tried out in a process of its own, with limits: what it can do to memory and time it does there.

The tokenizers library runs whatever normaliser, pattern and decoder the file describes, in native code that can be
neither interrupted nor kept from ending its process. Started by `probe`; imports nothing heavy.
"""

from __future__ import annotations

import os
import string
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_BYTES = 2 << 30
MAX_SECONDS = 3  # of one processor, and five times as long by the clock; LLaMA's takes 0.3. This process does it again
MAX_GROWTH = 16  # times as long a text may become
SAMPLE = f"{string.printable} User: what is this? <image> </s>\ufdd0 é漢字😀\u0301"
REPEATED = "".join(30 * letter for letter in string.printable)
BOOTSTRAP = (
    "import sys; path = sys.argv[1]; sys.path[:] = sys.argv[2:]; "
    "from idefics_cli.prompts.tokenizer_probe import main; main(path, {seconds})"
)


def probe(path: Path) -> str | None:
    """Why this `tokenizer.json` cannot be used, or None."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", BOOTSTRAP.format(seconds=MAX_SECONDS), str(path), *sys.path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
            timeout=5 * MAX_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "it takes too long"
    except OSError as error:
        return f"the process to try it in cannot be started: {error}"
    if done.returncode == 0:
        return done.stdout.decode("utf-8", "replace") or None
    return f"it needs more than {MAX_BYTES >> 30} GB or {MAX_SECONDS} s, or crashes the tokenizers library"


def main(path: str, max_seconds: int) -> None:
    """Write to stdout what is wrong, if the limits let it."""
    import resource

    for limit, value in (
        (resource.RLIMIT_AS, MAX_BYTES),
        (resource.RLIMIT_CPU, max_seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(OSError, ValueError):  # a lower limit holds already
            resource.setrlimit(limit, (value, value))
    from tokenizers import Tokenizer

    try:
        found = _complaint(Tokenizer.from_file(path))
    except Exception as error:  # the library raises no narrower kind
        found = str(error).strip() or type(error).__name__
    sys.stdout.write(found)


def _complaint(tokenizer: Tokenizer) -> str:
    from idefics_cli.prompts.tokenize import literal_twin

    for each in (tokenizer, literal_twin(tokenizer, ())):
        for text in (SAMPLE, REPEATED):
            if each.normalizer and len(each.normalizer.normalize_str(text)) > MAX_GROWTH * len(text):
                return "its normalizer makes texts too long"
            ids = each.encode(text, add_special_tokens=False).ids
            if max(len(ids), len(each.decode(ids))) > MAX_GROWTH * len(text):
                return "it makes texts too long"
    return ""
