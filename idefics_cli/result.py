"""What comes out for a prompt or an image: texts with their scores, latents, or an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self, TypeAlias, Union

from idefics_cli.errors import IdeficsError, RowError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Candidate:
    """One of a prompt's texts.

    `score` is the sum of its tokens' log-probabilities, including the end token's, over length ** length_penalty.
    `token_ids` do not include the end token, and `tokens` counts them.
    """

    text: str
    score: float
    tokens: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """Of one prompt: the best candidate's fields and all candidates, best first; or an `error` and no text.

    `input` is what the caller gave, `index` its place among all that was given, from 0.
    """

    text: str | None = None
    score: float | None = None
    tokens: int | None = None
    token_ids: tuple[int, ...] | None = None
    candidates: tuple[Candidate, ...] = ()
    error: RowError | None = None
    input: Any = field(default=None, repr=False, compare=False)
    index: int | None = field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether there is a text."""
        return self.error is None

    def raise_for_error(self) -> Self:
        """The same; raises IdeficsError where the text is missing."""
        if self.error is not None:
            which = "" if self.index is None else f"input {self.index}: "
            raise IdeficsError(f"{which}{self.error}")
        return self

    @classmethod
    def of(cls, candidates: Sequence[Candidate]) -> Result:
        best = candidates[0]
        return cls(best.text, best.score, best.tokens, best.token_ids, tuple(candidates))

    def finished(self, postprocess: Callable[[str], str]) -> Result:
        """The same with every text postprocessed; scores and tokens are still those of the whole decoded text."""
        if self.text is None:
            return self
        written = self.of([replace(each, text=postprocess(each.text)) for each in self.candidates])
        return replace(written, input=self.input, index=self.index)


Outcome: TypeAlias = Union[Result, "Tensor", RowError]  # a tensor holds an image's latents (seq, dim)


def error_of(outcome: Outcome) -> RowError | None:
    return outcome if isinstance(outcome, RowError) else getattr(outcome, "error", None)
