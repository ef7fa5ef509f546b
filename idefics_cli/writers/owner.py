"""Which process writes an output, named by the target of the symbolic link `F.lock`.

The kernel's lock, `flock`, may do nothing on network file systems, or nothing between two machines. A link is made with
its target in one step there too. Its time is set again and again, so that a run whose machine has died is told from one
that is at work. Two that take over from a third at one moment may both succeed: whoever writes asks `is_held` first.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import secrets
import threading
from contextlib import suppress
from pathlib import Path

from idefics_cli.errors import OutputError
from idefics_cli.storage.filenames import escape_name, shown

NOT_SUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ENOLCK, errno.EINVAL)
TARGET = re.compile(r"idefics-run:(?P<host>.*):(?P<pid>\d{1,9}):(?P<began>\d*):(?P<machine>.*):(?P<processes>\d+):\w+")
BEAT_SECONDS = 5.0
GONE_SECONDS = 60.0  # without a beat, the process of another machine has ended


class Owner:
    """Holds the link beside `path` from `__init__` to `release`; another's is removed if its process has ended.

    `file` is `path`, open: its times come from the clock that the link's times come from. `is_locked`: the kernel holds
    a lock on it, which is enough where the file system has no links. Raises OutputError where another process holds the
    link, or its name is the user's own.
    """

    def __init__(self, path: Path, file: int, is_locked: bool) -> None:
        self._written, self.path, self._file, self._is_locked = path, path.with_suffix(".lock"), file, is_locked
        self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # whatever name it will have
        self._name = self.path.name
        pid = os.getpid()
        about = "idefics-run", platform.node(), pid, began_of(pid), *this_machine(), secrets.token_hex(4)
        self._target = ":".join(map(str, about))
        self._released = threading.Event()
        try:
            while not self._take():
                self._remove_ended()
        except BaseException as error:
            if not (is_locked and isinstance(error, OSError) and error.errno in NOT_SUPPORTED):
                os.close(self._folder)
                raise
            self._target = ""
        threading.Thread(target=self._beat, name="owner", daemon=True).start()

    def is_held(self) -> bool:
        with suppress(OSError):
            return not self._target or os.readlink(self._name, dir_fd=self._folder) == self._target
        return False

    def release(self) -> None:
        self._released.set()
        if self._target and self.is_held():
            with suppress(OSError):  # then the next run sees that this process has ended
                os.unlink(self._name, dir_fd=self._folder)
        os.close(self._folder)

    def _take(self) -> bool:
        try:
            os.symlink(self._target, self._name, dir_fd=self._folder)
        except FileExistsError:
            return self.is_held()  # a network may lose the answer and ask twice
        return True

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            if self.is_held():
                with suppress(OSError):
                    os.utime(self._name, dir_fd=self._folder, follow_symlinks=False)

    def _remove_ended(self) -> None:
        """Raises OutputError where the process that holds the link may be at work."""
        with suppress(FileNotFoundError):
            target = os.readlink(self.path) if self.path.is_symlink() else str(os.lstat(self.path))
            found = TARGET.fullmatch(target)
            if found is None:
                raise OutputError(
                    f"{escape_name(str(self.path))} is not a file of this program, and is needed to lock the output:"
                    " move it away, or name another output"
                )
            silent = self._seconds_silent()
            if not self._has_ended(found, silent):
                raise OutputError(
                    f"another run is writing {escape_name(str(self._written))}: wait for it, or name another output"
                    f" (process {found['pid']} on {shown(found['host'])}, seen {max(0, silent):.0f} s ago; if it was"
                    " killed, the same command resumes a minute later)"
                )
            if os.readlink(self.path) == target:
                os.unlink(self.path)

    def _has_ended(self, other: re.Match[str], silent: float) -> bool:
        machine, processes = this_machine()
        if other["machine"] != machine:
            return silent > GONE_SECONDS
        if other["processes"] != processes:  # another container: its processes are not seen, its locks are
            return self._is_locked or silent > GONE_SECONDS
        return began_of(int(other["pid"])) not in (other["began"], "")

    def _seconds_silent(self) -> float:
        os.utime(self._file)
        return os.fstat(self._file).st_mtime - os.lstat(self.path).st_mtime


def this_machine() -> tuple[str, str]:
    """What tells this machine, since it was started, and this set of processes on it from all others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        return boot, str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return platform.node(), "0"


def began_of(pid: int) -> str | None:
    """When the process has begun, "" where the system does not say; None: it has ended."""
    try:
        with suppress(PermissionError):  # another user's
            os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except ProcessLookupError:
        return None
    except OSError:
        return ""
    return None if status[0] in "ZX" else status[19]
