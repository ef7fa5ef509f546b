"""Numbered units: contiguous ranges of the input's rows, each of which becomes one part of the output's folder.

`open_units` cuts the input, or finds it cut; a `Worker` makes a unit's rows into its part, by itself; `attempts` says
what is to be tried where a worker's process ends, down to the row that ends it; `close_units` looks whether all is
there. Whoever drives workers, in local processes or on a cluster, has units of this module and gets a `Done` for each.
Parts joined in order are, byte for byte, what one process writes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.errors import IdeficsError, InputError, OutputError, RowError
from idefics_cli.pipeline.options import STDIN, RunOptions
from idefics_cli.pipeline.prefetch import RunStats, Steps
from idefics_cli.pipeline.run import Run
from idefics_cli.pipeline.task import Observer, Task
from idefics_cli.readers.inputs import Cut, Inputs
from idefics_cli.readers.manifest import open_table
from idefics_cli.readers.source import ALL, Place
from idefics_cli.rows import ImageSource, InputRow, ReadOptions
from idefics_cli.storage.unique_ids import UniqueIds
from idefics_cli.storage.unit_folder import UnitFolder
from idefics_cli.writers.formats import FAILED, NUM_ROWS, SETTINGS, format_of
from idefics_cli.writers.output_file import differences

if TYPE_CHECKING:
    from idefics_cli.idefics import Idefics

FORMAT_NAMES = ("jsonl", "parquet")
MOST_FATAL = 8  # rows of one unit that each end their process
FIRST_IDS = 3


@dataclass(frozen=True)
class Unit:
    """The rows from `begin` to `end`. `fatal` are the indices of those that end their process, and become error rows.

    With `only`, a range of indices, the others are passed over and no part is made: do these rows end their process?
    """

    number: int
    begin: Cut
    end: Cut
    fatal: tuple[int, ...] = ()
    only: tuple[int, int] | None = None

    @property
    def num_rows(self) -> int:
        return self.end.index - self.begin.index


@dataclass(frozen=True)
class Done:
    """What comes back of a unit whose part is there."""

    unit: int
    rows: int
    failed: Mapping[str, int] = field(default_factory=dict)
    seconds_waited: float = 0.0


@dataclass(frozen=True)
class Job:
    """All that a worker is told once. It can be sent to another process if its functions can."""

    options: RunOptions
    make_task: Callable[[], Task]
    check_model: Callable[[ModelRequest], str | None]
    load_model: Callable[[ModelRequest, int | None], Idefics]


class Worker:
    """One model and one pool of image processes, through which units go one after the other. A context."""

    def __init__(self, job: Job, observer: Observer) -> None:
        self._job, self._observer, self._task = job, observer, job.make_task()
        self._folder = UnitFolder(job.options.output)
        self._open = ExitStack()
        self._ready: tuple[Steps, int] | None = None
        self._run: Run | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def do(self, unit: Unit, inputs: Inputs) -> Done:
        """Make the part of a unit from its `inputs`, which are those of its range."""
        job, stats = self._job, RunStats()
        self._run = run = Run(
            job.options, self._task, job.check_model, job.load_model, stats, self._observer, inputs=inputs
        )
        if self._ready is None:
            self._task.check(run.options.request)
            self._ready = self._open.enter_context(run.steps(self._resolve))
        with tempfile.TemporaryFile() as spool:
            run.write_rows(spool, _without_fatal(inputs.rows, unit), self._ready, first_may_fail=unit.number > 0)
            if unit.only is None:
                self._publish(unit, run, spool)
        return Done(unit.number, stats.rows, dict(stats.failed), stats.seconds_waited)

    def _resolve(self, value: object, index: int = 0) -> ImageSource | RowError:
        return self._run.inputs.resolve(value, index)

    def _publish(self, unit: Unit, run: Run, spool: Any) -> None:
        name = self._folder.part_name(unit.number)
        with self._folder.written(name) as file:
            if name.endswith(".jsonl"):
                spool.seek(0)
                shutil.copyfileobj(spool, file)
                return
            settings = run.settings(self._job.check_model(run.options.request))
            about = {SETTINGS: settings, NUM_ROWS: run.stats.rows, FAILED: dict(run.stats.failed)}

            def texts() -> Iterator[bytes]:
                spool.seek(0)
                return (line.rstrip(b"\n") for line in spool)

            format_of(Path(name)).write_to(file, texts, texts(), run.form.columns, run.passthrough, about)


def _without_fatal(rows: Iterator[InputRow], unit: Unit) -> Iterator[InputRow]:
    for row in rows:
        if unit.only is None or unit.only[0] <= row.index < unit.only[1]:
            if row.index in unit.fatal:
                error = RowError("process_died", "the process that works on this row ends each time")
                row = replace(row, sources=(), error=row.error or error)
            yield row


def attempts(unit: Unit) -> Generator[Unit, bool, None]:
    """What is to be tried until the part of the unit is there; is sent whether the process has survived each try.

    One end may be chance. After a second, halves are tried until the row is found that ends its process.
    """
    while True:
        if (yield unit) or (yield unit):
            return
        first, stop = unit.begin.index, unit.end.index
        while stop - first > 1:
            middle = (first + stop) // 2
            if (yield replace(unit, only=(first, middle))):
                first = middle
            else:
                stop = middle
        if not (yield replace(unit, only=(first, stop))):
            unit = replace(unit, fatal=(*unit.fatal, first))
        if len(unit.fatal) > MOST_FATAL:
            raise IdeficsError(
                f"{len(unit.fatal)} rows of unit {unit.number}, row {first + 1} among them, each end the process that"
                " works on them: look at its memory and device, or leave such rows out"
            )


# ---- the folder


@dataclass(frozen=True)
class Units:
    """The units of a folder that this driver is to do, those from `first` up to `stop`."""

    folder: UnitFolder
    inputs: Inputs
    first: int
    stop: int

    def missing(self) -> Iterator[Unit]:
        """Those whose part is not there, in order."""
        done = self.folder.done()
        for number, (begin, end) in enumerate(self.folder.bounds(self.first, self.stop), self.first):
            if not done[number]:
                yield Unit(number, _cut(begin), _cut(end))

    def part(self, unit: Unit) -> Inputs:
        return self.inputs.part(unit.begin, unit.end)

    @property
    def num_rows(self) -> int:
        if self.first == self.stop:
            return 0
        (begin, _), (_, end) = (next(self.folder.bounds(each, each + 1)) for each in (self.first, self.stop - 1))
        return end[0] - begin[0]


def _cut(numbers: tuple[int, ...]) -> Cut:
    return Cut(*numbers[:3], Place(*numbers[3:]))


def require_units(options: RunOptions) -> None:
    """Raise where options do not go with a folder of parts."""
    if STDIN in options.inputs:
        raise InputError(f"stdin cannot be cut into the parts of {options.output}: save it as a file, and name that")
    for flag, given in {
        "--sidecar": options.sidecar,
        "--update": options.update,
        "--retry-errors": options.retry_errors,
        "--format vqav2": options.format == "vqav2",
    }.items():
        if given:
            raise OutputError(
                f"{flag} needs one output file: leave it out, and join {options.output} with idefics merge"
            )
    if options.overwrite and options.reading.shard is not None:
        raise OutputError("--overwrite would remove what other shards are writing: remove the folder instead")


def open_units(run: Run, folder: UnitFolder) -> None:
    """Cut the input, unless that is done. Raises OutputError where the folder is of a run with other settings.

    No other driver may be at this in the meantime.
    """
    options = run.options
    settings = settings_of(run, None)
    if folder.look():
        require_same(folder, settings)
        return
    settings = settings_of(run, run.check_model(options.request))
    name = "parquet" if options.format == "auto" else options.format
    cuts = ((cut.index, cut.source, cut.before, *cut.place) for cut in run.inputs.cuts(options.unit_rows))
    columns = {column.name: column.kind for column in run.form.columns}
    about = {"format": name, "columns": columns, "rows_each": run.task.rows_each}
    folder.begin({SETTINGS: settings, "inputs": _identity(run.inputs), **about}, cuts)


def settings_of(run: Run, weights: str | None) -> dict[str, Any]:
    """As those of a single file, without what each shard has for itself, and with what decides the bounds."""
    options = run.options
    settings = {name: value for name, value in run.settings(weights).items() if name != "--shard"}
    bounds = {"--unit-rows": options.unit_rows, "--limit": options.reading.limit, "--format": options.format}
    return {**settings, **bounds}


def require_same(folder: UnitFolder, settings: Mapping[str, Any]) -> None:
    import json

    found = sorted(differences(folder.header[SETTINGS], json.loads(json.dumps(settings))))
    if found:
        raise OutputError(
            f"{folder.name} belongs to a run with other settings ({'; '.join(found[:4])}): name another folder, or start"
            " over with --overwrite"
        )


def require_same_inputs(run: Run, folder: UnitFolder) -> None:
    if folder.header["inputs"] != _identity(run.inputs):
        raise OutputError(
            f"the input is not what it was when {folder.name} was begun: restore it, name another folder, or start over"
            " with --overwrite"
        )


def _identity(inputs: Inputs) -> list[dict[str, Any]]:
    return [{name: value for name, value in each.items() if name != "name"} for each in inputs.identity]


# ---- the end


@dataclass
class Summary:
    """What all parts of a folder hold: rows, those that failed by code with the first ids, and ids that come twice."""

    rows: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    failed_ids: dict[str, list[str]] = field(default_factory=dict)
    repeated: int = 0
    repeated_ids: list[str] = field(default_factory=list)


def close_units(folder: UnitFolder, may_repeat_ids: bool) -> Summary:
    """Look through all parts: each must hold its rows. Memory does not grow with them."""
    summary, ids = Summary(), UniqueIds() if may_repeat_ids else None
    rows_each = folder.header["rows_each"]
    for number, (begin, end) in enumerate(folder.bounds(0, folder.num_units)):
        part, expected, before = folder.part(number), (end[0] - begin[0]) * rows_each, summary.rows
        for row in _rows_of(part, ["id", "error"]):
            summary.rows += 1
            code = row["error"].partition(":")[0] if row["error"] else None
            if code is not None:
                summary.failed[code] += 1
                summary.failed_ids.setdefault(code, []).append(row["id"])
                del summary.failed_ids[code][FIRST_IDS:]
            if ids is not None and code != "duplicate_id" and ids.add(row["id"], summary.rows) is not None:
                summary.repeated += 1
                summary.repeated_ids = [*summary.repeated_ids, row["id"]][:FIRST_IDS]
        if summary.rows - before != expected:
            raise OutputError(
                f"{part.name} holds {summary.rows - before} rows, not {expected}: remove it and run the same command"
                " again, which makes it anew".replace("makes it anew", "does it over")
            )
    return summary


def _rows_of(part: Any, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    table = open_table(part.found(), ReadOptions())
    for _, row in table.records(ALL, columns):
        if isinstance(row, RowError):
            raise OutputError(f"{part.name} cannot be read: {row.message}; remove it and run the same command again")
        yield row
