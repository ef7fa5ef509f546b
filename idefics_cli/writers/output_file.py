"""`-o F.jsonl` and its like: what is there already, what made it, and how a run's rows become the final file.

A run has its rows in the journal `F.part`; `F` appears whole, by rename, when all rows are there, and whatever had that
name stays until then. Where the input changes in between, the rest is done in a further attempt: its rows come after
those of the attempts before it, and become the file without them. Everything that can be wrong with an output is found
when it is opened, before a model is loaded.
This module knows no images and no models; a row is a mapping with an `id` and an `error`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import cached_property
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeAlias

from idefics_cli.columns import Column
from idefics_cli.errors import OutputError
from idefics_cli.storage.filenames import ADDRESS, shown_address
from idefics_cli.storage.unique_ids import UniqueIds
from idefics_cli.writers.formats import (
    DIGEST,
    DIGEST_START,
    FAILED,
    FORMATS,
    NUM_ROWS,
    SETTINGS,
    VQAV2,
    JsonLines,
    Passthrough,
    Texts,
    content_of,
    format_of,
    is_of_others,
    is_record,
    mark_of,
    record_name,
    remove_leftovers,
)
from idefics_cli.writers.journal import Journal, refusing, shown_path, sync_folder

REPLACES, MODE, COLUMNS = "replaces", "mode", "columns"
GOOD, SAME = 1, 2  # modes: only rows without an error are taken over; only those whose digest is the same
TAG = "%03x%x"  # number and mode of the attempt, before the digest of each row in the journal
FINGERPRINTS = frozenset({"weights", "vision"})  # settings that are known once the model is on this machine


Earlier: TypeAlias = tuple[dict[str, Any], str]  # a row and its digest ("": not known)


class FileOutput:
    """An output file, locked until `close`.

    `overwrite` discards what is there, once the run begins (what has the final name stays until its end). `record` is
    that of a finished file. Raises OutputError where nothing could be written, or where what is there is not a run's.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, overwrite: bool = False, format_name: str | None = None
    ) -> None:
        self.path = output_place(path, "captions.jsonl")
        self.format = format_of(self.path, format_name)
        journal = self.path.with_name(self.path.name + ".part")
        if not os.path.lexists(journal):
            self._require_free_names()
        self.journal = Journal(journal, discard=overwrite)
        try:
            self._require_form()
            self.record = None if overwrite else self._finished_run()
        except BaseException:
            self.journal.close()
            raise

    def _require_free_names(self) -> None:
        """What is written beside the final file may be left over from a run, and from nothing else."""
        with self._reading():
            if is_of_others(record_name(self.path)):
                raise OutputError(
                    f"{shown_path(record_name(self.path))} is not a file of this program, and would be overwritten:"
                    " move it away, or name another output"
                )

    def _require_form(self) -> None:
        """What the journal says of its run may be valid JSON and not what a run has written."""
        header, summary = self.journal.header, self.journal.summary
        is_head = header is None or (
            isinstance(header.get(SETTINGS), dict)
            and isinstance(header.get(REPLACES), list | None)
            and header.get(MODE) in range(4)
        )
        record = {SETTINGS: {}, **(summary or {})}
        is_end = summary is None or (is_record(record) and record[NUM_ROWS] == sum(1 for _ in self.texts()))
        if not (is_head and is_end):
            raise self._forged()

    def _forged(self) -> OutputError:
        return OutputError(
            f"{shown_path(self.journal.path)} is not as a run of this program leaves it: restore it from a copy, or"
            " discard it with --overwrite"
        )

    def _finished_run(self) -> dict[str, Any] | None:
        """What is known of the run that made the final file, or None where there is none."""
        header, exists = self.journal.header, os.path.lexists(self.path)
        replaces = None if header is None else header.get(REPLACES)
        with self._reading():
            record = self.format.run_of(self.path) if exists else None
            content = content_of(self.path) if exists and replaces is not None else None
        if header is None and exists and record is None:
            raise OutputError(
                f"{shown_path(self.path)} exists already, and is not as a run of this program left it: name another"
                " output, or replace it with --overwrite"
            )
        is_published = self.journal.summary is not None and record is not None
        if content != replaces and not is_published:
            raise OutputError(
                f"{shown_path(self.path)} was changed or removed while its failed rows were being retried: restore it,"
                " or start over with --overwrite"
            )
        return record

    def _reading(self) -> AbstractContextManager[None]:
        """Raise OutputError where the final file cannot be read."""
        return refusing("read", self.path, ", or start over with --overwrite")

    # ---- what is there

    @property
    def settings(self) -> dict[str, Any] | None:
        """Those of the run that is there, finished or not; None: there is none."""
        known = self.journal.header or self.record
        return None if known is None else known[SETTINGS]

    @property
    def is_finished(self) -> bool:
        """The final file is there, and no run is under way."""
        return self.record is not None and self.journal.header is None

    @cached_property
    def attempt(self) -> tuple[int, int]:
        """The number and mode of the attempt that is under way."""
        if self.journal.header is None:
            return 1 - self.is_finished, 0
        last = self.journal.last_text
        return (1, self.journal.header[MODE]) if last is None else self._attempt_of(_tag_of(last))

    @property
    def tag(self) -> str:
        return TAG % self.attempt

    def done(self, columns: Sequence[str]) -> Iterator[Earlier]:
        """The rows of the attempt that is under way, else these columns of the finished file, in order."""
        if self.is_finished:
            return self._finished(columns)
        return self._in_journal(lambda number: number == self.attempt[0])

    def earlier(self, columns: Sequence[str], before: int) -> Iterator[Earlier]:
        """What was done before the attempt of this number. Of several rows with one id, the last is the newest."""
        return chain(self._finished(columns) if self.record else (), self._in_journal(lambda number: number < before))

    def texts(self) -> Iterator[bytes]:
        """Those of the attempt that is under way, as they stand in the journal."""
        return (text for text in self.journal.texts() if self._attempt_of(_tag_of(text))[0] == self.attempt[0])

    def _in_journal(self, is_wanted: Callable[[int], bool]) -> Iterator[Earlier]:
        for row in self.journal.rows() if self.journal.header else ():
            tag = row.pop(DIGEST, "")
            if is_wanted(self._attempt_of(tag)[0]):
                yield row, tag[4:]

    def _attempt_of(self, tag: str | bytes) -> tuple[int, int]:
        try:
            return int(tag[:3], 16), int(tag[3:4], 16)
        except (ValueError, TypeError):
            raise self._forged() from None

    def _finished(self, columns: Sequence[str]) -> Iterator[Earlier]:
        digests = chain(self.format.digests(self.path), repeat(""))
        return zip(self.finished_rows(columns), digests, strict=False)

    def require_same(self, settings: Mapping[str, Any]) -> None:
        """Raise OutputError naming what differs from the run that is there. Settings not known yet are left out."""
        if self.settings is None:
            return
        found = differences(self.settings, json.loads(json.dumps(settings)))
        differing = sorted(found, key=lambda text: (not text.startswith("command: "), text))
        if differing:
            raise OutputError(
                f"{shown_path(self.path)} belongs to a run with other settings ({'; '.join(differing[:4])}): name"
                " another output, or start over with --overwrite"
            )

    def finished_rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """These columns of the rows of the final file."""
        with self._reading():
            yield from self.format.rows(self.path, columns)

    # ---- writing

    def next_attempt(self, mode: int) -> None:
        self.attempt = self.attempt[0] + 1, mode

    def begin(self, settings: Mapping[str, Any], columns: Sequence[Column]) -> None:
        """Make ready for rows. A finished file must stay as it is meanwhile."""
        if self.journal.header is None:
            replaces = None if self.record is None else content_of(self.path)
            shown = {column.name: column.kind for column in columns}
            self.journal.begin({SETTINGS: settings, REPLACES: replaces, MODE: self.attempt[1], COLUMNS: shown})

    def publish(self, columns: Sequence[Column], passthrough: Passthrough) -> None:
        """Give the rows of a journal that has ended their final name, durably."""
        assert self.journal.summary is not None and self.journal.header is not None, self.journal.path
        self.journal.require_unchanged()
        run = {SETTINGS: self.journal.header[SETTINGS], **self.journal.summary}
        write_whole(self.path, self.format, self.texts, columns, passthrough, run)
        self.journal.remove()

    def salvage(self, target: Path) -> dict[str, Any]:
        """What a stopped run has done, as a finished file of fewer rows: those of its last attempt, then others of
        earlier ones. The journal stays unless the file has the name that is its own. Gives the counts."""
        header = self.journal.header
        if header is None or self.journal.last_text is None:
            raise OutputError(f"{shown_path(self.journal.path)} holds no rows: name the .part file of a stopped run")
        require_free(target, ".json")

        def texts() -> Iterator[bytes]:
            ids = UniqueIds()
            for number in range(self.attempt[0], 0, -1):
                for text in self.journal.texts():
                    is_of_it = self._attempt_of(_tag_of(text))[0] == number
                    if is_of_it and (ids.add(json.loads(text)["id"], 0) is None or number == self.attempt[0]):
                        yield text

        columns = [Column(name, kind) for name, kind in header[COLUMNS].items()]
        is_own, is_submission = mark_of(target) == mark_of(self.path), target.suffix.lower() == ".json"
        if is_submission and "answer" not in header[COLUMNS]:
            raise OutputError(
                f"{shown_path(target)}: a .json file is for answers: name one that ends in .jsonl, .parquet or .csv"
            )
        errors = [json.loads(text)["error"] for text in texts()]
        failed = Counter(error.partition(":")[0] for error in errors if error)
        counts = {NUM_ROWS: len(errors), FAILED: dict(failed)}
        settings = {**header[SETTINGS], "--keep": []}
        format_name = VQAV2 if is_submission else None
        with nullcontext() if is_own else locked(target, format_name):
            run = {SETTINGS: settings, **counts}
            write_whole(target, format_of(target, format_name), texts, columns, Passthrough(), run)
        if is_own:
            self.journal.remove()
        return counts

    def close(self) -> None:
        """Let go; what has been written stays."""
        self.journal.close()


# ---- whole files


def write_whole(
    path: Path,
    form: JsonLines,
    texts: Texts,
    columns: Sequence[Column],
    passthrough: Passthrough,
    run: Mapping[str, Any],
) -> None:
    """Durably, in place of what is there. No other run may be writing it."""
    with refusing("finish", path):
        remove_leftovers(path.parent, *map(mark_of, (path, record_name(path))))
        form.write(path, texts, columns, passthrough, run)
        sync_folder(path.parent)


def require_free(path: Path, *also: str) -> None:
    """Raise OutputError where a new result file, of the usual suffixes and these, cannot have this name."""
    if os.path.lexists(path):
        raise OutputError(f"{shown_path(path)} exists already: name another file with -o")
    if path.suffix.lower() not in (*FORMATS, *also):
        raise OutputError(f"{shown_path(path)}: name a result file that ends in .jsonl, .parquet or .csv")


@contextmanager
def locked(path: Path, format_name: str | None = None) -> Iterator[None]:
    """While a file is made from rows that are done, as while a run makes it: what is of others beside it stays."""
    with closing(FileOutput(path, format_name=format_name)) as output:
        if output.journal.header is not None:
            raise OutputError(
                f"{shown_path(output.journal.path)} holds rows of another run: finish that, or name another file with"
                " -o"
            )
        yield


def _tag_of(text: bytes) -> bytes:
    return text.rpartition(DIGEST_START)[2]


# ---- settings


def differences(old: Mapping[str, Any], new: Mapping[str, Any], within: tuple[str, ...] = ()) -> Iterator[str]:
    """`--option: was this, now that` for each setting that differs. A fingerprint may not be known yet, and an option
    that one of the two does not know counts as off."""
    for name in (old.keys() | new.keys()) - (FINGERPRINTS - (old.keys() & new.keys())):
        before, now, path = old.get(name), new.get(name), (*within, name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from differences(before, now, path)
        elif _are_lists_alike(before, now):
            yield from differences(_numbered(before), _numbered(now), path)
        elif before != now and ((name in old and name in new) or before or now):
            yield f"{setting_name(path)}: was {_brief(before)}, now {_brief(now)}"


def setting_name(path: Sequence[str]) -> str:
    """A setting as users know it: by its option, else by its path among the settings."""
    return path[-1] if path[-1].startswith("-") else " ".join(path)


def _are_lists_alike(one: object, other: object) -> bool:
    """Lists of as many mappings."""
    if not (isinstance(one, list) and isinstance(other, list) and len(one) == len(other)):
        return False
    return all(isinstance(item, Mapping) for item in (*one, *other))


def _numbered(items: list[Any]) -> dict[str, Any]:
    return {str(number): item for number, item in enumerate(items, start=1)}


def _brief(value: Any) -> str:
    shown = "unset" if value is None else repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


# ---- places


def output_place(name: str | os.PathLike[str], example: str) -> Path:
    """The path of a file that can be written. Raises OutputError for what cannot, with an `example` of a name."""
    if ADDRESS.match(os.fspath(name)):
        raise OutputError(
            f"{shown_address(os.fspath(name))} is an address: name a file on this machine, and copy it when it is"
            " finished"
        )
    path = Path(name)
    shown = shown_path(path)
    if os.path.isdir(path):
        raise OutputError(f"{shown} is a folder: name a file in it, such as {shown_path(path / example)}")
    if not os.path.isdir(path.parent):
        raise OutputError(f"cannot write {shown}: the folder {shown_path(path.parent)} does not exist: make it first")
    if os.path.islink(path) and not os.path.exists(path):
        raise OutputError(f"{shown} is a broken link: name the file that it should point to")
    return path
