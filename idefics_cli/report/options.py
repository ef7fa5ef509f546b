"""What a page shows of a result file. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from idefics_cli.errors import IdeficsError
from idefics_cli.rows import ImageOptions, ReadOptions
from idefics_cli.validation import Help


@dataclass(frozen=True)
class ReportOptions:
    """`output` "-" is stdout. `reading` holds for the results, and for the input that `images_from` names."""

    output: Annotated[str, Help("Where the page goes, or - for stdout", metavar="R.html", flags=("-o", "--output"))] = (
        ""
    )
    compare: Annotated[
        str | None, Help("Show the texts of this result file beside the others, by id", metavar="OTHER", panel="Input")
    ] = None
    images_from: Annotated[
        str | None,
        Help(
            "The run's INPUT: images are taken from it, by id",
            metavar="INPUT",
            flags=("--images",),
            default="the paths in the results",
            panel="Images",
        ),
    ] = None
    link: Annotated[bool, Help("Link the images' files and embed no thumbnails, for many rows", panel="Images")] = False
    thumbnail: Annotated[
        int, Help("Longest side of the embedded images, in pixels", min=16, max=1024, panel="Images")
    ] = 256
    answers_column: Annotated[
        str | None,
        Help("Column of the references", metavar="NAME", default="answers, if there is one", panel="Input"),
    ] = None
    choices_column: Annotated[
        str | None,
        Help("Column of each row's choices", metavar="NAME", default="choices, if there is one", panel="Input"),
    ] = None
    overwrite: Annotated[bool, Help("Replace an existing page")] = False
    reading: ReadOptions = field(default_factory=partial(ReadOptions, keep="all"))
    images: ImageOptions = field(default_factory=partial(ImageOptions, draft=True))

    def __post_init__(self) -> None:
        if not self.output:
            raise IdeficsError("a report is a page in a file: add -o R.html")
        if self.images_from is None and (self.reading.image_column or self.reading.id_column):
            raise IdeficsError("--image-column and --id-column are about the run's INPUT: name it with --images")
