"""How commands talk and how they end: lines and tables on stderr, signals, exit codes.

Rows are written by the pipeline; other data for stdout goes through `print_data`. No colour where stderr is not a
terminal. A line is an event with a name: with --log-json it is a JSON object. rich is imported when it shows something.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from idefics_cli.errors import IdeficsError, StreamClosed, one_line
from idefics_cli.ranks import STOPPING, joined
from idefics_cli.storage.filenames import json_for_terminal, printable
from idefics_cli.validation import NOTHING, Help

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

EXIT_BUG = 1
EXIT_MISTAKE = 2
EXIT_FAILED_ROWS = 3
LONGEST_LINE = 2_000  # characters
EXIT_SIGNAL = 128  # and the signal's number


@dataclass(frozen=True)
class TalkOptions:
    """How much is said on stderr, and in which form."""

    quiet: Annotated[bool, Help("Say nothing but what ends the run")] = False
    verbose: Annotated[bool, Help("Also show each failed row, and what libraries log", flags=("-v", "--verbose"))] = (
        False
    )
    log_json: Annotated[bool, Help("On stderr, a JSON object for each event")] = False
    status_every: Annotated[
        float,
        Help("Where stderr is not a terminal, how often a status line comes; 0: never", metavar="SECONDS", min=0),
    ] = 60.0


ALWAYS = ("error", "stopped")  # events that --quiet lets through
_talk = TalkOptions()  # of the command that runs
_aside: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext  # what else stands on the terminal's line

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

    def number(self, stop: KeyboardInterrupt) -> int:
        """Libraries that see Interrupted may raise a plain one in place of it: ray.wait does."""
        return stop.number if isinstance(stop, Interrupted) else self._caught or signal.SIGINT

    def _handle(self, number: int, frame: object) -> None:
        if self._caught is not None:
            os._exit(EXIT_SIGNAL + number)
        self._caught = number
        raise Interrupted(number)


@contextlib.contextmanager
def exit_codes(debug: bool, talk: TalkOptions = TalkOptions()) -> Iterator[Signals]:
    """Turn whatever ends a command into one line on stderr and an exit code; `debug` adds the traceback."""
    global _talk
    _talk = talk
    _quiet_libraries(debug)
    with Signals() as signals:
        try:
            with _hearing_logs(), naming_failed_ranks():
                yield signals
        except typer.Exit:
            raise
        except StreamClosed:
            _leave_stdout()
            code = 0
        except KeyboardInterrupt as stop:
            _leave_stdout()
            number = signals.number(stop)
            code, name = EXIT_SIGNAL + number, signal.Signals(number).name
            say(f"Stopped by {name}. {signals.safe_rows('')}", event="stopped", facts={"signal": name, "exit": code})
        except OtherProcessFailed as failed:
            code = failed.code
            say_error(f"{failed}. {signals.safe_rows('')}", debug, code)
        except IdeficsError as error:
            code = EXIT_MISTAKE
            say_error(f"{error}. {signals.safe_rows(' once that is fixed')}", debug, code)
        except Exception as error:
            report = "" if debug else " Please report it with the traceback that --debug shows."
            code = EXIT_BUG
            say_error(f"a bug: {type(error).__name__}: {error}.{report} {signals.safe_rows('')}", debug, code)
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
    """Before they are imported: no bars of theirs, and none of their warnings among our lines but with --debug."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time needs no threads
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


class _Said(logging.Handler):
    """What the package logs is said as everything else is."""

    def emit(self, record: logging.LogRecord) -> None:
        facts = {"logger": record.name, "level": record.levelname}
        say(record.getMessage(), event="log", facts=facts)


@contextlib.contextmanager
def _hearing_logs() -> Iterator[None]:
    """Warnings of the package and, with -v, all that it and its libraries have to say."""
    heard = ("idefics_cli", *(("transformers", "huggingface_hub") if _talk.verbose else ()))
    handler = _Said(logging.NOTSET if _talk.verbose else logging.WARNING)
    logs = [logging.getLogger(name) for name in heard]
    levels = [log.level for log in logs]
    for log in logs:
        log.addHandler(handler)
        if _talk.verbose:
            log.setLevel(logging.INFO)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.removeHandler(handler)
            log.setLevel(level)


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


def say(message: str, label: str = "", event: str = "message", facts: Mapping[str, Any] = NOTHING) -> None:
    """One line on stderr, whatever names it has; of a very long one the beginning, and the end with the remedy.

    On a terminal lines break between words. With --log-json it is an object of time, event, the facts and the text.
    """
    if _talk.quiet and event not in ALWAYS:
        return
    text = printable(one_line(message))
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE // 2]} ... {text[-LONGEST_LINE // 2 :]}"
    with _aside():
        if _talk.log_json:
            _write(json.dumps({"time": now(), "event": event, **facts, "text": text}))
        elif is_terminal(sys.stderr):
            _say_on_terminal(text, label)
        else:
            _write(f"{label}{text}")


@contextlib.contextmanager
def standing_aside(aside: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """While a bar is shown: `aside` clears it for each line."""
    global _aside
    _aside = aside
    try:
        yield
    finally:
        _aside = contextlib.nullcontext


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _write(line: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # the log's disk is full, or its reader gone
            print(line, file=sys.stderr, flush=True)


def _say_on_terminal(text: str, label: str) -> None:
    from rich.text import Text

    width = max(console(sys.stderr).width - 1, 1)
    lines = textwrap.wrap(f"{label}{text}", width, break_long_words=False, break_on_hyphens=False) or [""]
    _print(Text.assemble((label, "bold red"), "\n".join(lines).removeprefix(label)), soft_wrap=True)


def show(table: Table, *, soft_wrap: bool = True) -> None:
    """On stderr, for people alone. Without `soft_wrap` no wider than the terminal."""
    if not _talk.quiet and not _talk.log_json:
        _print(table, soft_wrap)


def _print(shown: RenderableType, soft_wrap: bool) -> None:
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


def say_error(message: str, debug: bool, code: int) -> None:
    if debug:
        traceback.print_exc()
    say(message, label="Error: ", event="error", facts={"exit": code})
