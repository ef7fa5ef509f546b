"""How a result file is scored. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from idefics_cli.prompts.choices import parse_choices
from idefics_cli.rows import DelimitedOptions
from idefics_cli.validation import Help


@dataclass(frozen=True)
class ScoreOptions:
    """`metric` "auto" is vqa for answers, cider for captions, exact for others."""

    answers_column: Annotated[str, Help("Column of the references, a list of texts", metavar="NAME")] = "answers"
    by: Annotated[str | None, Help("Group scores by this column", metavar="NAME")] = None
    metric: Annotated[
        Literal["auto", "vqa", "cider", "exact"],
        Help("vqa (VQA accuracy), cider, exact, or auto; exact match always", metavar="WHICH"),
    ] = "auto"
    tokenization: Annotated[
        Literal["ptb", "treebank"],
        Help("How CIDEr splits words: ptb (as published, needs Java) or treebank", metavar="HOW"),
    ] = "ptb"
    delimited: DelimitedOptions = field(default_factory=DelimitedOptions)
    choices: Annotated[
        tuple[str, ...],
        Help("Of all rows: references may be numbers or letters of these", metavar="A,B", parse=parse_choices),
    ] = ()
    choices_column: Annotated[
        str | None, Help("Column of each row's choices", metavar="NAME", default="choices, if there is one")
    ] = None
