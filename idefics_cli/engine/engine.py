"""Runs the model over images, shared starts and prompts, and keeps what streams share: each is computed once.

Images are known by their content. Knows nothing of beams, text and files.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from idefics_cli.engine.kv_cache import NO_PREFIX, BoundedCache, KeyValues, Prefix, bytes_of, project_images, space_for
from idefics_cli.engine.memory_budget import (
    CACHE_BYTES,
    VISION_BATCH,
    AdaptiveBatchSize,
    attempt,
    most_rows,
    rows_that_fit,
)
from idefics_cli.engine.options import Vocabulary
from idefics_cli.engine.prefill import PrefillBatch, PrefixCache, QueuedPrompt
from idefics_cli.engine.prompt_source import EncodedImage, EncodedPrompt
from idefics_cli.engine.transfer import pixel_values, send, send_beside
from idefics_cli.engine.tree_attention import resolve_attention
from idefics_cli.model.kv_interface import image_seq_len, is_spread
from idefics_cli.model.modeling import IdeficsForVisionText2Text

EncodedImages = Sequence[EncodedPrompt] | Sequence[EncodedImage]


@dataclass
class PhaseTimes:
    """Where the time went, in seconds, and what was done in it."""

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    images: int = 0
    prompt_tokens: int = 0
    steps: int = 0

    def reset(self) -> None:
        self.__init__()


class Engine:
    """One model with its caches. `batch_size` rows are run at a time, fewer where memory ends; None: as many as memory
    holds and as make a step worth more.

    Latents, images' keys and values, and prefixes are kept from one stream to the next, within bounds. On CUDA a decode
    step is one graph, unless it is to be `eager`, and its `attention` one kernel ("triton"), or torch's ("sdpa");
    "auto" takes the former where it can. Streams may run side by side, in several threads too: each takes its
    `turn` for one step. Images are pixels, or bytes with the table `pixel_of_byte` (3, 256).
    """

    def __init__(
        self,
        model: IdeficsForVisionText2Text,
        vocabulary: Vocabulary,
        batch_size: int | None = 8,
        eager: bool = False,
        pixel_of_byte: Tensor | None = None,
        attention: str = "auto",
    ):
        self.model, self.vocabulary, self.pixel_of_byte = model, vocabulary, pixel_of_byte
        is_captured = model.device.type == "cuda" and not is_spread(model) and not model.model.rotary_emb.asks_positions
        self.is_eager = eager or not is_captured
        attention = "sdpa" if is_spread(model) else attention
        self.has_tree_kernel = resolve_attention(attention, model.config, model.device) == "triton"
        self._is_bounded = batch_size is None and model.device.type == "cuda"
        self.batch_size = AdaptiveBatchSize(batch_size or rows_that_fit(model))
        self.image_batch_size = AdaptiveBatchSize(VISION_BATCH)
        self.turn = threading.RLock()
        self.times = PhaseTimes()
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] | None = None  # of CUDA, while it is timed
        self.latents: BoundedCache[Tensor] = BoundedCache(CACHE_BYTES)
        self.image_key_values: BoundedCache[KeyValues] = BoundedCache(CACHE_BYTES)
        self.prefixes = PrefixCache(CACHE_BYTES, self._prefill_prefix)

    def rows_at_once(self, num_paths: int) -> int:
        """Of so many beams each."""
        return min(self.batch_size.now, most_rows(num_paths)) if self._is_bounded else self.batch_size.now

    def clear_caches(self) -> None:
        for cache in (self.latents, self.image_key_values, self.prefixes):
            cache.clear()

    def free_memory(self, prefixes: bool = True) -> None:
        """Drop what is kept for later, with or without `prefixes`, and give back what the device's allocator holds."""
        for cache in (self.latents, self.image_key_values, *([self.prefixes] if prefixes else [])):
            cache.clear()
        if self.model.device.type == "mps":
            torch.mps.empty_cache()
        torch.cuda.empty_cache()  # nothing where CUDA is not in use

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        if self.events is None:
            yield
        else:
            stream = torch.cuda.current_stream(self.model.device)
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record(stream)
            yield
            last.record(stream)
            self.events.append((phase, first, last))
        setattr(self.times, phase, getattr(self.times, phase) + time.perf_counter() - started)

    @contextmanager
    def timed_on_device(self) -> Iterator[None]:
        """After the body, `times` are what the device took, not the host: on CUDA it works on its own."""
        self.events = [] if self.model.device.type == "cuda" else None
        yield
        if self.events is None:
            return
        torch.cuda.synchronize(self.model.device)
        for phase in ("vision", "prefill", "decode"):
            spans = [first.elapsed_time(last) for name, first, last in self.events if name == phase]
            setattr(self.times, phase, sum(spans) / 1e3)
        self.events = None

    # ---- prompts

    def prefill(
        self, batch: PrefillBatch, images: Sequence[Sequence[KeyValues]], key_values: Sequence[Tensor]
    ) -> Tensor:
        """The last tokens' logits, (rows, vocabulary); keys and values go into `key_values`."""
        with self.timed("prefill"):
            rows, hidden_states = batch.forward(self.model, images, key_values)
            logits = self.model.logits(rows.last(hidden_states))
        self.times.prompt_tokens += sum(batch.lengths)
        return logits

    @torch.inference_mode()
    def _prefill_prefix(self, prompt: QueuedPrompt) -> Prefix:
        """The prompt's shared start, read alone."""
        length = len(prompt.shared)
        input_ids = prompt.prompt.input_ids[:length]
        num_images = input_ids.count(self.vocabulary.image_token_id)
        pixels, keys = prompt.prompt.pixels[:num_images], prompt.prompt.image_keys[:num_images]
        start = QueuedPrompt.of(0, EncodedPrompt(input_ids, pixels, keys), self.vocabulary.image_token_id)
        key_values = space_for((layer.self_attn for layer in self.model.model.layers), self.model, (2, 1), length)
        batch = PrefillBatch([start], NO_PREFIX, self.vocabulary)
        self.prefill(batch, batch.arrange(self.images([start], batch.wanted)), key_values)
        # An end token itself still sees the image before it; what comes after it does not.
        sees = bool(batch.sees_image()[0]) and input_ids[-1] != self.vocabulary.end_token_ids[0]
        return Prefix(prompt.shared, num_images, key_values, keys[-1] if sees else None)

    # ---- images

    def images(
        self, prompts: Sequence[QueuedPrompt], wanted: Sequence[bytes], ahead: Sequence[QueuedPrompt] = ()
    ) -> dict[bytes, KeyValues]:
        """What gated layers read of each wanted image of `prompts`.

        Where none is wanted, one that nothing sees. Those that prompts `ahead` show too are kept for them; to make
        others again from latents costs little.
        """
        if not wanted:
            return {b"": self._no_image()}
        found = {key: self.image_key_values.get(key) for key in wanted}
        missing = [key for key, value in found.items() if value is None]
        queued = [each.prompt for each in ahead]
        if missing:
            latents = self.encode_images([each.prompt for each in prompts], missing, queued)
            with self.timed("prefill"):
                projected = project_images(latents, self.model.model.gated_cross_attn_layers)
            found |= zip(missing, projected, strict=True)
        coming = {key for prompt in queued for key in prompt.image_keys}
        self.image_key_values.retain(coming)
        for key in coming & found.keys():
            self.image_key_values.put(key, found[key], bytes_of(found[key]))
        return found

    def encode_images(self, encoded: EncodedImages, wanted: Sequence[bytes], ahead: EncodedImages = ()) -> Tensor:
        """(images, seq, dim): given, from the cache, or from vision tower and resampler, several at a time.

        Images of prompts `ahead` fill the last batch.
        """
        pixels = images_of(encoded)
        given = {key: pixels[key] for key in wanted if is_latents(pixels[key])}
        found = {key: self.latents.get(key) for key in wanted if key not in given}
        missing = [key for key, value in found.items() if value is None]
        if missing:
            coming = {key: each for key, each in images_of(ahead).items() if not is_latents(each)}
            later = [key for key in coming if key not in pixels and self.latents.get(key) is None]
            missing += later[: -len(missing) % self.image_batch_size.now]
            found |= self._encode(missing, coming | pixels)
        found |= {key: send(latents.to(self.model.dtype), self.model.device) for key, latents in given.items()}
        return torch.stack([found[key] for key in wanted])

    def _encode(self, keys: Sequence[bytes], pixels: dict[bytes, Tensor]) -> dict[bytes, Tensor]:
        """The images' latents, kept for later too. Raises torch.OutOfMemoryError for one that does not fit alone."""
        assert len(set(keys)) == len(keys), "each image is encoded once"
        found: dict[bytes, Tensor] = {}
        while len(found) < len(keys):
            batch = keys[len(found) : len(found) + self.image_batch_size.now]
            encoded = attempt(lambda batch=batch: self._encode_batch([pixels[key] for key in batch]))
            if encoded is not None:
                found |= zip(batch, encoded, strict=True)
                self.image_batch_size.record_success(len(batch))
            elif not self.image_batch_size.shrink(len(batch)):
                self.image_batch_size.reset()
                raise torch.OutOfMemoryError("the device's memory does not hold one image alone")
        for key, latents in found.items():
            self.latents.put(key, latents.clone(), latents.nbytes)
        return found

    def _encode_batch(self, images: Sequence[Tensor]) -> Tensor:
        """(images, seq, dim)"""
        with self.timed("vision"):
            pixels = self._pixel_values(images)
            encoded = self.model.model.encode_images(pixel_values=pixels[:, None]).squeeze(1).to(pixels.device)
        self.times.images += len(images)
        return encoded

    def _pixel_values(self, images: Sequence[Tensor]) -> Tensor:
        """(images, 3, side, side). Bytes become pixels on the device: a quarter is sent."""
        if len({each.dtype for each in images}) > 1:
            return torch.cat([self._pixel_values([each]) for each in images])
        sent = send_beside(torch.stack(list(images)), self.model.device)
        if sent.dtype != torch.uint8:
            return sent
        assert self.pixel_of_byte is not None, "bytes of images without the table of their pixels"
        return pixel_values(sent, send(self.pixel_of_byte, sent.device))

    def _no_image(self) -> KeyValues:
        model = self.model
        latents = torch.zeros(1, image_seq_len(model.config), model.config.vision_config.embed_dim, dtype=model.dtype)
        return project_images(send(latents, model.device), model.model.gated_cross_attn_layers)[0]


def images_of(encoded: EncodedImages) -> dict[bytes, Tensor]:
    """Pixels, or the latents in their place, by what they show."""
    return {key: each for prompt in encoded for key, each in zip(prompt.image_keys, prompt.pixels, strict=True)}


def is_latents(image: Tensor) -> bool:
    """(seq, dim), not (3, side, side)."""
    return image.dim() == 2
