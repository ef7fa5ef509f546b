"""Images -> pixels in processes of their own: a broken decoder costs a row, never the run.

A decoder that hangs is cut by time; one that crashes, or takes all the memory it may, ends its own process. Each
process has a socket of its own and one image at a time, so nothing is shared that a dying one could leave locked or
half written. Processes are fresh interpreters, no copies of this one with its threads and devices, and start in the
background when images ask for them. This module knows no models, rows or output files.

Why no pool from a library: the standard one breaks as a whole when one process dies, and those that survive it send
pickles through a pipe that all processes share, and start by running the caller's script again.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from idefics_cli.errors import ROW_ERROR_CODES, IdeficsError, RowError
from idefics_cli.images.decode import path_of
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.images.worker import HEADER, PATH_CODING, Decode, DecodeTask, Kind
from idefics_cli.rows import ImageOptions

if TYPE_CHECKING:
    import torch

START_TIMEOUT = 60.0  # seconds; it takes a fraction of one, on a machine that is not drowning
KILL_TIMEOUT = 5.0  # seconds
STEP = 1.0  # seconds
ATTEMPTS = 2
LONGEST_TEXT = 1 << 20  # bytes of an answer in words
# The folders of modules are named before anything is imported: what lies in the working folder is not ours to run.
BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from idefics_cli.images.worker import main; main(int(sys.argv[1]), sys.argv[2])"
)
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
FOR_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Request: TypeAlias = "tuple[Kind, bytes]"


@runtime_checkable
class RemoteFile(Protocol):
    """A file elsewhere. `read` raises FileNotFoundError where there is none, and what it likes for other troubles."""

    def read(self, max_bytes: int) -> bytes:
        """The file, or its first `max_bytes` where it is longer."""
        ...


class WorkerPool:
    """`ImageProcessor.prepare` in up to `options.num_workers` processes, which start as they are needed.

    A context: `close` ends them. Safe to call from many threads. `decode` is
    what the processes run: a function by whose module and name they can import it.
    """

    def __init__(
        self,
        processor: ImageProcessor,
        options: ImageOptions,
        decode: Decode = ImageProcessor.prepare_array,
    ) -> None:
        assert options.num_workers > 0 and options.decode_timeout > 0, options
        self._processor, self._limits, self._timeout = processor, options, options.decode_timeout
        self._children = _Children(DecodeTask(processor, options, decode).to_json(), options.num_workers)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def prepare(self, source: Any) -> torch.Tensor | RowError:
        """A path, the bytes of a file, a Pillow image or a RemoteFile -> (3, S, S) float32, or why there are none.

        Waits for a free process. A remote file is read in the calling thread, for as long as its `read` takes. Raises
        IdeficsError where no process can be started, and CancelledError once `close` has been called.
        """
        if isinstance(source, RemoteFile):
            source = _read_remote(source, self._limits)
        if isinstance(source, RowError):
            return source
        request = _request(source, self._limits)
        if request is None:  # a Pillow image is past its decoder, and what else comes here is no image for any
            return self._processor.prepare(source, self._limits)
        return self._in_a_process(request)

    def _in_a_process(self, request: Request) -> torch.Tensor | RowError:
        import torch

        # What kills a process may be the image before, whose decoder wrote where it should not. A fresh one tells.
        for _ in range(ATTEMPTS):
            try:
                with self._children.borrowed() as child:
                    answer = child.ask(request, self._processor.image_size, self._timeout)
                return answer if isinstance(answer, RowError) else torch.from_numpy(answer)
            except TimeoutError:
                return RowError("image_unreadable", f"decoding took longer than {self._timeout:g} s")
            except _Lost as error:
                lost = error
        if not lost.had_started:
            raise _cannot_start(lost) from lost
        return RowError("image_unreadable", f"the decoder process died ({lost})")

    def close(self) -> None:
        """End all processes, those too that are decoding."""
        self._children.close()


def _read_remote(file: RemoteFile, limits: ImageOptions) -> bytes | RowError:
    try:
        return file.read(limits.max_bytes + 1)  # one more tells a file that is too long
    except FileNotFoundError as error:
        return RowError("image_missing", f"no such file: {error}")
    except Exception as error:  # each kind of storage has errors of its own
        return RowError("image_unreadable", f"{type(error).__name__}: {error}")


def _request(source: object, limits: ImageOptions) -> Request | None:
    """What to ask a process, or None for what none is needed for."""
    if isinstance(source, str | os.PathLike):
        return Kind.PATH, path_of(source).encode(*PATH_CODING)
    if isinstance(source, bytes | bytearray | memoryview) and memoryview(source).nbytes <= limits.max_bytes:
        return Kind.BYTES, bytes(source)
    return None


def _cannot_start(reason: Exception) -> IdeficsError:
    return IdeficsError(
        f"no process can be started to decode images ({reason}): "
        "allow more processes (ulimit -u) or more memory (ulimit -v)"
    )


class _Children:
    """Up to `limit` child processes, each lent to one thread at a time."""

    def __init__(self, task: str, limit: int) -> None:
        self._task, self._limit = task, limit
        self._changed = threading.Condition()  # guards all that follows
        self._all: set[_Child] = set()
        self._idle: deque[_Child] = deque()  # on the right the one used last
        self._waiting = 0
        self._closed = False
        self._failure: OSError | None = None
        # Linux ends a child with the *thread* that started it, so one thread starts them all, and stays to the end.
        self._starter = threading.Thread(target=self._start_children, name="decoder starter", daemon=True)
        self._starter.start()

    @contextmanager
    def borrowed(self) -> Iterator[_Child]:
        """A child, which comes back; or is ended, when an exception breaks off its answer."""
        child = self._take()
        try:
            yield child
        except BaseException:
            child.end()
            raise
        finally:
            self._put_back(child)

    def _take(self) -> _Child:
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._idle or self._is_over)
            self._waiting -= 1
            if self._closed:
                raise CancelledError("the image decoders have been closed")
            if self._failure is not None:
                raise _cannot_start(self._failure)
            return self._idle.pop()

    def _put_back(self, child: _Child) -> None:
        with self._changed:
            closed = self._closed
            if child.has_ended or closed:
                self._all.discard(child)
            else:
                self._idle.append(child)
            self._changed.notify_all()
        if closed:
            child.end()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._starter.join()
        with self._changed:
            for child in self._all:
                child.kill()  # a thread that waits for its answer reads the end of it, and puts it away
            idle = list(self._idle)
        for child in idle:
            child.end()

    # ---- in the thread that starts them

    def _start_children(self) -> None:
        # Children inherit it: Ctrl-C and its like reach the whole group, and what becomes of the rows the parent says.
        signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_PARENT)
        while self._wait_until_wanted():
            try:
                self._add(_Child(self._task))
            except OSError as error:
                self._make_do(error)

    def _wait_until_wanted(self) -> bool:
        """Return when another child is wanted, or, with False, when none will be any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._is_wanted)
            return not self._is_over

    @property
    def _is_over(self) -> bool:
        return self._closed or self._failure is not None

    @property
    def _is_wanted(self) -> bool:
        """The first is started before it is asked for, the others when somebody has to wait."""
        return not self._all or (self._waiting > len(self._idle) and len(self._all) < self._limit)

    def _add(self, child: _Child) -> None:
        with self._changed:
            self._all.add(child)
            self._idle.appendleft(child)
            self._changed.notify_all()

    def _make_do(self, error: OSError) -> None:
        """The machine allows no further child: those that are there do all the work."""
        with self._changed:
            self._limit = len(self._all)
            self._failure = None if self._all else error
            self._changed.notify_all()


class _Lost(Exception):
    """The process is no more; the text says how it ended."""

    def __init__(self, how: str, had_started: bool) -> None:
        super().__init__(how)
        self.had_started = had_started


class _Child:
    """A decoder process and our end of its socket. One thread at a time talks to it; any may kill it."""

    def __init__(self, task: str) -> None:
        """Raises OSError where the system does not start it."""
        self._is_ready = False
        self.has_ended = False
        self._socket, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable or "", "-c", BOOTSTRAP, str(theirs.fileno()), task, *sys.path],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                    env=os.environ | ONE_THREAD,
                )
        except OSError:
            self._socket.close()
            raise

    def ask(self, request: Request, image_size: int, timeout: float) -> np.ndarray | RowError:
        """Pixels (3, image_size, image_size) float32, or why there are none.

        Raises _Lost when the process dies, TimeoutError when it does not answer within `timeout` seconds, and
        RuntimeError for a bug in it.
        """
        pixels = np.empty((3, image_size, image_size), np.float32)
        try:
            self._await_start()
            self._send(request, timeout)
            self._wait(timeout)
            answer = self._receive_answer(pixels)
        except TimeoutError:
            raise
        except (OSError, EOFError) as error:
            raise _Lost(self.end(), self._is_ready) from error
        return answer

    def _await_start(self) -> None:
        if self._is_ready:
            return
        try:
            self._wait(START_TIMEOUT)
        except TimeoutError as error:
            raise _Lost(f"not started after {START_TIMEOUT:g} s", had_started=False) from error
        self._receive(HEADER.size)
        self._process.stderr.close()
        self._is_ready = True

    def _send(self, request: Request, timeout: float) -> None:
        kind, payload = request
        self._socket.settimeout(timeout)
        self._socket.sendall(HEADER.pack(kind, len(payload)))
        self._socket.sendall(payload)

    def _wait(self, timeout: float) -> None:
        """Until there is something to read. Counted in steps: while a run is suspended only one of them passes."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while timeout > 0:
            step = min(STEP, timeout)
            if poll.poll(1000 * step):
                return
            timeout -= step
        raise TimeoutError

    def _receive_answer(self, pixels: np.ndarray) -> np.ndarray | RowError:
        """`pixels`, filled in, or an error. What can be no answer is of a process gone astray: _Lost."""
        kind, size = HEADER.unpack(self._receive(HEADER.size))
        if kind == Kind.PIXELS and size == pixels.nbytes:
            self._receive_into(memoryview(pixels).cast("B"))
            return pixels
        text = self._receive(size).decode("utf-8", "replace") if size <= LONGEST_TEXT else ""
        if kind == Kind.BUG:
            raise RuntimeError(f"in a decoder process: {text}")
        code, _, message = text.partition(": ")
        if kind != Kind.ERROR or code not in ROW_ERROR_CODES:
            raise _Lost("it answered nonsense", self._is_ready)
        return RowError(code, message)

    def _receive(self, size: int) -> bytearray:
        data = bytearray(size)
        self._receive_into(memoryview(data))
        return data

    def _receive_into(self, view: memoryview) -> None:
        while view:
            received = self._socket.recv_into(view)
            if not received:
                raise EOFError
            view = view[received:]

    def kill(self) -> None:
        self._process.kill()
        with suppress(
            subprocess.TimeoutExpired
        ):  # held in the kernel by a disk that is gone; it ends when that answers
            self._process.wait(KILL_TIMEOUT)

    def end(self) -> str:
        """Make sure that it is gone, let go of what it held here, and say how it ended."""
        if not self.has_ended:
            self.has_ended = True
            self.kill()
            self._how = ": ".join(filter(None, (_ending(self._process.returncode), self._last_words())))
            self._socket.close()
        return self._how

    def _last_words(self) -> str:
        """The last line of what it wrote while it did not start."""
        if self._is_ready or self._process.returncode is None:
            return ""
        with self._process.stderr as errors:
            lines = errors.read().decode("utf-8", "replace").splitlines()
        return lines[-1] if lines else ""


def _ending(returncode: int | None) -> str:
    if returncode is None:
        return "it cannot be killed"
    if returncode >= 0:
        return f"exit status {returncode}"
    known = {int(number): number.name for number in signal.Signals}
    return f"signal {known.get(-returncode, -returncode)}"
