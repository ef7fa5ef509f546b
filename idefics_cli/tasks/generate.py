"""Free prompts: a manifest's column of texts and images in any order, or conversations, each to be continued.

Rows in, prompts out. What a cell may hold, `prompts/interleaved.py` knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from idefics_cli.errors import RowError, first_error
from idefics_cli.pipeline.prefetch import Steps
from idefics_cli.pipeline.task import Observer, Task
from idefics_cli.prompts.interleaved import ImageItem, interleaved_prompt
from idefics_cli.prompts.templates import END_OF_UTTERANCE, Prompt
from idefics_cli.rows import InputRow
from idefics_cli.tasks.embed import StoredLatents
from idefics_cli.tasks.options import GenerateOptions
from idefics_cli.tasks.result_rows import ResultForm
from idefics_cli.validation import by_option

if TYPE_CHECKING:
    from idefics_cli.checkpoint import ModelRequest
    from idefics_cli.engine.prompt_source import EncodedPrompt
    from idefics_cli.idefics import Idefics
    from idefics_cli.images.worker_pool import WorkerPool


class Generate(Task):
    """The task of `generate`. Raises InputError for embeddings that cannot be read."""

    command = "generate"
    needs_image = False

    def __init__(self, options: GenerateOptions) -> None:
        self.options = options
        self.embeddings = None if options.embeddings is None else StoredLatents(options.embeddings)
        self.columns = (options.prompt_column,)
        self.files = tuple(filter(None, (options.embeddings,)))
        self.needs_manifest = f"name one with a column {options.prompt_column!r} of texts and images"

    @property
    def settings(self) -> dict[str, Any]:
        return {**by_option(self.options), "embeddings_file": self.embeddings.identity if self.embeddings else None}

    def check(self, request: ModelRequest) -> None:
        if self.embeddings is not None:
            self.embeddings.check(request)

    @property
    def form(self) -> ResultForm:
        options = self.options
        return ResultForm("text", options.postprocess, candidates=options.decoding.num_return_sequences > 1)

    def begin(self, model: Idefics, images: WorkerPool, resolve: Callable, observer: Observer) -> Steps:
        if self.embeddings is not None:
            self.embeddings.begin(model)

        def opened(item: ImageItem, index: int) -> Any | RowError:
            if item.embedding is not None:
                return self._latents(item.embedding)
            source = resolve(item.source, index)
            return source if isinstance(source, RowError) else images.prepare(source)

        def prepare(row: InputRow) -> EncodedPrompt | RowError:
            """Safe in many threads."""
            prompt = self._prompt(row, model.is_instruct)
            if isinstance(prompt, RowError):
                return prompt
            items = [opened(item, row.index) if isinstance(item, ImageItem) else item for item in prompt]
            return first_error(items) or model.encode(items, self.options.decoding.max_new_tokens)

        return Steps(prepare, lambda source: model.stream(source, **asdict(self.options.decoding)))

    def _prompt(self, row: InputRow, is_instruct: bool) -> Prompt | RowError:
        """With its images not opened yet."""
        prompt = interleaved_prompt(row.values.get(self.options.prompt_column))
        if not isinstance(prompt, RowError) and END_OF_UTTERANCE in prompt and not is_instruct:
            return RowError("row_invalid", "a conversation needs an instruct model: name one with -m")
        return prompt

    def _latents(self, row_id: str) -> Any | RowError:
        if self.embeddings is None:
            return RowError("image_missing", f"the embedding {row_id!r} needs its file: add --embeddings E.parquet")
        return self.embeddings.latents(row_id)
