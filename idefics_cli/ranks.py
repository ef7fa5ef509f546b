"""The processes that `torchrun` has started to work on one network together, as one of them sees the others.

The first process (rank 0) reads, writes, prints and decides; the others do with their share of the weights what it
does. All meet at the same points: `agree` before each pass over the layers and after each piece of work, `broadcast`
where rank 0 takes prompts, `sum` within a pass. So one whose memory ends is not waited for: it goes straight to the
next of these points and says so there. Imports torch when processes are joined; knows no network, text and files.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from _thread import interrupt_main
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from idefics_cli.errors import DeviceError, IdeficsError

if TYPE_CHECKING:
    from torch import Tensor

FOR_EVER = timedelta(days=365)  # a process may wait for a row on stdin
NOTICE = 1.0  # seconds in which a process notices that another ends
PATIENCE = 10.0  # seconds in which a process that is told to end does so by itself
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MESSAGE_BYTES = 4096
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether this is one of several processes of `torchrun`, or of another launcher that sets its variables."""
    return all(name in os.environ for name in VARIABLES) and os.environ["WORLD_SIZE"] not in ("", "1")


def is_first() -> bool:
    return os.environ.get("RANK") == "0"


@cache
def join() -> Ranks:
    """The same at each call."""
    return Ranks()


def joined() -> Ranks | None:
    """What `join` has given, if it has been called."""
    return join() if join.cache_info().currsize else None


def leave_signals_to_first() -> None:
    """A process after the first has it end all of them, even while it waits for that one. Before there are threads."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)

    def wait() -> None:
        code = 128 + signal.sigwait(STOPPING)
        if joined() is not None:
            joined().end(code)
        os._exit(code)

    threading.Thread(target=wait, daemon=True).start()


class Ranks:
    """All processes, once they are connected. `failure` is what another has said as it ended: exit code, message."""

    def __init__(self) -> None:
        import torch
        from torch import distributed

        self._distributed, self._torch = distributed, torch
        num_here, local_rank = (int(os.environ.get(name, 0)) for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"))
        self.device, backend = torch.device("cpu"), "gloo"
        if torch.cuda.is_available():
            num_devices = torch.cuda.device_count()
            if num_here > num_devices:
                raise DeviceError(f"{num_here} processes need as many GPUs, and here are {num_devices}: start fewer")
            self.device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(self.device)
        try:
            distributed.init_process_group(backend, timeout=FOR_EVER)
            self._control, self._lifeline = (distributed.new_group(backend="gloo", timeout=FOR_EVER) for _ in range(2))
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DeviceError(
                f"the processes of torchrun cannot reach each other ({reason}): check their network"
            ) from error
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.failure: tuple[int, str] | None = None
        self._has_failed = threading.Event()
        self._sums_left, self._all_know = 0, False
        self._broken: BaseException | None = None
        self._is_ending = self._is_noticed = self._is_working = False
        self._others = range(1, self.size) if self.rank == 0 else (0,)
        self._listeners = [threading.Thread(target=self._listen_to, args=(each,), daemon=True) for each in self._others]
        for listener in self._listeners:
            listener.start()

    # ---- meeting points

    def agree(self, is_well: bool = True, check: int = 0) -> None:
        """Wait for all. Raises torch.OutOfMemoryError where one of them is not well.

        `check` must be the same number, of up to 62 bits, in all processes that are well.
        """
        told = self._torch.tensor([not is_well, check, -check])
        self._distributed.all_reduce(told, self._distributed.ReduceOp.MAX, group=self._control)
        is_unwell, most, least = told.tolist()
        if is_unwell:
            self._all_know = True
            raise self._torch.OutOfMemoryError("the memory of one of the processes has ended")
        if most != -least:
            raise IdeficsError("the processes compute different numbers: run them on equal devices")

    def all_well(self, is_well: bool, check: int = 0) -> bool:
        """Whether a piece of work has come to its end in all processes."""
        if not self._all_know:
            with suppress(self._torch.OutOfMemoryError):
                self.agree(is_well, check)
        is_well, self._all_know = not self._all_know, False
        return is_well

    def broadcast(self, value: Any = None) -> Any:
        """What rank 0 gives."""
        values = [value]
        self._distributed.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def least(self, number: int) -> int:
        told = self._torch.tensor([number])
        self._distributed.all_reduce(told, self._distributed.ReduceOp.MIN, group=self._control)
        return int(told)

    @contextmanager
    def passing(self, hidden_states: Tensor, num_sums: int) -> Iterator[None]:
        """A pass over the layers in which `sum` is called so often, for tensors of this shape, which are no
        longer needed then.

        Where memory ends in it, the sums that others wait for are still made.
        """
        self.agree()
        is_capture = hidden_states.is_cuda and self._torch.cuda.is_current_stream_capturing()
        self._sums_left = num_sums
        try:
            yield
        except self._torch.OutOfMemoryError:
            while self._sums_left and not is_capture:
                self.sum(hidden_states)
            raise
        assert self._sums_left == 0, self._sums_left

    def sum(self, states: Tensor) -> Tensor:
        """Over all processes, in place."""
        self._distributed.all_reduce(states)
        self._sums_left -= 1
        return states

    @contextmanager
    def working(self, *work: Any) -> Iterator[None]:
        """A stream of `work`, which the others receive. One that has been left in its middle is the last."""
        if self._broken is not None:
            raise self._broken
        if self._is_working:
            raise IdeficsError("several processes do one stream at a time: end it before the next")
        if self.rank == 0:
            self.broadcast(work)
        self._is_working = True
        try:
            yield
        except IdeficsError:  # raised by all at the same place
            raise
        except BaseException as error:
            is_closed = isinstance(error, GeneratorExit)
            self._broken = IdeficsError("a stream was left before its end: start again") if is_closed else error
            raise
        finally:
            self._is_working = False

    # ---- the end

    def end(self, code: int, message: str = "") -> None:
        """Tell the others that this process ends: those that follow rank 0 end with it, and it waits for them."""
        self._is_ending = True
        data = message.encode()[: MESSAGE_BYTES - 8]
        told = code.to_bytes(4, "little") + len(data).to_bytes(4, "little") + data.ljust(MESSAGE_BYTES - 8, b"\0")
        for other in self._others:
            with suppress(RuntimeError):  # where it is gone already
                self._distributed.send(self._torch.tensor(list(told), dtype=self._torch.uint8), other, self._lifeline)
        if self.rank == 0:
            for listener in self._listeners:
                listener.join(PATIENCE)
            self._distributed.destroy_process_group()
        else:
            time.sleep(NOTICE)  # rank 0 may end all, or else notices that this one is gone
            os._exit(code)

    def _listen_to(self, other: int) -> None:
        """Until it ends, however that comes about: then so does this process."""
        told = self._torch.zeros(MESSAGE_BYTES, dtype=self._torch.uint8)
        try:
            self._distributed.recv(told, other, self._lifeline)
            data = bytes(told.tolist())
            code, length = (int.from_bytes(data[start : start + 4], "little") for start in (0, 4))
            failure = code, data[8 : 8 + length].decode(errors="replace")
        except RuntimeError:
            failure = 1, f"process {other + 1} of {self.size} has ended"
        if self.rank > 0:
            os._exit(failure[0])  # it has nothing to save
        if self._is_ending:
            return
        if self.failure is None:
            self.failure = failure
        self._has_failed.set()
        time.sleep(2 * NOTICE)  # in which what the two do together fails
        if self._is_ending:
            return
        if not self._is_noticed and self.failure[0] < 128:
            interrupt_main(signal.SIGTERM)
        time.sleep(PATIENCE)  # rank 0 saves its rows; it may also wait for ever for a device
        os._exit(self.failure[0])

    def failure_after(self, error: BaseException) -> tuple[int, str] | None:
        """Why another process has ended, if that is what has raised `error` in this one."""
        if isinstance(error, (RuntimeError, KeyboardInterrupt)):
            self._has_failed.wait(NOTICE if isinstance(error, RuntimeError) else 0.0)
        self._is_noticed = self.failure is not None
        return self.failure
