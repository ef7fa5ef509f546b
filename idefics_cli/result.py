"""What comes out for a prompt or an image: texts with their scores, latents, or an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, Union

from idefics_cli.errors import RowError

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
    """Of one prompt: the best candidate's fields and all candidates, best first; or an `error` and no text."""

    text: str | None = None
    score: float | None = None
    tokens: int | None = None
    token_ids: tuple[int, ...] | None = None
    candidates: tuple[Candidate, ...] = ()
    error: RowError | None = None

    @classmethod
    def of(cls, candidates: Sequence[Candidate]) -> Result:
        best = candidates[0]
        return cls(best.text, best.score, best.tokens, best.token_ids, tuple(candidates))

    def finished(self, postprocess: Callable[[str], str]) -> Result:
        """The same with every text postprocessed; scores and tokens are still those of the whole decoded text."""
        if self.text is None:
            return self
        return self.of([replace(each, text=postprocess(each.text)) for each in self.candidates])


Outcome: TypeAlias = Union[Result, "Tensor", RowError]  # a tensor holds an image's latents (seq, dim)


def error_of(outcome: Outcome) -> RowError | None:
    return outcome if isinstance(outcome, RowError) else getattr(outcome, "error", None)
