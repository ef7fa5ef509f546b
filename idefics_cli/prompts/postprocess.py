"""What happens to a decoded text before it is written. Texts only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PostProcess:
    """How a decoded text becomes the written one: stripped, cut at the first of `cut_words`, then framed.

    The words are compared as the M4 evaluation does: letter by letter, capitals included, inside a longer word too.
    """

    cut_words: tuple[str, ...] = ()
    prefix: str = ""
    suffix: str = ""

    def __call__(self, text: str) -> str:
        text = text.strip()
        found = (text.find(word) for word in self.cut_words)
        end = min((place for place in found if place >= 0), default=len(text))
        return f"{self.prefix}{text[:end].rstrip()}{self.suffix}"
