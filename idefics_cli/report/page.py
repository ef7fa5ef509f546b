"""Result rows -> one HTML page that needs nothing else: template, style and script stand beside this file.

The page is written as rows come, a chunk of them at a time: neither their number nor their size decides the memory.
A chunk is three JSON texts within it: the columns, which the script reads at once, and details and thumbnails, which it
reads when they are shown. No character of a row can end such a text or begin a tag, and the page's own policy lets
nothing run but its script and nothing be fetched but images beside it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from idefics_cli import __version__
from idefics_cli.columns import json_text, strict_json
from idefics_cli.errors import OutputError, RowError
from idefics_cli.images.thumbnail import Thumbnails
from idefics_cli.images.worker_pool import WorkerPool
from idefics_cli.report.options import ReportOptions
from idefics_cli.report.results import ImagePlaces, ImagesOfInput, OtherRun, ResultRow, Results, Said
from idefics_cli.rows import ImageSource
from idefics_cli.writers.formats import mark_of, remove_leftovers, replacing
from idefics_cli.writers.journal import refusing, shown_path, sync_folder
from idefics_cli.writers.output_file import output_place
from idefics_cli.writers.writers import write_through

CHUNK_ROWS, CHUNK_BYTES = 256, 8 << 20
IN_FLIGHT = 4  # images for each worker
WEB_IMAGE = re.compile(r"\.(apng|avif|bmp|gif|ico|jfif|jpe?g|png|webp)$", re.IGNORECASE)
PARTS_OF_SCRIPT = {character: rf"\u{ord(character):04x}" for character in "<>&\u2028\u2029"}

Source: TypeAlias = "ImageSource | RowError | None"  # None: the row has no image


@dataclass
class Counts:
    """What became of the rows' images; `reasons` have an example each."""

    rows: int = 0
    without_image: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def num_hidden(self) -> int:
        return self.without_image.total()

    def add(self, reason: str | None) -> None:
        self.rows += 1
        if reason is not None:
            code, _, message = reason.partition(": ")
            self.without_image[code] += 1
            self.reasons.setdefault(code, message)


class Page:
    """The page of a result file. Everything named is checked before the first piece of it is made."""

    def __init__(self, results: str, options: ReportOptions, stdin: BinaryIO | None = None) -> None:
        self.options, self.counts = options, Counts()
        self.results = Results(results, options, stdin)
        self.other = None if options.compare is None else OtherRun(Results(options.compare, options))
        self._places = ImagePlaces(self.results.folder, options.reading)
        self._input = None if options.images_from is None else ImagesOfInput(options.images_from, options.reading)
        self._folder = None if options.output == "-" else os.path.realpath(os.path.dirname(options.output) or ".")

    def pieces(self, on_row: Callable[[], None] = lambda: None) -> Iterator[str]:
        """The page's text."""
        loader = jinja2.FileSystemLoader(Path(__file__).parent)
        environment = jinja2.Environment(loader=loader, autoescape=True, keep_trailing_newline=True)
        style, script = (Markup((Path(__file__).parent / name).read_text()) for name in ("page.css", "page.js"))
        digest = hashlib.sha256()
        yield from environment.get_template("page.html").generate(
            title=self.results.name,
            version=__version__,
            policy=_policy(style, script),
            style=style,
            script=script,
            about=embedded(self._about()),
            chunks=self._chunks(digest, on_row),
            end=lambda: embedded({"digest": digest.hexdigest()[:16], "unmatched": self._unmatched()}),
        )

    def _about(self) -> dict[str, Any]:
        results, other = self.results, self.other
        return {
            "title": results.name,
            "text": results.text_column,
            "question": results.has_question,
            "measure": results.measure,
            "kept": results.kept,
            "link": self.options.link,
            "other": other and other.results.name,
        }

    def _unmatched(self) -> int:
        """Rows that the other run alone has."""
        return self.other.total - self.other.met if self.other else 0

    # ---- rows

    def _chunks(self, digest: Any, on_row: Callable[[], None]) -> Iterator[dict[str, Markup]]:
        chunk = Chunk(len(self.results.kept))
        with closing(self._illustrated()) as rows:
            for row, sources, thumbnail in rows:
                links = [self._link(source) for source in sources]
                reason = self._reason(sources, links, thumbnail)
                self.counts.add(reason)
                digest.update(json_text({"row": [row.id, row.said.text]}))
                chunk.add(row, [link for link in links if link], thumbnail, reason)
                on_row()
                if chunk.is_full:
                    yield chunk.texts()
                    chunk = Chunk(len(self.results.kept))
        yield chunk.texts()

    def _illustrated(self) -> Iterator[tuple[ResultRow, list[Source], bytes | RowError | None]]:
        """Each row with its images' places, and a thumbnail of the first."""
        rows = ((row, self._sources(row)) for row in self.results.rows(self.other))
        if self.options.link:
            yield from ((row, sources, None) for row, sources in rows)
            return
        options = self.options.images
        with ExitStack() as stack:
            threads = stack.enter_context(ThreadPoolExecutor(options.num_workers))
            pool = stack.enter_context(WorkerPool(Thumbnails(self.options.thumbnail), options))
            waiting: deque[Any] = deque()
            for row, sources in rows:
                waiting.append((row, sources, threads.submit(partial(_thumbnail, pool), sources)))
                if len(waiting) > IN_FLIGHT * options.num_workers:
                    yield _answered(waiting.popleft())
            while waiting:
                yield _answered(waiting.popleft())

    def _sources(self, row: ResultRow) -> list[Source]:
        if self._input is not None:
            return list(self._input.sources(row.id))
        return [self._places.source(value) for value in row.images]

    def _link(self, source: Source) -> str | None:
        """Where the page finds the image's file, if that is one which browsers show."""
        if not isinstance(source, Path) or not WEB_IMAGE.search(source.name):
            return None
        path = os.path.realpath(source)
        if self._folder is None:
            return f"file://{quote(os.fsencode(path))}"
        return quote(os.fsencode(os.path.relpath(path, self._folder)))

    def _reason(self, sources: list[Source], links: list[str | None], thumbnail: bytes | RowError | None) -> str | None:
        """Why there is nothing to show; an empty text where the row names no image."""
        if isinstance(thumbnail, RowError):
            return str(thumbnail)
        if thumbnail is not None or (links and links[0]):
            return None
        first = next(iter(sources), None)
        if isinstance(first, RowError):
            return str(first)
        return (
            "no image: the row names none" if first is None else "no file: --link shows only files, of browsers' kinds"
        )


def _thumbnail(pool: WorkerPool, sources: list[Source]) -> bytes | RowError | None:
    first = next(iter(sources), None)
    return first if first is None or isinstance(first, RowError) else pool.made(first)


def _answered(waiting: tuple[ResultRow, list[Source], Any]) -> tuple[ResultRow, list[Source], bytes | RowError | None]:
    row, sources, thumbnail = waiting
    return row, sources, thumbnail.result()


class Chunk:
    """Rows as the page holds them, by columns. A column without values is null."""

    def __init__(self, num_kept: int) -> None:
        own = ("id", "question", "link", "missing", *(f"{name}{run}" for run in ("", "2") for name in SAID))
        self._columns: dict[str, list[Any]] = {name: [] for name in own}
        self._kept: list[list[Any]] = [[] for _ in range(num_kept)]
        self._details: list[dict[str, Any]] = []
        self._thumbnails: list[str] = []
        self._bytes = 0

    @property
    def is_full(self) -> bool:
        return len(self._details) >= CHUNK_ROWS or self._bytes > CHUNK_BYTES

    def add(self, row: ResultRow, links: list[str], thumbnail: bytes | RowError | None, reason: str | None) -> None:
        values = {"id": row.id, "question": row.question, "link": next(iter(links), None), "missing": reason}
        values |= _said(row.said, "") | _said(row.other, "2")
        for name, column in self._columns.items():
            column.append(values[name])
        for column, value in zip(self._kept, row.kept, strict=True):
            column.append(value)
        details = {
            "image": row.shown_image,
            "links": links[1:],
            "candidates": row.said.candidates,
            "candidates2": row.other.candidates if row.other else [],
            "references": row.references,
            "choices": row.choices,
        }
        self._details.append({name: value for name, value in details.items() if value})
        self._thumbnails.append(base64.b64encode(thumbnail).decode() if isinstance(thumbnail, bytes) else "")
        self._bytes += sum(len(text or "") for text in (row.said.text, row.question, self._thumbnails[-1]))

    def texts(self) -> dict[str, Markup]:
        columns: dict[str, Any] = {name: _or_null(column) for name, column in self._columns.items()}
        return {
            "rows": embedded({**columns, "kept": self._kept}),
            "details": embedded({"rows": self._details}),
            "thumbnails": embedded({"rows": self._thumbnails if any(self._thumbnails) else []}),
        }


SAID = ("text", "score", "tokens", "error", "value")


def _said(said: Said | None, run: str) -> dict[str, Any]:
    return {f"{name}{run}": getattr(said, name, None) for name in SAID}


def _or_null(column: list[Any]) -> list[Any] | None:
    return column if any(value is not None for value in column) else None


def embedded(value: Any) -> Markup:
    """JSON within a page, of which nothing is a tag, a comment or the end of a script."""
    text = strict_json(json_text(value)).decode()
    for character, escape in PARTS_OF_SCRIPT.items():
        text = text.replace(character, escape)
    return Markup(text)


def _policy(style: str, script: str) -> str:
    """Only this style and this script; images from the page itself and from files beside it; nothing else at all."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    style_hash, script_hash = (f"'sha256-{each}'" for each in hashes)
    return (
        f"default-src 'none'; style-src {style_hash}; script-src {script_hash}; img-src data: file: 'self';"
        " base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def write_report(
    results: str,
    options: ReportOptions,
    stdin: BinaryIO | None = None,
    stdout: BinaryIO | None = None,
    on_row: Callable[[], None] = lambda: None,
) -> Counts:
    """Make the page, and give it its name when it is whole. Raises IdeficsError for what cannot be shown or written."""
    path = None if options.output == "-" else _free_place(options)
    page = Page(results, options, stdin)
    with closing(page.pieces(on_row)) as texts:
        pieces = (text.encode() for text in texts)
        if path is None:
            for piece in pieces:
                write_through(stdout, piece)
        else:
            _write_file(path, pieces)
    return page.counts


def _free_place(options: ReportOptions) -> Path:
    path = output_place(options.output, "report.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{shown_path(path)}: a report is a page: name a file that ends in .html, or - for stdout")
    if os.path.lexists(path) and not options.overwrite:
        raise OutputError(f"{shown_path(path)} exists already: name another output, or replace it with --overwrite")
    return path


def _write_file(path: Path, pieces: Iterable[bytes]) -> None:
    with refusing("finish", path):
        remove_leftovers(path.parent, mark_of(path))
        with replacing(path) as file:
            file.writelines(pieces)
        sync_folder(path.parent)
