"""What one benchmark measures. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, get_args

from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.errors import IdeficsError
from idefics_cli.validation import Help

RandomSize = Literal["tiny", "mid", "9b"]
SIZES: tuple[RandomSize, ...] = get_args(RandomSize)


@dataclass(frozen=True)
class BenchOptions:
    """One benchmark of the request's model, or of random weights of the size that `random` names.

    `rows` counts prompts, `scenes` images; without either, a run is one batch. `length` None: fixed for random weights,
    varied for a model. `embeddings`: our engine gets the images' latents instead of the images. `threads` None is
    torch's own choice.
    """

    request: ModelRequest = field(default_factory=ModelRequest)
    random: Annotated[
        RandomSize | None, Help("Random weights of this size in place of a model", metavar="tiny|mid|9b", panel="Model")
    ] = None
    shots: Annotated[int, Help("Examples that all prompts start with", min=0, panel="Prompt")] = 0
    questions_per_image: Annotated[
        int, Help("Prompts about each image; more than one: questions", min=1, panel="Prompt")
    ] = 1
    rows: Annotated[int | None, Help("Prompts in each run", min=1, default="one batch")] = None
    scenes: Annotated[int | None, Help("Images in each run, instead of --rows", min=1)] = None
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    length: Annotated[
        Literal["fixed", "varied"] | None,
        Help(
            "fixed: all texts have the most tokens; varied: they end where they end",
            metavar="fixed|varied",
            default="fixed for random weights, varied for a model",
            panel="Decoding",
        ),
    ] = None
    embeddings: Annotated[bool, Help("Our engine gets the images' latents instead", panel="Images")] = False
    batch_size: Annotated[int, Help("Prompts decoded together", min=1)] = 8
    repeats: Annotated[int, Help("Timed runs of each side, in turn; medians are shown", min=1)] = 3
    seed: Annotated[int, Help("Of weights, images and prompts", min=0)] = 0
    threads: Annotated[int | None, Help("CPU threads", min=1, max=1024, default="torch's own choice")] = None

    def __post_init__(self) -> None:
        given = {flag: getattr(self.request, flag) for flag in ("revision", "allow_pickle", "adapter")}
        useless = next((f"--{flag.replace('_', '-')}" for flag, value in given.items() if value), None)
        if self.random is not None and useless is not None:
            raise IdeficsError(f"{useless} has no effect on --random {self.random}: leave it out")
        if self.rows is not None and self.scenes is not None:
            raise IdeficsError("--rows counts prompts and --scenes images: use one of them")

    @property
    def num_rows(self) -> int:
        if self.scenes is not None:
            return self.scenes * self.questions_per_image
        return self.rows or self.batch_size

    @property
    def num_images(self) -> int:
        """Images asked about, not counting shots."""
        return -(-self.num_rows // self.questions_per_image)

    @property
    def fixed_length(self) -> bool:
        """Whether every text has `decoding.max_new_tokens`."""
        return self.random is not None if self.length is None else self.length == "fixed"

    @property
    def texts(self) -> DecodingOptions:
        """How texts are decoded, with the fixed length."""
        least = self.decoding.max_new_tokens if self.fixed_length else self.decoding.min_new_tokens
        return replace(self.decoding, min_new_tokens=least)
