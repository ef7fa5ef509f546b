"""The options of `idefics bench` as a group of flags. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from idefics_cli.cli.options import ModelFlags

if TYPE_CHECKING:
    from idefics_cli.bench.subjects import BenchOptions

MOST_THREADS = 1024


@dataclass(frozen=True)
class BenchFlags:
    """What is measured, and how often."""

    model: ModelFlags
    random: Annotated[
        Literal["tiny", "mid", "9b"] | None,
        typer.Option(help="Random weights of this size in place of a model.", show_default=False),
    ] = None
    shots: Annotated[int, typer.Option(metavar="N", min=0, help="Worked examples that all prompts start with.")] = 0
    questions_per_image: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts about each image; with a model, more than one asks.")
    ] = 1
    rows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Prompts in each run.", show_default="one batch")
    ] = None
    scenes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The same, counted in images.", show_default=False)
    ] = None
    num_beams: Annotated[int, typer.Option(metavar="N", min=1, help="Beams of the search; 1 is greedy.")] = 3
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest text, in tokens.")] = 30
    length: Annotated[
        Literal["fixed", "varied"] | None,
        typer.Option(
            help="fixed: every text is as long as it may be; varied: texts end where they end.",
            show_default="fixed for random weights, varied for a model",
        ),
    ] = None
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Give ours the images' latents, embedded beforehand.")
    ] = False
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts that are decoded at a time.")] = 8
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, help="Timed runs of each side, in turn; medians count.")
    ] = 3
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Decides weights, images and prompts.")] = 0
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=MOST_THREADS, help="Threads of the CPU.", show_default="torch's own choice"
        ),
    ] = None

    def check(self, names_model: bool) -> None:
        """Raises typer.BadParameter for what contradicts itself; `names_model`: -m stands on the command line."""
        if self.random is not None and names_model:
            raise typer.BadParameter("random weights need no model: leave -m out", param_hint="--random")
        if self.random is not None and (self.model.revision or self.model.allow_pickle):
            useless = "--revision" if self.model.revision else "--allow-pickle"
            raise typer.BadParameter("random weights come from no file: leave it out", param_hint=useless)
        if self.rows is not None and self.scenes is not None:
            raise typer.BadParameter("it says the same as --rows: give one of them", param_hint="--scenes")

    @property
    def options(self) -> BenchOptions:
        from idefics_cli.bench.subjects import BenchOptions
        from idefics_cli.engine.options import DecodingOptions

        return BenchOptions(
            request=self.model.request,
            random=self.random,
            rows=self.rows if self.scenes is None else self.scenes * self.questions_per_image,
            shots=self.shots,
            questions_per_image=self.questions_per_image,
            batch_size=self.batch_size,
            decoding=DecodingOptions(num_beams=self.num_beams, max_new_tokens=self.max_new_tokens),
            fixed_length=self.random is not None if self.length is None else self.length == "fixed",
            embeddings=self.embeddings,
            repeats=self.repeats,
            seed=self.seed,
            threads=self.threads,
        )
