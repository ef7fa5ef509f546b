"""Which driver is at work on which units of a folder: a file for each, whose time is set again and again.

A driver first says what it claims and then looks for others, so that of two at one moment at least one sees the other
and steps back. A claim whose process has ended on this machine, or that has been silent elsewhere, counts no more.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import threading
import time
from contextlib import suppress

from idefics_cli.errors import InputError, OutputError
from idefics_cli.storage.filenames import shown
from idefics_cli.storage.unit_folder import UnitFolder
from idefics_cli.writers.owner import BEAT_SECONDS, GONE_SECONDS, began_of, this_machine

CLAIM = re.compile(r"_claim-(\d+)-(\d+)-[0-9a-f]{16}\.json")
LOOK_SECONDS = 0.2
ALL_UNITS = 10**12


class InUse(OutputError):
    """Another driver is at work on some of the units."""


class Claim:
    """A context that holds the units from `first` up to `stop`. Raises InUse where another driver works on some."""

    def __init__(self, folder: UnitFolder, first: int = 0, stop: int = ALL_UNITS) -> None:
        self._folder, self._first, self._stop = folder, first, stop
        self._name = f"_claim-{first}-{stop}-{secrets.token_hex(8)}.json"
        self._released = threading.Event()

    def __enter__(self) -> Claim:
        self._write()
        try:
            self._require_alone()
        except BaseException:
            self._folder.remove(self._name)
            raise
        threading.Thread(target=self._beat, name="claim", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._released.set()
        self._folder.remove(self._name)

    def _write(self) -> None:
        pid = os.getpid()
        about = {"host": platform.node(), "pid": pid, "began": began_of(pid), "machine": this_machine()}
        with self._folder.written(self._name) as file:
            file.write(json.dumps(about).encode())

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OutputError, OSError):
                self._touch()

    def _touch(self) -> None:
        if self._folder.place.is_local:
            os.utime(self._folder.place.child(self._name).path)
        else:
            self._write()

    def _require_alone(self) -> None:
        for name in list(self._folder.names()):
            found = CLAIM.fullmatch(name)
            if found and name != self._name and int(found[1]) < self._stop and self._first < int(found[2]):
                self._require_ended(name)

    def _require_ended(self, name: str) -> None:
        """Of another machine's driver, the next beat is waited for."""
        with suppress(InputError):  # it has gone in the meantime
            with self._folder.place.child(name).open() as file:
                about = json.loads(file.read())
            seen = self._folder.written_at(name)
            while not self._has_ended(about, name):
                is_here = about["machine"] == list(this_machine())
                if is_here or self._folder.written_at(name) != seen:
                    raise InUse(
                        f"another run is at work on {self._folder.name}: wait for it, or name another folder (process"
                        f" {about['pid']} on {shown(about['host'])})"
                    )
                time.sleep(LOOK_SECONDS)
            self._folder.remove(name)

    def _has_ended(self, about: dict, name: str) -> bool:
        if about["machine"] == list(this_machine()):
            return began_of(about["pid"]) not in (about["began"], "")
        self._touch()
        return self._folder.written_at(self._name) - self._folder.written_at(name) > GONE_SECONDS
