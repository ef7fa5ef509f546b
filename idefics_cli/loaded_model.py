"""A loaded model with its tokenizer and image processor: images and prompts encoded, streams of these continued.

An image that cannot be used, or a prompt that is too long, is a `RowError`; the others are not affected. A caller's
mistake (a model that does not exist) raises IdeficsError. What users call is `Idefics` in `idefics.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn, Self

import torch
from PIL import Image

from idefics_cli.checkpoint import quantize as quantization
from idefics_cli.checkpoint.devices import device_of_process, dtype_name, resolve_device, resolve_dtype
from idefics_cli.checkpoint.files import Checkpoint
from idefics_cli.checkpoint.find import find_checkpoint
from idefics_cli.checkpoint.fingerprint import vision_fingerprint
from idefics_cli.checkpoint.load import load_network, meta_network, side_files
from idefics_cli.checkpoint.request import Attention, ModelRequest
from idefics_cli.engine.embed import embed
from idefics_cli.engine.engine import Engine
from idefics_cli.engine.likelihood import Scoring
from idefics_cli.engine.options import DecodingOptions, Hypothesis, Vocabulary
from idefics_cli.engine.prompt_source import (
    EncodedChoices,
    EncodedImage,
    EncodedPrompt,
    IterableSource,
    PromptSource,
)
from idefics_cli.engine.scheduler import stream
from idefics_cli.engine.transfer import pixel_values
from idefics_cli.engine.tree_attention import resolve_attention
from idefics_cli.errors import IdeficsError, RowError, first_error
from idefics_cli.images.decode import DEFAULT_OPTIONS
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.images.worker_pool import WorkerPool
from idefics_cli.model.joined_linear import join_linears
from idefics_cli.model.kv_interface import image_seq_len, is_spread
from idefics_cli.model.packed_linear import pack_linears
from idefics_cli.prompts.choices import (
    ChoiceNorm,
    checked_choices,
    common_length,
    normalised,
    require_norm,
    split_answers,
    with_answer,
)
from idefics_cli.prompts.templates import (
    Prompt,
    SpecialToken,
)
from idefics_cli.prompts.tokenize import PromptEncoder
from idefics_cli.result import Candidate, Result
from idefics_cli.rows import ImageOptions
from idefics_cli.validation import file_name, several, whole_number

if TYPE_CHECKING:
    from idefics_cli.model.modeling import IdeficsForVisionText2Text
    from idefics_cli.ranks import Ranks


ImageSource = str | os.PathLike[str] | bytes | Image.Image
PreparedImage = torch.Tensor | EncodedImage | RowError


class LoadedModel:
    """A loaded model. Streams may run side by side, in several threads too: they take turns, a step each."""

    def __init__(
        self,
        model: IdeficsForVisionText2Text,
        encoder: PromptEncoder,
        images: ImageProcessor,
        batch_size: int | None,
        checkpoint: Checkpoint,
        eager: bool = False,
        request: ModelRequest | None = None,
        attention: str = "auto",
    ):
        self.checkpoint, self.request = checkpoint, request
        self.model, self.encoder, self.images, self._batch_size = model, encoder, images, batch_size
        self._is_eager, self._attention = eager, attention
        self._encode_start = lru_cache(maxsize=16)(encoder.encode)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        device_map: str | None = None,
        revision: str | None = None,
        allow_pickle: bool = False,
        adapter: str | os.PathLike[str] | None = None,
        quantize: str | None = None,
        eager: bool = False,
        attention: Attention = "auto",
        batch_size: int | None = None,
        ranks: Ranks | None = None,
    ) -> Self:
        """Load a hub id, a local folder or "demo", by default idefics-9b-instruct or the adapter's base.

        `dtype`: auto, bf16, fp16, fp32, or one of torch's or its name; `device`: auto, cpu, mps, cuda, cuda:N or one
        of torch's; `device_map`: auto, balanced or sequential, to spread it over devices and disk as accelerate does;
        `adapter`: a folder of LoRA weights that PEFT has saved; `quantize`: int8 (CPU, CUDA) or nf4 (CUDA), for smaller
        weights; `eager`: on CUDA, launch a decode step's operations one by one, not as a graph; `attention`: of a
        decode step, auto, triton (one kernel, on CUDA) or sdpa (torch's); `batch_size`: prompts decoded together, by
        default as many as memory holds; `ranks`: processes to split it over, all of which call this, and all but the
        first then `follow`. Raises IdeficsError, which names the remedy.
        """
        if batch_size is not None:
            batch_size = whole_number("batch_size", batch_size, least=1)
        name = file_name("model", model, "a hub id, a folder or 'demo'")
        folder = file_name("adapter", adapter, "a folder")
        where = (name, revision, dtype, str(device), allow_pickle, folder, device_map, quantize)
        request = ModelRequest(*where, attention=attention)
        if device_map is not None and ranks is not None:
            raise IdeficsError("--device-map is for one process: start it without torchrun, or leave --device-map out")
        place = resolve_device(request.device) if ranks is None else device_of_process(request.device, ranks)
        is_shared = ranks is not None or device_map is not None
        quantization.check(quantize, place, request.dtype, is_shared)
        checkpoint = find_checkpoint(request)
        config, encoder, images = side_files(checkpoint)
        kind = quantization.kind_of(config, quantize)
        quantization.check(kind, place, request.dtype, is_shared)
        quantization.check_saved(config, is_shared, folder is not None)
        expected = meta_network(checkpoint, config)
        number_format = resolve_dtype(request.dtype, place, None if kind else config)
        if ranks is not None:
            number_format = ranks.broadcast(number_format)
        resolve_attention(attention, config, place)  # before weights are read
        network = load_network(checkpoint, expected, place, number_format, ranks, device_map, quantize)
        if not is_spread(network):
            (pack_linears if place.type == "cpu" else join_linears)(network)
        return cls(network, encoder, images, batch_size, checkpoint, eager, request, attention)

    @classmethod
    def without_network(cls, request: ModelRequest) -> LoadedModel:
        """It encodes prompts and continues none: no weights are fetched or read."""
        checkpoint = find_checkpoint(request, with_weights=False)
        config, encoder, images = side_files(checkpoint)
        return cls(SimpleNamespace(config=config), encoder, images, batch_size=1, checkpoint=checkpoint)

    @cached_property
    def engine(self) -> Engine:
        vocabulary, table = vocabulary_of(self.encoder), self._pixel_of_byte
        return Engine(self.model, vocabulary, self._batch_size, self._is_eager, table, self._attention)

    @property
    def batch_size(self) -> int:
        """How many rows are decoded together at most."""
        return self._batch_size or self.engine.batch_size.wanted

    @property
    def place(self) -> tuple[str, str] | None:
        """Its device, and the number format of its weights; None where nothing is computed."""
        kind = quantization.kind_of(self.model.config)
        return str(self.model.device), kind or dtype_name(self.model.dtype)

    @property
    def _pixel_of_byte(self) -> torch.Tensor:
        return torch.from_numpy(self.images.pixel_of_byte)

    @property
    def is_instruct(self) -> bool:
        """Whether the checkpoint was trained to answer users, as its tokenizer shows."""
        return self.encoder.is_instruct

    @cached_property
    def fingerprint(self) -> str:
        """Equal for models whose latents can stand for each other: see `vision_fingerprint`."""
        return vision_fingerprint(self.checkpoint)

    def image_workers(self, options: ImageOptions) -> WorkerPool:
        """`prepare_image` in worker processes, so that a broken image cannot take this one down."""
        return WorkerPool(self.images, options)

    def prepare_image(self, source: ImageSource, options: ImageOptions = DEFAULT_OPTIONS) -> torch.Tensor | RowError:
        """Pixels (3, side, side) of a path, bytes or PIL image, or why there are none."""
        found = self.images.prepare(source, options)
        return found if isinstance(found, RowError) else pixel_values(found[None], self._pixel_of_byte)[0]

    def stream(
        self, source: PromptSource, *, banned_words: Sequence[str] = (), **decoding: object
    ) -> Iterator[tuple[int, Result]]:
        """Continue encoded prompts as they come: (number, result) as they finish, numbered as they are taken.

        The source is waited for only while no prompt is running or queued. Each prompt must leave space for
        `max_new_tokens` in the model's positions. `PromptEncoder.banned_sequences` says how `banned_words` are kept
        out of texts.
        """
        banned = self.encoder.banned_sequences(banned_words)
        for number, outcome in stream(self.engine, source, self._decoding_options(decoding), banned):
            yield number, Result(error=outcome) if isinstance(outcome, RowError) else self._result(outcome)

    def follow(self) -> NoReturn:
        """In all processes of `ranks` but the first: do on a part of the weights what the first one's streams do."""
        engine = self.engine  # all agree on its batch size before its first stream
        while True:
            kind, *arguments = engine.model.ranks.broadcast()
            with suppress(IdeficsError):  # the first process has it too, and says it
                for _ in stream(engine, None, *arguments) if kind == "stream" else Scoring(engine).run(None):
                    pass

    def score_stream(self, source: PromptSource, choice_norm: ChoiceNorm = "none") -> Iterator[tuple[int, Result]]:
        """The likelihoods of the results of `encode_choices`, as they come; numbers and order as in `stream`."""
        require_norm(choice_norm)
        for number, encoded, found in Scoring(self.engine).run(source):
            is_error = isinstance(found, RowError)
            yield number, Result(error=found) if is_error else _choice_result(encoded, found, choice_norm)

    def embed_stream(self, source: PromptSource) -> Iterator[tuple[int, torch.Tensor | RowError]]:
        """What the model keeps of the results of `encode_image`: (number, latents), in order, numbered as taken.

        Latents (seq, dim), in the model's dtype and on the host, are the resampler's output or, without one, the vision
        tower's. They may take the place of the image in a prompt for a model of the same `fingerprint`.
        """
        return embed(self.engine, source)

    def image_vectors(self, images: Iterable[ImageSource | PreparedImage]) -> torch.Tensor:
        """One vector for each image, (images, dim) in fp32, similar for similar images: the mean of its latents.

        It costs nothing beyond the latents, which decoding needs anyway; stored ones are accepted too. An image without
        latents (out of memory, NaN or Inf) has zeros.
        """
        encoded = [self.encode_image(image) for image in several("image_vectors's images", images, "image")]
        error = first_error(encoded)
        if error is not None:
            raise IdeficsError(f"an image cannot be embedded ({error}): fix it, or leave it out")
        latents = [found for _, found in self.embed_stream(IterableSource(encoded))]
        vectors = torch.zeros(len(latents), self.latents_shape[1])
        for vector, each in zip(vectors, latents, strict=True):
            if not isinstance(each, RowError):
                vector.copy_(each.float().mean(dim=0))
        return vectors

    @property
    def latents_shape(self) -> tuple[int, int]:
        """(seq, dim) of one image's latents."""
        return image_seq_len(self.model.config), self.model.config.vision_config.embed_dim

    def _decoding_options(self, decoding: dict[str, object]) -> DecodingOptions:
        options = DecodingOptions.from_keywords(decoding)
        options.require_space(self.model.config.max_position_embeddings)
        return options

    def encode(self, prompt: Prompt | Sequence, max_new_tokens: int, start: Prompt = ()) -> EncodedPrompt | RowError:
        """A prompt as `stream` takes it, with space for so many tokens, or why there is none. Safe in many threads.

        `start` is what further prompts begin with too, such as shots: that is read once.
        """
        items = self._items(prompt)
        if isinstance(items, RowError):
            return items
        input_ids = self.encoder.encode(items)
        longest = self.model.config.max_position_embeddings - max_new_tokens
        if len(input_ids) > longest:
            too_long = f"{len(input_ids)} tokens, and the model takes {longest} before its answer"
            return RowError("prompt_too_long", too_long)
        return EncodedPrompt(input_ids, *_images_of(items), self._shared_len(start, input_ids))

    def _shared_len(self, start: Prompt, input_ids: Sequence[int]) -> int:
        """How many tokens are those of `start` before an image: a text that follows may change the last ones."""
        texts = tuple(item if isinstance(item, (str, SpecialToken)) else None for item in start)
        return common_length(self._encode_start((*texts, None))[:-2], input_ids) if start else 0

    def encode_choices(
        self, prompt: Prompt | Sequence, choices: Sequence[str], start: Prompt = ()
    ) -> EncodedChoices | RowError:
        """A prompt with the answers to choose from, as `score_stream` takes it. Safe in many threads.

        Prompt and choice are tokenised as one text, with a blank between them.
        """
        items, checked = self._items(prompt), checked_choices(choices)
        error = first_error((items, checked))
        if error is not None:
            return error
        prompt_ids = self.encoder.encode(items)
        answered = [self.encoder.encode(with_answer(items, choice)) for choice in checked]
        longest, room = max(map(len, answered)), self.model.config.max_position_embeddings
        if longest > room:
            return RowError("prompt_too_long", f"{longest} tokens with the longest choice, and the model takes {room}")
        common, choice_ids = split_answers(prompt_ids, answered)
        shared_len = self._shared_len(start, prompt_ids[:common])
        return EncodedChoices(prompt_ids[:common], *_images_of(items), shared_len, checked, tuple(choice_ids))

    def encode_image(self, image: ImageSource | PreparedImage) -> EncodedImage | RowError:
        """An image as `embed_stream` takes it, or why there is none. Safe in many threads.

        It may take the place of its image in a prompt, and its content is not hashed again.
        """
        if isinstance(image, (EncodedImage, RowError)):
            return image
        if not isinstance(image, torch.Tensor):
            return self.encode_image(self.images.prepare(image))
        wanted = (3, self.images.image_size, self.images.image_size)
        if image.shape not in (wanted, self.latents_shape):
            raise IdeficsError(
                f"an image tensor cannot have shape {tuple(image.shape)}: use {wanted} as from prepare_image, or "
                f"{self.latents_shape} as from embed"
            )
        is_bytes = image.dtype == torch.uint8 and image.shape == wanted
        return EncodedImage((image if is_bytes else image.float(),))

    def _items(self, prompt: Prompt | Sequence) -> Prompt | RowError:
        """The prompt with its images prepared."""
        items = tuple(
            item if isinstance(item, (str, SpecialToken)) else self.encode_image(item)
            for item in several("a prompt", prompt, "image, text")
        )
        return first_error(items) or items

    def _result(self, hypotheses: Sequence[Hypothesis]) -> Result:
        found = [(each.token_ids, each.score) for each in hypotheses]
        return Result.of([Candidate(self.encoder.decode(ids), score, len(ids), ids) for ids, score in found])


def _images_of(items: Prompt) -> tuple[tuple[torch.Tensor, ...], tuple[bytes, ...]]:
    """Pixels or latents of the images, and their `content_key`s."""
    images = [item for item in items if isinstance(item, EncodedImage)]
    return tuple(each.pixels[0] for each in images), tuple(each.image_keys[0] for each in images)


def _choice_result(encoded: EncodedChoices, log_likelihoods: Sequence[float], norm: ChoiceNorm) -> Result:
    """The likeliest first; equals in the order they were given."""
    candidates = [
        Candidate(text, normalised(log_likelihood, text, len(ids), norm), len(ids), ids)
        for text, ids, log_likelihood in zip(encoded.choices, encoded.choice_ids, log_likelihoods, strict=True)
    ]
    return Result.of(sorted(candidates, key=lambda candidate: -candidate.score))


def vocabulary_of(encoder: PromptEncoder) -> Vocabulary:
    return Vocabulary(encoder.end_token_ids, encoder.banned_token_ids, encoder.pad_token_id, encoder.image_token_id)
