"""Options that say how a model is asked and what becomes of its texts, as `options.py` has those of every run."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from idefics_cli.cli.options import BatchSizeFlag, OutputFlags, rows_per_batch
from idefics_cli.errors import RowError
from idefics_cli.tasks.questions import QUESTION

if TYPE_CHECKING:
    from idefics_cli.engine.options import DecodingOptions
    from idefics_cli.evaluation.score import ScoreOptions
    from idefics_cli.prompts.choices import ChoiceOptions
    from idefics_cli.prompts.postprocess import PostProcess
    from idefics_cli.tasks.caption_vqa import CaptionVqaOptions

DEFAULT_SHOTS = 4

EmbeddingsFlag = Annotated[
    str | None,
    typer.Option(
        "--embeddings",
        metavar="E.parquet",
        help="What `idefics embed` wrote of the same rows, by id, in place of their images.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class PromptFlags:
    """How the model is asked."""

    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Prompt in place of the official one: {image} stands for the images, {name} for a column.",
            show_default=False,
        ),
    ] = None
    template: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Official template: caption, vqa, vizwiz, instruct-caption, instruct-vqa.",
            show_default="the model's own",
        ),
    ] = None
    shots: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Manifest of worked examples, with a caption or an answer each.", show_default=False
        ),
    ] = None
    num_shots: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Examples before each row.", show_default=f"{DEFAULT_SHOTS} with --shots"
        ),
    ] = None
    shot_selection: Annotated[
        Literal["first", "random", "similar"],
        typer.Option(help="Which examples; similar: those whose images are nearest to the row's."),
    ] = "first"
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Decides what is random.")] = 0
    bare: Annotated[
        bool, typer.Option("--bare", help="No examples at all, not even the two of the published zero-shot prompts.")
    ] = False

    @property
    def number_of_shots(self) -> int:
        """Raises typer.BadParameter for shots that come from nowhere."""
        if self.num_shots and self.shots is None:
            raise typer.BadParameter("there is no file to take them from: add --shots FILE", param_hint="--num-shots")
        if self.shot_selection != "first" and not self.shots:
            raise typer.BadParameter("it selects from a file: add --shots FILE", param_hint="--shot-selection")
        if self.seed and self.shot_selection != "random":
            raise typer.BadParameter("nothing is random: add --shot-selection random", param_hint="--seed")
        if self.num_shots is not None:
            return self.num_shots
        return DEFAULT_SHOTS if self.shots is not None else 0


@dataclass(frozen=True)
class TextFlags:
    """What becomes of the model's texts."""

    prefix: Annotated[str, typer.Option(metavar="TEXT", help="Written before each text.", show_default=False)] = ""
    suffix: Annotated[str, typer.Option(metavar="TEXT", help="Written behind each text.", show_default=False)] = ""
    stop_words: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Words at which a text is cut; '' for none.",
            show_default="those of the published protocol",
        ),
    ] = None

    def postprocess(self, task: str | None) -> PostProcess:
        """Texts end where the task's published protocol ends them, or at the caller's own words."""
        from idefics_cli.prompts.postprocess import PostProcess
        from idefics_cli.prompts.templates import TASKS
        from idefics_cli.storage.filenames import is_utf8

        for name, text in (("--prefix", self.prefix), ("--suffix", self.suffix)):
            if not is_utf8(text):
                raise typer.BadParameter("it is no UTF-8, which texts are written in", param_hint=name)
        words = parse_words(self.stop_words)
        if task is None:
            return PostProcess(words or (), self.prefix, self.suffix)
        cut_words = TASKS[task].cut_words if words is None else (*words, *TASKS[task].banned_words)
        return PostProcess(cut_words, self.prefix, self.suffix)


@dataclass(frozen=True)
class ChoiceFlags:
    """Answers to choose from, in place of decoding."""

    choices: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Rank these answers by likelihood; the best is the text.", show_default=False),
    ] = None
    choices_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The same with each row's own, a list.", show_default=False)
    ] = None
    choice_norm: Annotated[
        Literal["none", "tokens", "bytes"], typer.Option(help="What an answer's likelihood is divided by.")
    ] = "none"

    def options(self) -> ChoiceOptions | None:
        from idefics_cli.prompts.choices import ChoiceOptions, checked_choices, split_choices

        if self.choices is not None and self.choices_column is not None:
            raise typer.BadParameter("each row's own or the same for all: give one", param_hint="--choices-column")
        if self.choices is None and self.choices_column is None:
            if self.choice_norm != "none":
                raise typer.BadParameter("there are no answers to rank: add --choices A,B", param_hint="--choice-norm")
            return None
        words = () if self.choices is None else checked_choices(split_choices(self.choices))
        if isinstance(words, RowError):
            raise typer.BadParameter(words.message, param_hint="--choices")
        return ChoiceOptions(words, self.choices_column, self.choice_norm)

    @property
    def flag(self) -> str:
        """What the answers were given by."""
        return "--choices" if self.choices is not None else "--choices-column"


@dataclass(frozen=True)
class ScoreFlags:
    """What the texts are held against at the end."""

    answers_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column of right answers: kept, and scored at the end.", show_default=False),
    ] = None

    def scoring(self, output: OutputFlags, task: str) -> ScoreOptions | None:
        """Raises typer.BadParameter or IdeficsError for what cannot be scored."""
        from idefics_cli.evaluation.metrics import require_cider
        from idefics_cli.evaluation.score import ScoreOptions, closing_tokenization

        if self.answers_column is None:
            return None
        if output.output == "-":
            raise typer.BadParameter("the finished file is scored: add -o F.jsonl", param_hint="--answers-column")
        options = ScoreOptions(self.answers_column, tokenization=closing_tokenization())
        if task == "caption":
            require_cider(options.tokenization)
        return options


@dataclass(frozen=True)
class QuestionFlags:
    """What is asked."""

    question: Annotated[
        list[str] | None,
        typer.Option(
            "-q", "--question", metavar="TEXT", help="Asked about every image; may be given again.", show_default=False
        ),
    ] = None
    question_column: Annotated[str, typer.Option(metavar="NAME", help="Column of a manifest's questions.")] = QUESTION

    @property
    def asked(self) -> tuple[str, ...]:
        """What is asked of every row. Raises typer.BadParameter for nothing that could be asked."""
        asked = tuple(self.question or ())
        if not all(question.strip() for question in asked):
            raise typer.BadParameter("it is empty: write what is to be asked", param_hint="-q")
        if asked and self.question_column != QUESTION:
            raise typer.BadParameter("-q asks the same of every row: give one", param_hint="--question-column")
        return asked


@dataclass(frozen=True)
class DecodingFlags:
    """How texts are written."""

    num_beams: Annotated[int, typer.Option(metavar="N", min=1, help="Beams of the search; 1 is greedy.")] = 3
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Longest text, in tokens.",
            show_default="30 for captions, 15 for answers, else 100",
        ),
    ] = None
    min_new_tokens: Annotated[int, typer.Option(metavar="N", min=0, help="Shortest text, in tokens.")] = 0
    length_penalty: Annotated[float, typer.Option(metavar="X", help="Scores are divided by length to this power.")] = (
        1.0
    )
    early_stopping: Annotated[bool, typer.Option(help="End when there are as many finished texts as beams.")] = True
    no_repeat_ngram_size: Annotated[
        int, typer.Option(metavar="N", min=0, help="Never repeat N tokens in a row; 0: may.")
    ] = 0
    num_return_sequences: Annotated[
        int, typer.Option(metavar="N", min=1, help="Best texts per row; more than one adds a `candidates` column.")
    ] = 1
    batch_size: BatchSizeFlag = "auto"

    def decoding(self, max_new_tokens: int) -> DecodingOptions:
        """`max_new_tokens` is the command's own default."""
        from idefics_cli.engine.options import DecodingOptions

        chosen = {name: value for name, value in vars(self).items() if name != "batch_size"}
        return DecodingOptions(**{**chosen, "max_new_tokens": self.max_new_tokens or max_new_tokens})

    @property
    def rows_per_batch(self) -> int | None:
        return rows_per_batch(self.batch_size)

    @property
    def first_given(self) -> str | None:
        """The first option of how texts are written that is not as it would be unsaid."""
        usual = DecodingFlags(batch_size=self.batch_size)
        given = (each.name for each in fields(self) if getattr(self, each.name) != getattr(usual, each.name))
        name = next(given, None)
        if name is None:
            return None
        return ("--no-" if getattr(self, name) is False else "--") + name.replace("_", "-")


@dataclass(frozen=True)
class AskFlags:
    """What `caption` and `vqa` take besides the options of every run."""

    prompts: PromptFlags
    text: TextFlags
    choices: ChoiceFlags
    scores: ScoreFlags
    decoding: DecodingFlags
    embeddings: EmbeddingsFlag = None

    def options(
        self, task: str, questions: QuestionFlags | None = None, image_column: str | None = None
    ) -> CaptionVqaOptions:
        """`image_column` is the inputs' own. Raises typer.BadParameter or IdeficsError for what contradicts itself."""
        from idefics_cli.prompts.templates import TASKS, PromptOptions
        from idefics_cli.tasks.caption_vqa import CaptionVqaOptions
        from idefics_cli.tasks.few_shot import ShotOptions

        prompts, number, choices = self.prompts, self.prompts.number_of_shots, self.choices.options()
        if choices is not None:
            self._require_nothing_written()
        file, selection, seed = prompts.shots, prompts.shot_selection, prompts.seed
        options = CaptionVqaOptions(
            prompts=PromptOptions(task, prompts.template, prompts.prompt, number, prompts.bare),
            decoding=self.decoding.decoding(TASKS[task].max_new_tokens),
            questions=() if questions is None else questions.asked,
            question_column=QUESTION if questions is None else questions.question_column,
            shots=None if file is None else ShotOptions(file, number, selection, seed, image_column),
            choices=choices,
            embeddings=self.embeddings,
            postprocess=self.text.postprocess(task if choices is None else None),
        )
        if not options.shows_questions:
            raise typer.BadParameter(
                "-q is not shown by it: put {question} where it is to stand", param_hint="--prompt"
            )
        return options

    def _require_nothing_written(self) -> None:
        """Answers that are given are ranked as they stand."""
        useless = "--stop-words" if self.text.stop_words is not None else self.decoding.first_given
        if useless is not None:
            raise typer.BadParameter(
                f"answers of {self.choices.flag} are ranked, none is written: leave it out", param_hint=useless
            )


def parse_words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(filter(None, text.split(",")))
