"""What the tasks are told: how the model is asked about a row, and what becomes of its texts. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.errors import IdeficsError
from idefics_cli.prompts.choices import ChoiceOptions
from idefics_cli.prompts.postprocess import PostProcess
from idefics_cli.prompts.templates import IMAGE_FIELD, TASKS, PromptOptions, Shot, choose_template
from idefics_cli.rows import DelimitedOptions
from idefics_cli.storage.filenames import shown_place
from idefics_cli.validation import Help, by_option

QUESTION = "question"
DEFAULT_SHOTS = 4
EmbeddingsFile = Annotated[
    str | None, Help("Output of `idefics embed`, read by id in place of images", metavar="FILE", panel="Images")
]


@dataclass(frozen=True)
class ShotOptions:
    """A manifest of examples, or a `pool` of them, and which of them stand before each row.

    `similar` shows each row those with the images nearest to its own, the nearest last (RICES: Yang et al. 2022,
    section 3.2; Alayrac et al. 2022, appendix A.2), without those of its own image; the others show all rows the same.
    Of 0 shots no image is shown.
    `image_column`, `allow_no_image` and `delimited` are those of the inputs.
    """

    file: Annotated[
        str | None,
        Help("Manifest of examples, each with a caption or an answer", metavar="FILE", flags=("--shots",)),
    ] = None
    number: Annotated[
        int | None,
        Help("Examples before each row", min=0, flags=("--num-shots",), default=f"{DEFAULT_SHOTS} with --shots"),
    ] = None
    selection: Annotated[
        Literal["first", "random", "similar"],
        Help(
            "Which examples: first, random, or similar (with images most like the row's)",
            metavar="HOW",
            flags=("--shot-selection",),
        ),
    ] = "first"
    seed: Annotated[int, Help("Of --do-sample and --shot-selection random", min=0, panel="Decoding")] = 0
    allow_self: Annotated[bool, Help("Similar examples may show the row's own image")] = False
    pool: tuple[Shot, ...] = ()
    image_column: str | None = None
    allow_no_image: bool = False
    delimited: DelimitedOptions | None = None
    follow_links: bool = False

    def __post_init__(self) -> None:
        if self.allow_self and self.selection != "similar":
            raise IdeficsError("--allow-self has no effect: add --shot-selection similar")
        if self.file is None and not self.pool and (self.number or self.selection != "first"):
            raise IdeficsError(
                f"{'--num-shots' if self.number else '--shot-selection'} needs examples: add --shots FILE"
            )
        if self.number is None:
            of_pool = len(self.pool) if self.selection == "first" else min(len(self.pool), DEFAULT_SHOTS)
            object.__setattr__(self, "number", of_pool if self.file is None else DEFAULT_SHOTS)

    @property
    def place(self) -> str:
        """Where the examples are, for people."""
        return "the list of shots" if self.file is None else shown_place(self.file)


@dataclass(frozen=True)
class CaptionVqaOptions:
    """`questions` are asked about every row; without them each row has its own in `question_column`.

    `postprocess` makes the written text of the decoded one. With a file of `embeddings` no row's image is opened.
    """

    prompts: PromptOptions
    decoding: DecodingOptions
    questions: Annotated[
        tuple[str, ...],
        Help("Ask this about every image; may be repeated", metavar="TEXT", flags=("-q", "--question")),
    ] = ()
    question_column: Annotated[str, Help("Column of a manifest's questions", metavar="NAME", panel="Input")] = QUESTION
    shots: ShotOptions = field(default_factory=ShotOptions)
    choices: ChoiceOptions = field(default_factory=ChoiceOptions)
    postprocess: PostProcess = field(default_factory=PostProcess)
    embeddings: EmbeddingsFile = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", replace(self.prompts, num_shots=self.shots.number))
        if not all(question.strip() for question in self.questions):
            raise IdeficsError("-q is empty: write a question")
        if self.questions and self.question_column != QUESTION:
            raise IdeficsError("-q replaces the questions of --question-column: use one of them")
        if self.questions and QUESTION not in self.prompt_fields:
            raise IdeficsError("--prompt does not show the question of -q: write {question} where it belongs")
        if self.decoding.seed and not self.decoding.do_sample and self.shots.selection != "random":
            raise IdeficsError("--seed has no effect: add --do-sample, or --shot-selection random")
        if self.choices.are_given:
            self._require_nothing_decoded()

    def _require_nothing_decoded(self) -> None:
        limit, draws = TASKS[self.prompts.task].max_new_tokens, self.decoding.do_sample
        # The seed may be that of the shots, and the usual number of beams depends on `do_sample`.
        usual = by_option(DecodingOptions(max_new_tokens=limit, seed=self.decoding.seed, do_sample=draws))
        given = {name: value for name, value in by_option(self.decoding).items() if value != usual[name]}
        flags = ["--do-sample"] if draws else []
        flags += [name.replace("--", "--no-") if value is False else name for name, value in given.items()]
        if self.postprocess.cut_words is not None:
            flags.append("--stop-words")
        if flags:
            raise IdeficsError(f"{flags[0]} has no effect where answers are ranked: leave it out, or --choices")

    @property
    def asks(self) -> bool:
        return self.prompts.task == "vqa"

    @property
    def needs_question_column(self) -> bool:
        return self.asks and not self.questions

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """What prompts have fields for, images apart. Raises IdeficsError for a template that no model could take."""
        return tuple(dict.fromkeys(name for name in self._places if name != IMAGE_FIELD))

    @property
    def _places(self) -> tuple[str, ...]:
        return choose_template(self.prompts, instruct=True).fields  # that for base models has the same

    @property
    def columns(self) -> tuple[str, ...]:
        """The manifest's columns that prompts are made of."""
        question = (self.question_column,) if self.needs_question_column else ()
        shown = (name for name in self.prompt_fields if not (self.asks and name == QUESTION))
        choices = () if self.choices.column is None else (self.choices.column,)
        return tuple(dict.fromkeys((*question, *shown, *choices)))

    @property
    def needs_manifest(self) -> str | None:
        """What to do about an input that has no columns; None where it needs none."""
        images = self._places.count(IMAGE_FIELD)
        if images > 1:
            return f"name one with a list of {images} images in each row, or leave one {{image}} in --prompt"
        if self.columns == (self.question_column,) and self.needs_question_column:
            return f"ask with -q QUESTION, or name one with a column {self.question_column!r}"
        return f"name one with the columns {', '.join(self.columns)}" if self.columns else None


def require_space(decoding: DecodingOptions, request: ModelRequest) -> None:
    """Raise where a model on this machine can be known to have none for a prompt."""
    from idefics_cli.checkpoint.find import known_positions

    positions = known_positions(request)
    if positions is not None:
        decoding.require_space(positions)


@dataclass(frozen=True)
class GenerateOptions:
    """Where the prompts stand, and what becomes of the texts that continue them."""

    decoding: DecodingOptions
    prompt_column: Annotated[
        str,
        Help("Column of the prompts", metavar="NAME", default="prompt, messages or conversations", panel="Input"),
    ] = "prompt"
    text_only: Annotated[bool, Help("Strings are texts, whatever they name; no column of images is read")] = False
    postprocess: PostProcess = field(default_factory=PostProcess)
    embeddings: EmbeddingsFile = None

    def __post_init__(self) -> None:
        if self.decoding.seed and not self.decoding.do_sample:
            raise IdeficsError("--seed has no effect: add --do-sample")
