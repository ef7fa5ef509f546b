"""Which driver is at work on which units of a folder: an empty file for each, whose time is set again and again.

A driver first says what it claims and then looks for others, so that of two at one moment at least one sees the other
and steps back. A claim whose process has ended on this machine, or that has been silent elsewhere, counts no more.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import threading
import time
from contextlib import suppress
from hashlib import blake2b

from idefics_cli.errors import InputError, OutputError
from idefics_cli.storage.unit_folder import UnitFolder
from idefics_cli.writers.owner import BEAT_SECONDS, GONE_SECONDS, began_of, this_machine

CLAIM = re.compile(
    r"_claim-(?P<first>\d+)-(?P<stop>\d+)-(?P<pid>\d+)-(?P<began>\d*)-(?P<machine>[0-9a-f]{16})-(?P<host>\w*)-\w{8}"
)
LOOK_SECONDS = 0.2
ALL_UNITS = 10**12


class InUse(OutputError):
    """Another driver is at work on some of the units."""


class Claim:
    """A context that holds the units from `first` up to `stop`. Raises InUse where another driver works on some."""

    def __init__(self, folder: UnitFolder, first: int = 0, stop: int = ALL_UNITS) -> None:
        self._folder, self._first, self._stop = folder, first, stop
        self._machine, pid = blake2b(repr(this_machine()).encode(), digest_size=8).hexdigest(), os.getpid()
        host = re.sub(r"\W", "_", platform.node(), flags=re.ASCII)[:60]
        self._name = f"_claim-{first}-{stop}-{pid}-{began_of(pid)}-{self._machine}-{host}-{secrets.token_hex(4)}"
        self._released = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="claim", daemon=True)

    def __enter__(self) -> Claim:
        self._folder.touch(self._name)
        try:
            for name in list(self._folder.names()):
                found = CLAIM.fullmatch(name)
                if found and name != self._name and self._overlaps(found):
                    self._require_ended(found)
        except BaseException:
            self._folder.remove(self._name)
            raise
        self._beating.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._released.set()
        self._beating.join()  # a beat that is under way would make the claim again
        self._folder.remove(self._name)

    def _overlaps(self, other: re.Match[str]) -> bool:
        return int(other["first"]) < self._stop and self._first < int(other["stop"])

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OutputError, OSError):
                self._folder.touch(self._name)

    def _require_ended(self, other: re.Match[str]) -> None:
        """Of another machine's driver, the next beat is waited for."""
        with suppress(InputError):  # it has gone in the meantime
            seen = self._folder.written_at(other[0])
            while not self._has_ended(other):
                if other["machine"] == self._machine or self._folder.written_at(other[0]) != seen:
                    raise InUse(
                        f"another run is at work on {self._folder.name}: wait for it, or name another folder (process"
                        f" {other['pid']} on {other['host']})"
                    )
                time.sleep(LOOK_SECONDS)
            self._folder.remove(other[0])

    def _has_ended(self, other: re.Match[str]) -> bool:
        if other["machine"] == self._machine:
            return began_of(int(other["pid"])) not in (other["began"], "")
        self._folder.touch(self._name)
        return self._folder.written_at(self._name) - self._folder.written_at(other[0]) > GONE_SECONDS
