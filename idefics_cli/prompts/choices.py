"""Answers to choose from: the tokens of each after a prompt, and how their likelihoods are compared.

Texts and token ids only; no model. A choice is written as a shot's answer is. Compared is the likelihood of its tokens
alone, without an end of text (as in lm-evaluation-harness's `loglikelihood`): a longer text may follow an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated, Any, Literal, get_args

from idefics_cli.errors import IdeficsError, RowError
from idefics_cli.prompts.templates import Prompt, merge_texts
from idefics_cli.storage.filenames import listed
from idefics_cli.validation import Help

ChoiceNorm = Literal["none", "tokens", "bytes"]


def parse_choices(text: str) -> tuple[str, ...]:
    choices = checked_choices(several_choices(split_choices(text)))
    if isinstance(choices, RowError):
        raise IdeficsError(f"{choices.message}; write them as in yes,no")
    return choices


@dataclass(frozen=True)
class ChoiceOptions:
    """The same `words` to choose from for all rows, or each row's own in `column`; without both, texts are decoded."""

    words: Annotated[
        tuple[str, ...],
        Help(
            "Rank these answers by likelihood, and decode nothing; the best is the text",
            metavar="A,B",
            flags=("--choices",),
            parse=parse_choices,
        ),
    ] = ()
    column: Annotated[
        str | None, Help("Column of each row's own answers to rank", metavar="NAME", flags=("--choices-column",))
    ] = None
    norm: Annotated[
        ChoiceNorm,
        Help("Divide likelihoods by an answer's tokens or bytes, or by nothing", "BY", flags=("--choice-norm",)),
    ] = "none"

    def __post_init__(self) -> None:
        if self.words and self.column is not None:
            raise IdeficsError(
                "--choices has the same answers for all rows and --choices-column each row's own: use one of them"
            )
        if self.norm != "none" and not self.are_given:
            raise IdeficsError("--choice-norm needs answers to rank: add --choices A,B")

    @property
    def are_given(self) -> bool:
        return bool(self.words) or self.column is not None

    def of(self, values: Mapping[str, Any]) -> Any:
        """What a row with these values chooses from, unchecked but for its number. A text is split at its commas, as
        the option is."""
        value = self.words if self.column is None else values.get(self.column)
        return several_choices(split_choices(value) if isinstance(value, str) else value)


def split_choices(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def several_choices(choices: Any) -> Any | RowError:
    """The same, unless it is one alone: then there is nothing to choose, and a separator was probably meant."""
    is_one = isinstance(choices, list | tuple) and len(choices) == 1
    return RowError("row_invalid", f"one choice alone, {choices[0]!r}: give two or more") if is_one else choices


def checked_choices(choices: Any) -> tuple[str, ...] | RowError:
    """A row's choices, each a text with more than white space, or what is wrong with them."""
    if isinstance(choices, RowError):
        return choices
    if choices is None or choices in ([], ()):
        return RowError("row_invalid", "the choices are empty: give two or more")
    if not isinstance(choices, list | tuple):
        found = f"{type(choices).__name__} {choices!r}"
        return RowError("row_invalid", f"the choices must be a list of texts, not {found}"[:200])
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            return RowError("row_invalid", f"one of the choices is {choice!r}: each must be a text, and not empty")
    return tuple(choices)


def with_answer(prompt: Prompt, answer: str) -> Prompt:
    """The prompt followed by the answer, with a blank between two texts where there is no white space yet.

    After an image or a special token there is none: tokenizers of LLaMA's kind begin a text with a blank themselves.
    """
    *_, last = (None, *merge_texts(prompt))
    blank = " " if isinstance(last, str) and not last[-1].isspace() else ""
    return merge_texts((*prompt, blank, answer))


def split_answers(prompt_ids: Sequence[int], answered: Sequence[Sequence[int]]) -> tuple[int, list[tuple[int, ...]]]:
    """How many tokens all have in common with the prompt, and each answer's tokens after these (one at least).

    `answered` are prompt and answer tokenised as one text. Where an answer changes the prompt's last tokens, these
    count as the answer's, for all choices, so that all are judged after the same text.
    """
    common = common_length(prompt_ids, *(ids[:-1] for ids in answered))
    return common, [tuple(ids[common:]) for ids in answered]


def common_length(*token_ids: Sequence[int]) -> int:
    """How many tokens all begin with."""
    columns = zip(*token_ids, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def require_norm(norm: str) -> None:
    if norm not in get_args(ChoiceNorm):
        raise IdeficsError(f"unknown choice norm {norm!r}: use {listed(get_args(ChoiceNorm))}")


def normalised(log_likelihood: float, choice: str, num_tokens: int, norm: ChoiceNorm) -> float:
    """The log-likelihood as it is, per token, or per byte of the choice's UTF-8 (the blank before it not counted)."""
    divisors = {"none": 1, "tokens": num_tokens, "bytes": len(choice.encode("utf-8", "replace"))}
    return log_likelihood / divisors[norm]
