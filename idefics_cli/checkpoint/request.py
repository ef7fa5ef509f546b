"""Which model, in the words of a user."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from idefics_cli.checkpoint.devices import dtype_name
from idefics_cli.checkpoint.files import ADAPTER_CONFIG, read_json, require, require_config
from idefics_cli.errors import IdeficsError
from idefics_cli.validation import Help

Attention = Literal["auto", "triton", "sdpa"]
DEFAULT_MODEL = "HuggingFaceM4/idefics-9b-instruct"
DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "checkpoint"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelRequest:
    """Which model to load, and where it runs, in the caller's words."""

    model: Annotated[
        str | None,
        Help(
            "Hub id, local folder, or demo (knows coloured shapes, runs anywhere)",
            metavar="MODEL",
            flags=("-m", "--model"),
            default=f"{DEFAULT_MODEL}, or the adapter's base",
        ),
    ] = None
    revision: Annotated[str | None, Help("Branch, tag or commit of the hub model", metavar="NAME")] = None
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32", "bfloat16", "float16", "float32"],
        Help("Number format: auto, bf16, fp16 or fp32; on the CPU auto is fp32, or bf16 if that is faster", "FORMAT"),
    ] = "auto"
    device: Annotated[str, Help("Where the model runs: auto, cuda, cuda:N, cpu or mps", metavar="DEVICE")] = "auto"
    allow_pickle: Annotated[bool, Help("Load pickled weights (as weights only) where safetensors are missing")] = False
    adapter: Annotated[str | None, Help("Folder of LoRA weights (PEFT), merged into the model", metavar="DIR")] = None
    device_map: Annotated[
        Literal["auto", "balanced", "sequential"] | None,
        Help("Spread the model over GPUs, CPU and disk: auto, balanced or sequential", metavar="HOW"),
    ] = None
    quantize: Annotated[
        Literal["int8", "nf4"] | None,
        Help("Smaller weights: of 8 bits (CPU, CUDA) or 4 (CUDA)", metavar="int8|nf4"),
    ] = None
    attention: Annotated[
        Attention,
        Help("Attention of a decode step: one kernel on CUDA (triton), torch's (sdpa), or auto", metavar="KIND"),
    ] = "auto"
    eager: Annotated[bool, Help("On CUDA: no graph of a decode step, its operations one by one")] = False

    def __post_init__(self) -> None:
        if self.model is None:
            object.__setattr__(self, "model", DEFAULT_MODEL if self.adapter is None else base_of(self.adapter))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.attention not in get_args(Attention):
            raise IdeficsError(f"unknown attention {self.attention!r}: use {', '.join(get_args(Attention))}")
        if self.device_map not in (None, "auto", "balanced", "sequential"):
            raise IdeficsError(f"unknown device_map {self.device_map!r}: use auto, balanced or sequential")
        if self.device_map is not None and self.device != "auto":
            raise IdeficsError("--device cannot be used with --device-map, which places the weights: leave it out")
        if self.device_map is not None and self.attention == "triton":
            raise IdeficsError("--attention triton cannot be used with --device-map: use auto or sdpa")


def base_of(adapter: str) -> str:
    """The model that an adapter was trained on. A file's word alone fetches nothing: it is a folder, or cached."""
    path = Path(os.path.expanduser(adapter))
    require_config(path, ADAPTER_CONFIG)
    base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    require(isinstance(base, str) and base, f"{path} names no base model: add -m MODEL")
    is_here = os.path.isdir(base) or (HUB_ID.fullmatch(base) and cached_folder(base) is not None)
    require(is_here, f"{path} was trained on {base!r}, which is not on this machine: name its base, as -m {base}")
    return base


def local_folder(model: str) -> Path | None:
    """The folder that `model` names, or None for a hub id. Raises CheckpointError for what can be neither."""
    if model == DEMO:
        return DEMO_FOLDER
    path = os.path.expanduser(model)  # unlike pathlib's, these functions raise for no name
    if os.path.isdir(path):
        return Path(path)
    require(not os.path.exists(path), f"model {model!r} is a file: give the checkpoint's folder")
    is_hub_id = HUB_ID.fullmatch(model) and not model.startswith((".", os.sep))
    require(is_hub_id, f"no model {model!r}: give a folder that exists, a hub id such as org/name, or 'demo'")
    return None


def cached_folder(hub_id: str, revision: str | None = None) -> Path | None:
    """What the hub's cache has of a model, perhaps not all of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):  # reported when the model is fetched
        return None
