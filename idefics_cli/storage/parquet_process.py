"""Parquet files are looked at in a process of their own first: there are bytes on which Arrow ends its process.

The process opens each file that it is sent, reads all that its footer says and the first pages (all pages of a small
file, and of a large one the pages that it is asked for), and answers with a line: what is wrong, or nothing. It has
limited memory, and ends when the pipe to it closes.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from idefics_cli.errors import InputError, one_line
from idefics_cli.storage.files import BUFFER_BYTES, File, cannot_read, local_file

LOOK_SECONDS = 60.0
SMALL_BYTES = 16 << 20
MEMORY_BYTES = 3 << 30
LEAST_BYTES_PER_SECOND = 2 << 20
LONGEST_ANSWER = 500
# The folders of modules are set before anything is imported: the working folder is not one of them.
BOOTSTRAP = "import sys; sys.path[:] = sys.argv[1:]; from idefics_cli.storage.parquet_process import main; main()"


class Pages(NamedTuple):
    """All pages of some columns in these row groups, which have `num_bytes`. So many rows fit into memory."""

    groups: range
    columns: Sequence[str]
    rows: int
    num_bytes: int


_asking = threading.Lock()
_processes: list[subprocess.Popen[bytes]] = []  # at most one


def require_sound(file: File, remedy: str = "fetch or make it again", pages: Pages | None = None) -> None:
    """Raises InputError for a file that Arrow cannot open, or on which it ends its process; or on these `pages`."""
    seconds = LOOK_SECONDS + (pages.num_bytes if pages else 0) / LEAST_BYTES_PER_SECOND
    with _asking:
        process = _processes.pop() if _processes else _started()
        watch = threading.Timer(seconds, process.kill)
        watch.start()
        try:
            pickle.dump((_from_anywhere(file), pages), process.stdin)
            process.stdin.flush()
            answer = process.stdout.readline().decode()
        except BrokenPipeError:
            answer = ""
        finally:
            watch.cancel()
        if answer:
            _processes.append(process)
    if not answer:
        code = process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        answer = f"Arrow ends its process on it ({how})"
    if answer.strip():
        raise cannot_read(file.name, ValueError(answer.strip()), remedy)


def _from_anywhere(file: File) -> File:
    """The process may have another working folder."""
    return local_file(os.path.abspath(file.path)) if file.is_local else file


def _started() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable or "", "-c", BOOTSTRAP, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"},  # others reserve more than they use
        start_new_session=True,  # Ctrl-C reaches the whole process group, and only the parent reacts
    )


def main() -> None:
    """What the process does until its stdin ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(EOFError):
        while True:
            answer = _look(*pickle.load(sys.stdin.buffer))
            sys.stdout.buffer.write(one_line(answer)[:LONGEST_ANSWER].encode(errors="replace") + b"\n")
            sys.stdout.buffer.flush()


def _look(file: File, pages: Pages | None) -> str:
    """What is wrong with the file as a whole. What is wrong with a page, its reader says, where it is needed."""
    import pyarrow.parquet as pq

    try:
        with file.open() as stream:
            parquet = pq.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER_BYTES)
            if pages is not None:
                _read_pages(parquet, pages)
                return ""
            for number in range(parquet.num_row_groups):
                group = parquet.metadata.row_group(number)
                for column in map(group.column, range(group.num_columns)):
                    str(column.path_in_schema)
            str(parquet.schema_arrow.metadata)
            is_small = stream.seek(0, os.SEEK_END) <= SMALL_BYTES
            with suppress(Exception):
                for _ in parquet.iter_batches(1024 if is_small else 1, use_threads=False):
                    if not is_small:
                        break
    except InputError:  # it cannot be opened, as its reader will say
        return ""
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def _read_pages(parquet: Any, pages: Pages) -> None:
    with suppress(Exception):
        for _ in parquet.iter_batches(
            pages.rows, row_groups=list(pages.groups), columns=list(pages.columns), use_threads=False
        ):
            pass
