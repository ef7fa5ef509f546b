"""The floor: how long the matrix products that a phase needs take alone, in a loop.

Same shapes and weights as in the run, in the fastest layout there is; on CUDA at least the time to read the weights at
the bandwidth of a large copy. Knows the network's shapes, no engine and no prompts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from torch import Tensor, nn

from idefics_cli.engine.memory_budget import VISION_BATCH
from idefics_cli.model.kv_interface import image_seq_len
from idefics_cli.model.packed_linear import packable_dtypes

Network = transformers.IdeficsForVisionText2Text
Multiply = Callable[[Tensor], Tensor]
FLOOR_BYTES = 256 << 20  # no cache holds so much: weights in a loop come from memory
FLOOR_SECONDS = 0.3  # for each timing


@dataclass(frozen=True)
class Product:
    """`times` passes of (rows, in) through each of `weights`, all (out, in) of one shape."""

    weights: tuple[Tensor, ...]
    rows: int
    times: float


@dataclass(frozen=True)
class AttentionProduct:
    """Two products without weights, scores and values: (batch, queries) with (batch, keys), `times` passes of `layers`.

    Each layer of a text reads keys and values that other work has driven from the caches since, as it does with
    weights. In vision they were computed just before: there `layers` is 1.
    """

    batch: int
    queries: int
    keys: int
    head_dim: int
    times: float
    layers: int = 1


Work = list[Product | AttentionProduct]


@dataclass(frozen=True)
class Counts:
    """What a run did: images encoded, prompts' own tokens read, decode steps; and in which shapes."""

    images: int
    prompt_tokens: int
    steps: int
    prompts: int
    rows: int
    beams: int
    prompt_length: float
    text_length: float


# ---- what a phase multiplies


def work_of(model: Network, counts: Counts) -> dict[str, Work]:
    """The products that the counted work needs, by phase. Prefill makes each image's keys and values, once."""
    return {
        "vision": vision_work(model, counts) if counts.images else [],
        "prefill": prefill_work(model, counts) if counts.prompt_tokens else [],
        "decode": decode_work(model, counts) if counts.steps else [],
    }


def vision_work(model: Network, counts: Counts) -> Work:
    vision, network = model.config.vision_config, model.model
    batch = min(counts.images, VISION_BATCH)
    times = counts.images / batch
    patches = (vision.image_size // vision.patch_size) ** 2
    embedding = network.vision_model.embeddings.patch_embedding.weight.flatten(1)
    heads, head_dim = vision.num_attention_heads, vision.hidden_size // vision.num_attention_heads
    return [
        Product((embedding,), batch * patches, times),
        *products_of(network.vision_model.encoder, batch * (patches + 1), times),
        AttentionProduct(batch * heads, patches + 1, patches + 1, head_dim, times * vision.num_hidden_layers),
        *(resampler_work(model, batch, patches + 1, times) if model.config.use_resampler else ()),
    ]


def resampler_work(model: Network, batch: int, seen: int, times: float) -> Work:
    config, blocks = model.config.perceiver_config, model.model.perceiver_resampler.blocks
    latents, heads, head_dim = config.resampler_n_latents, config.resampler_n_heads, config.resampler_head_dim
    return [
        *products_of(blocks, batch * (seen + latents), times, key_value=True),
        *products_of(blocks, batch * latents, times, key_value=False),
        AttentionProduct(batch * heads, latents, seen + latents, head_dim, times * len(blocks)),
    ]


def prefill_work(model: Network, counts: Counts) -> Work:
    batches = max(1.0, counts.prompts / counts.rows)
    image_vectors = round(counts.images / batches) * image_seq_len(model.config)
    gated = model.model.gated_cross_attn_layers
    own, keys = max(1, round(counts.prompt_tokens / counts.prompts)), round(counts.prompt_length)
    return [
        *text_work(model, round(counts.prompt_tokens / batches), counts.rows, own, counts.rows, keys, batches),
        *(products_of(gated, image_vectors, batches, key_value=True) if counts.images else ()),
    ]


def decode_work(model: Network, counts: Counts) -> Work:
    # Half of a text's length on average, in a tree whose trunk the beams share.
    keys = round(counts.prompt_length + counts.text_length / 2)
    tokens = counts.rows * counts.beams
    return text_work(model, tokens, counts.rows, counts.beams, tokens, keys, counts.steps)


def text_work(model: Network, tokens: int, rows: int, queries: int, predictions: int, keys: int, times: float) -> Work:
    """`times` passes of `tokens` in all, where each of `rows` has `queries` tokens that see `keys` and an image."""
    config, layers, gated = model.config, model.model.layers, model.model.gated_cross_attn_layers
    heads, head_dim = rows * config.num_attention_heads, config.hidden_size // config.num_attention_heads
    return [
        *products_of(layers, tokens, times),
        *products_of(gated, tokens, times, key_value=False),
        Product((model.lm_head.weight,), predictions, times),
        AttentionProduct(heads, queries, keys, head_dim, times, len(layers)),
        AttentionProduct(heads, queries, image_seq_len(config), head_dim, times, len(gated)),
    ]


def products_of(module: nn.Module, rows: int, times: float, key_value: bool | None = None) -> list[Product]:
    """One Product for each shape among the module's linear layers; `key_value`: only k_proj and v_proj, or all but."""
    shapes: dict[tuple[int, ...], list[Tensor]] = {}
    for name, layer in module.named_modules():
        chosen = key_value is None or name.endswith(("k_proj", "v_proj")) == key_value
        if isinstance(layer, nn.Linear) and chosen:
            shapes.setdefault(tuple(layer.weight.shape), []).append(layer.weight)
    return [Product(tuple(weights), rows, times) for weights in shapes.values()]


# ---- how long that takes


def floor_seconds(work: Work, bandwidth: float | None) -> dict[str, float]:
    """Of products with weights, of attention's, and of reading the weights at the copy bandwidth, where it is known."""
    products = [each for each in work if isinstance(each, Product)]
    attention = [each for each in work if isinstance(each, AttentionProduct)]
    floor = {
        "products": sum(map(product_seconds, products)),
        "attention": sum(attention_seconds(each, like=products[0].weights[0]) for each in attention),
    }
    if bandwidth is not None:
        read = sum(each.times * sum(weight.nbytes for weight in each.weights) for each in products)
        floor["bytes"] = read / bandwidth
    return floor


@torch.inference_mode()
def product_seconds(product: Product) -> float:
    """All of the product, in the faster layout, measured over as many weights as no cache holds."""
    weights = product.weights[: max(1, -(-FLOOR_BYTES // max(1, product.weights[0].nbytes)))]
    like = weights[0]
    states = torch.randn(product.rows, like.shape[1], device=like.device).to(like.dtype)
    fastest = min(
        repeated_seconds(lambda layout=layout: [multiply(states) for multiply in layout], states.device)
        for layout in layouts(weights, product.rows)
    )
    return fastest * len(product.weights) / len(weights) * product.times


def layouts(weights: Sequence[Tensor], rows: int) -> Iterator[list[Multiply]]:
    """Products with the weights as they are, and in oneDNN's blocks for so many rows where it has such kernels."""
    yield [partial(nn.functional.linear, weight=weight) for weight in weights]
    if weights[0].device.type == "cpu" and weights[0].dtype in packable_dtypes():
        yield [packed(weight.detach().contiguous(), rows) for weight in weights]


def packed(weight: Tensor, rows: int) -> Multiply:
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda states: torch.ops.mkldnn._linear_pointwise(states, blocks, None, "none", [], "")


@torch.inference_mode()
def attention_seconds(product: AttentionProduct, like: Tensor) -> float:
    """All of the product, measured over as many layers' keys and values as no cache holds."""

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


def repeated_seconds(once: Callable[[], object], device: torch.device) -> float:
    """The median of repeated calls, not counting the first."""

    def timed(calls: int) -> float:
        if device.type == "cuda":
            return seconds_on_cuda(lambda: [once() for _ in range(calls)], device) / calls
        started = time.perf_counter()
        for _ in range(calls):
            once()
        return (time.perf_counter() - started) / calls

    timed(1)
    # On CUDA several calls are queued at a time, so that the device does not wait for the host.
    calls = max(1, int(FLOOR_SECONDS / 5 / max(timed(1), 1e-7)))
    return statistics.median(timed(min(calls, 1000)) for _ in range(5))


def seconds_on_cuda(work: Callable[[], object], device: torch.device) -> float:
    """Between two events on the device's stream."""
    stream = torch.cuda.current_stream(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record(stream)
    work()
    last.record(stream)
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def copy_bandwidth(device: torch.device, num_bytes: int = 1 << 30) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / repeated_seconds(lambda: target.copy_(source), device)
