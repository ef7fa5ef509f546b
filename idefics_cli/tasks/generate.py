"""Free prompts: a manifest's column of texts and images in any order, or conversations, each to be continued.

Rows in, prompts out, as `asking.py` does it. What a cell may hold is the business of `interleaved.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from idefics_cli.errors import RowError
from idefics_cli.pipeline.prefetch import Steps
from idefics_cli.pipeline.task import Observer, Task
from idefics_cli.prompts.interleaved import ImageItem, interleaved_prompt
from idefics_cli.prompts.postprocess import PostProcess
from idefics_cli.prompts.templates import END_OF_UTTERANCE
from idefics_cli.rows import ImageSource, InputRow
from idefics_cli.tasks.embed import StoredLatents, stored_latents
from idefics_cli.tasks.result_rows import ResultForm

if TYPE_CHECKING:
    from idefics_cli.checkpoint import ModelRequest
    from idefics_cli.engine.options import DecodingOptions
    from idefics_cli.engine.prompt_source import EncodedPrompt
    from idefics_cli.idefics import Idefics
    from idefics_cli.images.worker_pool import WorkerPool

PROMPT = "prompt"
MAX_NEW_TOKENS = 100


@dataclass(frozen=True)
class GenerateOptions:
    """Where the prompts stand, and what becomes of the texts that continue them."""

    decoding: DecodingOptions
    prompt_column: str = PROMPT
    embeddings: str | None = None
    postprocess: PostProcess = field(default_factory=PostProcess)


class Generate(Task):
    """The work of `generate`. Raises InputError for embeddings that are none."""

    command = "generate"
    needs_image = False

    def __init__(self, options: GenerateOptions) -> None:
        self.options = options
        self.embeddings = stored_latents(options.embeddings)
        self.columns = (options.prompt_column,)
        self.files = tuple(filter(None, (options.embeddings,)))
        self.needs_manifest = f"name one with a column {options.prompt_column!r} of texts and images"

    @property
    def settings(self) -> dict[str, Any]:
        return {**asdict(self.options), "embeddings_file": self.embeddings.identity if self.embeddings else None}

    def check(self, request: ModelRequest) -> None:
        if self.embeddings is not None:
            self.embeddings.check(request)

    @property
    def form(self) -> ResultForm:
        options = self.options
        return ResultForm("text", options.postprocess, candidates=options.decoding.num_return_sequences > 1)

    def begin(self, model: Idefics, images: WorkerPool, resolve: Callable, observer: Observer) -> Steps:
        decoding = asdict(self.options.decoding)
        if self.embeddings is not None:
            self.embeddings.begin(model)
        prepare = PromptOpening(self.options, model, images, self.embeddings, resolve)
        return Steps(prepare, lambda source: model.stream(source, **decoding))


@dataclass(frozen=True)
class PromptOpening:
    """A row -> its prompt with the images opened, or why there is none. Safe in many threads."""

    options: GenerateOptions
    model: Idefics
    images: WorkerPool
    embeddings: StoredLatents | None
    resolve: Callable[[object, int], ImageSource | RowError]

    def __call__(self, row: InputRow) -> EncodedPrompt | RowError:
        prompt = interleaved_prompt(row.values.get(self.options.prompt_column))
        if isinstance(prompt, RowError):
            return prompt
        if END_OF_UTTERANCE in prompt and not self.model.is_instruct:
            return RowError("row_invalid", "a conversation, which only instruct models were taught: name one with -m")
        items = []
        for item in prompt:
            opened = self._opened(item, row.index) if isinstance(item, ImageItem) else item
            if isinstance(opened, RowError):
                return opened
            items.append(opened)
        return self.model.encode(items, self.options.decoding.max_new_tokens)

    def _opened(self, image: ImageItem, index: int) -> Any | RowError:
        if image.embedding is not None:
            return self._stored(image.embedding)
        source = self.resolve(image.source, index)
        return source if isinstance(source, RowError) else self.images.prepare(source)

    def _stored(self, row_id: str) -> Any | RowError:
        if self.embeddings is None:
            return RowError("image_missing", f"the embedding {row_id!r} is nowhere: name its file with --embeddings")
        return self.embeddings.latents(row_id)
