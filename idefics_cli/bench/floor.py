"""The floor: how long the matrix products that a phase cannot do without take alone, in a loop.

Same shapes and same weights as in the run, each in the fastest layout there is. On CUDA also the bytes that must be
read, over the bandwidth of a large copy. Knows the network's shapes, no engine and no prompts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from idefics_cli.engine.memory_budget import VISION_BATCH
from idefics_cli.model.kv_interface import image_seq_len

Layout = Callable[[Tensor, int], Callable[[Tensor], Tensor]]
FLOOR_BYTES = 256 << 20  # weights read in a loop are more than any cache holds
FLOOR_SECONDS = 0.3  # for each timing


@dataclass(frozen=True)
class Product:
    """`times` passes of (rows, in) through each of `weights`, all (out, in) of one shape."""

    weights: tuple[Tensor, ...]
    rows: int
    times: float

    @property
    def num_bytes(self) -> float:
        return self.times * sum(weight.nbytes for weight in self.weights)


@dataclass(frozen=True)
class AttentionProduct:
    """Pairs of products without weights: scores, then values, for (batch, queries) against (batch, keys).

    `times` passes of `layers` pairs. Each layer of a text reads keys and values that are kept, and that other work has
    driven from the caches since, as it does with weights. In vision they were computed just before: `layers` is 1.
    """

    batch: int
    queries: int
    keys: int
    head_dim: int
    times: float
    layers: int = 1


@dataclass(frozen=True)
class PhaseWork:
    products: list[Product]
    attention: list[AttentionProduct]


@dataclass(frozen=True)
class Counts:
    """What was done in a run: images encoded, prompts' own tokens read, decode steps; and the shapes of doing it."""

    images: int
    prompt_tokens: int
    steps: int
    prompts: int
    rows: int
    beams: int
    prompt_length: float
    text_length: float


def work_of(model: transformers.IdeficsForVisionText2Text, counts: Counts) -> dict[str, PhaseWork]:
    """The matrix products that the counted work cannot do without, by phase.

    Images' keys and values, made once for each image, belong to prefill.
    """
    return {
        "vision": vision_work(model, counts),
        "prefill": prefill_work(model, counts),
        "decode": decode_work(model, counts),
    }


def vision_work(model: transformers.IdeficsForVisionText2Text, counts: Counts) -> PhaseWork:
    config, network = model.config, model.model
    vision, perceiver = config.vision_config, config.perceiver_config
    batch = min(counts.images, VISION_BATCH)
    if not batch:
        return PhaseWork([], [])
    times = counts.images / batch
    patches = (vision.image_size // vision.patch_size) ** 2
    seen = 1 + patches
    embedding = network.vision_model.embeddings.patch_embedding.weight.flatten(1)
    products = [Product((embedding,), batch * patches, times)]
    products += products_of(network.vision_model.encoder, batch * seen, times)
    head_dim = vision.hidden_size // vision.num_attention_heads
    heads = batch * vision.num_attention_heads
    attention = [AttentionProduct(heads, seen, seen, head_dim, times * vision.num_hidden_layers)]
    if config.use_resampler:
        latents = perceiver.resampler_n_latents
        blocks = network.perceiver_resampler.blocks
        products += products_of(blocks, batch * (seen + latents), times, only=("k_proj", "v_proj"))
        products += products_of(blocks, batch * latents, times, but=("k_proj", "v_proj"))
        heads = batch * perceiver.resampler_n_heads
        attention.append(
            AttentionProduct(heads, latents, seen + latents, perceiver.resampler_head_dim, times * len(blocks))
        )
    return PhaseWork(products, attention)


def prefill_work(model: transformers.IdeficsForVisionText2Text, counts: Counts) -> PhaseWork:
    if not counts.prompt_tokens:
        return PhaseWork([], [])
    batches = max(1.0, counts.prompts / counts.rows)
    tokens = round(counts.prompt_tokens / batches)
    products = text_products(model, tokens, batches)
    products.append(Product((model.lm_head.weight,), counts.rows, batches))
    if counts.images:
        source = round(counts.images / batches) * image_seq_len(model.config)
        gated = model.model.gated_cross_attn_layers
        products += products_of(gated, source, batches, only=("cross_attn.k_proj", "cross_attn.v_proj"))
    own = max(1, round(counts.prompt_tokens / counts.prompts))
    return PhaseWork(products, text_attention(model, counts, own, round(counts.prompt_length), batches))


def decode_work(model: transformers.IdeficsForVisionText2Text, counts: Counts) -> PhaseWork:
    if not counts.steps:
        return PhaseWork([], [])
    queries = counts.rows * counts.beams
    products = text_products(model, queries, counts.steps)
    products.append(Product((model.lm_head.weight,), queries, counts.steps))
    # Half of a text's length on average, in a tree of which the beams share the trunk.
    keys = round(counts.prompt_length + counts.text_length / 2)
    return PhaseWork(products, text_attention(model, counts, counts.beams, keys, counts.steps))


def text_products(model: transformers.IdeficsForVisionText2Text, tokens: int, times: float) -> list[Product]:
    network = model.model
    return [
        *products_of(network.layers, tokens, times),
        *products_of(network.gated_cross_attn_layers, tokens, times, but=("cross_attn.k_proj", "cross_attn.v_proj")),
    ]


def text_attention(
    model: transformers.IdeficsForVisionText2Text, counts: Counts, queries: int, keys: int, times: float
) -> list[AttentionProduct]:
    config = model.config
    heads = counts.rows * config.num_attention_heads
    head_dim = config.hidden_size // config.num_attention_heads
    gated = len(model.model.gated_cross_attn_layers)
    seen = image_seq_len(model.config)
    return [
        AttentionProduct(heads, queries, keys, head_dim, times, config.num_hidden_layers),
        AttentionProduct(heads, queries, seen, head_dim, times, gated),
    ]


def products_of(
    module: nn.Module, rows: int, times: float, only: tuple[str, ...] = (), but: tuple[str, ...] = ()
) -> list[Product]:
    """One Product for each shape among the module's linear layers whose names end as asked."""
    shapes: dict[tuple[int, ...], list[Tensor]] = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear) or (only and not name.endswith(only)) or (but and name.endswith(but)):
            continue
        shapes.setdefault(tuple(layer.weight.shape), []).append(layer.weight)
    return [Product(tuple(weights), rows, times) for weights in shapes.values()]


def floor_seconds(work: PhaseWork, bandwidth: float | None) -> dict[str, float]:
    """The phase's products alone: with weights, and attention's; and how long its bytes take at the copy bandwidth."""
    floor = {
        "products": sum(product_seconds(product) for product in work.products),
        "attention": sum(attention_seconds(product, work.products[0].weights[0]) for product in work.attention),
    }
    if bandwidth is not None:
        floor["bytes"] = sum(product.num_bytes for product in work.products) / bandwidth
    return floor


@torch.inference_mode()
def product_seconds(product: Product) -> float:
    """All of the product, in the fastest layout there is."""
    weights = enough(product.weights)
    states = torch.randn(product.rows, weights[0].shape[1], device=weights[0].device).to(weights[0].dtype)
    fastest = min(loop_seconds(layout, weights, states) for layout in layouts(weights[0]))
    return fastest * len(product.weights) / len(weights) * product.times


def enough(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """So many of them that a loop over them is not served from a cache."""
    return weights[: max(1, -(-FLOOR_BYTES // max(1, weights[0].nbytes)))]


def layouts(weight: Tensor) -> list[Layout]:
    ready = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    packs = ready and hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and weight.dtype != torch.float16
    return [plain_layout, packed_layout] if packs else [plain_layout]


def plain_layout(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    return lambda states: nn.functional.linear(states, weight)


def packed_layout(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """oneDNN's own blocks for so many rows, as inductor's freezing lays weights out."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    return lambda states: torch.ops.mkldnn._linear_pointwise(states, packed, None, "none", [], "")


def loop_seconds(layout: Layout, weights: Sequence[Tensor], states: Tensor) -> float:
    """Seconds of one pass over all weights."""
    steps = [layout(weight, states.shape[0]) for weight in weights]

    def once() -> None:
        for step in steps:
            step(states)

    return repeated_seconds(once, states.device)


@torch.inference_mode()
def attention_seconds(product: AttentionProduct, like: Tensor) -> float:
    """All of the product, with the keys and values of as many layers as no cache holds, where there are so many."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(product.batch, *shape, device=like.device).to(like.dtype)

    query, weights = normal(product.queries, product.head_dim), normal(product.queries, product.keys)
    layer_bytes = 2 * product.batch * product.keys * product.head_dim * like.dtype.itemsize
    layers = min(product.layers, max(1, -(-FLOOR_BYTES // layer_bytes)))
    key_values = [normal(2, product.keys, product.head_dim).unbind(1) for _ in range(layers)]

    def once() -> None:
        for key, value in key_values:
            query @ key.transpose(1, 2)
            weights @ value

    return repeated_seconds(once, like.device) * product.layers / layers * product.times


def repeated_seconds(once: Callable[[], None], device: torch.device) -> float:
    """The median of repeated calls, the first of which is not counted."""

    def timed(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / calls

    timed(1)
    # On CUDA several calls are queued at a time: the device is not to wait for the host.
    calls = max(1, int(FLOOR_SECONDS / 5 / max(timed(1), 1e-7)))
    return statistics.median(timed(min(calls, 1000)) for _ in range(5))


def copy_bandwidth(device: torch.device) -> float | None:
    """Bytes a second that a large copy reads and writes, on CUDA."""
    if device.type != "cuda":
        return None
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / repeated_seconds(lambda: target.copy_(source) and None, device)
