"""The far side of `decoders.py`: a process that makes pixels of one image after the other until its socket closes.

It is there to be lost. It imports numpy and Pillow and never torch, takes one core and limited memory, and ends with
its parent. What it says is plain bytes behind a header of one kind and one length: of a process to whose memory a
broken image may have written, the parent reads no pickle.
"""

from __future__ import annotations

import ctypes
import json
import pkgutil
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, BinaryIO

import numpy as np
from PIL import AvifImagePlugin

from idefics_cli.errors import RowError
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.rows import ImageOptions

HEADER = struct.Struct("<BQ")  # kind, number of bytes behind it
PATH_CODING = ("utf-8", "surrogatepass")  # any str there and back, names of files that are no text among them
LONGEST_MESSAGE = 10_000  # characters
BYTES_PER_PIXEL = 32
PR_SET_PDEATHSIG = 1

Decode = Callable[[ImageProcessor, Any, ImageOptions], np.ndarray | RowError]


class Kind(IntEnum):
    """What stands behind a header. READY: nothing; the process has started. BUG: a traceback."""

    READY = 0
    PATH = 1
    BYTES = 2
    PIXELS = 3
    ERROR = 4
    BUG = 5


@dataclass(frozen=True)
class DecodeTask:
    """What a decoder process does all its life. `decode` is a function that can be imported by its name."""

    processor: ImageProcessor
    limits: ImageOptions
    decode: Decode

    def to_json(self) -> str:
        name = f"{self.decode.__module__}:{self.decode.__qualname__}"
        return json.dumps([asdict(self.processor), asdict(self.limits), name])

    @classmethod
    def from_json(cls, text: str) -> DecodeTask:
        processor, limits, name = json.loads(text)
        return cls(ImageProcessor(**processor), ImageOptions(**limits), pkgutil.resolve_name(name))

    def answer(self, source: str | bytes) -> tuple[Kind, bytes | memoryview]:
        try:
            pixels = self.decode(self.processor, source, self.limits)
        except MemoryError:
            pixels = RowError("image_unreadable", "MemoryError: more memory than a decoder may take")
        except Exception:  # nothing that an image may do: the parent raises it
            return Kind.BUG, traceback.format_exc().encode("utf-8", "backslashreplace")
        if isinstance(pixels, RowError):
            return Kind.ERROR, f"{pixels.code}: {pixels.message[:LONGEST_MESSAGE]}".encode("utf-8", "backslashreplace")
        return Kind.PIXELS, memoryview(pixels).cast("B")


def main(socket_number: int, task: str) -> None:
    """Serve on an inherited socket. The parent listens to standard error until it hears that this process has begun."""
    _end_with_parent()
    given = DecodeTask.from_json(task)
    _limit(given.limits)
    with open(socket_number, "rb", closefd=False) as requests, open(socket_number, "wb", closefd=False) as answers:
        _send(answers, Kind.READY)
        while header := requests.read(HEADER.size):
            kind, size = HEADER.unpack(header)
            payload = requests.read(size)
            _send(answers, *given.answer(payload.decode(*PATH_CODING) if kind == Kind.PATH else payload))


def _send(answers: BinaryIO, kind: Kind, payload: bytes | memoryview = b"") -> None:
    answers.write(HEADER.pack(kind, len(payload)))
    answers.write(payload)
    answers.flush()


def _end_with_parent() -> None:
    """Linux ends this process with its parent even inside a decoder that hangs; others when it next looks for work."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(limits: ImageOptions) -> None:
    """One thread (libraries that read the environment have it from there), bounded memory, no core dumps."""
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = memory_limit(limits)
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def memory_limit(limits: ImageOptions) -> int:
    """Bytes of address space: the interpreter and its libraries, a file twice, and the costliest form of an image."""
    return (1 << 30) + 2 * limits.max_bytes + BYTES_PER_PIXEL * limits.max_pixels
