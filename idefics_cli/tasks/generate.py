"""Free prompts: a manifest's column of texts and images in any order, or conversations, each to be continued.

Rows in, prompts out. What a cell may hold, `prompts/interleaved.py` knows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idefics_cli.columns import MAX_IMAGES
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.errors import RowError, first_error
from idefics_cli.pipeline.prefetch import Steps
from idefics_cli.pipeline.task import Form, ImageWatch, Observer, Task
from idefics_cli.prompts.interleaved import NEXT_IMAGE, PLACE, ImageItem, interleaved_prompt
from idefics_cli.prompts.templates import END_OF_UTTERANCE, Prompt
from idefics_cli.rows import ImageSource, InputRow, RemoteFile
from idefics_cli.storage.filenames import IMAGE_SUFFIX, shown
from idefics_cli.tasks.embed import StoredLatents, without_names
from idefics_cli.tasks.options import GenerateOptions, require_space
from idefics_cli.tasks.result_rows import text_form
from idefics_cli.validation import by_option

if TYPE_CHECKING:
    from idefics_cli.checkpoint.request import ModelRequest
    from idefics_cli.engine.prompt_source import EncodedPrompt, PromptSource
    from idefics_cli.images.worker_pool import WorkerPool
    from idefics_cli.loaded_model import LoadedModel
    from idefics_cli.prompts.choices import ChoiceNorm
    from idefics_cli.prompts.postprocess import PostProcess
    from idefics_cli.result import Outcome

PROMPT_COLUMNS = ("prompt", "messages", "conversations")  # the last two end with an answer where they are for training
REMEDY = "name the images' column with --image-column, or add --text-only if this is meant"


class Generate(Task):
    """The task of `generate`. Raises InputError for embeddings that cannot be read."""

    command = "generate"

    def __init__(self, options: GenerateOptions) -> None:
        self.options = options
        self.embeddings = None if options.embeddings is None else StoredLatents(options.embeddings)
        self._columns = PROMPT_COLUMNS if options.prompt_column == PROMPT_COLUMNS[0] else (options.prompt_column,)
        self.columns, self.list_columns = (self._columns,), self._columns
        self.needs_image = False if options.text_only else None
        self.files = tuple(filter(None, (options.embeddings,)))
        self.needs_manifest = f"name one with a column {options.prompt_column!r} of texts and images"

    @property
    def settings(self) -> dict[str, Any]:
        return without_names(by_option(self.options), embeddings_file=self.embeddings)

    def images_of(self, row: InputRow, resolve: Callable) -> Sequence[ImageSource]:
        """Those of the row and those that its prompt names."""
        prompt = self._prompt(row, True, resolve, str)
        items = () if isinstance(prompt, RowError) else (item for item in prompt if isinstance(item, ImageItem))
        named = (resolve(item.source, row.index) for item in items if item.embedding is None and item is not NEXT_IMAGE)
        return [*row.sources, *(source for source in named if not isinstance(source, RowError))]

    def check(self, request: ModelRequest) -> None:
        if self.embeddings is not None:
            self.embeddings.check(request)
        require_space(self.options.decoding, request)

    @property
    def postprocess(self) -> PostProcess:
        return self.options.postprocess

    @property
    def form(self) -> Form:
        options = self.options
        return text_form("text", self.postprocess, has_candidates=options.decoding.num_return_sequences > 1)

    def begin(self, model: LoadedModel, images: WorkerPool, resolve: Callable, observer: Observer) -> Steps:
        if self.embeddings is not None:
            self.embeddings.begin(model)

        watch = ImageWatch(observer, REMEDY)

        def opened(item: ImageItem, index: int, own: Iterator[ImageSource | RowError]) -> Any | RowError:
            if item.embedding is not None:
                return self._latents(item.embedding)
            source = next(own) if item is NEXT_IMAGE else resolve(item.source, index)
            return source if isinstance(source, RowError) else images.prepare(source)

        def prepare(row: InputRow) -> EncodedPrompt | RowError:
            """Safe in many threads."""
            prompt = self._prompt(row, model.is_instruct, resolve, watch.doubt)
            if isinstance(prompt, RowError):
                return prompt
            own = iter(row.sources)
            items = [opened(item, row.index, own) if isinstance(item, ImageItem) else item for item in prompt]
            watch.has_shown |= any(isinstance(item, ImageItem) for item in prompt)
            return first_error(items) or self._encoded(model, items, row)

        decode = partial(self._decode, model)
        return Steps(prepare, decode if self.options.text_only else watch.watching(decode))

    def _encoded(self, model: LoadedModel, items: Sequence[Any], row: InputRow) -> EncodedPrompt | RowError:
        return model.encode(items, self.options.decoding.max_new_tokens)

    def _decode(self, model: LoadedModel, source: PromptSource) -> Iterator[tuple[int, Outcome]]:
        return model.stream(source, **asdict(self.options.decoding))

    def _prompt(
        self, row: InputRow, is_instruct: bool, resolve: Callable, doubt: Callable[[str], None]
    ) -> Prompt | RowError:
        """With its images not opened yet. Says where words may have been meant as an image."""
        column = next(name for name in self._columns if name in row.values)
        cell, is_example = row.values[column], column in PROMPT_COLUMNS[1:]
        if self.options.text_only:
            prompt = interleaved_prompt(cell, is_example=is_example)
        else:
            prompt = interleaved_prompt(
                cell, len(row.sources), lambda text: _is_image(text, row, resolve, doubt), is_example
            )
            if not row.sources and not isinstance(prompt, RowError) and any(PLACE in text for text in _texts(prompt)):
                doubt(f"row {row.id}: {PLACE} stays a word, since the row has no image: {REMEDY}")
        if not isinstance(prompt, RowError) and sum(isinstance(item, ImageItem) for item in prompt) > MAX_IMAGES:
            return RowError("row_invalid", f"the prompt has more than the {MAX_IMAGES:,} images that a row may have")
        if not isinstance(prompt, RowError) and END_OF_UTTERANCE in prompt and not is_instruct:
            return RowError(
                "row_invalid", "a conversation needs an instruct model, such as idefics-9b-instruct: use one"
            )
        return prompt

    def _latents(self, row_id: str) -> Any | RowError:
        if self.embeddings is None:
            return RowError("image_missing", f"the embedding {row_id!r} needs its file: add --embeddings E.parquet")
        return self.embeddings.latents(row_id)


class Rank(Generate):
    """Prompts as `generate` has them, each with answers of its own to rank in the column `choices`."""

    def __init__(self, norm: ChoiceNorm) -> None:
        super().__init__(GenerateOptions(DecodingOptions(), text_only=True))
        self._norm = norm

    def _encoded(self, model: LoadedModel, items: Sequence[Any], row: InputRow) -> EncodedPrompt | RowError:
        return model.encode_choices(items, row.values["choices"])

    def _decode(self, model: LoadedModel, source: PromptSource) -> Iterator[tuple[int, Outcome]]:
        return model.score_stream(source, self._norm)


def _texts(prompt: Prompt) -> Iterator[str]:
    return (item for item in prompt if isinstance(item, str))


def _is_image(text: str, row: InputRow, resolve: Callable, doubt: Callable[[str], None]) -> bool:
    """Whether it names an image that is there, below the image root."""
    if not (IMAGE_SUFFIX.search(text) or text.startswith("data:image/")) or "\n" in text:
        return False
    source = resolve(text, row.index)
    if isinstance(source, RemoteFile):
        is_there = source.filesystem.exists(source.key)
    else:
        is_there = isinstance(source, bytes) or (isinstance(source, Path) and os.path.isfile(source))
    if not is_there:
        reason = source.message if isinstance(source, RowError) else "no such image"
        doubt(f"row {row.id}: {shown(text)} stays text ({reason}): fix the path or --image-root, or add --text-only")
    return is_there
