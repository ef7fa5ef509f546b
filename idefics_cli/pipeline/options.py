"""What a run over rows is told, whatever is done with each row. Imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.errors import IdeficsError
from idefics_cli.rows import ImageOptions, ReadOptions
from idefics_cli.storage.filenames import IMAGE_SUFFIX, is_unit_folder
from idefics_cli.validation import Help

STDIN = STDOUT = "-"
UNIT_ROWS = 4096
RAY_ADDRESS = re.compile(r"auto|local|[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+")


def parse_batch_size(text: str) -> int | None:
    """None: as many as memory holds."""
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise IdeficsError(f"invalid batch size {text!r}: expected auto or a number above 0")
    return int(text)


def parse_suffix(text: str) -> str:
    """Of files that stand beside images, and are not images themselves."""
    if not re.fullmatch(r"\.[\w.+-]*[\w+-]", text) or IMAGE_SUFFIX.search(text):
        raise IdeficsError(f"invalid suffix {text!r}: expected one such as .caption, and not one of images")
    return text


def parse_ray_address(text: str) -> str:
    """Empty: whatever there is."""
    if text and not RAY_ADDRESS.fullmatch(text):
        raise IdeficsError(f"invalid address {text!r}: expected local, auto or the HOST:PORT of a cluster's head")
    return text


@dataclass(frozen=True)
class RunOptions:
    """All that a run is told besides its task. `batch_size` None: as many rows as memory holds.

    `answers_column` holds the references that the finished result is scored against.
    """

    inputs: Annotated[
        tuple[str, ...],
        Help(
            "Images, folders, manifests (.parquet, .arrow, .feather, .jsonl, .json, .csv, .tsv) and archives (.tar),"
            " also on s3:// and the like, or - for paths or JSON lines on stdin",
            metavar="INPUT",
            panel="Input",
        ),
    ]
    output: Annotated[
        str,
        Help(
            "Where rows go: a .jsonl, .parquet or .csv file, a folder for numbered parts (DIR/), or - for stdout",
            metavar="FILE",
            flags=("-o", "--output"),
        ),
    ] = STDOUT
    format: Annotated[
        Literal["auto", "jsonl", "parquet", "vqav2"],
        Help("auto: by the output's name, Parquet in a folder; vqav2: the array that VQAv2's evaluation takes", "KIND"),
    ] = "auto"
    unit_rows: Annotated[int, Help("About how many rows each part of a folder has", min=1, max=10**9)] = UNIT_ROWS
    processes: Annotated[
        int | None,
        Help(
            "How many processes work on a folder's parts, each with a model",
            min=1,
            max=1024,
            default="one for each GPU",
            panel="Run",
        ),
    ] = None
    ray: Annotated[
        str | None,
        Help(
            "Work on a folder's parts by a Ray cluster: the one at ADDRESS, else one that runs here, else this machine",
            metavar="[ADDRESS]",
            parse=parse_ray_address,
            panel="Run",
        ),
    ] = None
    request: ModelRequest = field(default_factory=ModelRequest)
    reading: ReadOptions = field(default_factory=ReadOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    batch_size: Annotated[
        int | None,
        Help(
            "Rows that the model works on together; auto: as many as memory holds",
            metavar="auto|N",
            default="auto",
            parse=parse_batch_size,
            panel="Run",
        ),
    ] = None
    max_errors: Annotated[int | None, Help("Stop after N failed rows", min=1, panel="Run")] = None
    overwrite: Annotated[bool, Help("Start over and replace the existing output")] = False
    update: Annotated[
        bool, Help("Do what is new or changed in the input since, and keep the other rows of the output")
    ] = False
    retry_errors: Annotated[bool, Help("Redo the failed rows of a finished output")] = False
    sidecar: Annotated[bool, Help("Also write each text beside its image, as a.txt beside a.jpg")] = False
    sidecar_existing: Annotated[
        Literal["error", "skip", "overwrite", "append", "prepend"],
        Help(
            "What becomes of texts already there: error, skip (do only the others), overwrite, append, prepend", "HOW"
        ),
    ] = "error"
    sidecar_ext: Annotated[str, Help("Their suffix", metavar=".EXT", default=".txt", parse=parse_suffix)] = ".txt"
    show_prompt: Annotated[
        int | None, Help("Print the prompts of the first N rows, as text and token ids, and end", min=1, panel="Run")
    ] = None
    dry_run: Annotated[
        bool, Help("Show rows, columns, the first prompt, memory and disk needed, and end; load nothing", panel="Run")
    ] = False
    answers_column: Annotated[
        str | None, Help("Column of right answers: kept, and scored at the end", metavar="NAME", panel="Input")
    ] = None

    def __post_init__(self) -> None:
        if (self.reading.null or self.reading.stdin) and STDIN not in self.inputs:
            raise IdeficsError(
                f"{'--null' if self.reading.null else '--stdin'} says how stdin is read: add - to the inputs"
            )
        if self.reading.null and self.reading.stdin == "jsonl":
            raise IdeficsError("--null separates paths: leave it out with --stdin jsonl")
        if not self.has_parts:
            self._refuse_without_parts()
        if self.overwrite and (self.retry_errors or self.update):
            kept = "--retry-errors would redo" if self.retry_errors else "--update would keep"
            raise IdeficsError(f"--overwrite discards what {kept}: use one of them")
        if self.sidecar and self.reading.allow_no_image:
            raise IdeficsError("--sidecar needs an image beside each text: leave it out, or --allow-no-image")
        if not self.sidecar and (self.sidecar_existing != "error" or self.sidecar_ext != ".txt"):
            raise IdeficsError("--sidecar-existing and --sidecar-ext have no effect without --sidecar: add it")
        if self.format == "vqav2" and (self.reading.keep or self.answers_column or self.output == STDOUT):
            raise IdeficsError(
                "--format vqav2 writes question_id and answer alone, and to a file: name one with -o F.json, and leave"
                " --keep and --answers-column out"
            )
        if self.output != STDOUT:
            return
        if self.overwrite:
            raise IdeficsError(
                "--overwrite needs an output file: add -o F.jsonl; for texts beside images there is --sidecar-existing"
                " overwrite"
            )
        if self.retry_errors or self.update:
            flag = "--retry-errors" if self.retry_errors else "--update"
            raise IdeficsError(f"{flag} needs the finished output: add -o F.jsonl")
        if self.answers_column is not None:
            raise IdeficsError("--answers-column scores the finished output: add -o F.jsonl")

    @property
    def has_parts(self) -> bool:
        """Whether the output is a folder of numbered parts."""
        return is_unit_folder(self.output)

    def _refuse_without_parts(self) -> None:
        given = {
            f"--format {self.format}": self.format in ("jsonl", "parquet"),
            "--unit-rows": self.unit_rows != UNIT_ROWS,
            "--processes": self.processes is not None,
            "--ray": self.ray is not None,
        }
        for flag in (flag for flag, is_given in given.items() if is_given):
            raise IdeficsError(f"{flag} has no effect on a single output: name a folder for parts with -o DIR/")
