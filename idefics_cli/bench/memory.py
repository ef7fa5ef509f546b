"""Memory that a run takes: by torch's own count on CUDA, by the kernel's count of the resident set on Linux.

Both keep the peak themselves: sampling it would slow down what is measured.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class MemoryUse:
    """Bytes over what was in use before: at the peak, and afterwards; None where they cannot be counted."""

    rise: int | None = None
    kept: int | None = None


@contextmanager
def measured(device: torch.device) -> Iterator[MemoryUse]:
    """What the body takes. What is garbage before or after it is not counted."""
    use = MemoryUse()
    before = _settled_bytes(device)
    counts_peak = _reset_peak(device)
    yield use
    peak = _peak(device) if counts_peak else None
    after = _settled_bytes(device)
    if before is not None and after is not None:
        use.kept = after - before
        use.rise = None if peak is None else peak - before


def _settled_bytes(device: torch.device) -> int | None:
    """Bytes in use once garbage is collected."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed memory until it is told to return it
    if trim is not None:
        trim(0)
    if device.type != "cuda":
        return resident_bytes()
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def _reset_peak(device: torch.device) -> bool:
    if device.type != "cuda":
        return reset_resident_peak()
    torch.cuda.reset_peak_memory_stats(device)
    return True


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()


def resident_bytes() -> int | None:
    """Memory that this process holds now; None on systems without /proc."""
    return _status_bytes("VmRSS")


def resident_peak() -> int | None:
    """The most that it held since it started, or since `reset_resident_peak`. (`ru_maxrss` counts the parent's too.)"""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            found = re.search(rf"^{name}:\s+(\d+) kB", file.read(), re.MULTILINE)
    except FileNotFoundError:
        return None
    return int(found[1]) << 10 if found else None


def reset_resident_peak() -> bool:
    """Whether the kernel allows it (proc(5), /proc/pid/clear_refs)."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:  # not Linux, or /proc is read-only in this container
        return False
    return True
