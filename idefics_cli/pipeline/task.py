"""What a run does with its rows, as seen from the run: captions, answers and whatever else has rows and a model.

Interfaces only, and what all that implement them share. `run.py` drives a `Task`; `asking.py` and its neighbours are
works.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from idefics_cli.engine.prompt_source import EncodedImage, EncodedPrompt, PromptSource
from idefics_cli.errors import RowError
from idefics_cli.pipeline.prefetch import Prepared
from idefics_cli.result import Outcome
from idefics_cli.rows import ImageSource, InputRow

if TYPE_CHECKING:
    from torch import Tensor

    from idefics_cli.checkpoint import ModelRequest
    from idefics_cli.columns import Column
    from idefics_cli.prompts.templates import Prompt
    from idefics_cli.result import Result
    from idefics_cli.rows import ImageOptions


class ImageOpener(Protocol):
    """Opens images, from several threads at once."""

    def prepare(self, source: Any) -> Any | RowError: ...


class Model(Protocol):
    """What `Idefics` is to a run. What encodes may be called from several threads at once.

    `image_vectors` gives (images, dim), alike for images that are alike.
    """

    batch_size: int
    is_instruct: bool
    fingerprint: str  # equal for models that see images alike

    def image_workers(self, options: ImageOptions) -> AbstractContextManager[ImageOpener]: ...

    def encode(self, prompt: Prompt, max_new_tokens: int) -> EncodedPrompt | RowError: ...

    def encode_image(self, image: Any) -> EncodedImage | RowError: ...

    def encode_choices(self, prompt: Prompt, choices: Sequence[str]) -> EncodedPrompt | RowError: ...

    def score_stream(self, source: PromptSource, choice_norm: Any) -> Iterator[tuple[int, Result]]: ...

    @property
    def latents_shape(self) -> tuple[int, int]: ...

    def image_vectors(self, images: Sequence[Any]) -> Tensor: ...

    def stream(
        self, source: PromptSource, *, banned_words: Sequence[str] = (), **decoding: Any
    ) -> Iterator[tuple[int, Result]]: ...


class Resolve(Protocol):
    """An image value that stands in the row of this index -> what opens it, as `Inputs.resolve` does."""

    def __call__(self, value: object, index: int) -> ImageSource | RowError: ...


class Observer(Protocol):
    """Who follows a run: told how many rows will come (None: nobody knows), after each row, and what users should know.

    `say` may be called from several threads.
    """

    def on_start(self, total: int | None) -> None: ...

    def say(self, message: str) -> None: ...

    def on_row(self) -> None: ...


class Form(Protocol):
    """What a row of the result holds. `text_column` is where its text stands; None: it has none. `kept_names` are what
    the columns that are passed through are called."""

    text_column: str | None
    kept: Mapping[str, Any]
    kept_names: Mapping[str, str]

    @property
    def columns(self) -> Sequence[Column]: ...

    def row(self, row: InputRow, outcome: Outcome) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Steps:
    """A row -> what the model takes (in several threads at once), and from that to results, in the model's thread.

    `decode` gives (number of the prompt in the order taken, result) in the order of finishing.
    """

    prepare: Callable[[InputRow], Prepared | RowError]
    decode: Callable[[PromptSource], Iterator[tuple[int, Outcome]]]


class Task(Protocol):
    """What is done with each row.

    `command` is what users call it: no run goes on with what another command has made. `columns` are those that a
    manifest must have, `needs_manifest` what else to give where an input is none (None: no need), `needs_image` whether
    each row has an image of its own, `files` what is read besides the inputs. One row of the input becomes `rows_each`
    of the result: `expand` makes them, without those that are `done` of the first; `collapse` goes back from the ids of
    the result to those of the input, and leaves the ids of a row that is not complete in `left`. `settings` decide the
    texts: a run goes on only where they are the same. `check` raises what can be known to be wrong before a model is
    loaded.
    """

    command: str
    columns: tuple[str, ...]
    needs_manifest: str | None
    needs_image: bool
    files: tuple[str, ...]
    rows_each: int

    @property
    def settings(self) -> dict[str, Any]: ...

    def check(self, request: ModelRequest) -> None: ...

    def form(self, kept: Mapping[str, Any]) -> Form: ...

    def expand(self, rows: Iterator[InputRow], done: Sequence[str]) -> Iterator[InputRow]: ...

    def collapse(self, ids: Iterator[str], left: list[str]) -> Iterator[str]: ...

    def begin(self, model: Model, images: ImageOpener, resolve: Resolve, observer: Observer) -> Steps: ...


class OneRowEach:
    """What works share in which each row of the input is one of the result, and nothing but rows can be wrong."""

    rows_each = 1
    files: tuple[str, ...] = ()

    def check(self, request: ModelRequest) -> None:
        """All that can be wrong is wrong with rows."""

    def expand(self, rows: Iterator[InputRow], done: Sequence[str]) -> Iterator[InputRow]:
        assert not done, done
        return rows

    def collapse(self, ids: Iterator[str], left: list[str]) -> Iterator[str]:
        return ids


class Once:
    """Says something the first time it is called, with the name it is called with."""

    def __init__(self, observer: Observer, message: str) -> None:
        self._observer, self._message, self._first = observer, message, threading.Lock()

    def __call__(self, name: str) -> None:
        if self._first.acquire(blocking=False):  # never given back
            self._observer.say(self._message.format(name))


def open_images(row: InputRow, images: ImageOpener) -> list[Any] | RowError:
    """All images of a row, or what is wrong with the first that cannot be used."""
    opened = []
    for source in row.sources:
        image = images.prepare(source)
        if isinstance(image, RowError):
            return image
        opened.append(image)
    return opened
