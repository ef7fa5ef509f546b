"""How commands talk and how they end: lines, tables and a bar on stderr, signals, exit codes.

Rows are written by the pipeline; other data for stdout goes through `print_data`. No colour and no bar where stderr is
not a terminal. rich and tqdm are imported when they show something.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO, NoReturn, TextIO

import typer

from idefics_cli.errors import IdeficsError, StreamClosed, one_line
from idefics_cli.pipeline.task import Observer
from idefics_cli.ranks import STOPPING, joined
from idefics_cli.storage.filenames import counted, is_unit_folder, json_for_terminal, printable, shortened

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from tqdm import tqdm

    from idefics_cli.pipeline.prefetch import RunStats

EXIT_BUG = 1
EXIT_MISTAKE = 2
EXIT_FAILED_ROWS = 3
LONGEST_LINE = 2_000  # characters
EXIT_SIGNAL = 128  # and the signal's number
REMEDIES = {  # by the code of failed rows
    "duplicate_id": "leave such rows out, or name a manifest's column of unique ids with --id-column"
}

# ---- endings


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP came. Not an Exception, so that no library's `except Exception` catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class OtherProcessFailed(Exception):
    """One that torchrun has started beside this one."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Signals:
    """While a command runs, the first signal that stops it raises Interrupted and the second ends the process at once.

    A signal that the process was started to ignore stays ignored. `safe_rows` says to whoever stops the command where
    the finished rows are and, with a condition, how the run continues.
    """

    def __init__(self) -> None:
        self._caught: int | None = None
        self.safe_rows: Callable[[str], str] = lambda condition: ""

    def __enter__(self) -> Signals:
        self._before = {number: signal.getsignal(number) for number in STOPPING}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._caught is not None:
            return  # the process is about to end, and a second signal must still end it at once
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise again: Python drops what is raised in a destructor or a callback."""
        if self._caught is not None:
            raise Interrupted(self._caught)

    def _handle(self, number: int, frame: object) -> None:
        if self._caught is not None:
            os._exit(EXIT_SIGNAL + number)
        self._caught = number
        raise Interrupted(number)


@contextlib.contextmanager
def exit_codes(debug: bool) -> Iterator[Signals]:
    """Turn whatever ends a command into one line on stderr and an exit code; `debug` adds the traceback."""
    _quiet_libraries(debug)
    with Signals() as signals:
        try:
            with naming_failed_ranks():
                yield signals
        except typer.Exit:
            raise
        except StreamClosed:
            _leave_stdout()
            code = 0
        except Interrupted as stop:
            _leave_stdout()
            say(f"Stopped by {signal.Signals(stop.number).name}. {signals.safe_rows('')}")
            code = EXIT_SIGNAL + stop.number
        except OtherProcessFailed as failed:
            say_error(f"{failed}. {signals.safe_rows('')}", debug)
            code = failed.code
        except IdeficsError as error:
            say_error(f"{error}. {signals.safe_rows(' once that is fixed')}", debug)
            code = EXIT_MISTAKE
        except Exception as error:
            report = "" if debug else " Please report it with the traceback that --debug shows."
            say_error(f"a bug: {type(error).__name__}: {error}.{report} {signals.safe_rows('')}", debug)
            code = EXIT_BUG
        else:
            return
    raise typer.Exit(code)


@contextlib.contextmanager
def naming_failed_ranks() -> Iterator[None]:
    """Where another process of torchrun has ended, that is what has happened."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        ranks, is_own = joined(), isinstance(error, (IdeficsError, StreamClosed, typer.Exit))
        failure = None if ranks is None or is_own else ranks.failure_after(error)
        if failure is None:
            raise
        code, message = failure
        if code > EXIT_SIGNAL:
            raise (error if isinstance(error, Interrupted) else Interrupted(code - EXIT_SIGNAL)) from None
        raise OtherProcessFailed(code, message) from None


def silence() -> None:
    """From now on this process writes nothing: the first of those that torchrun has started does."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _quiet_libraries(debug: bool) -> None:
    """Before they are imported: none of their warnings among our lines, and bars on a terminal only."""
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time needs no threads
    if not is_terminal(sys.stderr):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _leave_stdout() -> None:
    """Discard what is left in stdout's buffer: its reader is gone, or may never read again."""
    with contextlib.suppress(io.UnsupportedOperation, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- talk


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def console(stream: TextIO) -> Console:
    from rich.console import Console

    class Listened(Console):
        def on_broken_pipe(self) -> None:
            """stderr is closed: say no more. rich would end the process with 1 and redirect stdout, too."""
            self.quiet = True

    return Listened(file=stream, force_terminal=is_terminal(stream), soft_wrap=True, highlight=False)


def say(message: str, label: str = "") -> None:
    """One line on stderr, whatever names it has; of a very long one the beginning, and the end with the remedy."""
    from rich.text import Text

    text = printable(one_line(message))
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE // 2]} ... {text[-LONGEST_LINE // 2 :]}"
    show(Text.assemble((label, "bold red"), text))


def show(shown: Table | Text, *, soft_wrap: bool = True) -> None:
    """On stderr. Without `soft_wrap` no wider than the terminal."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # the log's disk is full
            console(sys.stderr).print(shown, soft_wrap=soft_wrap)


def print_data(*lines: str) -> None:
    """On stdout, unless it is closed. Raises StreamClosed if its reader is gone, OutputError for a full disk."""
    from idefics_cli.writers.writers import write_through

    stream = getattr(sys.stdout, "buffer", None)
    if stream is not None:
        text = "".join(f"{line}\n" for line in lines)
        shown = json_for_terminal(text) if is_terminal(sys.stdout) else text
        write_through(stream, shown.encode(errors="backslashreplace"))


def say_error(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    say(message, label="Error: ")


# ---- runs


class StdoutOnTerminal:
    """stdout where it is a terminal: nothing in a row is a command to it, and the bar is cleared for each row."""

    def __init__(self, stream: BinaryIO, bar: tqdm[NoReturn]) -> None:
        self._stream, self._bar = stream, bar

    def write(self, data: bytes) -> int:
        self._bar.clear()
        self._stream.write(json_for_terminal(data.decode()).encode())
        return len(data)

    def flush(self) -> None:
        self._stream.flush()
        self._bar.refresh()


class Progress(Observer, contextlib.AbstractContextManager["Progress"]):
    """A bar that follows a run, on a terminal only."""

    def __init__(self, stats: RunStats, signals: Signals) -> None:
        from tqdm import tqdm

        self._stats, self._signals = stats, signals
        hidden = not is_terminal(sys.stderr)
        self._bar = tqdm(unit="row", file=sys.stderr, disable=hidden, dynamic_ncols=True, leave=False)

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def stdout(self) -> BinaryIO | None:
        stream = getattr(sys.stdout, "buffer", None)
        return StdoutOnTerminal(stream, self._bar) if stream is not None and is_terminal(sys.stdout) else stream

    def on_start(self, total: int | None) -> None:
        self._bar.reset(total)
        self._bar.initial = self._bar.n = self._stats.rows
        self._bar.refresh()

    def say(self, message: str) -> None:
        self._bar.clear()
        say(message)
        self._bar.refresh()

    def on_row(self, number: int = 1) -> None:
        if not self._bar.disable:
            self._bar.set_postfix(failed=self._stats.num_failed, refresh=False)
            self._bar.update(number)
        self._signals.check()


def say_failures(stats: RunStats) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("error", "rows", "first ids", title="Failed rows", title_justify="left")
    for code, number in stats.failed.most_common():
        first = stats.failed_ids[code]
        ids = ", ".join(map(shortened, first)) + (", ..." if number > len(first) else "")
        if is_terminal(sys.stderr):
            table.add_row(code, str(number), Text(printable(ids)))
        else:
            say(f"{code}: {counted(number, 'row')}: {ids}")
    if table.rows:
        show(table, soft_wrap=False)
    for code in stats.failed.keys() & REMEDIES.keys():
        say(f"{code}: {REMEDIES[code]}.")


def say_summary(stats: RunStats, output: str, made: str) -> None:
    """What went wrong, then the closing line with the counts; `made` is what good rows have."""
    say_failures(stats)
    if stats.stopped_early:
        say(f"Stopped early by --max-errors. {rows_so_far(stats, output)}")
    earlier = f", {stats.resumed} of them done before" if stats.resumed else ""
    say(
        f"{counted(stats.rows, 'row')}{earlier}: {stats.rows - stats.num_failed} with {made},"
        f" {stats.num_failed} failed,"
        f" in {stats.seconds:.1f} s ({stats.rate:.1f} per second);"
        f" the model waited for images {stats.waited_share:.0%} of the time."
    )


def say_finished(stats: RunStats, output: str) -> None:
    """There was nothing to do."""
    failed = f", {stats.num_failed} of them failed (--retry-errors redoes these)" if stats.num_failed else ""
    say(f"{output} is finished: {counted(stats.rows, 'row')}{failed}. Use --overwrite to start over.")


def rows_so_far(stats: RunStats, output: str, overwrite: bool = False, condition: str = "") -> str:
    if not stats.safe:
        return ""
    if output == "-":
        return f"{counted(stats.safe, 'row')} written so far."
    if is_unit_folder(output):
        part = output
    elif not os.path.exists(part := f"{output}.part"):
        return f"{output} is finished." if os.path.exists(output) else ""
    again = "The same command without --overwrite" if overwrite else "The same command"
    return f"{counted(stats.safe, 'row')} finished so far: safe in {part}. {again} continues from there{condition}."
