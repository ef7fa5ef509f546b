"""The ids that rows have: bounded in memory, however many there are."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from idefics_cli.errors import InputError

CACHE_KIBIBYTES = 64 << 10


def scratch_database(*tables: str) -> sqlite3.Connection:
    """A nameless database: in sqlite's page cache and, beyond that, in a temporary file that the system frees with the
    process."""
    # Made by the thread that opens the inputs, used by the one that reads them.
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_KIBIBYTES}"):
        database.execute(f"PRAGMA {setting}")
    for table in tables:
        database.execute(table)
    database.execute("BEGIN")
    return database


class UniqueIds:
    """Remembers each id with the index of its row, from the first of `known` on; of equal ids the first counts.

    It answers at once, so that the second of two rows with one id is never given out.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._database = scratch_database("CREATE TABLE ids (id TEXT PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        numbered = ((row_id, index) for index, row_id in enumerate(known))
        self._database.executemany("INSERT OR IGNORE INTO ids VALUES (?, ?)", numbered)

    def add(self, row_id: str, index: int) -> int | None:
        """The index of the row that already has this id, or None: then it is now that of row `index`."""
        try:
            added = self._database.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (row_id, index)).rowcount
        except sqlite3.Error as error:
            raise InputError(
                f"no space to remember the ids: {error}; free some in the folder for temporary files, or set"
                " SQLITE_TMPDIR to another folder"
            ) from error
        return None if added else self.row_of(row_id)

    def __contains__(self, row_id: str) -> bool:
        return self.row_of(row_id) is not None

    def row_of(self, row_id: str) -> int | None:
        """The index of the row that has this id."""
        found = self._database.execute("SELECT row FROM ids WHERE id = ?", (row_id,)).fetchone()
        return found and found[0]
