"""Numbered units: contiguous ranges of the input's rows, each of which becomes one part of the output's folder.

`drive` cuts the input, or finds it cut, has the missing units done, and looks whether all is there. How they are done,
in local processes or on a cluster, is left to `do`: a `Worker` makes a unit's rows into its part, by itself, and
`attempts` says what is to be tried where a worker's process ends, down to the row that ends it.
Parts joined in order are, byte for byte, what one process writes.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

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
from idefics_cli.scale.claims import Claim, InUse
from idefics_cli.storage.files import File
from idefics_cli.storage.unique_ids import UniqueIds
from idefics_cli.storage.unit_folder import PART, SUMMARY, UnitFolder
from idefics_cli.writers.formats import FAILED, NUM_ROWS, SETTINGS, format_of
from idefics_cli.writers.output_file import differences

if TYPE_CHECKING:
    from idefics_cli.loaded_model import LoadedModel

SINGLE_TRIES = 3  # of a row alone, before it is blamed
MOST_FATAL = 8  # rows of one unit that each end their process
FIRST_IDS = 3
BOUNDS = "--unit-rows", "--limit", "--format"  # settings of the folder, not of its rows


@dataclass(frozen=True)
class Unit:
    """The rows from `begin` to `end`. `fatal` are the indices of those that end their process, and become error rows.

    With `is_retry` the part is there, and its rows without an error stand: `num_standing` of them. With `only`, a range
    of indices, the others are passed over and no part is made: do these rows end their process?
    """

    number: int
    begin: Cut
    end: Cut
    fatal: tuple[int, ...] = ()
    only: tuple[int, int] | None = None
    is_retry: bool = False
    num_standing: int = 0

    @property
    def num_rows(self) -> int:
        return self.end.index - self.begin.index


@dataclass(frozen=True)
class Done:
    """What comes back of a unit whose part is there. `rows` are those that were done now."""

    unit: int
    rows: int
    failed: Mapping[str, int] = field(default_factory=dict)
    failed_ids: Mapping[str, list[str]] = field(default_factory=dict)  # the first of each code
    seconds_waited: float = 0.0


@dataclass(frozen=True)
class Job:
    """All that a worker is told once. It can be sent to another process if its functions can."""

    options: RunOptions
    make_task: Callable[[], Task]
    check_model: Callable[[ModelRequest], str | None]
    load_model: Callable[[ModelRequest, int | None], LoadedModel]


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
            self._observer.on_start(inputs.total)
        rows = self._task.expand(inputs.rows)
        if unit.is_retry:
            rows = map(_standing, rows, self._lines(unit))
        with tempfile.TemporaryFile() as spool:
            run.write_rows(spool, _without_fatal(rows, unit), self._ready, unit.number > 0, unit.num_standing)
            if unit.only is None:
                self._publish(unit, run, spool)
        return Done(unit.number, stats.rows - stats.resumed, dict(stats.failed), stats.failed_ids, stats.seconds_waited)

    def _lines(self, unit: Unit) -> Iterator[Mapping[str, Any]]:
        return lines_of(self._folder.part(unit.number), [column.name for column in self._run.form.columns])

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
                yield from (line.rstrip(b"\n") for line in spool)

            format_of(Path(name)).write_to(file, texts, texts(), run.form.columns, run.passthrough, about)


def _standing(row: InputRow, line: Mapping[str, Any]) -> InputRow:
    """With its line in the part that is there, if that has no error."""
    return row if line["error"] else replace(row, earlier={**line, "image": row.image})


def _without_fatal(rows: Iterator[InputRow], unit: Unit) -> Iterator[InputRow]:
    for row in rows:
        if unit.only is None or unit.only[0] <= row.index < unit.only[1]:
            if row.index in unit.fatal:
                error = RowError("process_died", "the process that works on this row ends each time")
                row = replace(row, sources=(), error=row.error or error)
            yield row


Tries: TypeAlias = Generator[Unit, bool, None]  # of a unit; is sent whether its process has survived each


def attempts(unit: Unit) -> Tries:
    """What is to be tried until the part of the unit is there; is sent whether the process has survived each try.

    One end may be chance. After a second, halves are tried until the row is found that ends its process each time.
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
        for _ in range(SINGLE_TRIES):
            if (yield replace(unit, only=(first, stop))):
                break
        else:
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
    is_retry: bool = False

    def missing(self) -> Iterator[Unit]:
        """Those whose part is not there, in order; where failed rows are to be redone, those which hold any, too."""
        done = self.folder.done()
        for number, (begin, end) in enumerate(self.folder.bounds(self.first, self.stop), self.first):
            errors = self._errors(number) if self.is_retry and done[number] else []
            if any(errors) or not done[number]:
                yield Unit(number, _cut(begin), _cut(end), is_retry=any(errors), num_standing=errors.count(None))

    def _errors(self, number: int) -> list[str | None]:
        return [row["error"] for row in rows_of(self.folder.part(number), ["error"])]

    def part(self, unit: Unit) -> Inputs:
        return self.inputs.part(unit.begin, unit.end)

    def num_rows(self) -> int:
        bounds = list(chain(*(self.folder.bounds(each, each + 1) for each in {self.first, self.stop - 1})))
        return max(end[0] for _, end in bounds) - min(begin[0] for begin, _ in bounds) if self.first < self.stop else 0


def _cut(numbers: tuple[int, ...]) -> Cut:
    return Cut(*numbers[:3], Place(*numbers[3:]))


Do: TypeAlias = Callable[[Units], Iterator[Done]]


def drive(run: Run, shard: tuple[int, int], do: Do) -> Summary | None:
    """Have the missing units of this shard done, and keep the run's `stats`. What all parts of the folder hold, where
    all are there now."""
    options, stats, folder = run.options, run.stats, UnitFolder(run.options.output)
    folder.make()
    if options.overwrite:
        with Claim(folder):
            folder.clear()
    _open_units(run, folder)
    first, stop = (folder.num_units * place // shard[1] for place in (shard[0] - 1, shard[0]))
    units = Units(folder, run.inputs, first, stop, options.retry_errors)
    with Claim(folder, units.first, units.stop):
        folder.remove_leftovers(units.first, units.stop)
        try:
            _do_missing(run, units, do)
        finally:
            folder.remove_leftovers(units.first, units.stop)
    if stats.stopped_early or 0 in folder.done():
        return None
    summary = _close_units(folder, run.inputs.may_repeat_ids)
    done_here = stats.rows - stats.resumed
    stats.rows, stats.failed, stats.failed_ids = summary.rows, Counter(summary.failed), summary.failed_ids
    stats.resumed = summary.rows - done_here
    return summary


def _do_missing(run: Run, units: Units, do: Do) -> None:
    stats, started = run.stats, time.perf_counter()
    rows_each = run.task.rows_each
    left = sum(unit.num_rows * rows_each - unit.num_standing for unit in units.missing())
    total = units.num_rows() * rows_each
    if left:
        units.folder.remove(SUMMARY)
    stats.rows = stats.resumed = stats.safe = total - left
    run.observer.on_start(total, stats.rows)
    with closing(do(units)) as all_done:
        for done in all_done:
            stats.rows, stats.safe = stats.rows + done.rows, stats.safe + done.rows
            stats.failed.update(done.failed)
            for code, ids in done.failed_ids.items():
                known = stats.failed_ids.setdefault(code, [])
                known += ids[: FIRST_IDS - len(known)]
            stats.seconds, stats.seconds_waited = (
                time.perf_counter() - started,
                stats.seconds_waited + done.seconds_waited,
            )
            if run.options.max_errors is not None and stats.num_failed >= run.options.max_errors:
                stats.stopped_early = True
                return


def _open_units(run: Run, folder: UnitFolder) -> None:
    """Cut the input, unless that is done: by one driver, for which the others wait.

    Raises OutputError where the folder is of a run with other settings or another input.
    """
    while not folder.look():
        try:
            with Claim(folder):
                folder.remove_leftovers()
                if not folder.look():
                    _cut_units(run, folder)
        except InUse:
            time.sleep(random.uniform(0.1, 0.5))
    found = list(differences(folder.header[SETTINGS], json.loads(json.dumps(settings_of(run, None)))))
    if found:
        raise OutputError(
            f"{folder.name} belongs to a run with other settings ({'; '.join(sorted(found)[:4])}): name another folder,"
            " or start over with --overwrite"
        )
    if folder.header["inputs"] != _identity(run.inputs):
        raise OutputError(
            f"the input is not what it was when {folder.name} was begun: restore it, name another folder, or start over"
            " with --overwrite"
        )


def _cut_units(run: Run, folder: UnitFolder) -> None:
    options = run.options
    if any(PART.fullmatch(name) for name in folder.names()):
        raise OutputError(f"{folder.name} holds parts and not what they are of: name another folder")
    about = {
        SETTINGS: settings_of(run, run.check_model(options.request)),
        "inputs": _identity(run.inputs),
        "format": "parquet" if options.format == "auto" else options.format,
        "columns": {column.name: column.kind for column in run.form.columns},
        "rows_each": run.task.rows_each,
        "kept": list(run.passthrough.names.values()),
        "may_repeat_ids": run.inputs.may_repeat_ids,
    }
    cuts = run.inputs.cuts(options.unit_rows)
    folder.begin(about, ((cut.index, cut.source, cut.before, *cut.place) for cut in cuts))


def settings_of(run: Run, weights: str | None) -> dict[str, Any]:
    """As those of a single file, and what decides the bounds."""
    options = run.options
    bounds = options.unit_rows, options.reading.limit, options.format
    return {**run.settings(weights), **dict(zip(BOUNDS, bounds, strict=True))}


def _identity(inputs: Inputs) -> list[dict[str, Any]]:
    return [{name: value for name, value in each.items() if name != "name"} for each in inputs.identity]


def require_units(options: RunOptions) -> None:
    """Raise where options do not go with a folder of parts."""
    if STDIN in options.inputs:
        raise InputError(f"stdin cannot be cut into the parts of {options.output}: save it as a file, and name that")
    refused = {
        "--sidecar": options.sidecar,
        "--update": options.update,
        "--format vqav2": options.format == "vqav2",
    }
    for flag in (flag for flag, given in refused.items() if given):
        raise OutputError(f"{flag} needs a single file: leave it out, and join {options.output} with `idefics merge`")
    if options.overwrite and options.reading.shard is not None:
        raise OutputError("--overwrite would remove what other shards are writing: remove the folder instead")


# ---- the end


@dataclass
class Summary:
    """What all parts of a folder hold: rows, those that failed by code with the first ids, and ids that come twice."""

    rows: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    failed_ids: dict[str, list[str]] = field(default_factory=dict)
    repeated: int = 0
    repeated_ids: list[str] = field(default_factory=list)

    def add(self, row_id: str, code: str | None, is_repeated: bool) -> None:
        self.rows += 1
        if code is not None:
            self.failed[code] = self.failed.get(code, 0) + 1
            ids = self.failed_ids.setdefault(code, [])
            ids += [row_id] * (len(ids) < FIRST_IDS)
        if is_repeated:
            self.repeated += 1
            self.repeated_ids += [row_id] * (len(self.repeated_ids) < FIRST_IDS)


def _close_units(folder: UnitFolder, may_repeat_ids: bool) -> Summary:
    """Look through all parts: each must hold its rows. Once that is done, by one driver, it is known."""
    while SUMMARY not in folder.names():
        try:
            with Claim(folder):
                folder.remove_leftovers()
                summary = read_parts(folder, may_repeat_ids)
                with folder.written(SUMMARY) as file:
                    file.write(json.dumps(vars(summary)).encode())
        except InUse:
            time.sleep(random.uniform(0.1, 0.5))
    with folder.place.child(SUMMARY).open() as file:
        return Summary(**json.loads(file.read()))


def read_parts(folder: UnitFolder, may_repeat_ids: bool) -> Summary:
    """Memory does not grow with the rows. Raises OutputError for a part without its rows."""
    summary, ids = Summary(), UniqueIds() if may_repeat_ids else None
    for number, (begin, end) in enumerate(folder.bounds(0, folder.num_units)):
        part, before = folder.part(number), summary.rows
        for row in rows_of(part, ["id", "error"]):
            code = row["error"].partition(":")[0] if row["error"] else None
            is_new = ids is None or code == "duplicate_id" or ids.add(row["id"], summary.rows) is None
            summary.add(row["id"], code, not is_new)
        num_rows, expected = summary.rows - before, (end[0] - begin[0]) * folder.header["rows_each"]
        if num_rows != expected:
            raise OutputError(
                f"{part.name} holds {num_rows} rows, not {expected}: remove it and run the command that made it again"
            )
    return summary


def lines_of(part: File, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    """These columns as they were written."""
    return format_of(Path(part.path)).rows(Path(part.path), columns) if part.is_local else rows_of(part, columns)


def rows_of(part: File, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    table = open_table(part.found(), ReadOptions())
    for _, row in table.records(ALL, columns):
        if isinstance(row, RowError):
            raise OutputError(f"{part.name} cannot be read: {row.message}; remove it and run the same command again")
        yield row
