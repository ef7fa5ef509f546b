"""`Idefics`: captions and texts from Python. A model, its tokenizer and its way with pictures behind three methods.

A picture that cannot be used, or a prompt that is too long, is a `Result` with an `error`; the others beside it are
not touched. A caller's mistake (an unknown option, a model that is not there) raises IdeficsError.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from PIL import Image

from idefics_cli.checkpoint import (
    ModelRequest,
    find_checkpoint,
    load_config,
    load_network,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from idefics_cli.data.images import DEFAULT_LIMITS, ImageLimits
from idefics_cli.errors import CheckpointError, IdeficsError, RowError
from idefics_cli.generation import reference
from idefics_cli.generation.options import DecodingOptions
from idefics_cli.processing import EncodedPrompt, ImageProcessor, PromptEncoder, collate
from idefics_cli.prompts import Prompt, SpecialToken, caption_prompt

if TYPE_CHECKING:
    from idefics_cli.model.modeling import IdeficsForVisionText2Text

DEFAULT_MODEL = "HuggingFaceM4/idefics-9b-instruct"
DEFAULT_BATCH_SIZE = 16
BATCHES_IN_SIGHT = 8  # among which prompts are sorted by length

ImageSource = str | os.PathLike | bytes | Image.Image
PreparedImage = torch.Tensor | RowError


@dataclass(frozen=True)
class Candidate:
    """One of a prompt's texts. `score` is the sum of its tokens' log-probabilities, the end's among them, over
    length ** length_penalty; `token_ids` leave the closing end token out, and `tokens` counts them."""

    text: str
    score: float
    tokens: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """What became of one prompt: the best candidate's fields and all candidates, best first; or an `error`, no text."""

    text: str | None = None
    score: float | None = None
    tokens: int | None = None
    token_ids: tuple[int, ...] | None = None
    candidates: tuple[Candidate, ...] = ()
    error: RowError | None = None

    @classmethod
    def of(cls, candidates: Sequence[Candidate]) -> Result:
        best = candidates[0]
        return cls(best.text, best.score, best.tokens, best.token_ids, tuple(candidates))


class Idefics:
    """A loaded model. Methods may be called from one thread at a time, `prepare_image` from any."""

    def __init__(
        self,
        model: IdeficsForVisionText2Text,
        encoder: PromptEncoder,
        images: ImageProcessor,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ):
        self.model, self.encoder, self.images, self.batch_size = model, encoder, images, batch_size

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike = DEFAULT_MODEL,
        *,
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        allow_pickle: bool = False,
        batch_size: int | None = None,
    ) -> Idefics:
        """Load a hub id, a local folder or "demo".

        `dtype`: auto, bf16, fp16 or fp32; `device`: auto, cpu, mps, cuda or cuda:N; `batch_size`: prompts decoded
        together. Raises IdeficsError with the remedy for anything that is not there.
        """
        request = ModelRequest(os.fspath(model), revision, dtype, device, allow_pickle)
        resolved_device = resolve_device(device)
        resolved_dtype = resolve_dtype(dtype, resolved_device)
        checkpoint = find_checkpoint(request)
        config = load_config(checkpoint)
        encoder = PromptEncoder(load_tokenizer(checkpoint))
        _require_vocabulary(encoder, config.vocab_size + config.additional_vocab_size)
        images = ImageProcessor.from_pretrained(checkpoint.folder)
        _require_image_size(images, config.vision_config.image_size)
        network = load_network(checkpoint, config, resolved_device, resolved_dtype)
        return cls(network, encoder, images, batch_size or DEFAULT_BATCH_SIZE)

    def prepare_image(self, source: ImageSource, limits: ImageLimits = DEFAULT_LIMITS) -> PreparedImage:
        """Pixels (3, side, side) of a path, bytes or PIL picture, or why there are none."""
        return self.images.prepare(source, limits)

    def caption(self, images: Iterable[ImageSource | PreparedImage], **decoding: object) -> list[Result]:
        """Describe each picture, prompted as its checkpoint was published: a base model or an instruct one."""
        prompts = (caption_prompt(self._picture(image), self.encoder.is_instruct) for image in images)
        return self.generate(prompts, **decoding)

    def generate(self, prompts: Iterable[Prompt | Sequence], **decoding: object) -> list[Result]:
        """Continue each prompt, a sequence of texts and pictures that stands verbatim behind `<s>`.

        A `str` is text, never a path: give pictures as PIL, `pathlib.Path` or bytes. Keywords are the fields of
        DecodingOptions. One Result for each prompt, in order; pixels are held for a few batches at a time.
        """
        options = DecodingOptions.from_keywords(decoding)
        results: list[Result] = []
        remaining = iter(prompts)
        while window := list(islice(remaining, BATCHES_IN_SIGHT * self.batch_size)):
            results += self._generate_window(window, options)
        return results

    def _generate_window(self, prompts: Sequence[Prompt | Sequence], options: DecodingOptions) -> list[Result]:
        encoded = [self._encode(prompt, options) for prompt in prompts]
        results = [Result(error=row) if isinstance(row, RowError) else None for row in encoded]
        waiting = [index for index, result in enumerate(results) if result is None]
        # Prompts of similar length are decoded together, so that little is padded.
        waiting.sort(key=lambda index: (len(encoded[index].pixels), len(encoded[index].input_ids)))
        for first in range(0, len(waiting), self.batch_size):
            batch = waiting[first : first + self.batch_size]
            for index, result in zip(batch, self._decode([encoded[i] for i in batch], options), strict=True):
                results[index] = result
        return results

    def _encode(self, prompt: Prompt | Sequence, options: DecodingOptions) -> EncodedPrompt | RowError:
        if isinstance(prompt, (str, bytes)):
            raise IdeficsError(
                "a prompt is a sequence of texts and pictures, not one text: write [text] or [picture, text]"
            )
        items = tuple(item if isinstance(item, (str, SpecialToken)) else self._picture(item) for item in prompt)
        error = next((item for item in items if isinstance(item, RowError)), None)
        if error is not None:
            return error
        input_ids = self.encoder.encode(items)
        longest = self.model.config.max_position_embeddings - options.max_new_tokens
        if len(input_ids) > longest:
            return RowError(
                "prompt_too_long", f"{len(input_ids)} tokens, and the model takes {longest} before its answer"
            )
        return EncodedPrompt(input_ids, tuple(item for item in items if isinstance(item, torch.Tensor)))

    def _picture(self, image: ImageSource | PreparedImage) -> PreparedImage:
        return image if isinstance(image, (torch.Tensor, RowError)) else self.prepare_image(image)

    def _decode(self, rows: Sequence[EncodedPrompt], options: DecodingOptions) -> list[Result]:
        inputs = collate(rows, self.encoder, self.images.image_size)
        tensors = {name: value.to(self.model.device) for name, value in vars(inputs).items()}
        vocabulary = reference.Vocabulary(
            self.encoder.end_token_ids, self.encoder.banned_token_ids, self.encoder.pad_token_id
        )
        decoded = reference.generate(self.model, tensors, options, vocabulary)
        return [Result.of([self._candidate(each) for each in hypotheses]) for hypotheses in decoded]

    def _candidate(self, hypothesis: reference.Hypothesis) -> Candidate:
        token_ids = hypothesis.token_ids
        return Candidate(self.encoder.decode(token_ids), hypothesis.score, len(token_ids), token_ids)


def _require_vocabulary(encoder: PromptEncoder, size: int) -> None:
    beyond = [token_id for token_id in (*encoder.banned_token_ids, *encoder.end_token_ids) if token_id >= size]
    if beyond:
        raise CheckpointError(
            f"the tokenizer uses the ids {beyond} and the model knows {size}: take both from one checkpoint"
        )


def _require_image_size(images: ImageProcessor, image_size: int) -> None:
    if images.image_size != image_size:
        raise CheckpointError(
            f"preprocessor_config.json resizes to {images.image_size} and the model takes {image_size}: "
            "take both files from one checkpoint"
        )
