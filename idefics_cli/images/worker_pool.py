"""Images -> pixels in worker processes: a broken image costs its row, never the run.

A decoder that hangs is stopped by time; one that crashes, or needs too much memory, ends its own process. Workers share
nothing: each has a connection of its own and one image at a time, so that none can leave a lock held or a message half
written for another. They are fresh interpreters that do not run the caller's script. A process that is forked from this
one starts workers of its own: two that ask one worker would get each other's images.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, LifoQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from idefics_cli.errors import ROW_ERROR_CODES, IdeficsError, RowError
from idefics_cli.images.remote import RemoteReader
from idefics_cli.images.thumbnail import Thumbnails
from idefics_cli.images.worker import BUG, ENCODED, PIXELS, Processor
from idefics_cli.rows import BoundPath, ImageOptions, RemoteFile

if TYPE_CHECKING:
    import torch

START_TIMEOUT = 60.0  # seconds; usually a fraction of one
KILL_TIMEOUT = 5.0  # seconds
MESSAGE_TIMEOUT = struct.pack("ll", 30, 0)  # seconds and microseconds, for a message that stops half way
STEP = 1.0  # seconds
WAITS = (0.5, 15.0)  # seconds: the shortest and the longest before a start is tried again
CLOSED = "the image workers have been closed"
LONGEST_TEXT = 1 << 20  # bytes
# The folders of modules are set before anything is imported: the working folder is not one of them.
BOOTSTRAP = "import sys; sys.path[:] = sys.argv[2:]; from idefics_cli.images.worker import main; main(int(sys.argv[1]))"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class WorkerPool(AbstractContextManager["WorkerPool"]):
    """`processor.prepare_array` in up to `options.num_workers` processes, which start when they are needed.

    Leaving the context ends them. Safe to call from many threads.
    """

    def __init__(self, processor: Processor, options: ImageOptions) -> None:
        assert options.num_workers > 0 and options.decode_timeout > 0, options
        self._processor, self._options = processor, options
        self._side = None if isinstance(processor, Thumbnails) else processor.image_size
        self._closing = threading.Event()
        self._without_workers()
        _pools.add(self)

    def _without_workers(self) -> None:
        self._slots: LifoQueue[_Worker | None] = LifoQueue()  # None: a worker may be started
        for _ in range(self._options.num_workers):
            self._slots.put(None)
        self._running: set[_Worker] = set()
        self._remote = RemoteReader()
        # Linux ends a worker with the *thread* that started it, so one thread starts them all, and stays to the end.
        self._starter = ThreadPoolExecutor(1, "worker-starter")

    def forked(self) -> None:
        """In the new process: the workers are the old one's."""
        if not self._closing.is_set():
            self._without_workers()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def prepare(self, source: Any) -> torch.Tensor | RowError:
        """`made` as a tensor: bytes (3, S, S), or why there are none."""
        import torch

        made = self.made(source)
        return made if isinstance(made, RowError) else torch.from_numpy(made)

    def made(self, source: Any) -> np.ndarray | bytes | RowError:
        """What the processor makes of a path, the bytes of a file, a Pillow image or a RemoteFile.

        Waits for a free worker; a remote file is read in the calling thread. Raises IdeficsError where no process can
        be started, InputError where a storage stays away, and CancelledError after `close`.
        """
        if isinstance(source, RemoteFile):
            source = self._remote.read(source, self._options.max_bytes)
        if isinstance(source, RowError):
            return source
        if isinstance(source, os.PathLike) and not isinstance(source, BoundPath):
            source = Path(os.fsdecode(source))
        if isinstance(source, bytearray | memoryview):
            source = bytes(source)
        is_large = isinstance(source, bytes) and len(source) > self._options.max_bytes
        if is_large or not isinstance(source, Path | str | bytes):  # refused, or a Pillow image, which is decoded
            return self._processor.prepare_array(source, self._options)
        return self._ask(source)

    def close(self) -> None:
        """End all workers, also those that are decoding."""
        self._closing.set()
        self._starter.shutdown()
        for worker in tuple(self._running):
            worker.kill()  # a thread that waits for its answer sees the connection end
        with suppress(Empty):
            while True:
                if worker := self._slots.get_nowait():
                    worker.end()
        self._slots.put(None)

    def _ask(self, request: Path | str | bytes) -> np.ndarray | bytes | RowError:
        for _attempt in range(2):  # a worker may die of what the image before did to its memory: a fresh one tells
            worker = self._take()
            try:
                answer = worker.ask(request, self._side, self._options.decode_timeout)
            except BaseException as error:
                how = self._end(worker)
                if isinstance(error, TimeoutError):
                    return RowError("image_unreadable", f"decoding took longer than {self._options.decode_timeout:g} s")
                if not isinstance(error, OSError | EOFError):
                    raise
                lost = how if isinstance(error, EOFError | ConnectionError) else "incomplete or invalid answer"
            else:
                self._slots.put(worker)
                return answer
        return RowError("image_unreadable", f"the worker process died ({lost})")

    def _take(self) -> _Worker:
        """A free worker, or a new one while there may be more. One that is killed as it starts is started again."""
        wait, longest = WAITS
        while not self._closing.is_set():
            worker = self._slots.get()
            try:
                return worker or self._start()
            except _Killed:  # memory is short; others end, or the kernel frees some
                self._slots.put(None)
                self._closing.wait(wait)
                wait = min(2 * wait, longest)
            except (OSError, RuntimeError) as error:
                if self._running and not self._closing.is_set():
                    continue  # no more processes are allowed: without this slot, the others do all the work
                self._slots.put(None)
                if not self._closing.is_set():
                    remedy = "allow more processes (ulimit -u) or memory (ulimit -v)"
                    raise IdeficsError(f"cannot start a process to decode images ({error}): {remedy}") from error
        raise CancelledError(CLOSED)

    def _start(self) -> _Worker:
        """Raises OSError where the system does not allow it."""
        worker = self._starter.submit(_Worker, self._running).result()
        try:
            worker.begin(self._processor, self._options)
        except (OSError, EOFError) as error:
            self._running.discard(worker)
            was_killed = not isinstance(error, TimeoutError) and worker.has_been_killed()
            raise (_Killed if was_killed else ChildProcessError)(worker.end()) from error
        return worker

    def _end(self, worker: _Worker) -> str:
        """End it, allow another one in its place, and say how it ended. Raises CancelledError after `close`."""
        how = worker.end()
        self._running.discard(worker)
        self._slots.put(None)
        if self._closing.is_set():
            raise CancelledError(CLOSED)
        return how


_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


def _forked() -> None:
    for pool in list(_pools):
        pool.forked()


os.register_at_fork(after_in_child=_forked)


class _Killed(ChildProcessError):
    """A worker has been killed as it started."""


class _Worker:
    """A worker process and the connection to it, which one thread uses at a time."""

    def __init__(self, running: set[_Worker]) -> None:
        """Joins those that are `running`. Raises OSError where the system does not start a process."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.process = subprocess.Popen(
                [sys.executable or "", "-c", BOOTSTRAP, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=os.environ | ONE_THREAD,
                start_new_session=True,  # Ctrl-C reaches the whole process group, and only the parent reacts
            )
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, option, MESSAGE_TIMEOUT)
            self.connection = Connection(ours.detach())
        running.add(self)

    def begin(self, processor: Processor, options: ImageOptions) -> None:
        """Say what it is to do with images. Raises OSError or EOFError where it does not come up."""
        self.connection.send((processor, options))
        self._wait(START_TIMEOUT)
        self.connection.recv_bytes(LONGEST_TEXT)
        self.process.stderr.close()  # what libraries print about images is not for the terminal

    def ask(self, request: Path | str | bytes, side: int | None, timeout: float) -> np.ndarray | bytes | RowError:
        """Pixels of this side, without one a file. Raises TimeoutError for an image that takes too long, EOFError or
        OSError for a worker that is lost, and RuntimeError for a bug in it."""
        self.connection.send(request)
        self._wait(timeout)
        text = self.connection.recv_bytes(LONGEST_TEXT)
        if text == PIXELS and side is not None:
            return self._receive((3, side, side))
        if text.startswith(ENCODED) and side is None:
            return text[len(ENCODED) :]
        code, _, message = text.decode("utf-8", "replace").partition(": ")
        if code == BUG:
            raise RuntimeError(f"in an image worker: {message}")
        if code not in ROW_ERROR_CODES:
            raise OSError(f"unknown answer {code[:20]!r}")
        return RowError(code, message)

    def _receive(self, shape: tuple[int, ...]) -> np.ndarray:
        pixels = np.empty(shape, np.uint8)
        view = memoryview(pixels).cast("B")  # filled in place: these bytes are not copied twice
        while received := os.readv(self.connection.fileno(), [view]):
            view = view[received:]
        if view:
            raise EOFError
        return pixels

    def _wait(self, timeout: float) -> None:
        """Until there is something to read. In steps, so that the time a run is suspended counts as one of them."""
        while not self.connection.poll(min(timeout, STEP)):
            timeout -= STEP
            if timeout <= 0:
                raise TimeoutError

    def has_been_killed(self) -> bool:
        """Whether the kernel or someone else has ended it, of one whose connection is closed."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_TIMEOUT)
        return self.process.returncode == -signal.SIGKILL

    def kill(self) -> None:
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):  # it hangs in the kernel, as when a network disk is gone
            self.process.wait(KILL_TIMEOUT)

    def end(self) -> str:
        """Make sure that it has ended, and say how; of one that did not come up, its last line, too."""
        self.kill()
        self.connection.close()
        status = self.process.returncode
        if status is None:
            return "it cannot be killed"
        how = f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
        if self.process.stderr.closed:
            return how
        with self.process.stderr as errors:
            lines = errors.read().decode("utf-8", "replace").splitlines()
        return ": ".join([how, *lines[-1:]])
