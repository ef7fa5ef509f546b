"""The command line: options in, exit code out. The only module that prints or exits.

Data goes to stdout or to `-o`, talk to stderr. What a user can have got wrong is looked at in this order, before a
model is loaded: options, inputs, output, model. Exit codes: 0 every row has a text (or nobody reads the rows any more),
2 nothing was done, 3 some rows have errors, 130 and 143 stopped by a signal, 1 a bug. Whatever is heavy (torch,
transformers, Pillow) is imported inside the command that needs it, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TextIO

import typer

from idefics_cli import __version__
from idefics_cli.checkpoint import DEFAULT_MODEL
from idefics_cli.errors import IdeficsError, one_line

if TYPE_CHECKING:
    from rich.console import Console
    from tqdm import tqdm

    from idefics_cli.checkpoint import ModelRequest
    from idefics_cli.data.readers import Inputs
    from idefics_cli.data.writers import FileWriter, RowWriter, StreamWriter
    from idefics_cli.pipeline import Captioner, RunOptions, RunStats

MAX_WORKERS = 8

EXIT_BUG = 1
EXIT_MISTAKE = 2
EXIT_FAILED_ROWS = 3
EXIT_SIGNAL = 128  # and the signal's number

app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain usage and errors: one line that says what is wrong stays one line
)


# Options that commands share

ModelOption = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        envvar="IDEFICS_MODEL",
        help="Hub id, local folder, or `demo` (coloured shapes, runs anywhere).",
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of the hub model.", show_default=False)
]
DtypeOption = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    typer.Option(help="Number format of the weights; auto: bf16 or fp16 on CUDA, fp32 on the CPU."),
]
DeviceOption = Annotated[str, typer.Option(metavar="auto|cuda|cuda:N|cpu|mps", help="Where the model runs.")]
AllowPickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Load weights from pickles (weights only) where there is no safetensors.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings.")]


def check_model(request: ModelRequest) -> None:
    """Raise what can be known to be wrong before the weights are read."""
    from idefics_cli.checkpoint import check_model_request

    check_model_request(request)


def load_model(request: ModelRequest, batch_size: int | None) -> Captioner:
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
def caption(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="Image files, folders, or - for paths from stdin.", show_default=False),
    ],
    output: Annotated[str, typer.Option("-o", "--output", metavar="F.jsonl|-", help="Where rows go.")] = "-",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is there under the output's name.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Take the first N rows only.", show_default=False)
    ] = None,
    no_recursive: Annotated[bool, typer.Option("--no-recursive", help="Leave out the sub-folders of folders.")] = False,
    null: Annotated[bool, typer.Option("-0", "--null", help="Paths on stdin end with NUL, not with a line.")] = False,
    max_errors: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Stop as soon as N rows have failed.", show_default=False)
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(metavar="N", min=1, help="Refuse pictures with more pixels than this.")
    ] = 64_000_000,
    model: ModelOption = DEFAULT_MODEL,
    revision: RevisionOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    allow_pickle: AllowPickleOption = False,
    num_beams: Annotated[int, typer.Option(metavar="N", min=1, help="Beams of the search; 1 is greedy.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest text, in tokens.")] = 30,
    min_new_tokens: Annotated[int, typer.Option(metavar="N", min=0, help="Shortest text, in tokens.")] = 0,
    length_penalty: Annotated[
        float, typer.Option(metavar="X", help="Scores are divided by length to this power.")
    ] = 1.0,
    early_stopping: Annotated[bool, typer.Option(help="End when there are as many finished texts as beams.")] = True,
    no_repeat_ngram_size: Annotated[
        int, typer.Option(metavar="N", min=0, help="Never repeat N tokens in a row; 0: may.")
    ] = 0,
    num_return_sequences: Annotated[
        int, typer.Option(metavar="N", min=1, help="Best texts per image; more than one adds a `candidates` column.")
    ] = 1,
    batch_size: Annotated[str, typer.Option(metavar="auto|N", help="Images that are described at a time.")] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Threads that decode images.", show_default=f"processors, at most {MAX_WORKERS}"
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Describe images: one JSON line for each, in input order.

    A folder stands for every image below it, sorted by path; hidden and system files are passed over, links to folders
    not followed. An image that cannot be read is a row with an error and never stops the run.
    """
    from idefics_cli.pipeline import RunOptions, RunStats

    rows_per_call = _parse_batch_size(batch_size)
    if null and "-" not in inputs:
        raise typer.BadParameter("it says how stdin is read: add - to the inputs", param_hint="--null")
    if overwrite and output == "-":
        raise typer.BadParameter("there is nothing to overwrite on stdout: add -o F.jsonl", param_hint="--overwrite")
    stats = RunStats()
    with _exit_codes(debug, lambda: _rows_so_far(stats, output)) as signals:
        from idefics_cli.checkpoint import ModelRequest
        from idefics_cli.data.images import ImageLimits

        decoding = _verified_decoding(
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            no_repeat_ngram_size=no_repeat_ngram_size,
            num_return_sequences=num_return_sequences,
        )
        found = _open_inputs(inputs, recursive=not no_recursive, null=null, limit=limit)
        with _opened_output(output, overwrite) as writer:
            request = ModelRequest(model, revision, dtype, device, allow_pickle)
            check_model(request)
            captioner = load_model(request, rows_per_call)
            options = RunOptions(
                batch_size=captioner.batch_size,
                workers=workers or min(MAX_WORKERS, os.cpu_count() or 1),
                limits=ImageLimits(max_pixels=max_pixels),
                decoding=decoding,
                candidates=num_return_sequences > 1,
                max_errors=max_errors,
            )
            _run(found, captioner, writer, options, stats, signals)
        _say_summary(stats, output)
    if stats.num_failed:
        raise typer.Exit(EXIT_FAILED_ROWS)


@app.command()
def bench(
    context: typer.Context,
    model: ModelOption = DEFAULT_MODEL,
    random: Annotated[
        Literal["tiny", "mid", "9b"] | None,
        typer.Option(help="Random weights of this size in place of a model.", show_default=False),
    ] = None,
    shots: Annotated[int, typer.Option(metavar="N", min=0, help="Worked examples that all prompts start with.")] = 0,
    questions_per_image: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts about each image; with a model, more than one asks.")
    ] = 1,
    rows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Prompts in each run.", show_default="one batch")
    ] = None,
    scenes: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="The same, counted in images.", show_default=False),
    ] = None,
    num_beams: Annotated[int, typer.Option(metavar="N", min=1, help="Beams of the search; 1 is greedy.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest text, in tokens.")] = 30,
    length: Annotated[
        Literal["fixed", "varied"] | None,
        typer.Option(
            help="fixed: every text is as long as it may be; varied: texts end where they end.",
            show_default="fixed for random weights, varied for a model",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts that are decoded at a time.")] = 8,
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, help="Timed runs of each side, in turn; medians count.")
    ] = 3,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Decides weights, pictures and prompts.")] = 0,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads of the CPU.", show_default="torch's own choice")
    ] = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    allow_pickle: AllowPickleOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure speed on this machine, beside transformers, with the distance to the hardware's floor.

    Both sides get the same prompts and share the weights. The first call of ours (nothing cached yet) is told apart;
    timed runs have new images and the same shots. Tables go to stderr, one JSON line to stdout.
    """
    if random is not None and context.get_parameter_source("model").name == "COMMANDLINE":
        raise typer.BadParameter("random weights need no model: leave -m out", param_hint="--random")
    if rows is not None and scenes is not None:
        raise typer.BadParameter("it says the same as --rows: give one of them", param_hint="--scenes")
    with _exit_codes(debug, str):
        from idefics_cli.checkpoint import ModelRequest

        request = ModelRequest(model, revision, dtype, device, allow_pickle)
        if random is None:
            check_model(request)
        _print_bench(
            request=request,
            random=random,
            rows=rows if scenes is None else scenes * questions_per_image,
            shots=shots,
            questions_per_image=questions_per_image,
            batch_size=batch_size,
            decoding=_verified_decoding(num_beams=num_beams, max_new_tokens=max_new_tokens),
            fixed_length=length == "fixed" if length is not None else random is not None,
            repeats=repeats,
            threads=threads,
            seed=seed,
        )


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Hub id, local folder or `demo`.", show_default=False)
    ] = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    allow_pickle: AllowPickleOption = False,
    debug: DebugOption = False,
) -> None:
    """Show versions, devices and, for a model, whether and how it would run here."""
    with _exit_codes(debug, str):
        from idefics_cli.checkpoint import ModelRequest

        facts = _machine_facts(device, dtype)
        if model is not None:
            facts["model"] = _model_fact(ModelRequest(model, revision, dtype, device, allow_pickle))
        _print_facts(facts)


# Before the run


def _parse_batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise typer.BadParameter(f"{text!r} is neither `auto` nor a number above 0", param_hint="--batch-size")
    return int(text)


def _verified_decoding(**decoding: Any) -> dict[str, Any]:
    from idefics_cli.generation.options import DecodingOptions

    return asdict(DecodingOptions(**decoding))


def _open_inputs(inputs: list[str], *, recursive: bool, null: bool, limit: int | None) -> Inputs:
    from idefics_cli.data.readers import open_inputs

    stdin = getattr(sys.stdin, "buffer", None)
    return open_inputs(inputs, recursive=recursive, null=null, stdin=stdin, limit=limit)


@contextlib.contextmanager
def _opened_output(output: str, overwrite: bool) -> Iterator[StreamWriter | FileWriter]:
    from idefics_cli.data.writers import open_writer

    writer = open_writer(output, stdout=getattr(sys.stdout, "buffer", None), overwrite=overwrite)
    try:
        yield writer
    finally:
        writer.close()


# The run


def _run(
    inputs: Inputs,
    captioner: Captioner,
    writer: RowWriter,
    options: RunOptions,
    stats: RunStats,
    signals: _Signals,
) -> None:
    from idefics_cli.pipeline import caption_images

    with _progress_bar(inputs.total) as bar:

        def on_row() -> None:
            bar.set_postfix(failed=stats.num_failed, refresh=False)
            bar.update()
            signals.check()

        if not bar.disable and _is_terminal(sys.stdout):
            writer = _WriterAboveBar(writer, bar)
        caption_images(inputs.rows, captioner, writer, options, stats, on_row)


def _progress_bar(total: int | None) -> tqdm[NoReturn]:
    from tqdm import tqdm

    hidden = not _is_terminal(sys.stderr)
    return tqdm(total=total, unit="image", file=sys.stderr, disable=hidden, dynamic_ncols=True, leave=False)


class _WriterAboveBar:
    """Rows on the terminal on which the bar is: the bar makes room for each."""

    def __init__(self, writer: RowWriter, bar: tqdm[NoReturn]) -> None:
        self._writer = writer
        self._bar = bar

    def write(self, row: Mapping[str, Any]) -> None:
        self._bar.clear()
        self._writer.write(row)
        self._bar.refresh()

    def finish(self) -> None:
        self._writer.finish()

    def close(self) -> None:
        self._writer.close()


# How a command ends


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came. No `except Exception` of a library takes it for a failure of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Signals:
    """While a command runs, the first SIGINT or SIGTERM raises Interrupted and the second ends the process at once.

    A signal that the process was started to ignore stays ignored.
    """

    def __init__(self) -> None:
        self._caught: int | None = None

    def __enter__(self) -> _Signals:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._caught is not None:
            return  # the process is about to end, and a second signal still ends it at once
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise again what was raised where Python drops exceptions, in a destructor or a callback."""
        if self._caught is not None:
            raise Interrupted(self._caught)

    def _handle(self, number: int, frame: object) -> None:
        if self._caught is not None:
            os._exit(EXIT_SIGNAL + number)
        self._caught = number
        raise Interrupted(number)


@contextlib.contextmanager
def _exit_codes(debug: bool, rows_so_far: Callable[[], str]) -> Iterator[_Signals]:
    """Turn whatever ends a command into one line on stderr and an exit code; `debug` adds the traceback.

    `rows_so_far` says what became of the rows that were finished before.
    """
    from idefics_cli.data.writers import StreamClosed

    _quiet_libraries(debug)
    with _Signals() as signals:
        try:
            yield signals
        except StreamClosed:
            _leave_stdout()
            code = 0
        except Interrupted as stop:
            _leave_stdout()
            _say(f"Stopped by {signal.Signals(stop.number).name}. {rows_so_far()}")
            code = EXIT_SIGNAL + stop.number
        except IdeficsError as error:
            _say_error(f"{error}. {rows_so_far()}", debug)
            code = EXIT_MISTAKE
        except Exception as error:
            told = "" if debug else " Please report it to the project, with the traceback that --debug shows."
            _say_error(f"a bug: {type(error).__name__}: {error}.{told} {rows_so_far()}", debug)
            code = EXIT_BUG
        else:
            return
    raise typer.Exit(code)


def _quiet_libraries(debug: bool) -> None:
    """Before they are imported: no warnings of theirs among our lines, and bars on a terminal only."""
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not _is_terminal(sys.stderr):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _leave_stdout() -> None:
    """What may still lie in stdout's buffer goes nowhere: its reader has gone, or may never read on."""
    with contextlib.suppress(io.UnsupportedOperation, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Talk


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, force_terminal=_is_terminal(stream), soft_wrap=True, highlight=False)


def _say(message: str, label: str = "") -> None:
    """One line on stderr, whatever the names in it hold."""
    from rich.text import Text

    if sys.stderr is None:
        return
    line = Text.assemble((label, "bold red"), _printable(one_line(message)))
    with contextlib.suppress(BrokenPipeError):  # nobody is listening
        _console(sys.stderr).print(line)


def _say_error(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    _say(message, label="Error: ")


def _printable(text: str) -> str:
    """File names may hold anything, commands to the terminal too; these are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _rows_so_far(stats: RunStats, output: str) -> str:
    if not stats.rows:
        return ""
    if output == "-":
        return f"{_count(stats.rows, 'row')} had been written."
    return f"{_count(stats.rows, 'row')} finished so far: safe in {output}.part."


def _say_summary(stats: RunStats, output: str) -> None:
    """The closing line with the counts, behind what went wrong."""
    if stats.num_failed:
        _say_failures(stats)
    if stats.stopped_early:
        _say(f"Stopped early by --max-errors. {_rows_so_far(stats, output)}")
    captioned = stats.rows - stats.num_failed
    _say(
        f"{_count(stats.rows, 'image')}: {captioned} captioned, {stats.num_failed} failed,"
        f" in {stats.seconds:.1f} s ({stats.rate:.1f} per second);"
        f" the model waited for images {stats.waited_share:.0%} of the time."
    )


def _say_failures(stats: RunStats) -> None:
    from rich.table import Table
    from rich.text import Text

    failures = [
        (code, number, ", ".join(stats.failed_ids[code]) + (", ..." if number > len(stats.failed_ids[code]) else ""))
        for code, number in stats.failed.most_common()
    ]
    if not _is_terminal(sys.stderr):
        for code, number, ids in failures:
            _say(f"{code}: {_count(number, 'row')}: {ids}")
        return
    table = Table("error", "rows", "first ids", title="Failed rows", title_justify="left")
    for code, number, ids in failures:
        table.add_row(code, str(number), Text(_printable(ids)))
    _console(sys.stderr).print(table, soft_wrap=False)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# Measurements


def _print_bench(**options: Any) -> None:
    """Run it; tables on stderr, the report on stdout as one line of JSON."""
    import json

    from idefics_cli.bench.report import run, tables
    from idefics_cli.bench.subjects import BenchOptions
    from idefics_cli.generation.options import DecodingOptions

    decoding = DecodingOptions(**options.pop("decoding"))
    found = run(BenchOptions(**options, decoding=decoding), _say)
    for table in tables(found):
        _console(sys.stderr).print(table, soft_wrap=False)
    print(json.dumps(found))


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
    from idefics_cli.checkpoint import inspect_folder, local_folder

    check_model(request)
    folder = local_folder(request.model)
    if folder is None:
        return f"{request.model}, from the hub or its cache when it is used"
    weights = sum(file.stat().st_size for file in inspect_folder(folder, request.allow_pickle).weight_files)
    return f"{folder}, {weights / 1e6:,.1f} MB of weights"


def _print_facts(facts: Mapping[str, str]) -> None:
    from rich.table import Table

    if not _is_terminal(sys.stdout):
        for name, fact in facts.items():
            print(f"{name}: {fact}")
        return
    table = Table(show_header=False)
    for name, fact in facts.items():
        table.add_row(name, fact)
    _console(sys.stdout).print(table)


def main() -> None:
    """The console script."""
    app(prog_name="idefics")
