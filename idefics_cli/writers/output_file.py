"""`-o F.jsonl` and `-o F.parquet`: what is there already, whose it is, and how a run's rows become the final file.

A run under way has its rows in the journal `F.part`; `F` appears whole, by rename, when all rows are there. A journal
that says that it has ended is made into `F` again wherever a kill came in between. Rows that failed can be done again:
then the journal holds new rows for failed ones of `F`, in their order, and the two are merged at the end.

Everything that can be wrong with an output is found when it is opened, before a model is loaded. This module knows no
images and no models; a row is a mapping with an `id` and an `error`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from idefics_cli.columns import Column
from idefics_cli.errors import OutputError
from idefics_cli.storage.filenames import REMOTE_ADDRESS, WEB_ADDRESS, shown_address
from idefics_cli.writers.formats import SETTINGS, Rows, format_of, temporary_file
from idefics_cli.writers.journal import Journal, reason, shown_path, sync_folder

AMENDS = "amends"


class FileOutput:
    """An output file, locked until `close`.

    `overwrite` forgets what is there (a run under way excepted); what stands under the final name stays until the end.
    Raises OutputError where nothing could be written, or where what is there is nobody knows whose.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        _refuse_address(os.fspath(path))
        self.path = Path(path)
        _check_place(self.path)
        self.format = format_of(self.path)
        journal = self.path.with_name(self.path.name + ".part")
        if not os.path.lexists(journal):
            self._require_free_names()
        self.journal = Journal(journal, discard=overwrite)
        try:
            self.record = None if overwrite else self._finished_run()
        except BaseException:
            self.journal.close()
            raise

    def _require_free_names(self) -> None:
        """What is written beside the final file may be left over from a run under way, and from nothing else."""
        with self._reading():
            for path in self.format.in_the_way(self.path):
                shown = shown_path(path)
                raise OutputError(
                    f"{shown} is no file of this program, and would be written over: move it away, or name another"
                    " output"
                )

    def _finished_run(self) -> dict[str, Any] | None:
        """What is known of the run that made the final file, or None where there is none."""
        is_there = os.path.lexists(self.path)
        with self._reading():
            record = self.format.run_of(self.path) if is_there else None
        if record is None and is_there and self.journal.header is None:
            raise OutputError(
                f"{shown_path(self.path)} exists already, and is not as a run of this program left it: name another"
                " output, or replace it with --overwrite"
            )
        if record is None and self.is_amending and not (is_there and self.journal.summary):
            raise OutputError(
                f"failed rows of {shown_path(self.path)} were being done again, but it is not there any more as it was:"
                " bring it back, or begin anew with --overwrite"
            )
        return record

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise OutputError where the final file cannot be read."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot read {shown_path(self.path)}: {reason(error)}; mend that, or begin anew with --overwrite"
            ) from error

    # ---- what is there

    @property
    def settings(self) -> dict[str, Any] | None:
        """Those of the run that is there, finished or not; None: there is none."""
        known = self.journal.header or self.record
        return None if known is None else known[SETTINGS]

    @property
    def is_amending(self) -> bool:
        return self.journal.header is not None and self.journal.header[AMENDS]

    @property
    def is_finished(self) -> bool:
        """The final file is that of the run that is there (whose failed rows may have begun to be done again)."""
        return self.record is not None and (self.journal.header is None or self.is_amending)

    def require_same(self, settings: Mapping[str, Any]) -> None:
        """Raise OutputError naming what differs from the run that is there. Settings not known yet are left out."""
        if self.settings is None:
            return
        differing = sorted(differences(self.settings, json.loads(json.dumps(settings))))
        if differing:
            raise OutputError(
                f"{shown_path(self.path)} belongs to a run with other settings ({'; '.join(differing[:4])}): name"
                " another output, or begin anew with --overwrite"
            )

    def rows_so_far(self) -> Iterator[dict[str, Any]]:
        """The rows that need not be done again."""
        return self.journal.rows() if self.journal.header is not None else iter(())

    def finished_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of the final file."""
        with self._reading():
            for text in self.format.texts(self.path):
                yield json.loads(text)

    # ---- writing

    def begin(self, settings: Mapping[str, Any], *, amends: bool = False) -> None:
        """Make ready for rows: go on where a journal is, else begin one."""
        if self.journal.header is None:
            self.journal.begin({SETTINGS: settings, AMENDS: amends})

    def publish(self, columns: Sequence[Column], summary: Mapping[str, Any] | None = None) -> None:
        """Give the rows their final name, durably. `summary` (None: the journal has it) is kept with the settings."""
        if summary is not None:
            self.journal.end(summary)
        assert self.journal.summary is not None and self.journal.header is not None, self.journal.path
        run = {SETTINGS: self.journal.header[SETTINGS], **self.journal.summary}
        try:
            with temporary_file(self.path) as target:
                self.format.write(target, Rows(self._final_texts), columns, run)
                self.format.before_rename(target, self.path, run)
                target.rename(self.path)
            sync_folder(self.path.parent)
            self.journal.remove()
        except OSError as error:
            raise OutputError(
                f"cannot finish {shown_path(self.path)}: {reason(error)}; make room or check the disk, and run the same"
                " command again"
            ) from error

    def _final_texts(self) -> Iterator[bytes]:
        return self._amended_texts() if self.is_amending else self.journal.texts()

    def _amended_texts(self) -> Iterator[bytes]:
        try:
            yield from merged(self.format.texts(self.path), self.journal.texts())
        except (ValueError, LookupError) as error:
            raise OutputError(
                f"{shown_path(self.path)} was changed while its failed rows were being done again: bring it back as it"
                " was, or begin anew with --overwrite"
            ) from error

    def close(self) -> None:
        """Let go; what has been written stays."""
        self.journal.close()


def merged(texts: Iterator[bytes], amended: Iterator[bytes]) -> Iterator[bytes]:
    """All rows, those that were done again in their new form. Merging what is merged already changes nothing.

    Raises LookupError where one was done again that is not there, ValueError where one is no row.
    """
    newer = next(amended, None)
    for text in texts:
        if newer is not None and id_of(text) == id_of(newer):
            yield newer
            newer = next(amended, None)
        else:
            yield text
    if newer is not None:
        raise LookupError(f"a row was done again that is not in the result: {newer!r}")


def id_of(text: bytes) -> str:
    return json.loads(text)["id"]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """`name was this and is now that` for each setting that differs; what only one of them knows is passed over."""
    for name in old.keys() & new.keys():
        before, now = old[name], new[name]
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from differences(before, now, f"{within}{name} ")
        elif _are_lists_alike(before, now):
            yield from differences(_numbered(before), _numbered(now), f"{within}{name} ")
        elif before != now:
            yield f"{within}{name} was {_brief(before)} and is now {_brief(now)}"


def _are_lists_alike(one: object, other: object) -> bool:
    """Lists of as many mappings."""
    if not (isinstance(one, list) and isinstance(other, list) and len(one) == len(other)):
        return False
    return all(isinstance(item, Mapping) for item in (*one, *other))


def _numbered(items: list[Any]) -> dict[str, Any]:
    return {str(number): item for number, item in enumerate(items, start=1)}


def _brief(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _refuse_address(name: str) -> None:
    if WEB_ADDRESS.match(name) or REMOTE_ADDRESS.match(name):
        raise OutputError(
            f"{shown_address(name)} is an address: name a file on this machine, and copy it when it is finished"
        )


def _check_place(path: Path) -> None:
    shown = shown_path(path)
    if os.path.isdir(path):
        raise OutputError(f"{shown} is a folder: name a file in it, such as {shown_path(path / 'captions.jsonl')}")
    if not os.path.isdir(path.parent):
        raise OutputError(f"there is no folder {shown_path(path.parent)} to write {shown} into: make it first")
    if os.path.islink(path) and not os.path.exists(path):
        raise OutputError(f"{shown} is a link that leads nowhere: name the file that it should lead to")
