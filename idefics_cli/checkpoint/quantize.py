"""Weights of fewer bits: int8 by torchao, nf4 by bitsandbytes, one tensor at a time as a checkpoint is read.

Neither library is imported before it is asked for. bitsandbytes' CPU backend may fetch compiled code from a hub, so nf4
is refused there.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from idefics_cli.errors import CheckpointError, DeviceError, IdeficsError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import IdeficsConfig

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
BYTES = {"int8": 1.0, "nf4": 0.55}  # of a weight, with its scale
# What stays as it is. In int8 all linear layers are measured to be harmless, on the demo model.
LEFT = {"int8": ["model.embed_tokens"], "nf4": ["lm_head", "model.vision_model", "model.perceiver_resampler"]}
NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
SMALL_BYTES = 1 << 20  # of tensors that glibc may keep when they are freed
LATER = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}  # what they come to by themselves
NOISY_LOGGERS = ("torchao", "torch.utils._pytree")  # torchao warns of kernels for other processors as it is imported


def check(quantize: str | None, device: torch.device, dtype: str, is_shared: bool) -> None:
    """Raise IdeficsError, or a kind of it, for what cannot be run. `is_shared`: by several processes or devices."""
    if quantize is None:
        return
    if quantize not in PACKAGES:
        raise IdeficsError(f"unknown quantize {quantize!r}: use {' or '.join(PACKAGES)}")
    if quantize == "nf4" and device.type != "cuda":
        raise DeviceError(f"--quantize nf4 runs on CUDA, not on {device}: use --quantize int8")
    if quantize == "nf4" and is_shared:
        raise DeviceError("nf4 weights are for one device: use --quantize int8, or leave out torchrun and --device-map")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"--quantize int8 runs on the CPU and on CUDA, not on {device}: use --device cpu")
    if device.type == "cpu" and dtype not in ("auto", "fp32"):
        raise IdeficsError(f"--quantize int8 computes in fp32 on the CPU: leave out --dtype {dtype}")
    if find_spec(PACKAGES[quantize]) is None:
        raise CheckpointError(f"--quantize {quantize} needs an extra: pip install 'idefics-cli[quantize]'")


def settings(quantize: str | None, dtype: torch.dtype) -> Any:
    """What transformers takes as `quantization_config`."""
    silence()  # it may import these libraries by itself, for weights saved in such a kind
    if quantize is None:
        return None
    from transformers import BitsAndBytesConfig, TorchAoConfig

    left = LEFT[quantize]
    if quantize == "nf4":
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=left, **options)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), modules_to_not_convert=left)


def kind_of(config: IdeficsConfig, quantize: str | None = None) -> str | None:
    """How a network's weights are held: as its checkpoint was saved, or as asked for.

    Raises CheckpointError where these differ, and for what was saved in another kind.
    """
    about = getattr(config, "quantization_config", None)  # of a network that is loaded, not a dict
    saved = _saved_kind(about.to_dict() if hasattr(about, "to_dict") else about)
    if saved is not None and quantize not in (None, saved):
        raise CheckpointError(f"the model is saved in {saved}: leave out --quantize {quantize}")
    return saved or quantize


def check_saved(config: IdeficsConfig, is_shared: bool, has_adapter: bool) -> None:
    """Raise CheckpointError for what cannot be done with weights that were quantized before they were saved."""
    kind = kind_of(config)
    if kind is not None and (is_shared or has_adapter):
        what = "is for one device, without torchrun and --device-map" if is_shared else "takes no --adapter"
        raise CheckpointError(f"a model saved in {kind} {what}: use the one it was made of, with --quantize {kind}")


def _saved_kind(saved: dict[str, Any] | None) -> str | None:
    if saved is None:
        return None
    method, kinds = saved.get("quant_method"), saved.get("quant_type")
    default = kinds.get("default") if isinstance(kinds, dict) else None
    name = default.get("_type") if isinstance(default, dict) else None
    if method == "torchao" and name == "Int8DynamicActivationInt8WeightConfig":
        return "int8"
    if method == "bitsandbytes" and saved.get("load_in_4bit") and saved.get("bnb_4bit_quant_type") == "nf4":
        return "nf4"
    what = " ".join(str(each) for each in (method, name, f"{saved['bits']}-bit" if "bits" in saved else None) if each)
    raise CheckpointError(
        f"the model asks for quantized weights ({what}), which cannot be run: use the published checkpoint, with "
        "--quantize int8 or nf4"
    )


def plain_shapes(stored: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...] | None]:
    """A quantized checkpoint's tensors under the names that they have in the network; None: packed in another shape."""
    in_4_bits = {name.partition(".weight.")[0] + ".weight" for name in stored if ".weight.absmax" in name}
    named = {name.replace("._weight_qdata", ".weight"): shape for name, shape in stored.items()}
    extra = re.compile(r"\._weight_\w+$|\.weight\.\w+")  # scales and tables
    return {name: None if name in in_4_bits else shape for name, shape in named.items() if not extra.search(name)}


def weight_bytes(network: nn.Module, kind: str | None, dtype: torch.dtype, size: int = 1) -> int:
    """Of all parameters in one of `size` processes, where the linear layers are quantized."""
    from torch import nn

    from idefics_cli.model.parallel import style_of

    left = tuple(LEFT.get(kind, ()))
    linear = {
        id(module.weight)
        for name, module in network.named_modules()
        if kind and isinstance(module, nn.Linear) and not name.startswith(left)
    }
    return round(
        sum(
            each.numel()
            * (BYTES[kind] if id(each) in linear else dtype.itemsize)
            / (size if style_of(name.removesuffix(".weight")) else 1)
            for name, each in network.named_parameters()
        )
    )


@contextmanager
def one_at_a_time(is_needed: bool) -> Iterator[None]:
    """transformers' threads would read all tensors long before they are quantized or merged; and glibc would keep what
    these leave free, between those that stay."""
    before, mallopt = os.environ.get(NO_THREADS), getattr(ctypes.CDLL(None), "mallopt", None)
    has_mallopt = is_needed and mallopt is not None
    if is_needed:
        os.environ[NO_THREADS] = "1"
    if has_mallopt:
        mallopt(M_MMAP_THRESHOLD, SMALL_BYTES)
    try:
        yield
    finally:
        if has_mallopt:
            for number, value in LATER.items():
                mallopt(number, value)
        os.environ.pop(NO_THREADS, None)
        if before is not None:
            os.environ[NO_THREADS] = before


def silence() -> None:
    """Warnings of these libraries' own imports, which no user can do anything about."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
