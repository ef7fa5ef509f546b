"""The rows of earlier runs beside those of the input: what decides a row, which rows still stand, and what has changed.

A row stands as long as what decides it is the same, wherever its input lies and whatever it is called. Memory does not
grow with the rows: what does lies in a nameless database.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from idefics_cli.columns import json_text
from idefics_cli.errors import RowError
from idefics_cli.rows import ImageSource, RemoteFile
from idefics_cli.storage.filenames import counted
from idefics_cli.storage.unique_ids import scratch_database
from idefics_cli.writers.output_file import GOOD, SAME, Earlier

DECIDING = 16  # letters of a digest for what decides a row; the others are for the columns that are passed through
FIRST_IDS = 3


def row_digest(
    name: str | None,
    sources: Iterable[ImageSource],
    values: Mapping[str, Any],
    kept: Mapping[str, Any],
    error: RowError | None,
) -> str:
    """Equal as long as nothing has changed that decides a row, or stands beside it in the result.

    `name` is what tells its images from others in the input, `values` are those that the row is made of, `error` is
    what is wrong with it.
    """
    parts = [f"{name} {error or ''}".encode(errors="surrogatepass"), *map(image_identity, sources), _encoded(values)]
    return f"{blake2b(b'|'.join(parts), digest_size=DECIDING // 2).hexdigest()}{zlib.crc32(_encoded(kept)):08x}"


def image_identity(source: ImageSource) -> bytes:
    """Of a file its size and when it was written; of bytes what they are."""
    if isinstance(source, bytes):
        return blake2b(source, digest_size=DECIDING).digest()
    if isinstance(source, RemoteFile):
        return source.identity()
    try:
        found = os.stat(source)
    except (OSError, ValueError):
        return b"none"
    return b"%d %d" % (found.st_size, found.st_mtime_ns)


def _encoded(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, default=str).encode() if values else b""


class EarlierRows:
    """Result rows by id, in whatever order they are asked for; quick where that is nearly their own.

    `ids` and `rows` each give them from the first on; of several with one id the last counts. `find` remembers what was
    asked for.
    """

    def __init__(self, ids: Iterable[Mapping[str, Any]], rows: Callable[[], Iterator[Earlier]]) -> None:
        self._database = scratch_database(
            "CREATE TABLE ids (id TEXT PRIMARY KEY, row INTEGER, failed INTEGER, found INTEGER) WITHOUT ROWID",
            "CREATE TABLE aside (row INTEGER PRIMARY KEY, text BLOB, digest TEXT)",
        )
        numbered = ((row["id"], i, bool(row["error"])) for i, row in enumerate(ids) if not is_duplicate(row["error"]))
        self._database.executemany("INSERT OR REPLACE INTO ids VALUES (?, ?, ?, 0)", numbered)
        self._all = rows
        self.rewind()

    def rewind(self) -> None:
        self._database.execute("DELETE FROM aside")
        self._rows, self._next = self._all(), 0

    def find(self, row_id: str) -> Earlier | None:
        query = "UPDATE ids SET found = 1 WHERE id = ? RETURNING row"
        found = self._database.execute(query, (row_id,)).fetchone()
        if found is None:
            return None
        if found[0] < self._next:
            text, digest = self._database.execute("SELECT text, digest FROM aside WHERE row = ?", found).fetchone()
            return json.loads(text), digest
        for row, digest in self._rows:
            self._next += 1
            if self._next > found[0]:
                return row, digest
            passed = (self._next - 1, json_text(row), digest)
            self._database.execute("INSERT INTO aside VALUES (?, ?, ?)", passed)
        raise AssertionError(f"row {found[0]} of {self._next} earlier ones")

    def never_found(self) -> tuple[int, int, list[str]]:
        """How many rows have not been asked for, how many of them had failed, and the first ids."""
        number, failed = self._database.execute("SELECT count(*), total(failed) FROM ids WHERE NOT found").fetchone()
        query = "SELECT id FROM ids WHERE NOT found ORDER BY row LIMIT ?"
        return number, int(failed), [row_id for (row_id,) in self._database.execute(query, (FIRST_IDS,))]


def stands(old: Earlier | None, digest: str, mode: int) -> bool:
    """Whether a run of this mode takes over the row for one with this digest."""
    if old is None or (mode & GOOD and old[0]["error"]):
        return False
    return not mode & SAME or old[1][:DECIDING] in ("", digest[:DECIDING])


def is_duplicate(error: object) -> bool:
    """Such a row has the id of another one."""
    return error is not None and str(error).startswith("duplicate_id")


@dataclass
class Changes:
    """What has become of an input since its rows were done: how many rows of each kind, and the first ids."""

    numbers: Counter[str] = field(default_factory=Counter)
    ids: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, *ids: str, number: int = 1) -> None:
        self.numbers[kind] += number
        known = self.ids.setdefault(kind, [])
        known.extend(ids[: FIRST_IDS - len(known)])

    def __str__(self) -> str:
        told = []
        for kind, number in (+self.numbers).items():
            first = ", ".join(self.ids[kind]) + (", ..." if number > FIRST_IDS else "")
            told.append(f"{counted(number, 'row')} {kind} ({first})")
        return ", ".join(told) or "its rows come in another order, or other ids come twice"
