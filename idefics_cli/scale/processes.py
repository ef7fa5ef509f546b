"""The units of a folder by local processes, each with a model of its own: one bar and one summary, as of one process.

A process that ends costs a try of its unit. Processes end with the driver, however that ends.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from idefics_cli.checkpoint import quantize
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.errors import IdeficsError
from idefics_cli.pipeline.options import RunOptions
from idefics_cli.pipeline.task import Observer, Relay, told
from idefics_cli.readers.inputs import Inputs
from idefics_cli.scale.units import Done, Job, Tries, Unit, Worker, attempts

START = "spawn"  # what the driver has open, as connections to a store, is not to be shared
PR_SET_PDEATHSIG = 1
SAY_SECONDS = 0.2  # between words about rows
EARLY_ENDS = 3  # of processes that have not got their model
END_SECONDS = 5.0


def processes_for(options: RunOptions, num_units: int) -> int:
    """As many as were asked for, else one for each of several GPUs. torch is imported here to count these, only."""
    if options.processes is not None or not _chooses_gpu(options.request) or num_units < 2:
        return options.processes or 1
    import torch

    return max(1, torch.cuda.device_count())


def _chooses_gpu(request: ModelRequest) -> bool:
    return request.device in ("auto", "cuda") and request.device_map is None


class Crew:
    """Up to `number` processes, which begin when there is a unit for them. A context, which ends them."""

    def __init__(self, job: Job, number: int, observer: Observer) -> None:
        self._observer, self._said = observer, set[tuple[str, Any]]()
        self._model = f"{job.options.request.model}"
        self._members = [_Member(job, place, number) for place in range(number)]
        self._waiting: deque[tuple[Tries, Unit]] = deque()
        self._early_ends = 0

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exception: object) -> None:
        for member in self._members:
            member.tell_to_end(at_once=any(exception))
        for member in self._members:
            member.wait()

    def do(self, units: Iterator[Unit], part: Callable[[Unit], Inputs]) -> Iterator[Done]:
        """In the order of finishing. Raises what a worker raises."""
        while True:
            for member in self._members:
                if member.unit is None and (found := self._next_try(units)) is not None:
                    self._tell("loading", self._model)  # a process does, too, once it has begun
                    member.begin(*found, part)
            busy = {member.pipe: member for member in self._members if member.unit is not None}
            if not busy:
                return
            for pipe in wait(list(busy)):
                done = self._hear(busy[pipe])
                if done is not None:
                    yield done

    def _next_try(self, units: Iterator[Unit]) -> tuple[Tries, Unit] | None:
        if self._waiting:
            return self._waiting.popleft()
        unit = next(units, None)
        if unit is None:
            return None
        tries = attempts(unit)
        return tries, next(tries)

    def _hear(self, member: _Member) -> Done | None:
        try:
            kind, value = member.pipe.recv()
        except (EOFError, OSError):
            self._has_ended(member)
            return None
        if kind == "ready":
            member.is_ready, self._early_ends = True, 0
        elif kind == "rows":
            member.told += value
            self._observer.on_row(value)
        elif kind == "mistake":
            raise value
        elif kind == "bug":
            raise RuntimeError(f"in the process of a unit: {value}")
        elif kind == "done":
            return self._has_done(member, value)
        else:
            self._tell(kind, value)
        return None

    def _tell(self, kind: str, value: Any) -> None:
        if (kind, value) not in self._said:
            self._said.add((kind, value))
            told(self._observer, kind, value)

    def _has_done(self, member: _Member, done: Done) -> Done | None:
        tries, _ = member.take_back()
        try:
            unit = tries.send(True)
        except StopIteration:
            self._observer.on_row(done.rows - member.told)
            return done
        self._observer.on_row(-member.told)
        self._waiting.appendleft((tries, unit))
        return None

    def _has_ended(self, member: _Member) -> None:
        tries, unit = member.take_back()
        self._observer.on_row(-member.told)
        member.tell_to_end(at_once=True)
        code = member.wait()
        if member.is_ready:
            unit = tries.send(False)
        else:
            self._early_ends += 1
        if self._early_ends >= EARLY_ENDS:
            raise IdeficsError(
                f"{EARLY_ENDS} processes in a row ended as they loaded the model (exit code {code}): look at the"
                " memory, or use fewer --processes"
            )
        self._waiting.appendleft((tries, unit))


class _Member:
    """A process, and what it is doing."""

    def __init__(self, job: Job, place: int, number: int) -> None:
        self._work, self._process = (job, place, number), None
        self.pipe: Connection | None = None
        self.unit: Unit | None = None
        self._tries: Tries | None = None
        self.told = 0  # rows of its unit
        self.is_ready = False

    def begin(self, tries: Tries, unit: Unit, part: Callable[[Unit], Inputs]) -> None:
        if self._process is None:
            self._start()
        self._tries, self.unit, self.told = tries, unit, 0
        with suppress(BrokenPipeError, ConnectionResetError):  # its end is heard of
            self.pipe.send((unit, part(unit)))

    def _start(self) -> None:
        context = multiprocessing.get_context(START)
        self.pipe, theirs = context.Pipe()
        self.is_ready = False
        process = context.Process(target=_serve, args=(*self._work, theirs, os.getpid()), name="idefics-units")
        process.start()  # a signal may come in between: there is nothing to end then
        self._process = process
        theirs.close()

    def take_back(self) -> tuple[Tries, Unit]:
        tries, unit, self._tries, self.unit = self._tries, self.unit, None, None
        return tries, unit

    def tell_to_end(self, at_once: bool) -> None:
        if self._process is None:
            return
        with suppress(OSError):
            self.pipe.send(None)
        if at_once:
            self._process.terminate()
        self.pipe.close()

    def wait(self) -> int | None:
        """For its end, of which it has been told. The exit code, where there was a process."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.join(END_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode


# ---- in the process


class _Reporter(Relay):
    """Tells the driver of rows, now and then, and all else at once."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._pipe, self._rows, self._told_at = pipe, 0, 0.0
        self._sending = threading.Lock()

    def tell(self, kind: str, value: Any = None) -> None:
        with self._sending:
            self._pipe.send((kind, value))

    def on_start(self, total: int | None, num_done: int = 0) -> None:
        self.tell("ready")

    def on_row(self, number: int = 1) -> None:
        self._rows += number
        if time.monotonic() - self._told_at > SAY_SECONDS:
            self.tell("rows", self._rows)
            self._rows, self._told_at = 0, time.monotonic()

    def done(self, done: Done) -> None:
        self._rows = 0
        self.tell("done", done)


def _serve(job: Job, place: int, number: int, pipe: Connection, driver: int) -> None:
    """Units, until the driver closes the pipe, in one of a number of processes. Ctrl-C is the driver's to react to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != driver:
        return
    quantize.silence()
    reporter = _Reporter(pipe)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            with Worker(_own_share(job, place, number), reporter) as worker:
                while (work := pipe.recv()) is not None:
                    reporter.done(worker.do(*work))
        except IdeficsError as error:
            reporter.tell("mistake", error)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            reporter.tell("bug", f"{type(error).__name__}: {error}")


def _own_share(job: Job, place: int, number: int) -> Job:
    """Each process has a GPU of its own where there are several, and its share of the processors."""
    if number == 1:
        return job
    import torch

    options = job.options
    torch.set_num_threads(max(1, torch.get_num_threads() // number))
    if _chooses_gpu(options.request) and (gpus := torch.cuda.device_count()) > 0:
        options = replace(options, request=replace(options.request, device=f"cuda:{place % gpus}"))
    images = replace(options.images, workers=options.images.workers or max(1, options.images.num_workers // number))
    return replace(job, options=replace(options, images=images))
