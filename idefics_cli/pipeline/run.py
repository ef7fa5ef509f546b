"""One run over many rows, from its options to its end: inputs, output, model, rows, final file.

What a user can have got wrong is looked at in this order, before a model is loaded: inputs, output, model. The same run
again goes on where it was stopped, or says that it is finished. This module ties the others together and knows no
terminal: whoever starts a run is told how it ended, and is called back for every row.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from idefics_cli import __version__
from idefics_cli.checkpoint import ModelRequest
from idefics_cli.errors import InputError, OutputError
from idefics_cli.pipeline.prefetch import FlowOptions, RunStats, Stages, run_rows
from idefics_cli.pipeline.task import Model, Observer, Steps, Task
from idefics_cli.readers.inputs import open_inputs
from idefics_cli.readers.manifest import is_manifest
from idefics_cli.readers.references import references_of
from idefics_cli.result import Outcome
from idefics_cli.rows import InputRow, ReadOptions
from idefics_cli.writers.output_file import FileOutput
from idefics_cli.writers.writers import JournalWriter, RowWriter, SidecarWriter, StreamWriter

if TYPE_CHECKING:
    from idefics_cli.images.decode import ImageLimits

STDIN = STDOUT = "-"
ROWS_AT_ONCE = 16  # read from files: one by one, threads hand each other the interpreter for every row


@dataclass(frozen=True)
class Loader:
    """`check` raises what can be known to be wrong with a model, and gives a digest of its weights where they are at
    hand; `load` reads them."""

    check: Callable[[ModelRequest], str | None]
    load: Callable[[ModelRequest, int | None], Model]


@dataclass(frozen=True)
class RunOptions:
    """All that a run is told besides its task. `batch_size` None: as many as memory holds.

    `answers_column` is that of the references which somebody means to score the result against.
    """

    inputs: tuple[str, ...]
    output: str
    request: ModelRequest
    reading: ReadOptions
    limits: ImageLimits
    decode_timeout: float
    workers: int
    batch_size: int | None = None
    max_errors: int | None = None
    overwrite: bool = False
    retry_errors: bool = False
    sidecar: bool = False
    answers_column: str | None = None


class Ending(Enum):
    """How a run ended that was neither a mistake nor a stop."""

    RAN = "all rows are out, or as many have failed as may"
    FINISHED_BEFORE = "there was nothing left to do"


class Run:
    """A run, from looking at its inputs on. Keeps `stats`; raises IdeficsError for a mistake, and whatever stops it."""

    def __init__(
        self,
        options: RunOptions,
        task: Task,
        loader: Loader,
        stats: RunStats,
        observer: Observer,
        stdin: BinaryIO | None = None,
    ) -> None:
        self.options, self.task, self.loader, self.stats, self.observer = options, task, loader, stats, observer
        _require_manifests(options, task)
        _require_output_of_its_own(options, task)
        self.inputs = open_inputs(options.inputs, options.reading, stdin)
        self.form = task.form(self.inputs.passthrough)
        assert not options.sidecar or task.rows_each == 1, task.rows_each
        self.sidecars = SidecarWriter(options.overwrite) if options.sidecar else None
        self.model: Model | None = None
        self._done_of_first: list[str] = []  # ids that an earlier run has done of the first row that is left

    def run(self, stdout: BinaryIO | None) -> Ending:
        if self.options.output != STDOUT:
            with closing(FileOutput(self.options.output, overwrite=self.options.overwrite)) as output:
                return self._run_to_file(output)
        if stdout is None:
            raise OutputError("stdout is closed: name a file with -o F.jsonl")
        self._load()
        self._run_rows(self._rows(), lambda: StreamWriter(stdout))
        return Ending.RAN

    # ---- to a file

    def _run_to_file(self, output: FileOutput) -> Ending:
        output.require_same(self._settings(weights=None))
        if output.journal.summary is not None:
            return self._publish_again(output)
        if output.is_finished:
            return self._after_finish(output)
        weights = self.loader.check(self.options.request)
        output.require_same(self._settings(weights))
        self._pass_over_done(output)
        self._load()
        settings = self._final_settings(output)
        self._run_rows(self._rows(), lambda: self._begin(output, settings))
        if not self.stats.stopped_early:
            output.publish(self.form.columns, self._summary())
        return Ending.RAN

    def _after_finish(self, output: FileOutput) -> Ending:
        record = output.record
        assert record is not None, output.path
        if self.options.retry_errors and record["failed"]:
            return self._retry(output)
        self._take_over(output, record)
        return Ending.FINISHED_BEFORE

    def _publish_again(self, output: FileOutput) -> Ending:
        """A kill came between the last row and the final name."""
        summary = output.journal.summary
        assert summary is not None, output.path
        output.publish(self.form.columns)
        self._take_over(output, summary)
        return Ending.FINISHED_BEFORE

    def _take_over(self, output: FileOutput, summary: Mapping[str, Any]) -> None:
        if self.inputs.is_streaming or self.sidecars is not None:
            self._go_through_finished(output)
        self.stats.rows = self.stats.resumed = self.stats.safe = summary["rows"]
        self.stats.failed = Counter(summary["failed"])

    def _go_through_finished(self, output: FileOutput) -> None:
        """What comes on stdin has no name to compare, so its rows are; texts beside images may not be there yet."""
        known = output.finished_rows()
        for row in self._rows():
            self._write_beside(row, _require_same_row(next(known, None), row))
        _require_end(known)

    def _retry(self, output: FileOutput) -> Ending:
        """Do the failed rows of a finished file again."""
        output.require_same(self._settings(self.loader.check(self.options.request)))
        self._load()
        settings = self._final_settings(output)
        self._run_rows(self._failed_rows(output), lambda: self._begin(output, settings, amends=True))
        if not self.stats.stopped_early:
            output.publish(self.form.columns, self._summary())
        return Ending.RAN

    def _failed_rows(self, output: FileOutput) -> Iterator[InputRow]:
        """The input's rows that failed and have not been done again yet."""
        done_again = output.rows_so_far()
        known = output.finished_rows()
        for row in self._rows():
            old = _require_same_row(next(known, None), row)
            if old["error"] is not None:
                old = next(done_again, None)
            if old is None:
                yield row
            else:
                self._count_again(old)
                self._write_beside(row, old)
        _require_end(known)

    def _recount(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
        """The ids of rows that an earlier run has finished, which count for this one."""
        for row in rows:
            self._count_again(row)
            yield row["id"]

    def _count_again(self, row: Mapping[str, Any]) -> None:
        error = row["error"]
        self.stats.add(row["id"], error.split(":", 1)[0] if error else None)
        self.stats.resumed += 1
        self.stats.safe += 1

    def _final_settings(self, output: FileOutput) -> dict[str, Any]:
        """With the weights: a model of the hub is at hand once it has been loaded."""
        settings = self._settings(self.loader.check(self.options.request))
        output.require_same(settings)
        return settings

    def _begin(self, output: FileOutput, settings: Mapping[str, Any], *, amends: bool = False) -> JournalWriter:
        output.begin(settings, amends=amends)
        return JournalWriter(output.journal)

    def _summary(self) -> dict[str, Any]:
        return {"rows": self.stats.rows, "failed": dict(self.stats.failed)}

    def _settings(self, weights: str | None) -> dict[str, Any]:
        """What decides the rows: a run goes on only where all of it is the same. `weights` None: not known yet."""
        options, reading = self.options, self.options.reading
        model = {"name": options.request.model, "revision": options.request.revision, "dtype": options.request.dtype}
        return {
            "version": __version__,
            "inputs": list(self.inputs.identity),
            "rows": {"limit": reading.limit, "shard": reading.shard, "recursive": reading.recursive},
            "columns": {"image": reading.image_column, "id": reading.id_column, "kept": list(self.form.kept)},
            "image_root": reading.image_root,
            "images": {"draft": options.limits.draft},
            "model": model if weights is None else {**model, "weights": weights},
            "command": self.task.command,
            "task": self.task.settings,
        }

    # ---- rows

    def _rows(self) -> Iterator[InputRow]:
        return self.task.expand(self.inputs.rows, self._done_of_first)

    def _pass_over_done(self, output: FileOutput) -> None:
        """Pass over what an earlier run has done, which may have had no --sidecar."""
        if self.sidecars is None:
            self.inputs.pass_over(self._rows_done(output))
            return
        for old in output.rows_so_far():
            self._write_beside(_require_done(next(self.inputs.rows, None), old), old)
            self._count_again(old)

    def _write_beside(self, row: InputRow, line: Mapping[str, Any]) -> None:
        """The text of a line of the result, beside the row's image where texts are wanted there."""
        if self.sidecars is not None and line["error"] is None:
            assert self.form.text_column is not None, self.form
            self.sidecars.write(_own_file(row), line[self.form.text_column], row.index)

    def _rows_done(self, output: FileOutput) -> Iterator[str]:
        """The ids of the input's rows that an earlier run has done."""
        return self.task.collapse(self._recount(output.rows_so_far()), self._done_of_first)

    @property
    def _total(self) -> int | None:
        return None if self.inputs.total is None else self.inputs.total * self.task.rows_each

    def _load(self) -> Model:
        if self.model is None:
            self.task.check(self.options.request)
            self.loader.check(self.options.request)
            self._check_next_row()
            self.model = self.loader.load(self.options.request, self.options.batch_size)
        return self.model

    def _check_next_row(self) -> None:
        """What is wrong with all rows shows in the first of them, and should before a model is loaded."""
        row = None if self.inputs.is_streaming else self.inputs.peek()
        if row is None or row.error is not None:
            return
        if self.sidecars is not None:
            _own_file(row)
        if self.options.answers_column is not None:
            references_of(row.values.get(self.options.answers_column), f"row {row.index + 1}")

    def _run_rows(self, rows: Iterator[InputRow], open_writer: Callable[[], RowWriter]) -> None:
        """A mistake that shows as the task begins leaves no output behind."""
        options, model = self.options, self._load()
        rows_at_once = 1 if self.inputs.is_streaming else ROWS_AT_ONCE
        flow = FlowOptions(model.batch_size, options.workers, options.max_errors, rows_at_once=rows_at_once)
        self.observer.on_start(self._total)
        with model.image_workers(options.limits, options.workers, options.decode_timeout) as images:
            steps = self.task.begin(model, images, self.inputs.resolve, self.observer)
            self._write_rows(rows, steps, flow, open_writer())

    def _write_rows(self, rows: Iterator[InputRow], steps: Steps, flow: FlowOptions, writer: RowWriter) -> None:
        def leave(row: InputRow, outcome: Outcome) -> None:
            line = self.form.row(row, outcome)
            self._write_beside(row, line)
            writer.write(line)

        resumed = self.stats.safe
        try:
            with closing(writer):
                run_rows(rows, Stages(steps.prepare, steps.decode, leave), flow, self.stats, self.observer.on_row)
        finally:
            self.stats.safe = resumed + writer.num_safe


def _own_file(row: InputRow) -> Path:
    if not row.sources:
        raise OutputError(
            f"row {row.id} names no image that a text could stand beside: name its column with --image-column, or"
            " leave --sidecar out"
        )
    if not isinstance(row.sources[0], Path):
        raise OutputError(f"the image of row {row.id} is no file that a text could stand beside: leave --sidecar out")
    return row.sources[0]


def _require_manifests(options: RunOptions, task: Task) -> None:
    """Files, folders and paths bring no columns."""
    without = [name for name in options.inputs if not is_manifest(name)]
    if task.needs_manifest and without:
        raise InputError(f"{without[0]} is no manifest: {task.needs_manifest}")
    reading = options.reading
    named = {
        "--image-column": reading.image_column if not any(map(is_manifest, task.files)) else None,
        "--id-column": reading.id_column,
        "--keep or --answers-column": reading.keep,
        "--image-root": reading.image_root if STDIN not in options.inputs else None,
    }
    useless = next((flag for flag, value in named.items() if value), None)
    if useless and len(without) == len(options.inputs):
        raise InputError(f"{without[0]} is no manifest, which {useless} speaks of: leave it out, or name one")


def _require_output_of_its_own(options: RunOptions, task: Task) -> None:
    """Nothing that the run reads may go, not even where all may that is there."""
    if any(_are_one_file(options.output, name) for name in (*options.inputs, *task.files)):
        raise OutputError(f"{options.output} is what this run reads: name another output")


def _are_one_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one of them is not there, or no name of a file
        return False


def _require_same_row(old: dict[str, Any] | None, row: InputRow) -> dict[str, Any]:
    """`old`, the finished row in the place of the input's `row`."""
    if old is None or old["id"] != row.id:
        raise InputError(
            f"row {row.index + 1} is {row.id}, and was not when the result was made: name another output,"
            " or begin anew with --overwrite"
        )
    return old


def _require_done(row: InputRow | None, old: Mapping[str, Any]) -> InputRow:
    """The input's `row` in the place of `old`, which the unfinished output has done."""
    if row is None or row.id != old["id"]:
        raise InputError(
            f"the unfinished output goes on with {old['id']}, and the input with {row.id if row else 'nothing'}: bring"
            " the old input back, or start anew with --overwrite"
        )
    return row


def _require_end(known: Iterator[Mapping[str, Any]]) -> None:
    """Raise InputError where the result has rows behind the input's last."""
    old = next(known, None)
    if old is not None:
        raise InputError(
            f"the input ends before {old['id']}, which the result holds: give all rows again, name another output,"
            " or begin anew with --overwrite"
        )
