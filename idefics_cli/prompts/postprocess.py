"""What happens to a decoded text before it is written: it is cut at the first stop word, and framed. Texts only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from idefics_cli.errors import IdeficsError
from idefics_cli.storage.filenames import is_utf8
from idefics_cli.validation import Help


def parse_words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


@dataclass(frozen=True)
class PostProcess:
    """How a decoded text becomes the written one: cut at the first of `cut_words`, then framed.

    `cut_words` None: those of the task's published protocol, where there is one.
    """

    cut_words: Annotated[
        tuple[str, ...] | None,
        Help(
            "Cut each text at the first of these words; '' for none",
            metavar="A,B",
            flags=("--stop-words",),
            default="those of the published protocol",
            parse=parse_words,
        ),
    ] = None
    prefix: Annotated[str, Help("Prepended to each output", metavar="TEXT", default=False)] = ""
    suffix: Annotated[str, Help("Appended to each output", metavar="TEXT", default=False)] = ""

    def __post_init__(self) -> None:
        for name, text in (("--prefix", self.prefix), ("--suffix", self.suffix)):
            if not is_utf8(text):
                raise IdeficsError(f"{name} is not valid UTF-8: write it in UTF-8")

    def __call__(self, text: str) -> str:
        return f"{self.prefix}{cut_at_stop_word(text, self.cut_words or ())}{self.suffix}"


def cut_at_stop_word(text: str, stop_words: Iterable[str]) -> str:
    """`text` up to the first stop word, without white space at its ends.

    As the M4 evaluation compares them: letter by letter, capitals included, anywhere, inside a longer word too.
    """
    text = text.strip()
    places = (text.find(word) for word in stop_words)
    return text[: min((place for place in places if place >= 0), default=len(text))].rstrip()
