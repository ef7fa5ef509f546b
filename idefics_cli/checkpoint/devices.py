"""Where a model runs and in which number format, and whether it has space there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from idefics_cli.errors import DeviceError, IdeficsError
from idefics_cli.storage.once_per_machine import once_per_machine

if TYPE_CHECKING:
    import torch
    from transformers import IdeficsConfig

    from idefics_cli.ranks import Ranks


INT8_BYTES = 1.2  # of a weight in int8, with those that are left as they are, at most about
BF16_GAIN = 1.25  # bf16 is less exact: it has to be worth it
SMALLEST_MATRIX = 1 << 20  # numbers in a layer's largest: in smaller models calls count, not products
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def dtype_name(dtype: str | torch.dtype) -> str:
    """Our name for `dtype` where it is one of torch's or its name; anything else as it is."""
    given = str(dtype).removeprefix("torch.")
    return next((name for name, full in DTYPES.items() if given == full), str(dtype))


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is a device, else MPS, else the CPU. Raises DeviceError for one that is not here."""
    import torch

    if device == "auto":
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return torch.device(next(name for name, is_there in found.items() if is_there))
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]{1,2})?", device):
        raise DeviceError(f"unknown device {device!r}: use auto, cpu, mps, cuda or cuda:N")
    resolved = torch.device(device)
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("MPS is not available: it needs a Mac with Metal; use --device cpu")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        build = "is a CPU build" if torch.version.cuda is None else "finds no CUDA device"
        raise DeviceError(f"CUDA is not available: torch {torch.__version__} {build}; use --device cpu")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"no device {device!r}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return resolved


def device_of_process(device: str, ranks: Ranks) -> torch.device:
    """Each of several processes has a device of its own. Raises DeviceError for another one."""
    if device not in ("auto", ranks.device.type):
        raise DeviceError(
            f"--device {device} has no meaning under torchrun, which gives each process one: leave it out"
        )
    return ranks.device


def resolve_dtype(dtype: str, device: torch.device, config: IdeficsConfig | None = None) -> torch.dtype:
    """`auto`: bfloat16 on CUDA devices that have it, float16 on others and on MPS; float32 on the CPU, or bfloat16
    where it multiplies faster in the layers that `config` asks for."""
    import torch

    if dtype in DTYPES:
        return getattr(torch, DTYPES[dtype])
    if dtype != "auto":
        raise IdeficsError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    if device.type == "cpu":
        return torch.bfloat16 if config is not None and bf16_gain(config) >= BF16_GAIN else torch.float32
    if device.type == "mps":
        return torch.float16
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def bf16_gain(config: IdeficsConfig) -> float:
    """How many times faster than in fp32 the processor multiplies in bf16: 1 where it has no instructions for that, or
    the layers are small, and otherwise what was once measured with the weights of one layer of text and one of vision.
    """
    import torch

    is_small = config.hidden_size * config.intermediate_size < SMALLEST_MATRIX
    if is_small or not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return 1.0
    from idefics_cli.model.packed_linear import DECODE_ROWS, IMAGE_ROWS, seconds_of_layer

    vision = config.vision_config
    layers = (
        (config.hidden_size, config.intermediate_size, DECODE_ROWS),
        (vision.embed_dim, vision.intermediate_size, IMAGE_ROWS),
    )

    def measure() -> float:
        formats = torch.float32, torch.bfloat16
        fp32, bf16 = (sum(seconds_of_layer(*layer, dtype) for layer in layers) for dtype in formats)
        return fp32 / bf16

    return once_per_machine(f"bf16 {layers} {torch.__version__} {torch.get_num_threads()}", measure)


def require_fit(num_bytes: int, device: torch.device, dtype: torch.dtype, quantize: str | None = None) -> None:
    from idefics_cli.engine.memory_budget import free_bytes

    if num_bytes > free_bytes(device):
        raise does_not_fit(num_bytes, device, dtype, quantize)


def does_not_fit(num_bytes: int, device: torch.device, dtype: torch.dtype, quantize: str | None = None) -> DeviceError:
    """`num_bytes`: in this format, or quantized so."""
    import torch

    from idefics_cli.engine.memory_budget import free_bytes

    free, host = free_bytes(device), free_bytes(torch.device("cpu"))
    in_int8 = num_bytes / dtype.itemsize * INT8_BYTES if quantize is None and device.type != "mps" else torch.inf
    remedies = [
        "--dtype bf16" if quantize is None and dtype.itemsize > 2 and num_bytes // 2 <= free else None,
        "--quantize int8" if in_int8 <= free else None,
        "--device cpu" if device.type != "cpu" and num_bytes <= host else None,
        "a machine with more memory" if device.type == "cpu" else "a larger device",
    ]
    return DeviceError(
        f"out of memory: the model's {num_bytes / 1e9:.1f} GB in {quantize or dtype_name(dtype)} do not fit on"
        f" {device}, which has {free / 1e9:.1f} GB free: use {', '.join(filter(None, remedies))} or a smaller model"
    )
