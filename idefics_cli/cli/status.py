"""How a run talks: what is being loaded, a start line, a bar on a terminal or a status line now and then, a summary.

One thread beats: on a terminal it turns the spinner and keeps the bar's time, elsewhere it says the status. tqdm is
imported when there is a run.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from idefics_cli.cli.console import Signals, TalkOptions, is_terminal, now, say, standing_aside
from idefics_cli.pipeline.task import About, Observer
from idefics_cli.storage.filenames import counted, is_unit_folder, json_for_terminal, shortened

if TYPE_CHECKING:
    from tqdm import tqdm

    from idefics_cli.pipeline.prefetch import RunStats

REMEDIES = {  # by the code of failed rows
    "duplicate_id": "leave such rows out, or name a manifest's column of unique ids with --id-column"
}
FRAMES = "|/-\\"
BEAT = 0.15  # seconds, on a terminal


class StdoutOnTerminal:
    """stdout where it is a terminal: nothing in a row is a command to it, and the bar is cleared for each row."""

    def __init__(self, stream: BinaryIO, bar: tqdm[NoReturn]) -> None:
        self._stream, self._bar = stream, bar

    def write(self, data: bytes) -> int:
        with self._bar.get_lock():
            self._bar.clear()
            self._stream.write(json_for_terminal(data.decode()).encode())
            self._stream.flush()
        return len(data)

    def flush(self) -> None:
        self._bar.refresh()


class Progress(Observer, contextlib.AbstractContextManager["Progress"]):
    """Follows a run, and says how it goes. `inputs` and `output` are what the start line calls them."""

    def __init__(
        self, stats: RunStats, signals: Signals, talk: TalkOptions, inputs: str = "", output: str = ""
    ) -> None:
        from tqdm import tqdm

        self._stats, self._signals, self._talk, self._place = stats, signals, talk, (inputs, output)
        self._is_shown = is_terminal(sys.stderr) and not talk.quiet and not talk.log_json
        look = {"unit": "row", "dynamic_ncols": True, "leave": False, "bar_format": "{desc}"}
        self._bar = tqdm(file=sys.stderr, disable=not self._is_shown, **look)
        self._loading, self._has_started, self._codes = "", False, set[str]()
        self._rows = self._first = 0
        self._total: int | None = None
        self._began = time.monotonic()
        self._ended, self._aside = threading.Event(), standing_aside(self._without_bar)
        self._frames = cycle(FRAMES)
        self._beats = threading.Thread(target=self._beat, name="status", daemon=True)

    def __enter__(self) -> Progress:
        self._aside.__enter__()
        if self._is_shown or self._talk.status_every:
            self._beats.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._beats.is_alive():
            self._beats.join()
        self._aside.__exit__(None, None, None)
        self._bar.close()

    def stdout(self) -> BinaryIO | None:
        stream = getattr(sys.stdout, "buffer", None)
        return StdoutOnTerminal(stream, self._bar) if stream is not None and is_terminal(sys.stdout) else stream

    # ---- what the run tells

    def on_loading(self, model: str) -> None:
        self._loading = model
        if self._talk.log_json:
            say(f"Loading {model}.", event="loading", facts={"model": model})

    def on_ready(self, about: About | None) -> None:
        """Several processes tell it, of which the first is heard."""
        was_loading, self._loading = self._loading, ""
        if was_loading and about is not None:
            self._began = time.monotonic()
            inputs, output = self._place
            beams = f", {counted(about.beams, 'beam')}" if about.beams else ""
            rows = counted(about.rows_at_once, "row")
            exact = " (--dtype fp32 is exact)" if about[1:3] == ("cpu", "bf16") else ""
            where = f"{about.model} on {about.device} in {about.dtype}{exact}{beams}, {rows} at a time"
            facts = {**about._asdict(), "input": inputs, "output": output}
            say(f"{where}: {inputs} to {'stdout' if output == '-' else output}.", event="start", facts=facts)

    def on_start(self, total: int | None, num_done: int = 0) -> None:
        self._has_started, self._total, self._began = True, total, time.monotonic()
        self._rows = self._first = num_done
        self._bar.bar_format = None
        self._bar.reset(total)
        self._bar.initial = self._bar.n = self._rows
        self._bar.refresh()

    def say(self, message: str) -> None:
        say(message)

    def on_result(self, row: Mapping[str, Any]) -> None:
        """The first error of each code is shown at once, with -v each."""
        if row["error"] is None:
            return
        code = row["error"].partition(":")[0]
        if code not in self._codes or self._talk.verbose:
            first = "" if code in self._codes else "First "
            self._codes.add(code)
            facts = {"id": row["id"], "code": code, "error": row["error"]}
            say(f"{first}{row['error']} (row {shortened(row['id'])})", event="row_failed", facts=facts)

    def on_row(self, number: int = 1) -> None:
        self._rows += number
        if self._is_shown:
            self._bar.set_postfix(failed=self._stats.num_failed, refresh=False)
            self._bar.update(number)
        self._signals.check()

    # ---- beats

    def _beat(self) -> None:
        while not self._ended.wait(BEAT if self._is_shown else self._talk.status_every):
            if self._is_shown:
                self._turn()
            else:
                self._say_status()

    def _turn(self) -> None:
        loading = f"{next(self._frames)} loading {self._loading} " if self._loading else ""
        self._bar.set_description_str(loading, refresh=True)

    @contextlib.contextmanager
    def _without_bar(self) -> Iterator[None]:
        with self._bar.get_lock():
            self._bar.clear()
            yield
            self._bar.refresh()

    def _say_status(self) -> None:
        if self._loading:
            say(f"{now()} loading {self._loading}", event="status", facts={"loading": self._loading})
        elif self._has_started:
            facts = self._status()
            say(f"{now()} {_in_words(facts)}", event="status", facts=facts)

    def _status(self) -> dict[str, Any]:
        done, seconds = self._rows - self._first, time.monotonic() - self._began
        rate = done / seconds if seconds else 0.0
        left = None if self._total is None or not rate else max(0, self._total - self._rows) / rate
        return {
            "rows": self._rows,
            "total": self._total,
            "rate": round(rate, 3),
            "seconds_left": None if left is None else round(left),
            "failed": self._stats.num_failed,
            "idle": round(self._stats.waited_share, 3),
            "memory_mb": round(memory_in_use() / 1e6),
        }


def _in_words(status: Mapping[str, Any]) -> str:
    total = "" if status["total"] is None else f"/{status['total']}"
    left = "" if status["seconds_left"] is None else f", {timedelta(seconds=status['seconds_left'])} left"
    return (
        f"{status['rows']}{total} rows, {status['rate']:.2f} per second{left}, {status['failed']} failed,"
        f" model idle {status['idle']:.0%} of the time, {status['memory_mb']:,} MB of memory"
    )


def memory_in_use() -> int:
    """Bytes of this process and those it has started, and of its GPU; 0 where the system does not say."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)  # not there while torch is being imported
    device = cuda.memory_reserved() if cuda is not None and cuda.is_initialized() else 0
    return device + _resident(os.getpid())


def _resident(process: int) -> int:
    folder = Path(f"/proc/{process}")
    try:
        pages = int((folder / "statm").read_text().split()[1])
        children = [child for each in folder.glob("task/*/children") for child in each.read_text().split()]
    except (OSError, IndexError, ValueError):  # it has ended, or there is no /proc
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(_resident(int(child)) for child in children)


# ---- the end


def say_failures(stats: RunStats) -> None:
    for code, number in stats.failed.most_common():
        first = stats.failed_ids[code]
        ids = ", ".join(map(shortened, first)) + (", ..." if number > len(first) else "")
        facts = {"code": code, "rows": number, "ids": list(first)}
        say(f"{code}: {counted(number, 'row')}: {ids}", event="failures", facts=facts)
    for code in stats.failed.keys() & REMEDIES.keys():
        say(f"{code}: {REMEDIES[code]}.")


def say_summary(stats: RunStats, output: str, made: str) -> None:
    """What went wrong, then the closing line with the counts; `made` is what good rows have."""
    say_failures(stats)
    if stats.stopped_early:
        say(f"Stopped early by --max-errors. {rows_so_far(stats, output)}", event="stopped")
    earlier = f", {stats.resumed} of them done before" if stats.resumed else ""
    place = "" if output == "-" or stats.stopped_early else f" They are in {output}."
    say(
        f"{counted(stats.rows, 'row')}{earlier}: {stats.rows - stats.num_failed} with {made},"
        f" {stats.num_failed} failed,"
        f" in {stats.seconds:.1f} s ({stats.rate:.1f} per second);"
        f" the model waited for images {stats.waited_share:.0%} of the time.{place}",
        event="end",
        facts=_summary(stats, output),
    )


def say_finished(stats: RunStats, output: str) -> None:
    """There was nothing to do."""
    failed = f", {stats.num_failed} of them failed (--retry-errors redoes these)" if stats.num_failed else ""
    say(
        f"{output} is finished: {counted(stats.rows, 'row')}{failed}. Use --overwrite to start over.",
        event="end",
        facts=_summary(stats, output),
    )


def _summary(stats: RunStats, output: str) -> dict[str, Any]:
    counts = {"rows": stats.rows, "resumed": stats.resumed, "failed": stats.num_failed}
    shares = {"seconds": round(stats.seconds, 3), "rate": round(stats.rate, 3), "idle": round(stats.waited_share, 3)}
    return {**counts, **shares, "stopped_early": stats.stopped_early, "output": output}


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
