"""What a run does with its rows, as the run sees it: a task, the row of its result, and who follows the run.

`run.py` drives a `Task`; captions, answers, embeddings and whatever else has rows and a model are tasks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from idefics_cli.errors import RowError
from idefics_cli.rows import ImageSource, InputRow

if TYPE_CHECKING:
    from idefics_cli.checkpoint.request import ModelRequest
    from idefics_cli.columns import Column
    from idefics_cli.engine.prompt_source import PromptSource
    from idefics_cli.images.worker_pool import WorkerPool
    from idefics_cli.loaded_model import LoadedModel
    from idefics_cli.pipeline.prefetch import Steps
    from idefics_cli.result import Outcome

Decode: TypeAlias = "Callable[[PromptSource], Iterator[tuple[int, Outcome]]]"


class About(NamedTuple):
    """What a run works with, once its model is loaded; None where that computes nothing. `beams` None: no decoding."""

    model: str
    device: str
    dtype: str
    beams: int | None
    rows_at_once: int


class Observer:
    """Follows a run: told how many rows there are (None: not known) and how many of them are done, which model is being
    loaded, what users should know, and of the others as they end.

    `say` may be called from several threads. This one does nothing.
    """

    def on_loading(self, model: str) -> None: ...

    def on_ready(self, about: About | None) -> None: ...

    def on_start(self, total: int | None, num_done: int = 0) -> None: ...

    def say(self, message: str) -> None: ...

    def on_result(self, row: Mapping[str, Any]) -> None:
        """The row as it has been written."""

    def on_row(self, number: int = 1) -> None: ...


class Relay(Observer):
    """In a process whose driver talks: `tell` hands on what is told, as a kind and a value, and the driver gives it to
    `told`. Of rows that fail, the first of each code."""

    def __init__(self) -> None:
        self._codes = set[str]()

    def tell(self, kind: str, value: Any) -> None:
        raise NotImplementedError

    def on_loading(self, model: str) -> None:
        self.tell("loading", model)

    def on_ready(self, about: About | None) -> None:
        self.tell("about", about)

    def say(self, message: str) -> None:
        self.tell("say", message)

    def on_result(self, row: Mapping[str, Any]) -> None:
        code = row["error"] and row["error"].partition(":")[0]
        if code and code not in self._codes:
            self._codes.add(code)
            self.tell("failed", (row["id"], row["error"]))


def told(observer: Observer, kind: str, value: Any) -> None:
    """What a Relay has handed on."""
    if kind == "failed":
        observer.on_result(dict(zip(("id", "error"), value, strict=True)))
    else:
        {"loading": observer.on_loading, "about": observer.on_ready, "say": observer.say}[kind](value)


@dataclass(frozen=True)
class Form:
    """Rows of a result: their own columns, which of these is the text (None: none), and a row's from its outcome."""

    text_column: str | None
    columns: Sequence[Column]
    row: Callable[[InputRow, Any], dict[str, Any]]


class Task(Protocol):
    """What is done with each row; what most tasks have in common stands here.

    `command` is what users call it: a run resumes only what the same command has made. `columns` are those that a
    manifest must have (of a tuple's names one), `needs_manifest` what else to give where an input is not one (None: no
    need), `needs_image` whether each row has an image of its own (None: where it has one, it is read), `files` what is
    read besides the inputs. `list_columns` are columns whose texts may be lists. `settings` decide the texts: a run
    resumes only where they are the same.
    """

    command: str
    columns: tuple[str | tuple[str, ...], ...]
    needs_manifest: str | None
    needs_image: bool | None
    files: tuple[str, ...] = ()
    rows_each: int = 1
    list_columns: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def form(self) -> Form: ...

    def check(self, request: ModelRequest) -> None:
        """Raise what can be known to be wrong before a model is loaded."""

    def expand(self, rows: Iterator[InputRow]) -> Iterator[InputRow]:
        """The rows of the result that rows of the input become, `rows_each` of each."""
        return rows

    def images_of(self, row: InputRow, resolve: Callable[[object, int], ImageSource | RowError]) -> Sequence[Any]:
        """All image sources that the row's text depends on."""
        return row.sources

    def begin(
        self,
        model: LoadedModel,
        images: WorkerPool,
        resolve: Callable[[object, int], ImageSource | RowError],
        observer: Observer,
    ) -> Steps:
        """`resolve` finds what opens an image value that stands in the row of an index."""
        ...


def say_once(observer: Observer, message: str) -> Callable[[str], None]:
    """Says the message the first time it is called, with the name it is called with. Safe in many threads."""
    first = threading.Lock()

    def say(name: str) -> None:
        if first.acquire(blocking=False):  # and never released
            observer.say(message.format(name))

    return say


class ImageWatch:
    """Says once that a run may be answering blind: `doubt` at once, else at the end where no row `has_shown` an image.

    Safe in many threads.
    """

    def __init__(self, observer: Observer, remedy: str) -> None:
        self.doubt = say_once(observer, "{}")
        self.has_shown = False
        self._remedy = remedy

    def watching(self, decode: Decode) -> Decode:
        def watched(source: PromptSource) -> Iterator[tuple[int, Outcome]]:
            number = None
            for number, outcome in decode(source):
                yield number, outcome
            if number is not None and not self.has_shown:
                self.doubt(f"no row shows an image: {self._remedy}")

        return watched


def open_images(row: InputRow, images: WorkerPool) -> list[Any] | RowError:
    """All images of a row, or what is wrong with the first that cannot be used."""
    opened = []
    for source in row.sources:
        image = images.prepare(source)
        if isinstance(image, RowError):
            return image
        opened.append(image)
    return opened
