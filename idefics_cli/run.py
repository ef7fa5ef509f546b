"""One run over many rows, from its options to its end: inputs, output, model, rows, final file.

What a user can have got wrong is looked at in this order, before a model is loaded: inputs, output, model. The same run
again goes on where it was stopped, or says that it is finished. This module ties the others together and knows no
terminal: whoever starts a run is told how it ended, and is called back for every row.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from idefics_cli import __version__
from idefics_cli.asking import AskOptions, PictureOpener, Preparation, rows_asked, with_questions
from idefics_cli.checkpoint import ModelRequest
from idefics_cli.data.manifests import is_manifest
from idefics_cli.data.outputs import FileOutput
from idefics_cli.data.readers import open_inputs
from idefics_cli.data.rows import InputRow, ReadOptions
from idefics_cli.data.writers import JournalWriter, RowWriter, SidecarWriter, StreamWriter
from idefics_cli.errors import InputError, OutputError, RowError
from idefics_cli.pipeline import FlowOptions, Outcome, PromptSource, RunStats, Stages, error_of, run_rows
from idefics_cli.prompts import Prompt, Shot, leading_shots
from idefics_cli.results import ResultForm
from idefics_cli.shots import chosen_for_all, open_shots, read_shots

if TYPE_CHECKING:
    from idefics_cli.data.images import ImageLimits
    from idefics_cli.generation.options import DecodingOptions
    from idefics_cli.idefics import Result
    from idefics_cli.processing import EncodedPrompt

STDIN = STDOUT = "-"


class Captioner(Protocol):
    """What `Idefics` is to a run. `encode` may be called from several threads at once."""

    batch_size: int
    is_instruct: bool

    def picture_decoders(
        self, limits: ImageLimits, workers: int, timeout: float
    ) -> AbstractContextManager[PictureOpener]: ...

    def encode(self, prompt: Prompt, max_new_tokens: int) -> EncodedPrompt | RowError: ...

    def stream(self, source: PromptSource, **decoding: Any) -> Iterator[tuple[int, Result]]: ...


@dataclass(frozen=True)
class Loader:
    """`check` raises what can be known to be wrong with a model, and gives a digest of its weights where they are at
    hand; `load` reads them."""

    check: Callable[[ModelRequest], str | None]
    load: Callable[[ModelRequest, int | None], Captioner]


@dataclass(frozen=True)
class RunOptions:
    """All that a run is told. `batch_size` None: as many as memory holds."""

    inputs: tuple[str, ...]
    output: str
    request: ModelRequest
    reading: ReadOptions
    limits: ImageLimits
    decode_timeout: float
    workers: int
    asking: AskOptions
    decoding: DecodingOptions
    batch_size: int | None = None
    max_errors: int | None = None
    overwrite: bool = False
    retry_errors: bool = False
    sidecar: bool = False


class Observer(Protocol):
    """Who follows a run: told how many rows will come (None: nobody knows), after each row, and what users should know.

    `say` may be called from several threads.
    """

    def on_start(self, total: int | None) -> None: ...

    def say(self, message: str) -> None: ...

    def on_row(self) -> None: ...


class Ending(Enum):
    """How a run ended that was neither a mistake nor a stop."""

    RAN = "all rows are out, or as many have failed as may"
    FINISHED_BEFORE = "there was nothing left to do"


class Run:
    """A run, from looking at its inputs on. Keeps `stats`; raises IdeficsError for a mistake, and whatever stops it."""

    def __init__(
        self, options: RunOptions, loader: Loader, stats: RunStats, observer: Observer, stdin: BinaryIO | None
    ) -> None:
        self.options, self.loader, self.stats, self.observer, self.stdin = options, loader, stats, observer, stdin
        _require_questions(options)
        self.inputs = open_inputs(options.inputs, options.reading, stdin)
        self.shots = None if options.asking.shots is None else open_shots(options.asking.shots)
        self.form = ResultForm(
            "answer" if options.asking.asks else "caption",
            with_question=options.asking.asks,
            candidates=options.decoding.num_return_sequences > 1,
            kept=self.inputs.kept,
        )
        self.captioner: Captioner | None = None
        self._asked_of_first: list[str] = []  # ids of what an earlier run has asked of the first row that is left

    def run(self, stdout: BinaryIO | None) -> Ending:
        if self.options.output != STDOUT:
            with closing(FileOutput(self.options.output, overwrite=self.options.overwrite)) as output:
                return self._run_to_file(output)
        if stdout is None:
            raise OutputError("stdout is closed: name a file with -o F.jsonl")
        self._load()
        self._run_rows(self._rows(), StreamWriter(stdout))
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
        self.inputs.pass_over(self._rows_done(output))
        self._load()
        self._begin(output)
        self._run_rows(self._rows(), JournalWriter(output.journal))
        if not self.stats.stopped_early:
            output.publish(self.form.columns, self._summary())
        return Ending.RAN

    def _after_finish(self, output: FileOutput) -> Ending:
        record = output.record
        assert record is not None, output.path
        if self.options.retry_errors and record["failed"]:
            return self._retry(output)
        self._take_over(record)
        return Ending.FINISHED_BEFORE

    def _publish_again(self, output: FileOutput) -> Ending:
        """A kill came between the last row and the final name."""
        summary = output.journal.summary
        assert summary is not None, output.path
        output.publish(self.form.columns)
        self._take_over(summary)
        return Ending.FINISHED_BEFORE

    def _take_over(self, summary: Mapping[str, Any]) -> None:
        self.stats.rows = self.stats.resumed = self.stats.safe = summary["rows"]
        self.stats.failed = Counter(summary["failed"])

    def _retry(self, output: FileOutput) -> Ending:
        """Do the failed rows of a finished file again."""
        output.require_same(self._settings(self.loader.check(self.options.request)))
        self._load()
        self._begin(output, amends=True)
        rows = self._failed_rows(output)
        self._run_rows(rows, JournalWriter(output.journal))
        if not self.stats.stopped_early:
            output.publish(self.form.columns, self._summary())
        return Ending.RAN

    def _failed_rows(self, output: FileOutput) -> Iterator[InputRow]:
        """The input's rows that failed and have not been done again yet."""
        done_again = output.rows_so_far()
        known = output.finished_rows()
        for row in self._rows():
            old = next(known, None)
            if old is None or old["id"] != row.id:
                raise InputError(
                    f"row {row.index + 1} is {row.id}, and was not when the result was made: begin anew"
                    " with --overwrite"
                )
            if old["error"] is not None:
                old = next(done_again, None)
            if old is None:
                yield row
            else:
                self._count_again(old)

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

    def _begin(self, output: FileOutput, *, amends: bool = False) -> None:
        settings = self._settings(self.loader.check(self.options.request))  # a model of the hub is at hand by now
        output.require_same(settings)
        output.begin(settings, amends=amends)

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
            "model": model if weights is None else {**model, "weights": weights},
            "asking": options.asking.settings,
            "shots": None if self.shots is None else list(self.shots.identity),
            "decoding": asdict(options.decoding),
        }

    # ---- rows

    def _rows(self) -> Iterator[InputRow]:
        questions = self.options.asking.questions
        return with_questions(self.inputs.rows, questions, self._asked_of_first) if questions else self.inputs.rows

    def _rows_done(self, output: FileOutput) -> Iterator[str]:
        """The ids of the input's rows that an earlier run has done."""
        num_questions = len(self.options.asking.questions) or 1
        return rows_asked(self._recount(output.rows_so_far()), num_questions, self._asked_of_first)

    @property
    def _total(self) -> int | None:
        num_questions = len(self.options.asking.questions) or 1
        return None if self.inputs.total is None else self.inputs.total * num_questions

    def _load(self) -> Captioner:
        if self.captioner is None:
            self.loader.check(self.options.request)
            self.captioner = self.loader.load(self.options.request, self.options.batch_size)
        return self.captioner

    def _run_rows(self, rows: Iterator[InputRow], writer: RowWriter) -> None:
        options, captioner, resumed = self.options, self._load(), self.stats.safe
        flow = FlowOptions(captioner.batch_size, options.workers, options.max_errors)
        opening = options.limits, options.workers, options.decode_timeout
        self.observer.on_start(self._total)
        leave = Leave(self.form, options.asking, writer, SidecarWriter(options.overwrite) if options.sidecar else None)
        try:
            with closing(writer), captioner.picture_decoders(*opening) as pictures:
                stages = Stages(
                    prepare=self._preparation(captioner, pictures),
                    decode=lambda prompts: captioner.stream(prompts, **asdict(options.decoding)),
                    write=leave,
                )
                run_rows(rows, stages, flow, self.stats, self.observer.on_row)
        finally:
            self.stats.safe = resumed + writer.num_safe

    def _preparation(self, captioner: Captioner, pictures: PictureOpener) -> Preparation:
        shots = self._shots(captioner, pictures)
        return Preparation(
            self.options.asking,
            captioner,
            pictures,
            shots,
            self.options.decoding.max_new_tokens,
            on_shots_dropped=Once(
                self.observer, "{} and perhaps others are too long for all shots: the first are left out"
            ),
        )

    def _shots(self, captioner: Captioner, pictures: PictureOpener) -> Sequence[Shot]:
        """Those that stand before every row."""
        asking = self.options.asking
        pool: list[Shot] = []
        if asking.shots is not None:
            assert self.shots is not None, asking
            pool = read_shots(asking.shots, self.shots, asking.prompts.task, pictures.prepare)
            pool = chosen_for_all(asking.shots, pool)
        return leading_shots(asking.prompts, pool, captioner.is_instruct)


class Once:
    """Says something the first time it is called, with the name it is called with."""

    def __init__(self, observer: Observer, message: str) -> None:
        self._observer, self._message, self._told = observer, message, threading.Event()

    def __call__(self, name: str) -> None:
        if not self._told.is_set():
            self._told.set()
            self._observer.say(self._message.format(name))


@dataclass(frozen=True)
class Leave:
    """A row and its outcome -> a line of the result, and a text beside the picture where one is wanted."""

    form: ResultForm
    asking: AskOptions
    writer: RowWriter
    sidecars: SidecarWriter | None

    def __call__(self, row: InputRow, outcome: Outcome) -> None:
        line = self.form.row(row, outcome, self.asking)
        if self.sidecars is not None and error_of(outcome) is None:
            self.sidecars.write(_own_file(row), line[self.form.text_column])
        self.writer.write(line)


def _own_file(row: InputRow) -> Path:
    picture = row.sources[0]
    if not isinstance(picture, Path):
        raise OutputError(f"the picture of row {row.id} is no file that a text could stand beside: leave --sidecar out")
    return picture


def _require_questions(options: RunOptions) -> None:
    """Files, folders and paths bring no questions of their own."""
    without = [name for name in options.inputs if not is_manifest(name)]
    if options.asking.needs_question_column and without:
        raise InputError(f"{without[0]} has no column of questions: ask with -q QUESTION, or name a manifest")
