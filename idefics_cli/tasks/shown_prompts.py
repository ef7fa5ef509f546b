"""`--show-prompt`: what the model would be asked about the first rows, as text and token ids, not its answers.

On stdout, whatever becomes of the rows' texts in the run itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.errors import IdeficsError, RowError
from idefics_cli.loaded_model import LoadedModel
from idefics_cli.pipeline.options import RunOptions
from idefics_cli.pipeline.task import Form
from idefics_cli.rows import InputRow

if TYPE_CHECKING:
    from torch import Tensor

    from idefics_cli.engine.prompt_source import EncodedPrompt, PromptSource
    from idefics_cli.prompts.templates import Prompt

Viewed = tuple[str, list[int]]


def prompts_alone(options: RunOptions) -> RunOptions:
    """Those of a run over the first rows that has no output of its own."""
    most = min(options.show_prompt, options.reading.limit or options.show_prompt)
    reading = replace(options.reading, limit=most, keep=())
    return RunOptions(options.inputs, request=options.request, reading=reading, images=options.images)


def prompt_viewer(request: ModelRequest, batch_size: int | None = None) -> PromptViewer:
    """Weights are read only where shots are chosen by what the model sees."""
    return PromptViewer(LoadedModel.without_network(request), lambda: LoadedModel.from_pretrained(**vars(request)))


class NeedsWeights(IdeficsError):
    """The prompt is not known without the network."""


def weightless_viewer(request: ModelRequest, batch_size: int | None = None) -> PromptViewer:
    def load() -> LoadedModel:
        raise NeedsWeights("known to the model alone, which compares images: --show-prompt 1 loads it")

    return PromptViewer(LoadedModel.without_network(request), load)


class PromptViewer:
    """A model whose results are the prompts. `load` gives the same one with its network."""

    place = None

    def __init__(self, model: LoadedModel, load: Callable[[], LoadedModel]) -> None:
        self._model, self._load = model, load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @cached_property
    def _whole(self) -> LoadedModel:
        return self._load()

    @property
    def fingerprint(self) -> str:
        return self._whole.fingerprint

    def image_vectors(self, images: Sequence[Any]) -> Tensor:
        return self._whole.image_vectors(images)

    def encode(self, prompt: Prompt, max_new_tokens: int, start: Prompt = ()) -> Viewed | RowError:
        return self._viewed(prompt, self._model.encode(prompt, max_new_tokens, start))

    def encode_choices(self, prompt: Prompt, choices: Sequence[str], start: Prompt = ()) -> Viewed | RowError:
        return self._viewed(prompt, self._model.encode_choices(prompt, choices, start))

    def _viewed(self, prompt: Prompt, encoded: EncodedPrompt | RowError) -> Viewed | RowError:
        return encoded if isinstance(encoded, RowError) else (self.encoder.spelled(prompt), encoded.input_ids)

    def stream(self, source: PromptSource, **decoding: object) -> Iterator[tuple[int, Viewed]]:
        return enumerate(prompt for prompts in iter(lambda: source.take(1, True), []) for prompt in prompts)

    def score_stream(self, source: PromptSource, choice_norm: str) -> Iterator[tuple[int, Viewed]]:
        return self.stream(source)


def shown_row(row: InputRow, outcome: Viewed | RowError) -> dict[str, Any]:
    """A row with its prompt."""
    text, token_ids = (None, None) if isinstance(outcome, RowError) else outcome
    error = str(outcome) if isinstance(outcome, RowError) else None
    return {"id": row.id, "image": row.image, "prompt": text, "token_ids": token_ids, "error": error}


FORM = Form("prompt", (), shown_row)
