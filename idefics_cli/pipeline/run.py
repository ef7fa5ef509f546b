"""One run over many rows, from its options to its end: inputs, output, model, rows, final file.

What a user can have got wrong is checked in this order, before a model is loaded: inputs, output, model. A run that
begins, resumes, retries or updates is one path: rows that the output has are passed over, rows with an earlier result
that stands go straight to the output, and the others through the model. Knows no terminal.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from fnmatch import fnmatch
from functools import cached_property, partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.errors import InputError, OutputError, RowError
from idefics_cli.pipeline.earlier import DECIDING, Changes, EarlierRows, is_duplicate, row_digest, stands
from idefics_cli.pipeline.options import STDIN, STDOUT, RunOptions
from idefics_cli.pipeline.prefetch import Finished, FirstRowsFailed, FlowOptions, RunStats, Steps, run_rows
from idefics_cli.pipeline.task import About, Observer, Task
from idefics_cli.readers.inputs import Inputs, open_inputs
from idefics_cli.readers.manifest import is_manifest
from idefics_cli.readers.references import references_of
from idefics_cli.rows import ImageSource, InputRow, ReadOptions, RemoteFile
from idefics_cli.storage.filenames import shown_place
from idefics_cli.validation import by_option
from idefics_cli.writers.formats import DIGEST, VQAV2, Passthrough, mark_of
from idefics_cli.writers.output_file import GOOD, SAME, FileOutput
from idefics_cli.writers.sidecars import SidecarWriter
from idefics_cli.writers.writers import JournalWriter, RowWriter, StreamWriter

if TYPE_CHECKING:
    from idefics_cli.loaded_model import LoadedModel

DECISIVE = (  # options that decide the rows, besides the task's own
    *("--model", "--revision", "--adapter", "--dtype", "--quantize", "--draft", "--frame"),
    *("--shard", "--image-column", "--id-column", "--allow-no-image", "--json-key", "--delimiter", "--encoding"),
)
FORMAT = 1  # of what is compared: where it differs, an earlier run cannot be continued
NO_STEPS = Steps(prepare=lambda row: row, decode=lambda source: iter(source.take(1, True)))  # where all rows are done
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
        load_model: Callable[[ModelRequest, int | None], LoadedModel],
        stats: RunStats,
        observer: Observer,
        stdin: BinaryIO | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        if options.format == VQAV2 and (task.command != "vqa" or task.rows_each > 1):
            raise OutputError("--format vqav2 is for vqa, with one question in each row of a manifest: leave it out")
        options = replace(options, reading=_reading(options, task))
        self.options, self.task, self.form, self.stats, self.observer = options, task, task.form, stats, observer
        self.check_model, self._load_model = check_model, load_model
        _require_output_of_its_own(options, task)
        self.inputs = inputs or open_inputs(options.inputs, options.reading, _spooled(stdin, options), observer.say)
        _require_manifests(options, task, self.inputs.are_manifests)
        _require_output_outside_parts(options, self.inputs.are_manifests)
        names = shown_names(self.inputs.passthrough, [column.name for column in self.form.columns])
        passed = self.inputs.passthrough_rows, self.inputs.passthrough_batches
        self.passthrough = Passthrough(names, *passed, task.rows_each)
        self._known_digests: dict[tuple[int, str], str] = {}  # of rows on their way
        self._tag, self._num_standing = "", 0  # rows still to come of which the observer was told that they are done
        self._columns = {name for each in task.columns for name in ([each] if isinstance(each, str) else each)}
        self.sidecars = _sidecars(options)

    def run(self, stdout: BinaryIO | None) -> bool:
        """Whether there was anything to do."""
        options = self.options
        if options.output == STDOUT:
            if stdout is None:
                raise OutputError("stdout is closed: name a file with -o F.jsonl")
            needs_model = STDIN in options.inputs or self.sidecars is None or self._look_ahead(self._rows)
            self._run_rows(self._rows(), lambda: StreamWriter(stdout), needs_model=needs_model)
            return True
        while True:
            output = FileOutput(options.output, overwrite=options.overwrite, format_name=options.format)
            with closing(output):
                output.require_same(self.settings(weights=None))
                if output.journal.summary is None or not self._is_publishable(output):
                    return self._run_to_file(output)
                self._publish(output)

    # ---- to a file

    def _run_to_file(self, output: FileOutput) -> bool:
        """Rows that are done and stand first in the input are passed over, and the others done: in the attempt that is
        under way or, where the input is not what it was, in a further one."""
        options, is_finished = self.options, output.is_finished
        if not is_finished:
            output.require_same(self.settings(self.check_model(options.request)))
        is_retry = is_finished and options.retry_errors and bool(output.record["failed"])
        rows = self._rows()
        if not is_retry and self._stand_first(output, rows):
            if not is_finished:
                needs_model = True
                if self.sidecars is not None or (output.attempt[1] and not self.inputs.is_streaming):
                    num_done = self.stats.rows
                    needs_model = self._look_ahead(
                        lambda: self._with_earlier(output, islice(self._rows(), num_done, None), *output.attempt)
                    )
                    rows = islice(self._rows(), num_done, None)
                self._finish(output, self._with_earlier(output, rows, *output.attempt), needs_model)
                return True
            if next(rows, None) is None:
                return False
        self.stats.reset()
        mode, number = GOOD * is_retry | SAME * options.update, output.attempt[0] + 1
        needs_model = self._look(output, number, mode) > 0
        if self.sidecars is not None:
            needs_model = self._look_ahead(lambda: self._with_earlier(output, self._rows(), number, mode))
        output.next_attempt(mode)
        self._finish(output, self._with_earlier(output, self._rows(), number, mode), needs_model)
        return True

    def _is_publishable(self, output: FileOutput) -> bool:
        """All rows are done, and the columns beside them can be read again as they were."""
        is_known = not self.passthrough.names or self._stand_first(output, self._rows())
        self.stats.reset()
        return is_known

    def _stand_first(self, output: FileOutput, rows: Iterator[InputRow]) -> bool:
        """Whether the rows that are done are the first of the input. Of failed ones, ids are enough where no update is
        wanted; and of all where failed rows are being retried."""
        done = output.done(["id", "error", *filter(None, [self.form.text_column])])
        is_retry = output.attempt[1] == GOOD
        while olds := list(islice(done, ROWS_AT_ONCE)):
            chunk = list(islice(rows, len(olds)))
            for (old, known), row, digest in zip_longest(olds, chunk, self._digests(chunk)):
                matters = known and not is_retry and (self.options.update or not old["error"])
                if row is None or row.id != old["id"] or (matters and digest != known) or self._is_corrected(row, old):
                    return False
                self._write_beside(row, old)
                self.stats.add_earlier(old)
                self.stats.safe += 1
        self._close_beside()
        return True

    def _look(self, output: FileOutput, number: int, mode: int) -> int:
        """What has changed in the input: how many rows there are for the model in the attempt of this number and mode.

        Raises OutputError where the user has not asked for it.
        """
        earlier, changes, num_left = self._earlier(output, number), Changes(), 0
        for row, digest in self._with_digests(self._rows()):
            old = None if is_duplicate(row.error) else earlier.find(row.id)
            is_standing = stands(old, digest, mode)
            self._num_standing += is_standing
            num_left += row.error is None and not is_standing
            if old is not None and mode != GOOD and old[1] not in ("", digest):
                changes.add("changed", row.id)
            elif old is None and not is_duplicate(row.error) and output.is_finished:
                changes.add("new", row.id)
            elif old is not None and self._is_corrected(row, old[0]):
                changes.add("corrected", row.id)
        gone, failed, ids = earlier.never_found()
        changes.add("gone", *ids, number=gone)
        is_retried = mode == GOOD and gone == failed >= changes.numbers["new"]
        if not self.options.update and not is_retried:
            raise OutputError(
                f"the input has changed since the rows of {output.path} were done: {changes}. Add --update to do what"
                f" is new or changed{', drop what is gone' if gone else ''} and keep the other rows, or start over with"
                " --overwrite"
            )
        if self.options.update:
            self.observer.say(f"The input has changed since the rows of {output.path} were done: {changes}.")
        return num_left

    def _earlier(self, output: FileOutput, before: int) -> EarlierRows:
        names = [column.name for column in self.form.columns]
        ids = (row for row, _ in output.earlier(["id", "error"], before))
        return EarlierRows(ids, lambda: output.earlier(names, before))

    def _with_earlier(self, output: FileOutput, rows: Iterator[InputRow], number: int, mode: int) -> Iterator[InputRow]:
        """The rows for an attempt of this number and mode, those that stand with what they became before."""
        if not mode:
            yield from rows
            return
        earlier = self._earlier(output, number)
        for row, digest in self._with_digests(rows):
            old = None if is_duplicate(row.error) else earlier.find(row.id)
            if old is not None and stands(old, digest, mode):
                digest = f"{(old[1] or digest)[:DECIDING]}{digest[DECIDING:]}"
                row = replace(row, earlier={**old[0], "image": row.image})
            self._known_digests[row.index, row.id] = digest
            yield row

    def _finish(self, output: FileOutput, rows: Iterator[InputRow], needs_model: bool = True) -> None:
        is_further = output.attempt[1] > 0
        try:
            self._run_rows(rows, lambda: self._begin(output), is_further, needs_model)
        except FirstRowsFailed:  # nothing else is in the journal, which would keep other settings from this output
            output.journal.remove()
            raise
        if not self.stats.stopped_early:
            output.journal.end({"rows": self.stats.rows, "failed": dict(self.stats.failed)})
            self._publish(output)
            for name in self.inputs.changed_names():
                self.observer.say(
                    f"{name} has changed since the run began: --update does what is new or changed in it."
                )

    def _begin(self, output: FileOutput) -> JournalWriter:
        settings = self.settings(self.check_model(self.options.request))  # a hub's weights are known only now
        output.require_same(settings)
        output.begin(settings, self.form.columns)
        self._tag = output.tag
        return JournalWriter(output.journal)

    def _publish(self, output: FileOutput) -> None:
        self.inputs.keep_to(output.journal.summary["rows"] // self.task.rows_each)
        output.publish(self.form.columns, self.passthrough)

    def settings(self, weights: str | None) -> dict[str, Any]:
        """What decides all rows: a run resumes only where it is the same. `weights` None: not known yet."""
        options = by_option(self.options)
        return {
            "format": FORMAT,
            **{name: options[name] for name in DECISIVE},
            "--keep": list(self.passthrough.names),
            "model": {} if weights is None else {"weights": weights},
            "command": self.task.command,
            "task": self.task.settings,
        }

    # ---- what decides a row

    def _rows(self) -> Iterator[InputRow]:
        """All rows, from the first at each call."""
        return self.task.expand(self.inputs.restarted())

    def _digest(self, row: InputRow) -> str:
        kept = self.passthrough.names
        return row_digest(
            row.image if self.inputs.is_manifest(row.index) else None,
            self.task.images_of(row, self.inputs.resolve),
            {name: value for name, value in row.values.items() if name in self._columns or name not in kept},
            {name: row.values.get(name) for name in kept},
            row.error,
        )

    def _digests(self, rows: Sequence[InputRow]) -> Iterator[str]:
        """In order; those that need requests at once."""
        is_remote = any(isinstance(source, RemoteFile) for row in rows for source in row.sources)
        return self._requests.map(self._digest, rows) if is_remote else map(self._digest, rows)

    def _with_digests(self, rows: Iterator[InputRow]) -> Iterator[tuple[InputRow, str]]:
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            yield from zip(chunk, self._digests(chunk), strict=True)

    @cached_property
    def _requests(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(ROWS_AT_ONCE)

    def _recording(self, steps: Steps) -> Steps:
        """With the digest of each row taken before its images are read: what changes meanwhile is another row later."""

        def prepare(row: InputRow) -> Any:
            if (row.index, row.id) not in self._known_digests:
                self._known_digests[row.index, row.id] = self._digest(row)
            return steps.prepare(row)

        return replace(steps, prepare=prepare)

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

    def _run_rows(
        self,
        rows: Iterator[InputRow],
        open_writer: Callable[[], RowWriter],
        first_may_fail: bool = False,
        needs_model: bool = True,
    ) -> None:
        """A mistake that shows as the task begins leaves no output."""
        options, total = self.options, self.inputs.total
        self.task.check(options.request)
        self.check_model(options.request)
        rows = self._checked(rows)
        rows = map(self._with_text_beside, rows)
        with self.steps(self.inputs.resolve) if needs_model else nullcontext((NO_STEPS, ROWS_AT_ONCE)) as ready:
            steps, batch_size = ready
            rows_at_once = 1 if self.inputs.is_streaming else ROWS_AT_ONCE
            flow = FlowOptions(batch_size, options.images.num_workers, options.max_errors, rows_at_once, first_may_fail)
            total = None if total is None else total * self.task.rows_each
            self.observer.on_start(total, self.stats.rows + self._num_standing)
            writer, resumed = open_writer(), self.stats.safe
            if isinstance(writer, JournalWriter):
                steps = self._recording(steps)
            try:
                with closing(writer):
                    run_rows(rows, steps, self._writing(writer), flow, self.stats, self._on_row)
                self._close_beside()
            finally:
                self.stats.safe = resumed + writer.num_safe

    @contextmanager
    def steps(self, resolve: Callable[[object, int], ImageSource | RowError]) -> Iterator[tuple[Steps, int]]:
        """What becomes of rows, with the model and the processes of images, and how many the model works on at once."""
        request = self.options.request
        self.observer.on_loading(f"{request.model}")
        model = self._load_model(request, self.options.batch_size)
        beams = self.task.settings.get("--num-beams")
        place = model.place
        self.observer.on_ready(place and About(f"{request.model}", *place, beams, model.batch_size))
        with model.image_workers(self.options.images) as images:
            yield self.task.begin(model, images, resolve, self.observer), model.batch_size

    def write_rows(
        self,
        stream: BinaryIO,
        rows: Iterator[InputRow],
        ready: tuple[Steps, int],
        first_may_fail: bool,
        num_standing: int,
    ) -> None:
        """These rows as JSON lines, for a run of many parts, whose observer knows that so many of them are done."""
        steps, batch_size = ready
        self._num_standing = num_standing
        flow = FlowOptions(batch_size, self.options.images.num_workers, None, ROWS_AT_ONCE, first_may_fail)
        write = self._writing(StreamWriter(stream))
        run_rows(rows, steps, write, flow, self.stats, self._on_row)

    def _on_row(self, finished: Finished) -> None:
        is_told = isinstance(finished, Mapping) and self._num_standing > 0
        self._num_standing -= is_told
        self.observer.on_row(int(not is_told))

    def _writing(self, writer: RowWriter) -> Callable[[InputRow, Finished], None]:
        """Rows on stdout have the columns that are passed through; a file gets them in the end, and digests."""
        is_stream, names = isinstance(writer, StreamWriter), self.passthrough.names

        def write(row: InputRow, finished: Finished) -> None:
            line = finished if isinstance(finished, Mapping) else self.form.row(row, finished)
            then = partial(self._write_beside, row, line)
            if is_stream:
                writer.write({**line, **self.passthrough.shown(row.values)} if names else line, then)
            else:
                digest = self._known_digests.pop((row.index, row.id), None) or self._digest(row)
                writer.write({**line, DIGEST: self._tag + digest}, then)
            self.observer.on_result(line)

        return write

    def _look_ahead(self, rows: Callable[[], Iterator[InputRow]]) -> bool:
        """At all rows to come, and what is beside their images, before a model is loaded; whether it is needed."""
        num_left = self._num_standing = 0
        for row in map(self._with_text_beside, rows()):
            self._known_digests.pop((row.index, row.id), None)
            num_left += row.error is None and row.earlier is None
            self._num_standing += row.earlier is not None
        return num_left > 0

    def _with_text_beside(self, row: InputRow) -> InputRow:
        """The row; one with a text beside its image that is to be kept has that, and is done."""
        if (
            self.sidecars is None
            or row.error is not None
            or (row.earlier is not None and row.earlier["error"] is not None)
        ):
            return row
        assert self.form.text_column is not None, self.form
        done = None if row.earlier is None else row.earlier[self.form.text_column]
        found = self.sidecars.before(_own_file(row), row.index, done)
        if isinstance(found, str):
            nothing = self.form.row(row, RowError("row_invalid", ""))
            return replace(row, earlier={**nothing, self.form.text_column: found, "error": None})
        return row if found is None else replace(row, error=found)

    def _is_corrected(self, row: InputRow, old: Mapping[str, Any]) -> bool:
        """Whether an update takes over a text beside the row's image that is not what the row became."""
        if not (self.options.update and self.sidecars) or row.error or old["error"]:
            return False
        return isinstance(self.sidecars.before(_own_file(row), row.index, old[self.form.text_column]), str)

    def _close_beside(self) -> None:
        if self.sidecars is not None:
            self.sidecars.close()

    def _write_beside(self, row: InputRow, line: Mapping[str, Any]) -> None:
        """The text of a result row, beside the row's image where texts are wanted there."""
        if self.sidecars is not None and line["error"] is None:
            assert self.form.text_column is not None, self.form
            self.sidecars.write(_own_file(row), line[self.form.text_column], row.index)


def _sidecars(options: RunOptions) -> SidecarWriter | None:
    mark = "" if options.output == STDOUT else mark_of(Path(options.output))
    return SidecarWriter(options.sidecar_existing, options.sidecar_ext, mark) if options.sidecar else None


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
    without = [shown_place(name) for name, is_one in zip(options.inputs, are_manifests, strict=True) if not is_one]
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
    inputs = [name for name, is_one in zip(options.inputs, are_manifests, strict=True) if is_one and name != STDIN]
    for name in inputs if options.output != STDOUT else ():
        if os.path.isdir(name) and output.startswith(os.path.realpath(name) + "/"):
            raise OutputError(f"{options.output} would become a part of {name}: name an output outside that folder")
        if not os.path.exists(name) and fnmatch(output, os.path.realpath(name)):
            raise OutputError(f"{options.output} matches {name}: name an output that does not")


def _are_one_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one of them does not exist, or cannot be the name of a file
        return False


def _spooled(stdin: BinaryIO | None, options: RunOptions) -> BinaryIO | None:
    """Where paths on stdin may be needed twice, they are kept until the run ends."""
    is_twice = options.update or options.sidecar or options.reading.keep or os.path.exists(options.output)
    if stdin is None or STDIN not in options.inputs or not is_twice or options.output == STDOUT:
        return stdin
    spool = tempfile.TemporaryFile()  # noqa: SIM115
    shutil.copyfileobj(stdin, spool)
    spool.seek(0)
    return spool
