"""One run over many rows, from its options to its end: inputs, output, model, rows, final file.

What a user can have got wrong is checked in this order, before a model is loaded: inputs, output, model. A run that
begins, resumes or retries is one path: rows that the output has are skipped, rows with an earlier result that is kept
go straight to the output, and the others through the model. Knows no terminal.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from fnmatch import fnmatch
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from idefics_cli import __version__
from idefics_cli.checkpoint import ModelRequest
from idefics_cli.errors import InputError, OutputError
from idefics_cli.pipeline.options import STDIN, STDOUT, RunOptions
from idefics_cli.pipeline.prefetch import Finished, FirstRowsFailed, FlowOptions, RunStats, run_rows
from idefics_cli.pipeline.task import Observer, Task
from idefics_cli.readers.inputs import open_inputs
from idefics_cli.readers.manifest import is_manifest
from idefics_cli.readers.references import references_of
from idefics_cli.rows import InputRow, ReadOptions
from idefics_cli.validation import by_option
from idefics_cli.writers.formats import VQAV2, Passthrough
from idefics_cli.writers.output_file import FileOutput
from idefics_cli.writers.writers import JournalWriter, RowWriter, SidecarWriter, StreamWriter

if TYPE_CHECKING:
    from idefics_cli.idefics import Idefics

DECISIVE = (  # options that decide the rows, besides the task's own
    *("--model", "--revision", "--adapter", "--dtype", "--draft", "--frame"),
    *("--limit", "--shard", "--no-recursive", "--image-column", "--id-column", "--image-root", "--allow-no-image"),
    *("--json-key", "--delimiter", "--encoding"),
)
ROWS_AT_ONCE = 16  # read from files: one by one, threads would hand each other the interpreter for every row


class Run:
    """A run, from looking at its inputs on. Keeps `stats`; raises IdeficsError for a mistake, and whatever stops it.

    `check_model` raises what can be known to be wrong with a model, and gives a digest of its weights where they are on
    this machine; `load_model` reads them.
    """

    def __init__(
        self,
        options: RunOptions,
        task: Task,
        check_model: Callable[[ModelRequest], str | None],
        load_model: Callable[[ModelRequest, int | None], Idefics],
        stats: RunStats,
        observer: Observer,
        stdin: BinaryIO | None = None,
    ) -> None:
        if options.format == VQAV2 and (task.command != "vqa" or task.rows_each > 1):
            raise OutputError("--format vqav2 is for vqa, with one question in each row of a manifest")
        options = replace(options, reading=_reading(options, task))
        self.options, self.task, self.form, self.stats, self.observer = options, task, task.form, stats, observer
        self._check_model, self._load_model = check_model, load_model
        _require_output_of_its_own(options, task)
        self.inputs = open_inputs(options.inputs, options.reading, stdin, observer.say)
        _require_manifests(options, task, self.inputs.are_manifests)
        _require_output_outside_parts(options, self.inputs.are_manifests)
        names = shown_names(self.inputs.passthrough, [column.name for column in self.form.columns])
        passed = self.inputs.passthrough_rows, self.inputs.passthrough_batches
        self.passthrough = Passthrough(names, *passed, task.rows_each)
        self.sidecars = SidecarWriter(options.overwrite) if options.sidecar else None

    def run(self, stdout: BinaryIO | None) -> bool:
        """Whether there was anything to do."""
        if self.options.output != STDOUT:
            options = self.options
            output = FileOutput(options.output, overwrite=options.overwrite, format_name=options.format)
            with closing(output):
                return self._run_to_file(output)
        if stdout is None:
            raise OutputError("stdout is closed: name a file with -o F.jsonl")
        self._run_rows(self.task.expand(self.inputs.rows), lambda: StreamWriter(stdout))
        return True

    # ---- to a file

    def _run_to_file(self, output: FileOutput) -> bool:
        output.require_same(self._settings(weights=None))
        record, is_complete = output.record, output.journal.summary is not None
        if output.is_finished and not (self.options.retry_errors and record["failed"]):
            self._accept(output)
            return False
        if not is_complete:
            output.require_same(self._settings(self._check_model(self.options.request)))
        rows = self._rows_left(output)
        if is_complete:
            _require_end(rows, output)
        else:
            try:
                self._run_rows(rows, lambda: self._begin(output), output.is_retry)
            except FirstRowsFailed:  # nothing else is in the journal, which would keep other settings from this output
                output.journal.remove()
                raise
            if self.stats.stopped_early:
                return True
            output.journal.end({"rows": self.stats.rows, "failed": dict(self.stats.failed)})
        output.publish(self.form.columns, self.passthrough)
        return not is_complete

    def _accept(self, output: FileOutput) -> None:
        """Take a finished file as it is. Paths on stdin have no name to compare, so their rows are compared."""
        assert output.record is not None, output.path
        if self.inputs.is_streaming or self.sidecars is not None:
            rows = self.task.expand(self.inputs.rows)
            self._skip(rows, output.finished_rows(["id", "error", *filter(None, [self.form.text_column])]))
            _require_end(rows, output)
        else:
            self.stats.rows = self.stats.resumed = self.stats.safe = output.record["rows"]
            self.stats.failed = Counter(output.record["failed"])

    def _rows_left(self, output: FileOutput) -> Iterator[InputRow]:
        """The rows that the journal does not have; of a retry with those of the finished file that are kept."""
        num_done = output.journal.num_rows
        rows = self._rows_from(num_done // self.task.rows_each)
        if num_done:
            self._skip(rows, output.journal.rows())
        return self._with_earlier(rows, output, num_done) if output.is_retry else rows

    def _skip(self, rows: Iterator[InputRow], done: Iterator[Mapping[str, Any]]) -> None:
        """The rows of `done` are finished, and come first."""
        for old in done:
            self._write_beside(_require_same_row(next(rows, None), old), old)
            self.stats.add_earlier(old)
            self.stats.safe += 1

    def _rows_from(self, num_skipped: int) -> Iterator[InputRow]:
        """All rows, so many of the input's without their images; whole ones where a text may be missing beside them."""
        if self.sidecars is None:
            yield from self.task.expand(self.inputs.skip(num_skipped))
        yield from self.task.expand(self.inputs.rows)

    def _with_earlier(self, rows: Iterator[InputRow], output: FileOutput, num_done: int) -> Iterator[InputRow]:
        known = output.finished_rows([column.name for column in self.form.columns])
        for old in islice(known, num_done, None):
            row = _require_same_row(next(rows, None), old)
            yield row if old["error"] else replace(row, earlier=old)
        _require_end(rows, output)

    def _begin(self, output: FileOutput) -> JournalWriter:
        settings = self._settings(self._check_model(self.options.request))  # a hub's weights are known only now
        output.require_same(settings)
        output.begin(settings)
        return JournalWriter(output.journal)

    def _settings(self, weights: str | None) -> dict[str, Any]:
        """What decides the rows: a run resumes only where all of it is the same. `weights` None: not known yet."""
        options = by_option(self.options)
        return {
            "version": __version__,
            "inputs": list(self.inputs.identity),
            **{name: options[name] for name in DECISIVE},
            "--keep": list(self.passthrough.names),
            "model": {} if weights is None else {"weights": weights},
            "command": self.task.command,
            "task": self.task.settings,
        }

    # ---- rows

    def _checked(self, rows: Iterator[InputRow]) -> Iterator[InputRow]:
        """What is wrong with all rows shows in the first of them, and should before a model is loaded."""
        first = None if self.inputs.is_streaming else next(rows, None)
        if first is None:
            return rows
        if self.sidecars is not None and first.error is None:
            _own_file(first)
        if self.options.answers_column is not None and first.error is None:
            references_of(first.values.get(self.options.answers_column), f"row {first.index + 1}")
        return chain([first], rows)

    def _run_rows(self, rows: Iterator[InputRow], open_writer: Callable[[], RowWriter], is_retry: bool = False) -> None:
        """A mistake that shows as the task begins leaves no output."""
        options, total = self.options, self.inputs.total
        self.task.check(options.request)
        self._check_model(options.request)
        rows = self._checked(rows)
        model = self._load_model(options.request, options.batch_size)
        rows_at_once = 1 if self.inputs.is_streaming else ROWS_AT_ONCE
        flow = FlowOptions(model.batch_size, options.images.num_workers, options.max_errors, rows_at_once, is_retry)
        self.observer.on_start(None if total is None else total * self.task.rows_each)
        with model.image_workers(options.images) as images:
            steps = self.task.begin(model, images, self.inputs.resolve, self.observer)
            writer, resumed = open_writer(), self.stats.safe
            try:
                with closing(writer):
                    run_rows(rows, steps, self._writing(writer), flow, self.stats, self.observer.on_row)
            finally:
                self.stats.safe = resumed + writer.num_safe

    def _writing(self, writer: RowWriter) -> Callable[[InputRow, Finished], None]:
        """Rows on stdout have the columns that are passed through; a file gets them in the end."""
        names = self.passthrough.names if self.options.output == STDOUT else {}

        def write(row: InputRow, finished: Finished) -> None:
            line = finished if isinstance(finished, Mapping) else self.form.row(row, finished)
            self._write_beside(row, line)
            writer.write({**line, **self.passthrough.shown(row.values)} if names else line)

        return write

    def _write_beside(self, row: InputRow, line: Mapping[str, Any]) -> None:
        """The text of a result row, beside the row's image where texts are wanted there."""
        if self.sidecars is not None and line["error"] is None:
            assert self.form.text_column is not None, self.form
            self.sidecars.write(_own_file(row), line[self.form.text_column], row.index)


def shown_names(passthrough: Mapping[str, Any], own: Sequence[str]) -> dict[str, str]:
    """What each passed-through column is called in a result: `input_...` where that has a column of its name."""
    names = {name: f"input_{name}" if name in own else name for name in passthrough}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise InputError(f"two columns of --keep would be called {', '.join(twice)}: keep one of them, by its name")
    return names


def _own_file(row: InputRow) -> Path:
    if not row.sources:
        raise OutputError(
            f"row {row.id} names no image that a text could be beside: name its column with --image-column, or leave"
            " --sidecar out"
        )
    if not isinstance(row.sources[0], Path):
        raise OutputError(
            f"the image of row {row.id} is not a file on this machine, which a text could be beside: leave --sidecar"
            " out"
        )
    return row.sources[0]


def _reading(options: RunOptions, task: Task) -> ReadOptions:
    """With the columns that the task reads, the answers and choices, which are kept too, and a submission's ids."""
    reading = options.reading
    answers = () if options.answers_column is None else (options.answers_column, *task.list_columns)
    submitted_id = "question_id" if options.format == VQAV2 else None
    return replace(
        reading,
        id_column=reading.id_column or submitted_id,
        columns=tuple(dict.fromkeys((*task.columns, *answers))),
        list_columns=tuple(dict.fromkeys((*task.list_columns, *answers))),
        keep="all" if reading.keep == "all" else tuple(dict.fromkeys((*reading.keep, *answers))),
        needs_image=reading.needs_image and task.needs_image,
    )


def _require_manifests(options: RunOptions, task: Task, are_manifests: Sequence[bool]) -> None:
    """Files, folders and paths bring no columns."""
    without = [name for name, is_one in zip(options.inputs, are_manifests, strict=True) if not is_one]
    if task.needs_manifest and without:
        raise InputError(f"{without[0]} is not a manifest: {task.needs_manifest}")
    reading = options.reading
    named = {
        "--image-column": reading.image_column if not any(map(is_manifest, task.files)) else None,
        "--id-column": reading.id_column,
        "--json-key": reading.json_key,
        "--answers-column": options.answers_column,
        "--delimiter": reading.delimited.delimiter,
        "--encoding": reading.delimited.encoding,
        "--keep": reading.keep,
        "--image-root": reading.image_root if STDIN not in options.inputs else None,
    }
    useless = next((flag for flag, value in named.items() if value), None)
    if useless and len(without) == len(options.inputs):
        raise InputError(f"{useless} needs a manifest, and {without[0]} is not one: name one, or leave {useless} out")


def _require_output_of_its_own(options: RunOptions, task: Task) -> None:
    """Nothing that the run reads may be replaced, not even with --overwrite, and no text by another of its image."""
    if options.sidecar and task.rows_each > 1:
        raise OutputError(
            f"--sidecar writes one text per image, not {task.rows_each}: ask one question, or leave it out"
        )
    if any(_are_one_file(options.output, name) for name in (*options.inputs, *task.files)):
        raise OutputError(f"{options.output} is what this run reads: name another output")


def _require_output_outside_parts(options: RunOptions, are_manifests: Sequence[bool]) -> None:
    """The next run would read it, too."""
    output = os.path.realpath(options.output)
    for name in (name for name, is_one in zip(options.inputs, are_manifests, strict=True) if is_one):
        if os.path.isdir(name) and output.startswith(os.path.realpath(name) + "/"):
            raise OutputError(f"{options.output} would become a part of {name}: name an output outside that folder")
        if not os.path.exists(name) and fnmatch(output, os.path.realpath(name)):
            raise OutputError(f"{options.output} matches {name}: name an output that does not")


def _are_one_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one of them does not exist, or cannot be the name of a file
        return False


def _require_same_row(row: InputRow | None, old: Mapping[str, Any]) -> InputRow:
    """The input's row in the place of `old`, a row of the output."""
    if row is None or row.id != old["id"]:
        found = "ends before it" if row is None else f"has {row.id} there"
        raise InputError(
            f"the output has the row {old['id']}, and the input {found}: restore the old input, name another output, or"
            " start over with --overwrite"
        )
    return row


def _require_end(rows: Iterator[InputRow], output: FileOutput) -> None:
    """Raise InputError where the input has rows that a finished output has not."""
    row = next(rows, None)
    if row is not None:
        raise InputError(
            f"the input has the row {row.id}, which {output.path} has not: restore the old input, name another output,"
            " or start over with --overwrite"
        )
