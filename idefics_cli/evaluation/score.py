"""How right the texts of a result file are: VQA accuracy, exact match and CIDEr against a column of references.

Rows in, numbers out: this module knows no model and no images, and prints nothing. A row with an error is a wrong
text and is counted apart; a row without references cannot be scored and is counted apart too. Rows are read one by one.
VQA accuracy and exact match keep sums only; CIDEr weighs words by all the references, so it keeps every caption.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from idefics_cli.errors import InputError
from idefics_cli.evaluation.metrics import cider, exact_match, require_cider, vqa_accuracy
from idefics_cli.readers.references import references_of
from idefics_cli.validation import Help

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile
    from rich.table import Table

AUTOMATIC_METRIC = {"answer": "vqa", "caption": "cider", "text": "exact"}
TEXT_COLUMNS = tuple(AUTOMATIC_METRIC)
METRICS = {
    "vqa": ("vqa_accuracy", "exact_match"),
    "cider": ("cider", "exact_match"),
    "exact": ("exact_match",),
}
ROW_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "vqa_accuracy": vqa_accuracy,
    "exact_match": exact_match,
}
TITLES = {"vqa_accuracy": "VQA accuracy %", "cider": "CIDEr ×100", "exact_match": "exact match %"}
NO_GROUP = "(none)"
ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class ScoreOptions:
    """`answers_column` holds the references, `by` the groups.

    `metric` "auto" is vqa for answers, cider for captions, exact for others. `tokenization` is how CIDEr's words
    are found: "ptb" as the published figures do, with Java; "treebank" without.
    """

    answers_column: Annotated[str, Help("Column of the references, a list of texts", metavar="NAME")] = "answers"
    by: Annotated[str | None, Help("Group scores by this column", metavar="NAME")] = None
    metric: Annotated[
        Literal["auto", "vqa", "cider", "exact"],
        Help("auto: VQA accuracy for answers, CIDEr for captions; exact match always"),
    ] = "auto"
    tokenization: Annotated[
        Literal["ptb", "treebank"],
        Help("How CIDEr splits words; ptb: as published, needs Java; treebank: without Java"),
    ] = "ptb"


@dataclass(frozen=True)
class GroupScores:
    """Mean values over `rows`; the `errors` among them count as wrong. VQA accuracy and exact match lie in 0..1."""

    rows: int
    errors: int
    values: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "errors": self.errors, **self.values}


@dataclass(frozen=True)
class Scores:
    """What became of a result file. `unscored` rows had no references, `single_reference` rows just one."""

    options: ScoreOptions
    metrics: tuple[str, ...]
    total: GroupScores
    groups: Mapping[str, GroupScores]
    unscored: int
    single_reference: int

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        report = self.total.as_dict() | {"unscored": self.unscored, "single_reference": self.single_reference}
        report["answers_column"] = self.options.answers_column
        if "cider" in self.metrics:
            report["tokenization"] = self.options.tokenization
        if self.options.by is not None:
            report["by"] = self.options.by
            report["groups"] = {name: group.as_dict() for name, group in self.groups.items()}
        return report


def score_results(path: str | os.PathLike[str], options: ScoreOptions | None = None) -> Scores:
    """Score a result file (JSONL or Parquet, .gz too for JSONL). Raises IdeficsError for what cannot be scored."""
    options = options or ScoreOptions()
    file = open_results(Path(path))
    scorer = Scorer(options, find_text_column(file.columns, options))
    for row in file.rows((scorer.text_column, "error", options.answers_column, options.by)):
        scorer.add(row)
    return scorer.scores()


def closing_tokenization() -> Literal["ptb", "treebank"]:
    """As the published figures do, where there is a Java for it."""
    return "treebank" if shutil.which("java") is None else "ptb"


def find_text_column(columns: Sequence[str], options: ScoreOptions) -> str:
    """The column with the texts to score: the one that a run has written, else `answer`, `caption` or `text`.

    Raises InputError if a column is missing.
    """
    for name in (options.answers_column, options.by):
        if name is not None and name not in columns:
            raise InputError(f"there is no column {name!r} in the results: they have {_listed(columns)}")
    # A run's own text stands before its score; a kept column of such a name stands behind both.
    own = [name for name, following in pairwise(columns) if following == "score" and name in TEXT_COLUMNS]
    texts = [name for name in (*own, *TEXT_COLUMNS) if name in columns and name != options.answers_column]
    if not texts:
        raise InputError(
            f"there is no column {' or '.join(TEXT_COLUMNS)} to score: the results have {_listed(columns)}"
        )
    return texts[0]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "no columns"


# ---- rows -> numbers


@dataclass
class _Tally:
    rows: int = 0
    errors: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def count(self, failed: bool) -> None:
        self.rows += 1
        self.errors += failed

    def add(self, metric: str, value: float) -> None:
        self.sums[metric] = self.sums.get(metric, 0.0) + value

    def means(self) -> GroupScores:
        return GroupScores(self.rows, self.errors, {name: total / self.rows for name, total in self.sums.items()})


class Scorer:
    """Takes result rows as they come (`add`) and says at the end how right they were (`scores`)."""

    def __init__(self, options: ScoreOptions, text_column: str) -> None:
        automatic = AUTOMATIC_METRIC[text_column]
        self.options, self.text_column = options, text_column
        self.metrics = METRICS[automatic if options.metric == "auto" else options.metric]
        self._total, self._groups = _Tally(), {}
        self._seen = self._unscored = self._single = 0
        self._captions: list[tuple[list[_Tally], str, list[str]]] = []  # kept for CIDEr only
        if "cider" in self.metrics:
            require_cider(options.tokenization)

    def add(self, row: Mapping[str, Any]) -> None:
        """Raises InputError for references that are neither texts nor structs that hold one."""
        self._seen += 1
        references = references_of(row.get(self.options.answers_column), f"row {self._seen}")
        if not references:
            self._unscored += 1
            return
        self._single += len(references) == 1
        text = row.get(self.text_column)
        failed = text is None or row.get("error") is not None
        tallies = self._tallies(row)
        for tally in tallies:
            tally.count(failed)
        self._score(tallies, "" if failed else str(text), references, failed)

    def _score(self, tallies: list[_Tally], text: str, references: list[str], failed: bool) -> None:
        for metric in self.metrics:
            if metric == "cider":
                self._captions.append((tallies, text, references))
                continue
            value = 0.0 if failed else ROW_METRICS[metric](text, references)
            for tally in tallies:
                tally.add(metric, value)

    def _tallies(self, row: Mapping[str, Any]) -> list[_Tally]:
        if self.options.by is None:
            return [self._total]
        key = json.dumps(row.get(self.options.by), default=str)
        return [self._total, self._groups.setdefault(key, _Tally())]

    def scores(self) -> Scores:
        """Raises InputError when no row could be scored."""
        if not self._total.rows:
            raise InputError(
                f"none of the {self._seen} rows has references in {self.options.answers_column!r}: "
                "name their column with --answers-column"
            )
        self._add_cider()
        names = _group_names(self._groups)
        groups = {names[key]: self._groups[key].means() for key in sorted(names, key=names.__getitem__)}
        return Scores(self.options, self.metrics, self._total.means(), groups, self._unscored, self._single)

    def _add_cider(self) -> None:
        captions, self._captions = self._captions, []
        if captions:
            values = cider([text for _, text, _ in captions], [r for _, _, r in captions], self.options.tokenization)
            for (tallies, _, _), value in zip(captions, values, strict=True):
                for tally in tallies:
                    tally.add("cider", value)


def _group_names(keys: Iterable[str]) -> Mapping[str, str]:
    """What people see of a group, by its value as JSON: texts without quotes, unless two would be called the same."""
    quoted = {key: NO_GROUP if key == "null" else key for key in keys}
    plain = {key: json.loads(key) if key.startswith('"') else name for key, name in quoted.items()}
    return plain if len(set(plain.values())) == len(plain) else quoted


# ---- result files


@dataclass(frozen=True)
class ResultFile:
    """An opened result file: its columns, and its rows with those of them that are wanted."""

    columns: tuple[str, ...]
    rows: Callable[[Iterable[str | None]], Iterator[Mapping[str, Any]]]


def open_results(path: Path) -> ResultFile:
    """A `.parquet`, or JSON lines under any other name. Raises InputError for a file that is neither."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a result file (.jsonl or .parquet)")
    return _open_parquet(path) if path.suffix == ".parquet" else _open_json_lines(path)


def _open_json_lines(path: Path) -> ResultFile:
    first = next(_json_rows(path), None)
    if first is None:
        raise InputError(f"{path} holds no rows: name a finished result file")
    return ResultFile(tuple(first), lambda wanted: _json_rows(path))


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_row(line, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path} ({error}): name a whole result file") from error


def _json_row(line: bytes, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not JSON ({type(error).__name__}): name a result file") from error
    if not isinstance(row, dict):
        raise InputError(f"{place}: not a JSON object: name a result file")
    return row


def _open_parquet(path: Path) -> ResultFile:
    with _parquet_file(path) as file:
        columns = tuple(file.schema_arrow.names)
    return ResultFile(columns, lambda wanted: _parquet_rows(path, [name for name in wanted if name in columns]))


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    with _parquet_file(path) as file:
        for batch in file.iter_batches(ROWS_AT_A_TIME, columns=columns, use_threads=False):
            yield from batch.to_pylist()


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[ParquetFile]:
    """Opened so that little of it is in memory at a time. Whatever is wrong with it is an InputError."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"cannot read {path} ({error}): name a whole result file") from error


# ---- for people


def score_table(scores: Scores) -> Table:
    """A line for each group and one for all rows; figures in hundredths, as papers print them."""
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{scores.total.rows} rows against {scores.options.answers_column!r}")
    table = Table(title=title, caption=_notes(scores))
    table.add_column(Text(scores.options.by or ""))  # a Text: brackets in a name are not markup
    for name in ("rows", "errors", *(TITLES[metric] for metric in scores.metrics)):
        table.add_column(name, justify="right")
    for name, group in (*scores.groups.items(), ("all", scores.total)):
        figures = (f"{100 * group.values[metric]:.2f}" for metric in scores.metrics)
        table.add_row(Text(name), str(group.rows), str(group.errors), *figures)
    return table


def _notes(scores: Scores) -> str | None:
    notes = []
    if scores.unscored:
        notes.append(f"{scores.unscored} rows without references are left out")
    if scores.single_reference and "vqa_accuracy" in scores.metrics:
        notes.append(f"{scores.single_reference} rows have one reference: right if equal when normalised")
    if "cider" in scores.metrics:
        notes.append(f"words by the {scores.options.tokenization} tokenizer")
    return "\n".join(notes) or None
