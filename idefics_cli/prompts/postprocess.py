"""What happens to a decoded text before it is written: it is cut at the first stop word, and framed. Texts only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class PostProcess:
    """How a decoded text becomes the written one: cut at the first of `cut_words`, then framed."""

    cut_words: tuple[str, ...] = ()
    prefix: str = ""
    suffix: str = ""

    def __call__(self, text: str) -> str:
        return f"{self.prefix}{cut_at_stop_word(text, self.cut_words)}{self.suffix}"


def cut_at_stop_word(text: str, stop_words: Iterable[str]) -> str:
    """`text` up to the first stop word, without white space at its ends.

    As the M4 evaluation compares them: letter by letter, capitals included, anywhere, inside a longer word too.
    """
    text = text.strip()
    places = (text.find(word) for word in stop_words)
    return text[: min((place for place in places if place >= 0), default=len(text))].rstrip()
