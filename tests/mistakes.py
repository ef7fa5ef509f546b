"""Seeded mistakes in the bytes of a file, and how much a process has held while it read them."""

from __future__ import annotations

import random
import resource
from contextlib import suppress
from pathlib import Path

WRONG = (
    *(b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\x01\0\0\0"),
    *(b"\0\0", b"\xff\xff", b"\x7f\xff", b"\0", b"\xff", b"\x7f", b"\x80"),
    *(bytes([byte]) for byte in b' 09-e[]{}",;\n\t'),
)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """One to four faults, as disks, networks and those who look for crashes make them."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        place, length, kind = draw.randrange(len(changed)), draw.choice((1, 2, 4, 16, 40, 512)), draw.randrange(6)
        if kind == 0:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            wrong = draw.choice(WRONG)
            changed[place : place + len(wrong)] = wrong
        elif kind == 2:
            del changed[place : place + length]
        elif kind == 3:
            changed[place:place] = changed[place : place + length] * draw.randint(1, 9)
        elif kind == 4:
            changed[place:place] = draw.randbytes(draw.randint(1, 16))
        elif draw.random() < 0.3:
            del changed[place:]
        changed = changed or bytearray(b"0")
    return bytes(changed)


def forget_peak() -> None:
    """`peak` of this process counts from here."""
    with suppress(OSError):  # it then counts from the process's start, which is more
        Path("/proc/self/clear_refs").write_text("5")


def peak_with_children() -> int:
    """`peak`, or that of its largest child that has ended."""
    return max(peak(), peak_of_children())


def peak_of_children() -> int:
    """That of the largest that has ended.

    A process is said to have held what its parent held when it was started (`ru_maxrss`), so only one that was itself
    started for the purpose can tell.
    """
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def peak(process: int | str = "self") -> int:
    """Bytes that it has held at once, 0 where the kernel does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
