"""A result file of any format -> its rows as a page shows them, and where their images are. Opens no image."""

from __future__ import annotations

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from idefics_cli.columns import finite, json_text, json_value, list_in
from idefics_cli.errors import InputError, RowError
from idefics_cli.evaluation.score import CHOICES, ROW_METRICS, require_columns, text_column_of
from idefics_cli.readers.image_paths import open_root, read_image, shown_images
from idefics_cli.readers.inputs import open_inputs
from idefics_cli.readers.manifest import id_text, is_manifest, manifest_kind
from idefics_cli.readers.references import references_of
from idefics_cli.report.options import ReportOptions
from idefics_cli.rows import ImageSource, InputRow, ReadOptions
from idefics_cli.storage.filenames import shown_place
from idefics_cli.storage.files import File, find_all, local_file

KNOWN = ("id", "image", "question", "score", "tokens", "error", "candidates")
IDS = ("id", "question_id")  # the latter in files for VQAv2's evaluation
ANSWERS = "answers"
MOST_COLUMNS = 100
LONGEST_CELL = 2_000  # characters of a kept value
READING = ReadOptions(needs_image=False, needs_id=False, keep="all")
EXPECTED = "name a file of results (.jsonl, .json, .csv, .parquet), or a folder of their parts"


@dataclass(frozen=True)
class Said:
    """What one run says of a row. `value` is how right that is, 0 to 1; None where nothing is known to be right."""

    text: str | None
    score: float | None
    tokens: int | None
    error: str | None
    candidates: list[list[Any]]  # [text, score, tokens] of each
    value: float | None


@dataclass(frozen=True)
class ResultRow:
    """`images` are as they stand in the file; `references` have how often they are given, and whether they are met."""

    id: str
    images: list[Any]
    question: str | None
    said: Said
    other: Said | None
    references: list[tuple[str, int, bool]]
    choices: list[str]
    kept: list[Any]

    @property
    def shown_image(self) -> str | None:
        return shown_images(self.images) if self.images else None


class Results:
    """The rows of a result file, checked to be one. `text_column` is where its texts are, `kept` are further columns.

    `measure` tells how right a text is; None where nothing is known to be right. `folder` is where the file lies.
    """

    def __init__(self, name: str, options: ReportOptions, stdin: BinaryIO | None = None) -> None:
        self.name, self.folder = shown_place(name), _folder_of_results(name)
        lists = ("candidates", options.answers_column or ANSWERS, options.choices_column or CHOICES)
        same = {field: getattr(options.reading, field) for field in ("limit", "json_key", "delimited")}
        self.inputs = open_inputs([name], replace(READING, list_columns=lists, **same), stdin)
        if not all(self.inputs.are_manifests):
            raise InputError(f"{self.name} holds no results: {EXPECTED}")
        columns = list(self.inputs.passthrough)
        require_columns(columns, options.answers_column, options.choices_column)
        self._answers = options.answers_column or (ANSWERS if ANSWERS in columns else None)
        self._choices = options.choices_column or (CHOICES if CHOICES in columns else None)
        self.text_column = text_column_of(columns, self._answers)
        measure = "vqa_accuracy" if self.text_column == "answer" else "exact_match"
        self.measure = measure if self._answers else None
        self.kept = self._kept(columns, options.reading.keep)
        self.has_question = "question" in columns
        # As CSV has them: what is missing there is an empty text.
        self._are_texts = all(str(of) == "string" for of in self.inputs.passthrough.values())

    def _kept(self, columns: Sequence[str], wanted: Sequence[str]) -> list[str]:
        own = {*KNOWN, *IDS, self.text_column, self._answers, self._choices}
        kept = [name for name in columns if name not in own] if wanted == "all" else list(wanted)
        require_columns(columns, *kept)
        if len(kept) > MOST_COLUMNS:
            raise InputError(f"{self.name} has {len(kept)} further columns: name those to show, as in --keep a,b")
        return kept

    def rows(self, other: OtherRun | None = None) -> Iterator[ResultRow]:
        for row in self.inputs.rows:
            yield self._row(row, other)

    def records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The id and the values of each row."""
        for row in self.inputs.rows:
            yield self._checked(row)

    def _checked(self, row: InputRow) -> tuple[str, Mapping[str, Any]]:
        if row.error is not None:
            raise InputError(f"{self.name}: {row.error.message}; name a result file")
        values = row.values
        if self._are_texts:
            kept = None if values.get("error") else self.text_column  # which may be empty
            values = {name: value or (value if name == kept else None) for name, value in values.items()}
        given = (id_text(values.get(name)) for name in IDS)
        return next(filter(None, given), row.id), values

    def _row(self, row: InputRow, other: OtherRun | None) -> ResultRow:
        row_id, values = self._checked(row)
        choices = _items(values.get(self._choices)) if self._choices else []
        found = values.get(self._answers) if self._answers else None
        references = references_of(found, f"row {row.index + 1}", choices or None)
        said = self.said(values, references)
        return ResultRow(
            row_id,
            _items(values.get("image")),
            _text(values.get("question")),
            said,
            other.said(row_id, references) if other else None,
            self._judged(said.text, references),
            [str(choice) for choice in choices],
            [_cell(values.get(name)) for name in self.kept],
        )

    def said(self, values: Mapping[str, Any], references: Sequence[str]) -> Said:
        text, error = _text(values.get(self.text_column)), _text(values.get("error"))
        value = None
        if references and self.measure:
            value = 0.0 if text is None or error else ROW_METRICS[self.measure](text, references)
        found = values.get("candidates")
        candidates = [_candidate(each) for each in found] if isinstance(found, list | tuple) else []
        return Said(text, _number(values.get("score")), _whole(values.get("tokens")), error, candidates, value)

    def _judged(self, text: str | None, references: Sequence[str]) -> list[tuple[str, int, bool]]:
        """The references, the commonest first. Where all are the same, VQA accuracy compares them to the letter."""
        measure = ROW_METRICS[self.measure or "exact_match"]
        counts = Counter(references)
        beside = 2 if len(counts) == 1 and len(references) > 1 else 1
        return [
            (reference, times, text is not None and measure(text, [reference] * beside) > 0)
            for reference, times in counts.most_common()
        ]


class OtherRun:
    """The rows of the other result file, by id, on the disk: neither its size nor its order matters."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self._rows = sqlite3.connect("")  # a temporary file that has no name
        self._rows.execute("CREATE TABLE run (id TEXT PRIMARY KEY, row TEXT) WITHOUT ROWID")
        columns = (results.text_column, "score", "tokens", "error", "candidates")
        pairs = (
            (row_id, json_text({name: values.get(name) for name in columns}).decode())
            for row_id, values in results.records()
        )
        self._rows.executemany("INSERT OR IGNORE INTO run VALUES (?, ?)", pairs)
        self.total = self._rows.execute("SELECT count(*) FROM run").fetchone()[0]
        self.met = 0

    def said(self, row_id: str, references: Sequence[str]) -> Said | None:
        """None where it has no such row."""
        found = self._rows.execute("SELECT row FROM run WHERE id = ?", (row_id,)).fetchone()
        if found is None:
            return None
        self.met += 1
        return self.results.said(json.loads(found[0]), references)

    def close(self) -> None:
        self._rows.close()


def _folder_of_results(name: str) -> File | None:
    """None for stdin. Raises InputError for files whose names tell that they hold no results."""
    files = [] if name == "-" else find_all(name)
    for file in files:
        if not file.is_folder and (not is_manifest(file.name) or manifest_kind(file.name) == "tar"):
            raise InputError(f"{file.name} is not a file of results: {EXPECTED}")
    return next((file if file.is_folder else file.parent for file in files), None)


# ---- values


def _items(value: Any) -> list[Any]:
    """A list, also where it stands in a text; one value is a list of it."""
    found = list_in(value)
    found = value if isinstance(found, RowError) else found
    return list(found) if isinstance(found, list | tuple) else [] if found in (None, "", b"") else [found]


def _text(value: Any) -> str | None:
    is_text = value is None or isinstance(value, str)
    return value if is_text else json.dumps(value, ensure_ascii=False, default=json_value)


def _number(value: Any) -> float | None:
    try:
        return finite(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else round(number)


def _candidate(value: Any) -> list[Any]:
    if not isinstance(value, Mapping):
        return [_text(value), None, None]
    return [_text(value.get("text")), _number(value.get("score")), _whole(value.get("tokens"))]


def _cell(value: Any) -> Any:
    """A kept value as the page shows and filters it: numbers, truth values, or a text that is not endless."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if abs(value) < 2**53 else str(value) if value == value else None
    if isinstance(value, bytes):
        return f"({len(value):,} bytes)"
    text = _text(value)
    return text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]}…"


# ---- images


class ImagePlaces:
    """Where the images of rows are that hold paths: below `--image-root`, else below the file's folder or this one."""

    def __init__(self, folder: File | None, options: ReadOptions) -> None:
        self._resolvers = [open_root(folder or local_file("."), options, str)]
        if options.image_root is None and folder is not None and folder.is_local:
            self._resolvers.append(open_root(local_file(os.getcwd()), options, str))

    def source(self, value: Any) -> ImageSource | RowError:
        found = [read_image(value, resolve) for resolve in self._resolvers]
        there = (source for source in found if not isinstance(source, Path | RowError) or _is_there(source))
        return next(there, found[0])


def _is_there(source: Path | RowError) -> bool:
    return isinstance(source, Path) and source.exists()


class ImagesOfInput:
    """The images of the run's own input, which has its rows in the order of the results, or nearly so."""

    def __init__(self, name: str, options: ReadOptions) -> None:
        self._name, self._inputs = name, open_inputs([name], replace(options, keep=(), limit=None))
        self._rows: Iterator[InputRow] = self._inputs.rows
        self._row: InputRow | None = None
        self._known: set[str] | None = None

    def sources(self, row_id: str) -> Sequence[ImageSource | RowError]:
        wanted = {row_id, row_id.rpartition("#")[0]}  # one of several questions has its number added
        while self._known is None or not self._known.isdisjoint(wanted):
            if self._row is not None and self._row.id in wanted:
                return self._row.sources or [self._row.error or RowError("row_invalid", "this row has no image")]
            self._row = next(self._rows, None)
            if self._row is None:  # gone through: is it there at all?
                self._known = self._known or {row.id for row in self._inputs.restarted()}
                self._rows = self._inputs.restarted()
        return [RowError("image_missing", f"{shown_place(self._name)} has no row of this id")]
