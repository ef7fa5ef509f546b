"""What happens to a decoded text before it is written. Texts only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from idefics_cli.errors import IdeficsError
from idefics_cli.storage.filenames import is_utf8
from idefics_cli.validation import Help


def parse_words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


@dataclass(frozen=True)
class PostProcess:
    """How a decoded text becomes the written one: stripped, cut at the first of `cut_words`, then framed.

    The words are compared as the M4 evaluation does: letter by letter, capitals included, inside a longer word too.
    `cut_words` None: those of the task's published protocol, where there is one.
    """

    cut_words: Annotated[
        tuple[str, ...] | None,
        Help(
            "Cut texts at the first of these words; '': never",
            metavar="A,B",
            flags=("--stop-words",),
            default="those of the published protocol",
            parse=parse_words,
        ),
    ] = None
    prefix: Annotated[str, Help("Written before each text", metavar="TEXT", default=False)] = ""
    suffix: Annotated[str, Help("Written after each text", metavar="TEXT", default=False)] = ""

    def __post_init__(self) -> None:
        for name, text in (("--prefix", self.prefix), ("--suffix", self.suffix)):
            if not is_utf8(text):
                raise IdeficsError(f"{name} is not valid UTF-8: write it in UTF-8")

    def __call__(self, text: str) -> str:
        text = text.strip()
        found = (text.find(word) for word in self.cut_words or ())
        end = min((place for place in found if place >= 0), default=len(text))
        return f"{self.prefix}{text[:end].rstrip()}{self.suffix}"
