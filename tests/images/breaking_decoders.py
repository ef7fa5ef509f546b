"""Processors that break in a worker as real decoders have broken. Imports next to nothing."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from idefics_cli.errors import RowError
from idefics_cli.images.decode import DEFAULT_OPTIONS
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.rows import ImageOptions

poisoned = False


def poison() -> None:
    """As if memory had been written to that the next image needs."""
    global poisoned
    poisoned = True


def take_all_memory() -> None:
    kept = []
    while True:
        kept.append(np.zeros(1 << 28, np.uint8))


def complain() -> None:
    """As libraries in C do, on standard error and at length."""
    for _ in range(1000):
        ctypes.CDLL(None).perror(b"x" * 1000)


def raise_out_of_memory() -> None:
    raise MemoryError


def raise_something() -> None:
    raise KeyError("a mistake of ours")


FAULTS = {
    b"sleep": lambda: time.sleep(1000),
    b"spin": lambda: re.fullmatch("(a+)+b", "a" * 64),  # for ages, and without letting another thread in
    b"segmentation fault": lambda: ctypes.string_at(0),
    b"abort": os.abort,
    b"exit": lambda: os._exit(4),
    b"out of memory": raise_out_of_memory,
    b"bomb": take_all_memory,
    b"nonsense": lambda: os.write(int(sys.argv[1]), b"\xff" * 1000),
    b"longest nonsense": lambda: os.write(int(sys.argv[1]), b"\xff" * 4 + b"\x7f" + b"\xff" * 7),
    b"poison": poison,
    b"complaint": complain,
    b"bug": raise_something,
}


class Breaking(ImageProcessor):
    """An image as it is; of the bytes that name a fault, the fault, and a grey image where that returns."""

    def prepare_array(self, source: Any, options: ImageOptions = DEFAULT_OPTIONS) -> np.ndarray | RowError:
        if poisoned:
            os.abort()
        if source not in FAULTS:
            return super().prepare_array(source, options)
        FAULTS[source]()
        return np.zeros((3, self.image_size, self.image_size), np.uint8)


class Sleeping(ImageProcessor):
    """For the path of a folder: say so there, wait for a second, and answer."""

    def prepare_array(self, source: Any, options: ImageOptions = DEFAULT_OPTIONS) -> np.ndarray | RowError:
        with Path(source, "decoding").open("a") as file:
            file.write("once ")
        time.sleep(1)
        return RowError("image_missing", "it slept")


class Describing(ImageProcessor):
    """What there is in this process."""

    def prepare_array(self, source: Any, options: ImageOptions = DEFAULT_OPTIONS) -> np.ndarray | RowError:
        heavy = sorted({"torch", "transformers", "pyarrow", "fsspec", "idefics_cli.cli.app"} & set(sys.modules))
        super().prepare_array(source, options)
        threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
        return RowError("row_invalid", f"heavy {heavy}, threads {threads}")
