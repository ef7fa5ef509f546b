"""Bytes in use while something runs: on CUDA by torch's own count, elsewhere the process's resident set."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

RSS_PERIOD = 0.003  # seconds between two looks


class MemoryMeter:
    """Measures one run after the other. What is garbage when a run ends is not counted as kept."""

    def __init__(self, device: torch.device):
        self.device = device
        self._tidy()

    def _tidy(self) -> None:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what is freed until it is told
        if trim is not None:
            trim(0)

    def _now(self) -> int | None:
        """None: nobody counts here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.memory_allocated(self.device)
        return resident_bytes()

    @contextmanager
    def measure(self) -> Iterator[MemoryUse]:
        use = MemoryUse(self._now())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield use
            use.peak = torch.cuda.max_memory_allocated(self.device)
        elif use.before is None:
            yield use
        else:
            with _sampled_peak(use):
                yield use
        self._tidy()
        use.after = self._now()


@dataclass
class MemoryUse:
    """Bytes before, at the most, and after; None where nobody counts."""

    before: int | None
    peak: int | None = None
    after: int | None = None

    @property
    def rise(self) -> int | None:
        return None if self.before is None or self.peak is None else self.peak - self.before

    @property
    def kept(self) -> int | None:
        return None if self.before is None or self.after is None else self.after - self.before


def resident_bytes() -> int | None:
    """Pages of this process that are in memory, where the kernel tells."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return None


@contextmanager
def _sampled_peak(use: MemoryUse) -> Iterator[None]:
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(RSS_PERIOD):
            use.peak = max(use.peak or 0, resident_bytes() or 0)

    thread = threading.Thread(target=sample, daemon=True)
    use.peak = resident_bytes()
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        use.peak = max(use.peak or 0, resident_bytes() or 0)
