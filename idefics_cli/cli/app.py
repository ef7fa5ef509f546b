"""The command line: options in, exit code out. With `terminal.py` the only module that prints or exits.

Data goes to stdout or to `-o`, talk to stderr. Exit codes: 0 every row has a text (or nobody reads the rows any more),
2 nothing was done, 3 some rows have errors, 130 and 143 stopped by a signal, 1 a bug. Whatever is heavy (torch,
transformers, Pillow) is imported inside the command that needs it, so that `--help` is quick.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from idefics_cli import __version__
from idefics_cli.cli.bench_options import BenchFlags
from idefics_cli.cli.console import (
    EXIT_FAILED_ROWS,
    EXIT_MISTAKE,
    Progress,
    console,
    exit_codes,
    is_terminal,
    print_data,
    rows_so_far,
    say,
    say_finished,
    say_summary,
    show_table,
)
from idefics_cli.cli.options import (
    AllowPickleFlag,
    BatchSizeFlag,
    DebugFlag,
    DeviceFlag,
    DtypeFlag,
    RevisionFlag,
    RunFlags,
    flattened,
    rows_per_batch,
)
from idefics_cli.cli.task_options import AskFlags, DecodingFlags, EmbeddingsFlag, QuestionFlags, TextFlags

if TYPE_CHECKING:
    from idefics_cli.bench.subjects import BenchOptions
    from idefics_cli.checkpoint import ModelRequest
    from idefics_cli.evaluation.score import ScoreOptions
    from idefics_cli.idefics import Idefics
    from idefics_cli.pipeline.run import RunOptions
    from idefics_cli.pipeline.task import Task

app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain usage and errors: one line that says what is wrong stays one line
)


def check_model(request: ModelRequest) -> str | None:
    """Raise what can be known to be wrong before the weights are read; a digest of them where they are at hand."""
    from idefics_cli.checkpoint import check_model_request, weights_digest

    check_model_request(request)
    return weights_digest(request)


def load_model(request: ModelRequest, batch_size: int | None) -> Idefics:
    """Read the weights. Tests put a fake in place of this and of `check_model`."""
    from idefics_cli.idefics import Idefics

    return Idefics.from_pretrained(**vars(request), batch_size=batch_size)


# Commands


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"idefics {__version__}")
        raise typer.Exit()


@app.callback()
def idefics(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Describe images with IDEFICS: data on stdout or in -o, everything else on stderr."""


@app.command()
@flattened
def caption(run: RunFlags, ask: AskFlags, debug: DebugFlag = False) -> None:
    """Describe images: one row for each, in input order.

    A folder stands for every image below it, sorted by path; hidden and system files are passed over, links to folders
    not followed. An image that cannot be read is a row with an error and never stops the run. The same command again
    goes on where a run was stopped.
    """
    _ask(run, ask, None, debug)


@app.command()
@flattened
def vqa(run: RunFlags, questions: QuestionFlags, ask: AskFlags, debug: DebugFlag = False) -> None:
    """Answer questions about images: those of a manifest's column `question`, or the same with -q about every image.

    One row for each question, in input order. An image that cannot be read, or a row without a question, is a row with
    an error and never stops the run. The same command again goes on where a run was stopped.
    """
    _ask(run, ask, questions, debug)


@app.command()
@flattened
def generate(
    run: RunFlags,
    text: TextFlags,
    decoding: DecodingFlags,
    prompt_column: Annotated[str, typer.Option(metavar="NAME", help="Column of the prompts.")] = "prompt",
    embeddings: EmbeddingsFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Continue free prompts: manifest rows whose `prompt` is a list of texts and images, or a conversation.

    In a list a string is text, an image is bytes or a struct (`{"image": "a.jpg"}`, `{bytes, path}`). A conversation
    is a list of `{"role", "content"}` messages, as transformers' chat templates take them.
    """
    with exit_codes(debug):
        from idefics_cli.tasks.generate import MAX_NEW_TOKENS, Generate, GenerateOptions

        decoded = decoding.decoding(MAX_NEW_TOKENS)
        task = Generate(GenerateOptions(decoded, prompt_column, embeddings, text.postprocess(task=None)))
        options = run.options(task, decoding.rows_per_batch)
    _run(options, task, debug)


@app.command()
@flattened
def embed(run: RunFlags, batch_size: BatchSizeFlag = "auto", debug: DebugFlag = False) -> None:
    """Run the vision side once: each image's latents into a Parquet file, by id.

    `caption`, `vqa` and `generate` take it with --embeddings in place of the images.
    """
    with exit_codes(debug):
        from idefics_cli.tasks.embed import Embed

        task = Embed(run.model.request)
        options = run.options(task, rows_per_batch(batch_size))
        if not options.output.endswith(".parquet"):
            raise typer.BadParameter("latents go into Parquet: add -o E.parquet", param_hint="--output")
        if options.sidecar:
            raise typer.BadParameter("there are no texts to write: leave it out", param_hint="--sidecar")
    _run(options, task, debug)


@app.command()
def score(
    results: Annotated[
        str, typer.Argument(metavar="RESULTS", help="Result file of caption or vqa (.jsonl, .parquet, also .jsonl.gz).")
    ],
    answers_column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of the references, a list of texts.")
    ] = "answers",
    by: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column whose values are told apart.", show_default=False)
    ] = None,
    metric: Annotated[
        Literal["auto", "vqa", "cider", "exact"],
        typer.Option(help="auto: VQA accuracy for answers, CIDEr for captions; exact match always."),
    ] = "auto",
    tokenization: Annotated[
        Literal["ptb", "treebank"],
        typer.Option(help="How CIDEr's words are found; ptb: as published, needs Java; treebank: needs none."),
    ] = "ptb",
    debug: DebugFlag = False,
) -> None:
    """Say how right a result file is: VQA accuracy, exact match, CIDEr, against a column kept with --keep.

    A row with an error counts as wrong. A table goes to stderr, one JSON line to stdout.
    """
    with exit_codes(debug):
        from idefics_cli.evaluation.score import ScoreOptions

        _print_scores(results, ScoreOptions(answers_column, by, metric, tokenization))


@app.command()
@flattened
def bench(context: typer.Context, flags: BenchFlags, debug: DebugFlag = False) -> None:
    """Measure speed on this machine, beside transformers, with the distance to the hardware's floor.

    Both sides get the same prompts and share the weights. The first call of ours (nothing cached yet) is told apart;
    timed runs have new images and the same shots. Tables go to stderr, one JSON line to stdout.
    """
    flags.check(names_model=context.get_parameter_source("model").name == "COMMANDLINE")
    with exit_codes(debug):
        from idefics_cli.checkpoint import check_model_request

        if flags.random is None:
            check_model_request(flags.model.request)
        _print_bench(flags.options)


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Hub id, local folder or `demo`.", show_default=False)
    ] = None,
    revision: RevisionFlag = None,
    dtype: DtypeFlag = "auto",
    device: DeviceFlag = "auto",
    allow_pickle: AllowPickleFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Show versions, devices and, for a model, whether and how it would run here."""
    with exit_codes(debug):
        from idefics_cli.checkpoint import ModelRequest

        facts = _machine_facts(device, dtype)
        if model is not None:
            facts["model"] = _model_fact(ModelRequest(model, revision, dtype, device, allow_pickle))
        _print_facts(facts)


# Runs


def _ask(run: RunFlags, ask: AskFlags, questions: QuestionFlags | None, debug: bool) -> None:
    """Answers where there are questions, else captions."""
    with exit_codes(debug):
        from idefics_cli.tasks.caption_vqa import CaptionVqa

        command = "caption" if questions is None else "vqa"
        task = CaptionVqa(ask.options(command, questions, run.inputs.image_column))
        options = run.options(task, ask.decoding.rows_per_batch, ask.scores.answers_column)
        scoring = ask.scores.scoring(run.output, command)
    _run(options, task, debug, scoring)


def _run(options: RunOptions, task: Task, debug: bool, scoring: ScoreOptions | None = None) -> None:
    from idefics_cli.pipeline.prefetch import RunStats
    from idefics_cli.pipeline.run import Run

    stats = RunStats()
    with exit_codes(
        debug, lambda condition: rows_so_far(stats, options.output, options.overwrite, condition)
    ) as signals:
        with Progress(stats, signals) as progress:
            stdin = getattr(sys.stdin, "buffer", None)
            run = Run(options, task, check_model, load_model, stats, progress, stdin)
            had_work = run.run(progress.stdout())
        if had_work:
            say_summary(stats, options.output, made="latents" if run.form.text_column is None else "a text")
        else:
            say_finished(stats, options.output)
    if scoring is not None and not stats.stopped_early:
        with exit_codes(debug):
            shown_as = run.passthrough.names[scoring.answers_column]
            _print_scores(options.output, replace(scoring, answers_column=shown_as))
    if stats.num_failed:
        raise typer.Exit(EXIT_FAILED_ROWS)


# Scores


def _print_scores(results: str, options: ScoreOptions) -> None:
    from idefics_cli.evaluation.score import score_results, score_table

    scores = score_results(results, options)
    show_table(score_table(scores))
    print_data(json.dumps(scores.as_dict(), ensure_ascii=False))


# Measurements


def _print_bench(options: BenchOptions) -> None:
    """Run it; tables on stderr, the report on stdout as one line of JSON."""
    from idefics_cli.bench.report import run, tables

    found = run(options, say)
    for table in tables(found):
        show_table(table, soft_wrap=False)
    print_data(json.dumps(found))


# Facts


def _machine_facts(device: str, dtype: str) -> dict[str, str]:
    import platform
    from importlib import metadata

    import torch

    from idefics_cli.checkpoint import resolve_device, resolve_dtype

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ("torch", "transformers", "pillow", "pyarrow")
    chosen = resolve_device(device)
    return {
        "idefics": __version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "cuda": ", ".join(cuda) or "none",
        "threads": str(torch.get_num_threads()),
        "device": str(chosen),
        "dtype": str(resolve_dtype(dtype, chosen)).removeprefix("torch."),
    }


def _model_fact(request: ModelRequest) -> str:
    from idefics_cli.checkpoint import check_model_request, inspect_folder, local_folder

    check_model_request(request)
    folder = local_folder(request.model)
    if folder is None:
        return f"{request.model}, from the hub or its cache when it is used"
    weights = sum(file.stat().st_size for file in inspect_folder(folder, request.allow_pickle).weight_files)
    return f"{folder}, {weights / 1e6:,.1f} MB of weights"


def _print_facts(facts: Mapping[str, str]) -> None:
    from rich.table import Table

    if not is_terminal(sys.stdout):
        print_data(*(f"{name}: {fact}" for name, fact in facts.items()))
        return
    table = Table(show_header=False)
    for name, fact in facts.items():
        table.add_row(name, fact)
    console(sys.stdout).print(table)


def main() -> None:
    """What `__main__.py` calls."""
    try:
        app(prog_name="idefics")
    except OSError as error:  # a command has its own care: it is help, or the version, that has not come out
        say(f"cannot write to stdout: {error.strerror}", label="Error: ")
        sys.exit(EXIT_MISTAKE)
