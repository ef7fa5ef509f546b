"""Bytes in use while something runs: on CUDA by torch's own count, on Linux by the kernel's of the resident set.

Neither looks again and again, which would take time from what is measured.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


class MemoryMeter:
    """Measures runs. What is garbage when one begins or ends is not counted."""

    def __init__(self, device: torch.device):
        self.device = device

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
        self._tidy()
        use = MemoryUse(self._now())
        counted = self._forget_peak()
        yield use
        use.peak = self._peak() if counted else None
        self._tidy()
        use.after = self._now()

    def _forget_peak(self) -> bool:
        if self.device.type != "cuda":
            return forget_resident_peak()
        torch.cuda.reset_peak_memory_stats(self.device)
        return True

    def _peak(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident_peak()


@dataclass
class MemoryUse:
    """Bytes before, at the most, and after; None where nobody counts."""

    before: int | None = None
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


def forget_resident_peak() -> bool:
    """Let `resident_peak` start from what is resident now, where the kernel lets us (proc(5), /proc/pid/clear_refs)."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:  # no Linux, or a container whose /proc is read-only: then nobody counts
        return False
    return True


def resident_peak() -> int | None:
    """The most bytes of this process that were in memory at once, where the kernel tells.

    (`ru_maxrss` would count what its parent held when it was started.)
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            found = re.search(r"^VmHWM:\s+(\d+) kB", file.read(), re.MULTILINE)
    except FileNotFoundError:
        return None
    return int(found[1]) << 10 if found else None
