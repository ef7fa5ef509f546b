"""How right the texts of a result file are: VQA accuracy, exact match and CIDEr against a column of references.

Knows no model and no images, and prints nothing. A row with an error is a wrong text; a row without references is left
out; both are counted. Rows are read one by one; only CIDEr keeps texts, as it weighs words by the references of all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Literal

from idefics_cli.errors import InputError, RowError
from idefics_cli.evaluation.metrics import cider, exact_match, normalize_answer, require_cider, vqa_accuracy
from idefics_cli.evaluation.options import ScoreOptions
from idefics_cli.prompts.choices import ChoiceOptions
from idefics_cli.readers.jsonl import open_json_lines
from idefics_cli.readers.manifest import is_manifest, open_table
from idefics_cli.readers.parts import folder_parts
from idefics_cli.readers.references import references_of
from idefics_cli.readers.source import ALL
from idefics_cli.readers.table import OWN_ERROR, Table, with_lists
from idefics_cli.rows import ReadOptions
from idefics_cli.storage.filenames import counted, listed, printable, shortened
from idefics_cli.storage.files import File, find

if TYPE_CHECKING:
    from rich.table import Table

AUTOMATIC_METRIC = {"answer": "vqa", "caption": "cider", "text": "exact"}
TEXT_COLUMNS = tuple(AUTOMATIC_METRIC)
METRICS = {"vqa": ("vqa_accuracy", "exact_match"), "cider": ("cider", "exact_match"), "exact": ("exact_match",)}
ROW_METRICS: dict[str, Callable[..., float]] = {"vqa_accuracy": vqa_accuracy, "exact_match": exact_match}
TITLES = {"vqa_accuracy": "VQA accuracy %", "cider": "CIDEr ×100", "exact_match": "exact match %"}
CHOICES = "choices"
NO_GROUP = "(none)"


@dataclass
class GroupScores:
    """Sums over `rows`; the `errors` among them count as wrong."""

    rows: int = 0
    errors: int = 0
    sums: Counter[str] = field(default_factory=Counter)

    @property
    def values(self) -> dict[str, float]:
        """Means. VQA accuracy and exact match lie in 0..1, CIDEr in 0..10."""
        return {name: total / self.rows for name, total in self.sums.items()}

    def as_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "errors": self.errors, **self.values}


class Scores:
    """Takes result rows as they come (`add`); after `finish` it says how right they were, together and by groups.

    `unscored` rows had no references, `single_reference` rows just one, `not_among_choices` rows none that is one of
    their choices (None: no row had choices).
    """

    def __init__(self, options: ScoreOptions, text_column: str) -> None:
        automatic = AUTOMATIC_METRIC[text_column]
        self.options, self.text_column = options, text_column
        self._choices = ChoiceOptions(options.choices, None if options.choices else options.choices_column or CHOICES)
        self.metrics = METRICS[automatic if options.metric == "auto" else options.metric]
        self.total = GroupScores()
        self.groups: dict[str, GroupScores] = {}  # by their values as JSON; after `finish` by their names
        self.unscored = self.single_reference = 0
        self.not_among_choices: int | None = None
        self._captions: list[tuple[list[GroupScores], str, list[str]]] = []
        if "cider" in self.metrics:
            require_cider(options.tokenization)

    def add(self, row: Mapping[str, Any]) -> None:
        """Raises InputError for references that are neither texts nor structs that hold one."""
        place = f"row {self.unscored + self.total.rows + 1}"
        choices = self._choices.of(row)
        references = references_of(row.get(self.options.answers_column), place, choices)
        if not references:
            self.unscored += 1
            return
        self.single_reference += len(references) == 1
        if isinstance(choices, list | tuple):
            known = {normalize_answer(str(choice)) for choice in choices}
            astray = known.isdisjoint(map(normalize_answer, references))
            self.not_among_choices = (self.not_among_choices or 0) + astray
        text = row.get(self.text_column)
        failed = text is None or row.get("error") is not None  # wrong even beside an empty reference
        measures = {name: measure for name, measure in ROW_METRICS.items() if name in self.metrics}
        values = {name: 0.0 if failed else measure(str(text), references) for name, measure in measures.items()}
        groups = self._groups_of(row)
        for group in groups:
            group.rows += 1
            group.errors += failed
            group.sums.update(values)  # a Counter's update adds
        if "cider" in self.metrics:
            self._captions.append((groups, "" if failed else str(text), references))

    def _groups_of(self, row: Mapping[str, Any]) -> list[GroupScores]:
        if self.options.by is None:
            return [self.total]
        key = json.dumps(row.get(self.options.by), default=str)
        return [self.total, self.groups.setdefault(key, GroupScores())]

    def finish(self) -> Scores:
        """Raises InputError when no row could be scored."""
        if not self.total.rows:
            raise InputError(
                f"none of the {self.unscored} rows has references in {self.options.answers_column!r}: "
                "name another --answers-column"
            )
        if self._captions:
            rows, texts, references = zip(*self._captions, strict=True)
            for groups, value in zip(rows, cider(texts, references, self.options.tokenization), strict=True):
                for group in groups:
                    group.sums["cider"] += value
            self._captions.clear()
        names = _group_names(self.groups)
        self.groups = {names[key]: self.groups[key] for key in sorted(names, key=names.__getitem__)}
        return self

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        report = self.total.as_dict() | {"unscored": self.unscored, "single_reference": self.single_reference}
        if self.not_among_choices is not None:
            report["not_among_choices"] = self.not_among_choices
        report["answers_column"] = self.options.answers_column
        if "cider" in self.metrics:
            report["tokenization"] = self.options.tokenization
        if self.options.by is not None:
            report["by"] = self.options.by
            report["groups"] = {name: group.as_dict() for name, group in self.groups.items()}
        return report


def _group_names(keys: Iterable[str]) -> Mapping[str, str]:
    """What people see of a group, by its value as JSON: texts without quotes, unless two would be called the same."""
    quoted = {key: NO_GROUP if key == "null" else key for key in keys}
    plain = {key: json.loads(key) if key.startswith('"') else name for key, name in quoted.items()}
    return plain if len(set(plain.values())) == len(plain) else quoted


def score_results(path: str | os.PathLike[str], options: ScoreOptions | None = None) -> Scores:
    """Score a result file: a manifest by its name, JSON lines under any other. Raises IdeficsError for what cannot be
    scored."""
    options = options or ScoreOptions()
    file = find(os.fspath(path))
    files = folder_parts(file, True, str) if file.is_folder else [file]
    if not files:
        raise InputError(f"{path} is a folder without results: name a result file (.jsonl, .parquet, .csv)")
    tables = (_open_results(each.found(), options) for each in files)
    table = next(tables)
    scores = Scores(options, find_text_column(table.columns, options))
    for each in chain([table], tables):
        _add_rows(scores, each, str(path))
    return scores.finish()


def _open_results(file: File, options: ScoreOptions) -> Table:
    reading = ReadOptions(delimited=options.delimited)
    return open_table(file, reading) if is_manifest(file.name) else open_json_lines(file, compressed=False)


def _add_rows(scores: Scores, table: Table, path: str) -> None:
    options = scores.options
    lists = (options.answers_column, options.choices_column or CHOICES)
    wanted = dict.fromkeys((scores.text_column, "error", options.by, *lists))
    for _, row in table.records(ALL, [name for name in wanted if name in table.columns]):
        row = row if isinstance(row, RowError) else with_lists(row, lists, table.is_text and not row.get("error"))
        error = row if isinstance(row, RowError) else row.get(OWN_ERROR)
        if error is not None:
            raise InputError(f"{path}: {error.message}; name a result file")
        if table.is_text:
            row = {name: value or (value if name == scores.text_column else None) for name, value in row.items()}
        scores.add(row)


def closing_tokenization() -> Literal["ptb", "treebank"]:
    """How a run scores its own file: as the published figures do, where Java is installed."""
    return "treebank" if shutil.which("java") is None else "ptb"


def find_text_column(columns: Sequence[str], options: ScoreOptions) -> str:
    """The column to score. Raises InputError if a column is missing."""
    require_columns(columns, options.answers_column, options.choices_column, options.by)
    return text_column_of(columns, options.answers_column)


def require_columns(columns: Sequence[str], *names: str | None) -> None:
    for name in names:
        if name is not None and name not in columns:
            raise InputError(
                f"the results have no column {name!r}: use one of {listed(columns)}, or make them with --keep {name}"
            )


def text_column_of(columns: Sequence[str], answers_column: str | None) -> str:
    """The text that a run has written, else `answer`, `caption` or `text`. Raises InputError where there is none."""
    # A run writes its own text just before its score, and pass-through columns after both.
    own = [name for name, following in pairwise(columns) if following == "score" and name in TEXT_COLUMNS]
    texts = [name for name in (*own, *TEXT_COLUMNS) if name in columns and name != answers_column]
    if not texts:
        raise InputError(f"the results have no column {' or '.join(TEXT_COLUMNS)}, but only {listed(columns)}")
    return texts[0]


def score_table(scores: Scores) -> Table:
    """A line for each group and one for all rows; figures in hundredths, as papers print them."""
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{counted(scores.total.rows, 'row')} against {scores.options.answers_column!r}")
    table = Table(title=title, caption=_notes(scores))
    table.add_column(Text(printable(scores.options.by or "")))  # a Text: brackets in a name are not markup
    for name in ("rows", "errors", *(TITLES[metric] for metric in scores.metrics)):
        table.add_column(name, justify="right")
    for name, group in (*scores.groups.items(), ("all", scores.total)):
        figures = (f"{100 * group.values[metric]:.2f}" for metric in scores.metrics)
        table.add_row(Text(printable(shortened(name))), str(group.rows), str(group.errors), *figures)
    return table


def _notes(scores: Scores) -> str | None:
    notes = []
    if scores.unscored:
        notes.append(f"left out: {counted(scores.unscored, 'row')} without references")
    if scores.not_among_choices:
        notes.append(f"warning: in {counted(scores.not_among_choices, 'row')} no reference is among the choices")
    if scores.single_reference and "vqa_accuracy" in scores.metrics:
        notes.append(f"{counted(scores.single_reference, 'row')} with one reference: right if equal when normalised")
    if "cider" in scores.metrics:
        notes.append(f"words by the {scores.options.tokenization} tokenizer")
    return "\n".join(notes) or None
