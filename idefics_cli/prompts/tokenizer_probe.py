"""A `tokenizer.json` tried out in a limited process: what it can do to memory and time it does there.

The tokenizers library runs whatever normaliser, pattern and decoder the file describes, in native code that can be
neither interrupted nor kept from ending its process. Imports nothing heavy.
"""

from __future__ import annotations

import string
from pathlib import Path

from idefics_cli.storage.limited_process import complaint

MAX_SECONDS = 15.0  # LLaMA's takes 0.3. This process does it again
MAX_GROWTH = 16  # times as long a text may become
SAMPLE = f"{string.printable} User: what is this? <image> </s>\ufdd0 é漢字😀\u0301"
REPEATED = "".join(30 * letter for letter in string.printable)


def probe(path: Path) -> str:
    """Why this `tokenizer.json` cannot be used, or nothing."""
    return complaint("the tokenizers library", try_out, str(path.absolute()), seconds=MAX_SECONDS)


def try_out(path: str) -> str:
    """What is wrong, if the limits let it say so."""
    from tokenizers import Tokenizer

    from idefics_cli.prompts.tokenize import literal_twin

    try:
        tokenizer = Tokenizer.from_file(path)
        for each in (tokenizer, literal_twin(tokenizer, ())):
            for text in (SAMPLE, REPEATED):
                if each.normalizer and len(each.normalizer.normalize_str(text)) > MAX_GROWTH * len(text):
                    return "its normalizer makes texts too long"
                ids = each.encode(text, add_special_tokens=False).ids
                if max(len(ids), len(each.decode(ids))) > MAX_GROWTH * len(text):
                    return "it makes texts too long"
    except Exception as error:  # the library raises no narrower kind
        return str(error).strip() or type(error).__name__
    return ""
