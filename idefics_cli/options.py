"""Options that commands share, each defined once: groups of them as frozen dataclasses.

A command names the groups it takes as parameters, and `flattened` shows Typer their fields one by one. Nothing heavy is
imported here; what an option means is the business of the value that a group is turned into.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from idefics_cli.checkpoint import DEFAULT_MODEL
from idefics_cli.errors import RowError

if TYPE_CHECKING:
    from idefics_cli.asking import AskOptions
    from idefics_cli.checkpoint import ModelRequest
    from idefics_cli.choices import ChoiceOptions
    from idefics_cli.data.images import ImageLimits
    from idefics_cli.data.rows import ReadOptions
    from idefics_cli.generation.options import DecodingOptions
    from idefics_cli.run import RunOptions
    from idefics_cli.score import ScoreOptions
    from idefics_cli.texts import Finish
    from idefics_cli.work import Work

QUESTION = "question"
MAX_WORKERS = 8
DEFAULT_SHOTS = 4

RevisionFlag = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of the hub model.", show_default=False)
]
DtypeFlag = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    typer.Option(help="Number format of the weights; auto: bf16 or fp16 on CUDA, fp32 on the CPU."),
]
DeviceFlag = Annotated[str, typer.Option(metavar="auto|cuda|cuda:N|cpu|mps", help="Where the model runs.")]
AllowPickleFlag = Annotated[
    bool, typer.Option("--allow-pickle", help="Load weights from pickles (weights only) where there is no safetensors.")
]
BatchSizeFlag = Annotated[str, typer.Option(metavar="auto|N", help="Rows that the model works on at a time.")]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings.")]


def flattened(command: Callable[..., None]) -> Callable[..., None]:
    """The same command with the fields of its dataclass parameters in their place, for Typer to read."""
    hints = get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters
    groups = {name: hints[name] for name in parameters if is_dataclass(hints[name])}

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        made = {name: kind(**{f.name: values.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        command(**values, **made)

    shown: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        shown += _fields_as_parameters(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])]
    assert len({each.name for each in shown}) == len(shown), [each.name for each in shown]
    keyword_only = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in shown]
    flat.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    flat.__annotations__ = {each.name: each.annotation for each in keyword_only}
    del flat.__wrapped__
    return flat


def _fields_as_parameters(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


@dataclass(frozen=True)
class InputFlags:
    """Which rows are read."""

    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="Image files, folders, manifests (.parquet, .jsonl, .csv, .tsv, also .gz), .tar, or - for paths from"
            " stdin.",
            show_default=False,
        ),
    ]
    no_recursive: Annotated[bool, typer.Option("--no-recursive", help="Leave out the sub-folders of folders.")] = False
    null: Annotated[bool, typer.Option("-0", "--null", help="Paths on stdin end with NUL, not with a line.")] = False
    image_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column of the pictures.", show_default="image, else the only one"),
    ] = None
    id_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of the ids.", show_default="id, else the row's number")
    ] = None
    image_root: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Where a manifest's pictures are; no path may lead out of it.",
            show_default="the manifest's folder",
        ),
    ] = None
    keep: Annotated[
        str | None,
        typer.Option(metavar="A,B|all", help="Columns of the manifest to pass through.", show_default=False),
    ] = None
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Take the first N rows only.", show_default=False)
    ] = None
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Take every N-th row, from the I-th on.", show_default=False)
    ] = None

    def reading(self, columns: tuple[str, ...], needs_image: bool, answers_column: str | None = None) -> ReadOptions:
        """What readers are told; `columns` are those that must be there, that of the answers is kept."""
        from idefics_cli.data.rows import ReadOptions

        if self.null and "-" not in self.inputs:
            raise typer.BadParameter("it says how stdin is read: add - to the inputs", param_hint="--null")
        keep = parse_keep(self.keep)
        if answers_column is not None and keep != "all":
            keep = tuple(dict.fromkeys((*keep, answers_column)))
        return ReadOptions(
            recursive=not self.no_recursive,
            null=self.null,
            image_column=self.image_column,
            id_column=self.id_column,
            image_root=self.image_root,
            columns=columns,
            keep=keep,
            limit=self.limit,
            shard=parse_shard(self.shard),
            needs_image=needs_image,
        )


@dataclass(frozen=True)
class PromptFlags:
    """How the model is asked."""

    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Prompt in place of the official one: {image} stands for the pictures, {name} for a column.",
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
        typer.Option(help="Which examples; similar: those whose pictures are nearest to the row's."),
    ] = "first"
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Decides what is random.")] = 0
    bare: Annotated[
        bool, typer.Option("--bare", help="No examples at all, not even the two of the published zero-shot prompts.")
    ] = False

    def asking(
        self,
        task: str,
        decoding: DecodingFlags,
        text: TextFlags,
        choices: ChoiceFlags,
        embeddings: str | None = None,
        questions: tuple[str, ...] = (),
        question_column: str = QUESTION,
    ) -> AskOptions:
        from idefics_cli.asking import AskOptions
        from idefics_cli.prompts import TASKS, PromptOptions
        from idefics_cli.shots import ShotOptions

        number, ranked = self._number_of_shots(), choices.options()
        return AskOptions(
            PromptOptions(task, self.template, self.prompt, number, self.bare),
            decoding.decoding(TASKS[task].max_new_tokens),
            questions,
            question_column,
            None if self.shots is None else ShotOptions(self.shots, number, self.shot_selection, self.seed),
            ranked,
            embeddings,
            text.finish(task if ranked is None else None),
        )

    def _number_of_shots(self) -> int:
        if self.num_shots and self.shots is None:
            raise typer.BadParameter("there is no file to take them from: add --shots FILE", param_hint="--num-shots")
        if self.shot_selection == "similar" and not self.shots:
            raise typer.BadParameter("it selects from a file: add --shots FILE", param_hint="--shot-selection")
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

    def finish(self, task: str | None) -> Finish:
        """Texts end where the task's published protocol ends them, or at the caller's own words."""
        from idefics_cli.prompts import TASKS
        from idefics_cli.texts import Finish

        words = parse_words(self.stop_words)
        if task is None:
            return Finish(words or (), self.prefix, self.suffix)
        cut_words = TASKS[task].cut_words if words is None else (*words, *TASKS[task].banned_words)
        return Finish(cut_words, self.prefix, self.suffix)


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
        from idefics_cli.choices import ChoiceOptions, checked_choices, split_choices

        if self.choices is not None and self.choices_column is not None:
            raise typer.BadParameter("each row's own or the same for all: give one", param_hint="--choices-column")
        if self.choices is None and self.choices_column is None:
            return None
        words = () if self.choices is None else checked_choices(split_choices(self.choices))
        if isinstance(words, RowError):
            raise typer.BadParameter(words.message, param_hint="--choices")
        return ChoiceOptions(words, self.choices_column, self.choice_norm)


@dataclass(frozen=True)
class ScoreFlags:
    """What the texts are held against at the end."""

    answers_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column of right answers: kept, and scored at the end.", show_default=False),
    ] = None

    def scoring(self, output: OutputFlags, task: str) -> ScoreOptions | None:
        """Raises typer.BadParameter or IdeficsError for what cannot be scored."""
        from idefics_cli.metrics import require_cider
        from idefics_cli.score import ScoreOptions, closing_tokenization

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
        return asked


@dataclass(frozen=True)
class PictureFlags:
    """How pictures are opened."""

    max_pixels: Annotated[int, typer.Option(metavar="N", min=1, help="Refuse pictures with more pixels than this.")] = (
        64_000_000
    )
    draft: Annotated[
        bool,
        typer.Option("--draft", help="Decode large JPEGs at a part of their size: faster, and nearly the same."),
    ] = False
    decode_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Give a picture up that takes longer to decode.")
    ] = 30.0
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Processes that decode images.", show_default=f"processors, at most {MAX_WORKERS}"
        ),
    ] = None

    @property
    def limits(self) -> ImageLimits:
        from idefics_cli.data.images import ImageLimits

        return ImageLimits(max_pixels=self.max_pixels, draft=self.draft)

    @property
    def num_workers(self) -> int:
        return self.workers or min(MAX_WORKERS, os.cpu_count() or 1)


EmbeddingsFlag = Annotated[
    str | None,
    typer.Option(
        "--embeddings",
        metavar="E.parquet",
        help="What `idefics embed` wrote of the same rows, by id, in place of their pictures.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class OutputFlags:
    """Where rows go, and what happens to those that are there."""

    output: Annotated[str, typer.Option("-o", "--output", metavar="F.jsonl|F.parquet|-", help="Where rows go.")] = "-"
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew and replace what is there under the output's name.")
    ] = False
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Do the failed rows of a finished output again.")
    ] = False
    sidecar: Annotated[
        bool, typer.Option("--sidecar", help="Write each text into a .txt file beside its picture, too.")
    ] = False
    max_errors: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Stop as soon as N rows have failed.", show_default=False)
    ] = None

    def check(self) -> None:
        if self.output == "-" and self.overwrite and not self.sidecar:
            raise typer.BadParameter(
                "there is nothing to overwrite on stdout: add -o F.jsonl", param_hint="--overwrite"
            )
        if self.output == "-" and self.retry_errors:
            raise typer.BadParameter("it needs the finished file: add -o F.jsonl", param_hint="--retry-errors")
        if self.overwrite and self.retry_errors:
            raise typer.BadParameter("one forgets the rows that the other mends: give one", param_hint="--retry-errors")


@dataclass(frozen=True)
class ModelFlags:
    """Which model, and on what it runs."""

    model: Annotated[
        str,
        typer.Option(
            "-m",
            "--model",
            envvar="IDEFICS_MODEL",
            help="Hub id, local folder, or `demo` (coloured shapes, runs anywhere).",
        ),
    ] = DEFAULT_MODEL
    revision: RevisionFlag = None
    dtype: DtypeFlag = "auto"
    device: DeviceFlag = "auto"
    allow_pickle: AllowPickleFlag = False

    @property
    def request(self) -> ModelRequest:
        from idefics_cli.checkpoint import ModelRequest

        return ModelRequest(self.model, self.revision, self.dtype, self.device, self.allow_pickle)


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
        from idefics_cli.generation.options import DecodingOptions

        chosen = {name: value for name, value in vars(self).items() if name != "batch_size"}
        return DecodingOptions(**{**chosen, "max_new_tokens": self.max_new_tokens or max_new_tokens})

    @property
    def rows_per_batch(self) -> int | None:
        return rows_per_batch(self.batch_size)


def rows_per_batch(batch_size: str) -> int | None:
    """None: as many as memory holds."""
    if batch_size == "auto":
        return None
    if not (batch_size.isascii() and batch_size.isdigit() and int(batch_size) > 0):
        raise typer.BadParameter(f"{batch_size!r} is neither `auto` nor a number above 0", param_hint="--batch-size")
    return int(batch_size)


def run_options(
    inputs: InputFlags,
    work: Work,
    output: OutputFlags,
    pictures: PictureFlags,
    model: ModelFlags,
    batch_size: int | None,
    answers_column: str | None = None,
) -> RunOptions:
    """All that a run is told. Raises typer.BadParameter or IdeficsError for what contradicts itself."""
    from idefics_cli.run import RunOptions

    output.check()
    return RunOptions(
        inputs=tuple(inputs.inputs),
        output=output.output,
        request=model.request,
        reading=inputs.reading(work.columns, work.needs_image, answers_column),
        limits=pictures.limits,
        decode_timeout=pictures.decode_timeout,
        workers=pictures.num_workers,
        batch_size=batch_size,
        max_errors=output.max_errors,
        overwrite=output.overwrite,
        retry_errors=output.retry_errors,
        sidecar=output.sidecar,
    )


def parse_keep(text: str | None) -> tuple[str, ...] | Literal["all"]:
    if text == "all":
        return "all"
    names = [name.strip() for name in (text or "").split(",")]
    if text is not None and not all(names):
        raise typer.BadParameter(f"{text!r} has an empty name: name columns as in a,b", param_hint="--keep")
    return tuple(dict.fromkeys(names)) if text else ()


def parse_words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(filter(None, text.split(",")))


def parse_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.split("/")
    if len(parts) == 2 and all(part.isascii() and part.isdigit() for part in parts):
        place, number = int(parts[0]), int(parts[1])
        if 1 <= place <= number:
            return place, number
    raise typer.BadParameter(f"{text!r} is no share: use 1/4 for the first of four, up to 4/4", param_hint="--shard")
