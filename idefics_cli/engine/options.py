"""How a text is decoded: one frozen value, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Annotated, Any, Literal, get_type_hints

from idefics_cli.errors import IdeficsError
from idefics_cli.validation import Help, help_of, option_name, whole_number

NUM_BEAMS, TOP_K = 3, 50  # the latter as in transformers
MOST_PATHS = 1_000_000  # more than any memory holds
LARGEST_PENALTY = 10.0  # a length to a higher power is soon more than a float holds
LARGEST_FACTOR = 1e5  # of sums of log-probabilities, which are told from "none", −1e9, in transformers as here


@dataclass(frozen=True)
class DecodingOptions:
    """Beam search and sampling as `transformers.GenerationMixin.generate` means them; greedy is one beam.

    `num_beams` None is 3, or 1 with `do_sample`, which draws `num_return_sequences` texts each by itself; with several
    beams it draws what beam search would choose. The same prompt and `seed` draw the same texts in any batch.
    `early_stopping`: True stops when `num_beams` texts have ended, False when no better one is likely, "never" when
    none is possible. `length_penalty` is the exponent of the length that a sum of log-probabilities is divided by.
    `no_repeat_ngram_size` 0 allows repetition. Raises IdeficsError for a value or a combination that means nothing.
    """

    num_beams: Annotated[
        int | None,
        Help("Beams; 1 is greedy decoding", min=1, max=MOST_PATHS, default=f"{NUM_BEAMS}, 1 with --do-sample"),
    ] = None
    max_new_tokens: Annotated[int, Help("Longest text, in tokens", min=1)] = 30
    min_new_tokens: Annotated[int, Help("Shortest text, in tokens", min=0)] = 0
    length_penalty: Annotated[float, Help("Scores are divided by the length to this power")] = 1.0
    early_stopping: Annotated[
        bool | Literal["never"],
        Help("Stop once as many texts as beams have ended, or while none is likely to be better"),
    ] = True
    no_repeat_ngram_size: Annotated[int, Help("No n tokens in a row come twice; 0: they may", min=0)] = 0
    repetition_penalty: Annotated[float, Help("Above 1: tokens that the prompt or the text has become less likely")] = (
        1.0
    )
    num_return_sequences: Annotated[
        int, Help("Texts for each row, best first, in a column `candidates`", min=1, max=MOST_PATHS)
    ] = 1
    do_sample: Annotated[bool, Help("Draw each token by its probability")] = False
    temperature: Annotated[float, Help("Of --do-sample: below 1 less random, above 1 more")] = 1.0
    top_k: Annotated[int, Help("Of --do-sample: only the K likeliest tokens; 0: all", min=0)] = TOP_K
    top_p: Annotated[float, Help("Of --do-sample: only the likeliest tokens, to this sum of probability")] = 1.0
    seed: Annotated[int, Help("Of --do-sample", min=0)] = 0

    def __post_init__(self) -> None:
        if self.num_beams is None:
            object.__setattr__(self, "num_beams", 1 if self.do_sample else NUM_BEAMS)
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            about = help_of(hint)
            if about.min is not None:
                object.__setattr__(self, name, whole_number(name, getattr(self, name), about.min, about.max))
        for name, most in (("repetition_penalty", math.inf), ("temperature", math.inf), ("top_p", 1.0)):
            self._check_positive(name, most)
        self._check_sampling()
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise IdeficsError(f"invalid --early-stopping {self.early_stopping!r}: use True, False or 'never'")
        self._check_length_penalty()
        if self.min_new_tokens > self.max_new_tokens:
            raise IdeficsError(
                f"--min-new-tokens {self.min_new_tokens} is more than --max-new-tokens {self.max_new_tokens}: lower it"
            )
        if self.num_return_sequences > self.num_paths:
            raise IdeficsError(
                f"--num-return-sequences {self.num_return_sequences} is more than --num-beams {self.num_beams}:"
                " lower it, or raise --num-beams"
            )

    @property
    def num_paths(self) -> int:
        """How many texts of a row are decoded side by side: its beams, or its samples."""
        return self.num_return_sequences if self.do_sample and self.num_beams == 1 else self.num_beams

    def _check_sampling(self) -> None:
        usual = {"temperature": 1.0, "top_k": TOP_K, "top_p": 1.0}
        useless = next((name for name, value in usual.items() if getattr(self, name) != value), None)
        if useless and not self.do_sample:
            raise IdeficsError(f"{_option(useless)} has no effect unless tokens are drawn: add --do-sample")

    def _check_positive(self, name: str, most: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Real) or not (0 < value <= most and math.isfinite(value)):
            bounds = "above 0" if most == math.inf else f"above 0, at most {most:g}"
            raise IdeficsError(f"invalid {_option(name)} {value!r}: use a number {bounds}")
        object.__setattr__(self, name, float(value))

    def _check_length_penalty(self) -> None:
        if not isinstance(self.length_penalty, Real) or not abs(self.length_penalty) <= LARGEST_PENALTY:
            raise IdeficsError(
                f"invalid --length-penalty {self.length_penalty!r}: use a number from -{LARGEST_PENALTY:g} to "
                f"{LARGEST_PENALTY:g}, 1.0 for the mean log-probability"
            )
        object.__setattr__(self, "length_penalty", float(self.length_penalty))
        if self.max_new_tokens**-self.length_penalty > LARGEST_FACTOR:
            least = -math.log(LARGEST_FACTOR) / math.log(self.max_new_tokens)
            raise IdeficsError(
                f"--length-penalty {self.length_penalty:g} makes scores of {self.max_new_tokens} tokens too large to "
                f"compare: use at least {math.ceil(least * 10) / 10:g}, or fewer --max-new-tokens"
            )

    @classmethod
    def from_keywords(cls, decoding: dict[str, Any]) -> DecodingOptions:
        """The same from a caller's keywords; an unknown one is an IdeficsError that names the known ones."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(decoding) - set(known))
        if unknown:
            raise IdeficsError(f"unknown decoding option {', '.join(unknown)}: use {', '.join(known)}")
        return cls(**decoding)

    def require_space(self, positions: int) -> None:
        """Raise where a model of so many positions has none left for a prompt."""
        if self.max_new_tokens >= positions:
            raise IdeficsError(
                f"--max-new-tokens {self.max_new_tokens} leaves no space for a prompt: use fewer than {positions}"
            )


def _option(name: str) -> str:
    return option_name(name, Help(""))


@dataclass(frozen=True)
class Vocabulary:
    """The token ids with a meaning of their own: those that end a text, those never written, padding, and an image's.

    The first end token is `</s>`: what follows it sees no image. The last id of a banned sequence is not written where
    the others stand right before it, the prompt's end included.
    """

    end_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...]
    pad_token_id: int
    image_token_id: int
    banned_sequences: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Hypothesis:
    """One decoded text: its ids without the closing end token, and its score as the cli page defines it."""

    token_ids: tuple[int, ...]
    score: float
