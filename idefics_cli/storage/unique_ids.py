"""The ids that have been given out: bounded in memory, however many there are."""

from __future__ import annotations

import sqlite3

from idefics_cli.errors import InputError

CACHE_KIBIBYTES = 64 << 10


class SeenIds:
    """Remembers each id with the index of its row.

    A database without a name lives in sqlite's page cache and, beyond that, in a temporary file that the system frees
    with the process. It answers at once, so that of two rows with one id the second is never given out.
    """

    def __init__(self) -> None:
        # Made by the thread that opens the inputs, used by the one that reads them.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_KIBIBYTES}"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("CREATE TABLE seen (id TEXT PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def add(self, row_id: str, index: int) -> int | None:
        """The index of the row that has this id already, or None: then it is `index` from now on."""
        try:
            added = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (row_id, index)).rowcount
        except sqlite3.Error as error:
            raise InputError(
                f"no room to remember the ids: {error}; free some in the folder for temporary files, or name another"
                " one in SQLITE_TMPDIR"
            ) from error
        return None if added else self._index(row_id)

    def __contains__(self, row_id: str) -> bool:
        return self._index(row_id) is not None

    def _index(self, row_id: str) -> int | None:
        found = self._database.execute("SELECT row FROM seen WHERE id = ?", (row_id,)).fetchone()
        return found and found[0]
