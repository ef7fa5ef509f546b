"""The command line: options in, exit code out. With `console.py` the only module that prints or exits.

Data goes to stdout or to `-o`, everything else to stderr. Exit codes: 0 every row has a text (or stdout was closed),
2 a mistake, 3 some rows have errors, 129, 130 and 143 stopped by a signal, 1 a bug. Whatever is heavy (torch,
transformers, Pillow) is imported inside the command that needs it, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from idefics_cli import __version__
from idefics_cli.bench.options import BenchOptions
from idefics_cli.checkpoint import quantize
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.cli.completion import SHELLS, model_names
from idefics_cli.cli.console import (
    EXIT_BUG,
    EXIT_FAILED_ROWS,
    EXIT_MISTAKE,
    Signals,
    TalkOptions,
    exit_codes,
    is_terminal,
    print_data,
    say,
    say_error,
    show,
    silence,
)
from idefics_cli.cli.help import HelpfulCommand, HelpfulGroup, tries
from idefics_cli.cli.options import flattened
from idefics_cli.cli.status import Progress, rows_so_far, say_failures, say_finished, say_summary
from idefics_cli.errors import IdeficsError
from idefics_cli.evaluation.options import ScoreOptions
from idefics_cli.pipeline.options import RAY_ADDRESS, RunOptions
from idefics_cli.ranks import is_first, is_launched, join, joined, leave_signals_to_first
from idefics_cli.report.options import ReportOptions
from idefics_cli.storage.filenames import counted, shown_place
from idefics_cli.tasks.options import CaptionVqaOptions, GenerateOptions
from idefics_cli.validation import Help

if TYPE_CHECKING:
    from idefics_cli.loaded_model import LoadedModel
    from idefics_cli.pipeline.prefetch import RunStats
    from idefics_cli.pipeline.run import Run
    from idefics_cli.pipeline.task import Task

RUNS = ("caption", "vqa", "generate", "embed")  # what several processes can do together
DESCRIBE, RESULTS, MACHINE = "Describe images", "Results", "This machine"  # panels of commands
TEXT_FORMATS = {"format": Help("Of the rows; auto: by the output's name, Parquet in a folder", "auto|jsonl|parquet")}
LATENTS_FILE = {
    "output": Help(
        "Where latents go: a .parquet file, or a folder for numbered parts (DIR/): needed",
        metavar="FILE",
        flags=("-o", "--output"),
        default=False,
    )
}

app = typer.Typer(
    cls=HelpfulGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain usage and errors: one line that says what is wrong stays one line
)


def check_model(request: ModelRequest) -> str | None:
    """Raise what can be known to be wrong before the weights are read; a digest of them where they are at hand."""
    from idefics_cli.checkpoint.find import check_model_request, weights_digest

    check_model_request(request)
    return weights_digest(request)


def load_model(request: ModelRequest, batch_size: int | None) -> LoadedModel:
    """Read the weights. Tests put a fake in place of this and of `check_model`."""
    from idefics_cli.loaded_model import LoadedModel

    return LoadedModel.from_pretrained(**vars(request), batch_size=batch_size, ranks=joined())


# Commands


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"idefics {__version__}")
        raise typer.Exit()


@app.callback()
def idefics(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            *("-V", "--version"),
            callback=_show_version,
            is_eager=True,
            help="Show the version and exit.",
            rich_help_panel="Run",
        ),
    ] = False,
) -> None:
    """Describe images with IDEFICS, and answer questions about them, in bulk.

    Data goes to stdout or into -o, everything else to stderr.
    """
    if context.invoked_subcommand is None:
        print(*tries(), sep="\n")
        raise typer.Exit()
    if is_launched() and context.invoked_subcommand not in RUNS:
        with exit_codes(debug=False):
            raise IdeficsError(f"torchrun is for {', '.join(RUNS)}: run {context.invoked_subcommand} without it")


class RunCommand(HelpfulCommand):
    """`--ray` may stand alone. What comes next is its address only where it looks like one, and an input otherwise."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        given = zip(args, [*args, ""][1:], strict=True)
        named = [f"{arg}=" if arg == "--ray" and not RAY_ADDRESS.fullmatch(then) else arg for arg, then in given]
        return super().parse_args(context, named)


@app.command(cls=RunCommand, rich_help_panel=DESCRIBE)
@flattened("questions", "question_column", helps=TEXT_FORMATS, task="caption", max_new_tokens=30)
def caption(run: RunOptions, options: CaptionVqaOptions, talk: TalkOptions, signals: Signals) -> None:
    """Describe images: one row for each, in input order.

    A folder stands for every image below it, sorted by path, without hidden and system files and linked folders. An
    image that cannot be read gives a row with an error and never stops the run. The same command again continues a run
    that was stopped.
    """
    _ask(run, options, talk, signals)


@app.command(cls=RunCommand, rich_help_panel=DESCRIBE)
@flattened(task="vqa", max_new_tokens=15)
def vqa(run: RunOptions, options: CaptionVqaOptions, talk: TalkOptions, signals: Signals) -> None:
    """Answer questions about images: those of a manifest's column `question`, or the same with -q about every image.

    One row for each question, in input order. An image that cannot be read, or a row without a question, gives a row
    with an error and never stops the run. The same command again continues a run that was stopped.
    """
    _ask(run, options, talk, signals)


@app.command(cls=RunCommand, rich_help_panel=DESCRIBE)
@flattened("answers_column", helps=TEXT_FORMATS, max_new_tokens=100)
def generate(run: RunOptions, options: GenerateOptions, talk: TalkOptions, signals: Signals) -> None:
    """Continue free prompts: manifest rows whose `prompt` is a list of texts and images, or a conversation.

    An image is bytes, a struct (`{"image": "a.jpg"}`, `{bytes, path}`), a string that names one, or `<image>` in a text
    beside a column `image` or `images`. A conversation is a list of `{"role", "content"}` messages, as transformers'
    chat templates and OpenAI's API take them, or LLaVA's `{"from", "value"}`.
    """
    from idefics_cli.tasks.generate import Generate

    _run(run, partial(Generate, options), talk, signals)


@app.command(cls=RunCommand, rich_help_panel=DESCRIBE)
@flattened(
    *("answers_column", "sidecar", "sidecar_existing", "sidecar_ext", "allow_no_image", "show_prompt", "format"),
    *("attention", "eager"),
    helps=LATENTS_FILE,
)
def embed(run: RunOptions, talk: TalkOptions, signals: Signals) -> None:
    """Run the vision side once: each image's latents into a Parquet file, by id.

    `caption`, `vqa` and `generate` take it with --embeddings instead of the images.
    """
    from idefics_cli.tasks.embed import Embed

    if not (run.output.endswith(".parquet") or run.has_parts):
        raise IdeficsError("embed writes Parquet: add -o E.parquet")
    _run(run, partial(Embed, run.request), talk, signals)


@app.command(cls=HelpfulCommand, rich_help_panel=RESULTS)
@flattened()
def score(
    results: Annotated[
        str,
        typer.Argument(
            metavar="RESULTS", help="Result file of caption or vqa, or folder of its parts.", rich_help_panel="Input"
        ),
    ],
    options: ScoreOptions,
) -> None:
    """Score a result file: VQA accuracy, exact match, CIDEr, against a column kept with --keep.

    A row with an error counts as wrong. A table goes to stderr, one JSON line to stdout.
    """
    _print_scores(results, options)


@app.command(cls=HelpfulCommand, rich_help_panel=RESULTS)
@flattened("recursive", "null", "stdin", "allow_no_image", "shard", "draft", keep="all", draft=True)
def report(
    results: Annotated[
        str,
        typer.Argument(
            metavar="RESULTS",
            help="Result file (.jsonl, .json, .csv, .parquet), folder of parts, or - for JSON lines.",
            rich_help_panel="Input",
        ),
    ],
    options: ReportOptions,
    signals: Signals,
) -> None:
    """Make one page to look through a result file: images, texts, scores; search, filters, marks, corrections.

    The page is a single file that any browser opens, with small copies of the images inside. It fetches nothing.
    """
    _write_report(results, options, signals)


@app.command(cls=HelpfulCommand, rich_help_panel=RESULTS)
@flattened()
def salvage(
    part: Annotated[
        str,
        typer.Argument(
            metavar="F.part", help="What a stopped run has left beside its output.", rich_help_panel="Input"
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            *("-o", "--output"),
            metavar="FILE",
            help="Where the rows go. [default: the name before .part]",
            rich_help_panel="Output",
        ),
    ] = None,
) -> None:
    """Make a file of the rows that a stopped run has finished, where it cannot be resumed: its input is gone, for one.

    Columns of --keep are not among them. Of a file under its own name, --update does the other rows later.
    """
    from pathlib import Path

    from idefics_cli.writers.output_file import FileOutput, output_place

    final = part.removesuffix(".part")
    if not Path(f"{final}.part").is_file():
        raise IdeficsError(f"no file {final}.part: name what a stopped run has left beside its output")
    target = output_place(output or final, "captions.jsonl")
    with contextlib.closing(FileOutput(final, format_name="vqav2" if final.endswith(".json") else None)) as stopped:
        counts = stopped.salvage(target)
    say(f"{counted(counts['rows'], 'row')} in {target}, {sum(counts['failed'].values())} failed.")


@app.command(cls=HelpfulCommand, rich_help_panel=RESULTS)
@flattened()
def merge(
    folder: Annotated[
        str,
        typer.Argument(metavar="DIR", help="A folder of parts, as -o DIR/ makes them.", rich_help_panel="Input"),
    ],
    output: Annotated[
        str,
        typer.Option("-o", "--output", metavar="FILE", help="Where all rows go: needed.", rich_help_panel="Output"),
    ],
) -> None:
    """Join the parts of a folder into one file: none missing, each with its rows and of one run, no id twice.

    The file is what one process would have written, and known as its result.
    """
    from idefics_cli.scale.merge import merge as joined
    from idefics_cli.writers.output_file import output_place

    found = joined(folder, output_place(output, "captions.jsonl"))
    say(f"{counted(found.rows, 'row')} in {output}, {sum(found.failed.values())} failed.")


@app.command(cls=HelpfulCommand, rich_help_panel=MACHINE)
@flattened(
    *("min_new_tokens", "length_penalty", "early_stopping", "no_repeat_ngram_size", "num_return_sequences"),
    *("repetition_penalty", "do_sample", "temperature", "top_k", "top_p", "device_map", "quantize"),
)
def bench(context: typer.Context, options: BenchOptions) -> None:
    """Measure speed on this machine, beside transformers, with the distance to the hardware's floor.

    Both sides get the same prompts and share the weights. The first call of ours (nothing cached yet) is reported
    separately; timed runs have new images and the same shots. Tables go to stderr, one JSON line to stdout.
    """
    from idefics_cli.bench.report import comparison_table, phase_table, run
    from idefics_cli.checkpoint.find import check_model_request

    if options.random is None:
        check_model_request(options.request)
    elif context.get_parameter_source("model").name == "COMMANDLINE":
        raise IdeficsError(f"-m has no effect on --random {options.random}: leave it out")
    found = run(options, say)
    for table in (comparison_table(found), phase_table(found["phases"])):
        show(table, soft_wrap=False)
    print_data(json.dumps(found))


@app.command(cls=HelpfulCommand, rich_help_panel=MACHINE)
@flattened("model", "eager", "device_map", "attention")
def info(
    request: ModelRequest,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Hub id, local folder or demo.",
            rich_help_panel="Model",
            autocompletion=model_names,
        ),
    ] = None,
    device_count: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Say in which formats MODEL fits on N devices.", rich_help_panel="Model"),
    ] = None,
    device_memory: Annotated[
        float | None,
        typer.Option(metavar="GB", help="Memory of each. [default: what is free on this one]", rich_help_panel="Model"),
    ] = None,
) -> None:
    """Show versions, devices and, for a model, whether and how it would run here."""
    from idefics_cli.cli.info import fit_facts, machine_facts, model_facts

    facts = machine_facts(request)
    if model is not None or request.adapter is not None:
        request = replace(request, model=model or request.model)
        facts |= model_facts(request) if device_count is None else fit_facts(request, device_count, device_memory)
    print_data(*(f"{name}: {fact}" for name, fact in facts.items()))


# Runs


def _ask(run: RunOptions, options: CaptionVqaOptions, talk: TalkOptions, signals: Signals) -> None:
    from idefics_cli.tasks.caption_vqa import CaptionVqa

    make_task = partial(CaptionVqa.over_files, options, run.reading)
    scoring = None if run.answers_column is None else _closing_scores(run.answers_column, options)
    _run(run, make_task, talk, signals, scoring)


def _meet(run: RunOptions) -> None:
    """Under torchrun: the first process comes back, to do the run, and the others follow it up to its end."""
    if not is_launched():
        return
    if run.has_parts:
        raise IdeficsError("torchrun is for one model in several processes, and one output: name a file, as -o F.jsonl")
    ranks = join()
    if ranks.rank == 0:
        return
    try:
        load_model(run.request, run.batch_size).follow()
    except IdeficsError as error:
        ranks.end(EXIT_MISTAKE, f"{error}")
    except Exception as error:
        ranks.end(EXIT_BUG, f"a bug in process {ranks.rank + 1} of {ranks.size}: {type(error).__name__}: {error}")


def _run(
    options: RunOptions,
    make_task: Callable[[], Task],
    talk: TalkOptions,
    signals: Signals,
    scoring: ScoreOptions | None = None,
) -> None:
    from idefics_cli.pipeline.prefetch import RunStats
    from idefics_cli.pipeline.run import Run

    if options.dry_run:
        _show_plan(options, make_task)
        return
    _meet(options)
    stats, model, form, shows = RunStats(), (check_model, load_model), None, options.show_prompt is not None
    if shows:
        from idefics_cli.tasks.shown_prompts import FORM, prompt_viewer, prompts_alone

        options, model, form, scoring = prompts_alone(options), (lambda request: None, prompt_viewer), FORM, None
    signals.safe_rows = lambda condition: rows_so_far(stats, options.output, options.overwrite, condition)
    with Progress(stats, signals, talk, ", ".join(map(shown_place, options.inputs)), options.output) as progress:
        if options.has_parts and not shows:
            run, had_work = _run_units(options, make_task, stats, progress)
        else:
            run = Run(options, make_task(), *model, stats, progress, getattr(sys.stdin, "buffer", None))
            run.form = form or run.form
            had_work = run.run(progress.stdout())
    if shows:
        say_failures(stats)
    elif had_work:
        say_summary(stats, options.output, made="latents" if run.form.text_column is None else "a text")
    else:
        say_finished(stats, options.output)
    if scoring is not None and not stats.stopped_early:
        signals.safe_rows = lambda condition: ""
        names = run.passthrough.names
        answers, choices = names[scoring.answers_column], names.get(scoring.choices_column)
        _print_scores(options.output, replace(scoring, answers_column=answers, choices_column=choices))
    if stats.num_failed:
        raise typer.Exit(EXIT_FAILED_ROWS)


def _show_plan(options: RunOptions, make_task: Callable[[], Task]) -> None:
    from idefics_cli.cli.dry_run import dry_run_facts
    from idefics_cli.pipeline.prefetch import RunStats
    from idefics_cli.pipeline.run import Run
    from idefics_cli.pipeline.task import Observer
    from idefics_cli.scale.units import require_units

    if options.has_parts:
        require_units(options)
    stdin = getattr(sys.stdin, "buffer", None)
    run = Run(options, make_task(), check_model, load_model, RunStats(), Observer(), stdin)
    print_data(*(f"{name}: {fact}" for name, fact in dry_run_facts(run)))


def _write_report(results: str, options: ReportOptions, signals: Signals) -> None:
    from idefics_cli.pipeline.prefetch import RunStats
    from idefics_cli.report.page import write_report

    if options.output == "-" and is_terminal(sys.stdout):
        raise IdeficsError("a page is not for a terminal: name a file with -o R.html")
    with Progress(RunStats(), signals, TalkOptions(status_every=0)) as progress:
        progress.on_start(None)
        stdin, stdout = (getattr(stream, "buffer", None) for stream in (sys.stdin, sys.stdout))
        counts = write_report(results, options, stdin, stdout, progress.on_row)
    place = "on stdout" if options.output == "-" else f"in {options.output}"
    hidden = f", {counts.num_hidden} of them without an image to show" if counts.num_hidden else ""
    say(f"{counted(counts.rows, 'row')} {place}{hidden}.")
    for code, message in counts.reasons.items():
        if code:
            remedy = "; --image-root FOLDER or --images INPUT says where images are" if code == "image_missing" else ""
            say(f"{code}: {counted(counts.without_image[code], 'row')}, first: {message}{remedy}")


def _run_units(
    options: RunOptions, make_task: Callable[[], Task], stats: RunStats, progress: Progress
) -> tuple[Run, bool]:
    """The parts of a folder, and whether there was anything to do."""
    from idefics_cli.pipeline.run import Run
    from idefics_cli.scale.processes import Crew, processes_for
    from idefics_cli.scale.ray import do_on_cluster, require_ray
    from idefics_cli.scale.units import Done, Job, Units, drive, require_units

    require_units(options)
    if options.ray is not None:
        require_ray(options)
    shard = options.reading.shard or (1, 1)
    options = replace(options, reading=replace(options.reading, shard=None))
    job = Job(options, make_task, check_model, load_model)

    def do_here(units: Units) -> Iterator[Done]:
        with Crew(job, processes_for(options, units.stop - units.first), progress) as crew:
            yield from crew.do(units.missing(), units.part)

    run = Run(options, make_task(), check_model, load_model, stats, progress)
    summary = drive(run, shard, do_here if options.ray is None else partial(do_on_cluster, job, progress))
    if summary is None and not stats.stopped_early:
        progress.say(f"Other parts of {options.output} are not done yet: those of other shards.")
    if summary is not None and summary.repeated:
        ids = ", ".join(summary.repeated_ids)
        progress.say(f"{counted(summary.repeated, 'row')} with the id of a row in another part: {ids}.")
    return run, stats.rows > stats.resumed


def _closing_scores(answers_column: str, options: CaptionVqaOptions) -> ScoreOptions:
    """How a finished run is scored. Raises IdeficsError where it cannot be."""
    from idefics_cli.evaluation.metrics import require_cider
    from idefics_cli.evaluation.score import closing_tokenization

    choices = {"choices": options.choices.words, "choices_column": options.choices.column}
    scoring = ScoreOptions(answers_column, tokenization=closing_tokenization(), **choices)
    if options.prompts.task == "caption":
        require_cider(scoring.tokenization)
    return scoring


def _print_scores(results: str, options: ScoreOptions) -> None:
    from idefics_cli.evaluation.score import score_results, score_table

    scores = score_results(results, options)
    show(score_table(scores))
    print_data(json.dumps(scores.as_dict(), ensure_ascii=False))


def command_line() -> Any:
    """The app, whose options of completion are as quick as the others: a default of None has Typer import pydantic."""
    group = typer.main.get_command(app)
    for each in group.params:
        if each.name.endswith("_completion") and each.is_flag:
            each.default, each.rich_help_panel = False, "Run"
            each.help = f"{each.name.partition('_')[0].title()} completion of this shell, or of {', '.join(SHELLS)}."
    return group


def main() -> None:
    """What `__main__.py` calls."""
    quantize.silence()
    if is_launched() and not is_first():
        silence()
        leave_signals_to_first()
    try:
        command_line()(prog_name="idefics")
    except SystemExit as end:
        if joined() is not None:
            joined().end(end.code or 0)
        raise
    except OSError as error:  # commands handle their own errors: help, the version or completion could not be written
        place = error.filename or "stdout"
        say_error(f"cannot write to {place}: {error.strerror}", debug=False, code=EXIT_MISTAKE)
        sys.exit(EXIT_MISTAKE)
