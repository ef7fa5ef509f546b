"""LLaMA's own vocabulary and merges, from an npm package that carries them. Nothing of it is kept in the repository."""

from __future__ import annotations

import base64
import re
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_tokenizers import INSTRUCT_TOKENS, NAMED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 20
PACK = ["npm", "pack", "llama-tokenizer-js@1.2.2", "--silent", "--fetch-retries=0", f"--fetch-timeout={SECONDS}000"]


@dataclass(frozen=True)
class RealLlama:
    """What the package holds."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]

    def tokenizer(self, legacy: bool, added: Iterable[str] = INSTRUCT_TOKENS) -> PreTrainedTokenizerBase:
        """The tokenizer of an IDEFICS checkpoint; `legacy`: as those of 2023 have it."""
        from transformers import LlamaTokenizer

        tokenizer = LlamaTokenizer(vocab=self.vocab, merges=self.merges, legacy=legacy, padding_side="left", **NAMED)
        tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
        return tokenizer


def fetch_real_llama(folder: Path) -> RealLlama:
    """From the registry that npm is configured for; skips the test that asks where it is out of reach."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    try:
        subprocess.run(PACK, cwd=folder, capture_output=True, timeout=2 * SECONDS, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"llama-tokenizer-js cannot be had here: {error}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        source = archive.extractfile("package/llama-tokenizer.js").read().decode()
    return _unpacked(source)


def _unpacked(source: str) -> RealLlama:
    """The package's two base64 strings: names, a line each; and pairs of 16-bit ids, a merge each."""
    names_text, merges_text = (base64.b64decode(text) for text in re.findall(r'["\'`]([A-Za-z0-9+/=]{10000,})', source))
    names = names_text.decode().split("\n")
    ids = struct.unpack(f"<{len(merges_text) // 2}H", merges_text)
    merges = [(names[left], names[right]) for left, right in zip(ids[::2], ids[1::2], strict=True)]
    return RealLlama({name: index for index, name in enumerate(names)}, merges)
