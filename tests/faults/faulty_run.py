"""The command line with a fake captioner and, if wanted, a fault at the n-th call of the system that changes a file.

`main` does not return: it is for a process of its own. As a script: FAKE in the environment holds the fields of
`Settings` as JSON, the arguments are those of the command line.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import FakeCaptioner
from power_cuts import Recorder
from tqdm import tqdm

import idefics_cli
from idefics_cli import __main__ as console_script
from idefics_cli.cli import app as cli
from idefics_cli.errors import IdeficsError
from idefics_cli.pipeline import run  # noqa: F401 (the slow imports, done once where processes are forked)
from idefics_cli.scale import processes
from idefics_cli.tasks import caption_vqa  # noqa: F401
from idefics_cli.writers import formats, writers

COMMIT_ROWS = 20
PIPE_BYTES = 1 << 20
SIGNALS = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "hang up": signal.SIGHUP}
CALLS = ("write", "fsync", "ftruncate", "rename", "unlink")


@dataclass(frozen=True)
class Fault:
    """What happens at the `number`-th of the `calls`, counted from 1 (with `for_ever`, at those after it too).

    `kill` is before the call; `torn` is a kill when half of it is written, `half` a full disk with half of it written.
    `fired` is a file that is made when the fault happens.
    """

    number: int
    action: Literal["kill", "torn", "full", "half", "io", "interrupt", "terminate", "hang up"]
    fired: str
    calls: tuple[str, ...] = CALLS
    for_ever: bool = False


@dataclass(frozen=True)
class Settings:
    """`delay`: seconds for each batch; `file_limit`: bytes that a file may have; `weights`: the digest of the model's;
    `log`: a file of all texts that the captioner has given; `version`: the program's; `changes`: a file, and the
    folders whose changes are recorded in it."""

    delay: float = 0.0
    batch_size: int = 4
    commit_rows: int = COMMIT_ROWS
    commit_seconds: float = 60.0
    file_limit: int | None = None
    weights: str | None = "fake"
    log: str | None = None
    version: str = "0.1.0"
    fault: Fault | None = None
    changes: tuple[str, tuple[str, ...]] | None = None
    fatal: str | None = None  # a text that ends the process which is to write it
    ends_parent: bool = False  # that ends the process above it instead
    temporary: str | None = None  # in place of what is random in the names of new files


class Shim:
    """Stands in for the calls of the system, and counts them."""

    def __init__(self, fault: Fault) -> None:
        self._fault, self._count, self._counting = fault, 0, threading.Lock()
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in CALLS}

    def install(self) -> None:
        for name in self._fault.calls:
            setattr(os, name, self._stand_in(name))

    def _stand_in(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._is_due():
                self._fire(name, arguments)
            return self._real[name](*arguments, **options)

        return call

    def _is_due(self) -> bool:
        with self._counting:
            self._count += 1
            return self._count == self._fault.number or (self._fault.for_ever and self._count > self._fault.number)

    def _fire(self, name: str, arguments: tuple[Any, ...]) -> None:
        action = self._fault.action
        os.close(os.open(self._fault.fired, os.O_CREAT | os.O_WRONLY))
        if action in ("torn", "half") and name == "write":
            file, data = arguments
            self._real["write"](file, bytes(data)[: len(data) // 2])
        if action in ("kill", "torn"):
            os.kill(os.getpid(), signal.SIGKILL)
        if action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[action])
            return
        code = errno.EIO if action == "io" else errno.ENOSPC
        raise OSError(code, os.strerror(code))


def unbuffered(path: Any, mode: str = "r", **options: Any) -> Any:
    """As `open`: Python's own buffered files write past `os.write`, these do not."""
    if mode != "wb":
        return builtins.open(path, mode, **options)

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            return os.write(self.fileno(), data)

    return io.BufferedWriter(File(path, "wb"))


def load_fake(settings: Settings, request: object, batch_size: int | None) -> FakeCaptioner:
    """In place of `load_model`. Other processes find it by its name."""

    def logged(text: str) -> str:
        if text == settings.fatal:
            os.kill(os.getppid() if settings.ends_parent else os.getpid(), signal.SIGKILL)
            time.sleep(60)  # it is to end with that one
        if settings.log:
            with open(settings.log, "a") as log:
                log.write(f"{text}\n")
        return text

    return FakeCaptioner(batch_size or settings.batch_size, delay=settings.delay, answer=logged)


def load_nothing(request: object, batch_size: int | None) -> NoReturn:
    raise IdeficsError("the weights are not on this machine: copy them")


def digest_of_fake(settings: Settings, request: object) -> str | None:
    return settings.weights


def main(arguments: list[str], settings: Settings) -> NoReturn:
    writers.COMMIT_ROWS, writers.COMMIT_SECONDS = settings.commit_rows, settings.commit_seconds
    if settings.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings.file_limit, settings.file_limit))
    if settings.temporary is not None:
        formats.secrets.token_hex = lambda number: settings.temporary
    formats.open = unbuffered  # type: ignore[attr-defined]
    if settings.fault is not None:
        Shim(settings.fault).install()
    if settings.changes is not None:
        Recorder(*settings.changes).install()
    cli.check_model = partial(digest_of_fake, settings)
    idefics_cli.__version__ = cli.__version__ = settings.version

    processes.START = "fork"  # with the fake captioner

    cli.load_model = partial(load_fake, settings)
    sys.argv = ["idefics", *arguments]
    console_script.main()
    raise AssertionError("the command line came back")


def main_in_session(
    arguments: list[str], settings: Settings, stdout: str, stderr: str, stdin: bytes | None = None
) -> NoReturn:
    """The same in a process group of its own, with these files for its streams, and so much in a pipe as its input."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the command line ends by it too, a moment later
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in a process that nothing has forked
    tqdm.set_lock(threading.RLock())  # the one that all forks share stays locked where its owner is killed
    for number, path in (1, stdout), (2, stderr):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    if stdin is not None:
        reading, writing = os.pipe()
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        assert os.write(writing, stdin) == len(stdin) <= PIPE_BYTES
        os.close(writing)
        os.dup2(reading, 0)
        os.close(reading)
        sys.stdin = os.fdopen(0)
    main(arguments, settings)


if __name__ == "__main__":
    main(sys.argv[1:], Settings(**json.loads(os.environ.get("FAKE", "{}"))))
