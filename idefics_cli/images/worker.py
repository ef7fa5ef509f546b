"""One worker process: makes pixels of one image after another until its connection closes.

It is there to be lost: a broken image may crash it or write to its memory. So it takes one core and limited memory,
ends with its parent and imports no torch. It answers in plain bytes: from such a process the parent reads no pickle.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TypeAlias

import numpy as np
from PIL import AvifImagePlugin, Image, PngImagePlugin

from idefics_cli.errors import RowError
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.images.thumbnail import Thumbnails
from idefics_cli.rows import ImageOptions

Processor: TypeAlias = ImageProcessor | Thumbnails

PIXELS = b""  # the answer that pixels follow
ENCODED = b"encoded: "  # begins one that an encoded image follows; every other one is `code: message`
BUG = "bug"
LONGEST_MESSAGE = 10_000  # characters
BYTES_PER_PIXEL = 32  # of the costliest form of an image on its way
PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    """The first message says what to do, as (Processor, ImageOptions); each other one is an image."""
    if sys.platform == "linux":  # even inside a decoder that hangs; elsewhere it ends when it next looks for work
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")  # where memory is short, the kernel ends this process and not the run
    with Connection(descriptor) as connection, suppress(EOFError):
        processor, options = connection.recv()
        _limit_resources(options)
        _set_up_pillow(options)
        connection.send_bytes(b"ready")
        while True:
            _answer(connection, _prepared(processor, connection.recv(), options))


def _limit_resources(options: ImageOptions) -> None:
    """The interpreter and its libraries, a file twice, and an image; and no core dumps."""
    wanted = (1 << 30) + 2 * options.max_bytes + BYTES_PER_PIXEL * options.max_pixels
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _set_up_pillow(options: ImageOptions) -> None:
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    # What a PNG carries besides its pixels may be as large as a file: here, memory has a limit of its own.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = options.max_bytes
    Image.MAX_IMAGE_PIXELS = options.max_pixels  # Pillow refuses twice as many before it makes memory for them
    warnings.simplefilter("ignore")


def _prepared(processor: Processor, source: object, options: ImageOptions) -> np.ndarray | bytes | str:
    try:
        result = processor.prepare_array(source, options)
    except MemoryError:
        result = RowError("image_unreadable", "decoding needs more memory than a worker may use")
    except Exception:  # nothing that an image may cause: the parent raises it
        return f"{BUG}: {traceback.format_exc()}"
    return f"{result.code}: {result.message[:LONGEST_MESSAGE]}" if isinstance(result, RowError) else result


def _answer(connection: Connection, result: np.ndarray | bytes | str) -> None:
    if isinstance(result, str):
        connection.send_bytes(result.encode("utf-8", "backslashreplace"))
        return
    if isinstance(result, bytes):
        connection.send_bytes(ENCODED + result)
        return
    connection.send_bytes(PIXELS)
    pixels = memoryview(result).cast("B")
    while pixels:
        pixels = pixels[os.write(connection.fileno(), pixels) :]
