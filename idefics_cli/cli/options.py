"""Options that commands share, each defined once: groups of them as frozen dataclasses. Here, those of every run.

A command names the groups it takes as parameters, and `flattened` shows Typer their fields one by one. Nothing heavy is
imported here; what an option means is the business of the value that a group is turned into. How a model is asked
stands in `ask_options.py`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from idefics_cli.checkpoint import DEFAULT_MODEL
from idefics_cli.rows import MAX_WORKERS, ImageOptions

if TYPE_CHECKING:
    from idefics_cli.checkpoint import ModelRequest
    from idefics_cli.pipeline.run import RunOptions
    from idefics_cli.pipeline.task import Task
    from idefics_cli.rows import ImageOptions, ReadOptions

MOST_PIXELS, A_DAY = 10**12, 86_400.0

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
    """The same command with the fields of its dataclass parameters in their place, for Typer to read.

    A field that is such a group itself is shown by its own fields.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        command(**{name: _made(hints[name], name, values) for name in parameters})

    shown: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        shown += _shown(name, hints[name], parameter.default)
    assert len({each.name for each in shown}) == len(shown), [each.name for each in shown]
    flat.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    flat.__annotations__ = {each.name: each.annotation for each in shown}
    del flat.__wrapped__
    return flat


def _shown(name: str, hint: Any, default: Any) -> Iterator[inspect.Parameter]:
    if is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        for each in fields(hint):
            yield from _shown(each.name, hints[each.name], each.default)
    else:
        default = inspect.Parameter.empty if default is MISSING else default
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _made(hint: Any, name: str, values: Mapping[str, Any]) -> Any:
    """The value of a parameter: itself, or a group made of its fields' values."""
    if not is_dataclass(hint):
        return values[name]
    hints = get_type_hints(hint, include_extras=True)
    return hint(**{each.name: _made(hints[each.name], each.name, values) for each in fields(hint)})


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
        typer.Option(metavar="NAME", help="Column of the images.", show_default="image, else the only one"),
    ] = None
    id_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of the ids.", show_default="id, else the row's number")
    ] = None
    image_root: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Where a manifest's images are; no path may lead out of it.",
            show_default="the manifest's folder",
        ),
    ] = None
    keep: Annotated[
        str | None,
        typer.Option(metavar="A,B|all", help="Columns of the manifest to pass through.", show_default=False),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=sys.maxsize, help="Take the first N rows only.", show_default=False),
    ] = None
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Take every N-th row, from the I-th on.", show_default=False)
    ] = None

    def reading(self, columns: tuple[str, ...], needs_image: bool, answers_column: str | None = None) -> ReadOptions:
        """What readers are told; `columns` are those that must be there, that of the answers is kept."""
        from idefics_cli.rows import ReadOptions

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
class ImageFlags:
    """How images are opened."""

    max_pixels: Annotated[
        int, typer.Option(metavar="N", min=1, max=MOST_PIXELS, help="Refuse images with more pixels than this.")
    ] = 64_000_000
    draft: Annotated[
        bool,
        typer.Option("--draft", help="Decode large JPEGs at a part of their size: faster, and nearly the same."),
    ] = False
    decode_timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0.1, max=A_DAY, help="Give an image up that takes longer to decode."),
    ] = 30.0
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Processes that decode images.", show_default=f"processors, at most {MAX_WORKERS}"
        ),
    ] = None

    @property
    def decoding(self) -> ImageOptions:
        return ImageOptions(self.max_pixels, self.draft, self.decode_timeout, self.workers)


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
        bool, typer.Option("--sidecar", help="Write each text into a .txt file beside its image, too.")
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
class RunFlags:
    """What every run over rows takes."""

    inputs: InputFlags
    output: OutputFlags
    images: ImageFlags
    model: ModelFlags

    def options(self, task: Task, batch_size: int | None, answers_column: str | None = None) -> RunOptions:
        """All that a run is told. Raises typer.BadParameter or IdeficsError for what contradicts itself."""
        from idefics_cli.pipeline.run import RunOptions

        self.output.check()
        if self.output.sidecar and task.rows_each > 1:
            raise typer.BadParameter(
                f"an image gets {task.rows_each} answers and has one file: ask one question, or leave it out",
                param_hint="--sidecar",
            )
        return RunOptions(
            inputs=tuple(self.inputs.inputs),
            output=self.output.output,
            request=self.model.request,
            reading=self.inputs.reading(task.columns, task.needs_image, answers_column),
            images=self.images.decoding,
            batch_size=batch_size,
            max_errors=self.output.max_errors,
            overwrite=self.output.overwrite,
            retry_errors=self.output.retry_errors,
            sidecar=self.output.sidecar,
            answers_column=answers_column,
        )


def rows_per_batch(batch_size: str) -> int | None:
    """None: as many as memory holds."""
    if batch_size == "auto":
        return None
    if not (batch_size.isascii() and batch_size.isdigit() and int(batch_size) > 0):
        raise typer.BadParameter(f"{batch_size!r} is neither `auto` nor a number above 0", param_hint="--batch-size")
    return int(batch_size)


def parse_keep(text: str | None) -> tuple[str, ...] | Literal["all"]:
    if text == "all":
        return "all"
    names = [name.strip() for name in (text or "").split(",")]
    if text is not None and not all(names):
        raise typer.BadParameter(f"{text!r} has an empty name: name columns as in a,b", param_hint="--keep")
    return tuple(dict.fromkeys(names)) if text else ()


def parse_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.split("/")
    if len(parts) == 2 and all(part.isascii() and part.isdigit() for part in parts):
        place, number = int(parts[0]), int(parts[1])
        if 1 <= place <= number:
            return place, number
    raise typer.BadParameter(f"{text!r} is no share: use 1/4 for the first of four, up to 4/4", param_hint="--shard")
