"""A process of its own for native code that reads files of others: there are bytes on which it ends its process, or
takes all the time and memory there is.

The process calls the functions that it is sent, and answers with a line. It has limited memory, and ends when the pipe
to it closes.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from idefics_cli.errors import one_line

MEMORY_BYTES = 3 << 30
LONGEST_ANSWER = 500
# The folders of modules are set before anything is imported: the working folder is not one of them.
BOOTSTRAP = "import sys; sys.path[:] = sys.argv[1:]; from idefics_cli.storage.limited_process import main; main()"

_asking = threading.Lock()
_processes: list[subprocess.Popen[bytes]] = []  # at most one


def complaint(reader: str, function: Callable[..., str], *arguments: Any, seconds: float) -> str:
    """What the function of a module says, or in what way the `reader` that it calls has ended the process."""
    with _asking:
        while True:
            is_fresh = not _processes  # another may have been killed since it last answered
            process = _started() if is_fresh else _processes.pop()
            started = time.monotonic()
            if answer := _answer(process, function, arguments, seconds):
                _processes.append(process)
                return answer.strip()
            code = process.wait()
            if time.monotonic() - started >= seconds:
                return "it takes too long"
            if is_fresh:
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                return f"{reader} ends its process on it ({how})"


def _answer(process: subprocess.Popen[bytes], function: Callable[..., str], arguments: Any, seconds: float) -> str:
    """A line; nothing where the process ends. It is killed after so many seconds."""
    watch = threading.Timer(seconds, process.kill)
    watch.start()
    try:
        pickle.dump((function, arguments), process.stdin)
        process.stdin.flush()
        return process.stdout.readline().decode()
    except BrokenPipeError:
        return ""
    finally:
        watch.cancel()


def _forked() -> None:
    """The process is that of whoever was forked, and so is a lock that is held."""
    global _asking
    _asking = threading.Lock()
    _processes.clear()


os.register_at_fork(after_in_child=_forked)


def _started() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable or "", "-c", BOOTSTRAP, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Other pools of Arrow's reserve more than they use.
        env=os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "TOKENIZERS_PARALLELISM": "false"},
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
            function, arguments = pickle.load(sys.stdin.buffer)
            answer = one_line(function(*arguments))[:LONGEST_ANSWER]
            sys.stdout.buffer.write(answer.encode(errors="replace") + b"\n")
            sys.stdout.buffer.flush()
