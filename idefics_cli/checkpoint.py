"""Where a model is, whether it is whole, and how it is loaded: hub id, local folder or `demo` -> network and tokenizer.

Everything that headers and listings can tell is checked before a weight is read, and said in one line. Nothing from a
checkpoint is ever executed: weights are safetensors unless the caller allows pickles (then `weights_only`), and
`auto_map` is not honoured. This module knows no prompts and no decoding.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idefics_cli.errors import CheckpointError, DeviceError, IdeficsError
from idefics_cli.storage.files import file_digest, local_file

if TYPE_CHECKING:
    import torch
    from transformers import IdeficsConfig, PreTrainedTokenizerBase

    from idefics_cli.model.modeling import IdeficsForVisionText2Text

DEFAULT_MODEL = "HuggingFaceM4/idefics-9b-instruct"
DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo" / "checkpoint"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SAFETENSORS, PICKLES = "model.safetensors", "pytorch_model.bin"
SIDE_FILES = ("*.json", "tokenizer.model")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NAMES_SHOWN = 8
# Files of 2023 hold a buffer beside them, `position_ids`, which no class reads.
VISION_TENSOR = re.compile(r"model\.(vision_model|perceiver_resampler)\..*(?<!position_ids)")
# Fields of a configuration that name another file of weights (a pickle even), or classes to put in place of ours.
LOADER_FIELDS = ("transformers_weights", "fusion_config")


@dataclass(frozen=True)
class ModelRequest:
    """What the caller asked for, in the caller's words."""

    model: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    allow_pickle: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has been looked through: its weights' files are there, and whether they are pickles."""

    folder: Path
    weight_files: tuple[Path, ...]
    is_pickled: bool


# ---- what can be known before anything is loaded


def check_model_request(request: ModelRequest) -> None:
    """Raise what is wrong with dtype, device or a local folder. Reaches no network and reads no weight."""
    resolve_dtype_name(request.dtype)
    resolve_device(request.device)
    folder = local_folder(request.model)
    if folder is not None:
        inspect_folder(folder, request.allow_pickle)


def weights_digest(request: ModelRequest) -> str | None:
    """Equal for equal checkpoints, told from every file's size, head and tail; None for one that is not here yet."""
    folder = local_folder(request.model) or _cached_folder(request)
    if folder is None:
        return None
    checkpoint = inspect_folder(folder, request.allow_pickle)
    side_files = {path for pattern in SIDE_FILES for path in folder.glob(pattern)}
    digest = hashlib.sha256()
    for path in sorted({*checkpoint.weight_files, *side_files}):
        digest.update(f"{path.name} {path.stat().st_size} {file_digest(local_file(str(path)))}\n".encode())
    return digest.hexdigest()


def vision_fingerprint(checkpoint: Checkpoint) -> str:
    """Equal for checkpoints that make the same latents of an image, whatever their name, shards and language side.

    Made of the tensors of vision tower and resampler as they are stored, of the settings that say how they are used,
    and of how pixels are made. The dtype of a run is not part of it: it changes roundings only.
    """
    from idefics_cli.images.preprocess import ImageProcessor

    settings = _vision_settings(load_config(checkpoint)) | asdict(ImageProcessor.from_pretrained(checkpoint.folder))
    tensors = {name: digest for file in checkpoint.weight_files for name, digest in _vision_digests(file, checkpoint)}
    return hashlib.sha256(json.dumps([settings, tensors], sort_keys=True).encode()).hexdigest()


def known_vision_fingerprint(request: ModelRequest) -> str | None:
    """`vision_fingerprint` of a model that is here, without fetching it; None: it is not here yet."""
    folder = local_folder(request.model) or _cached_folder(request)
    return None if folder is None else vision_fingerprint(inspect_folder(folder, request.allow_pickle))


def _vision_settings(config: IdeficsConfig) -> dict[str, Any]:
    vision, perceiver = config.vision_config, config.perceiver_config
    names = ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
    settings = {name: getattr(vision, name) for name in names} | {"use_resampler": config.use_resampler}
    if config.use_resampler:
        names = ("resampler_n_heads", "resampler_head_dim", "qk_layer_norms_perceiver")
        settings |= {name: getattr(perceiver, name) for name in names}
    return settings


def _vision_digests(file: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Name and digest of each tensor in the file that latents are made with."""
    import torch

    for name, tensor in _stored_tensors(file, checkpoint.is_pickled):
        about = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        about.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        yield name, about.hexdigest()


def _stored_tensors(file: Path, is_pickled: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of vision tower and resampler, one at a time."""
    import torch
    from safetensors import safe_open

    if is_pickled:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        yield from ((name, tensor) for name, tensor in stored.items() if VISION_TENSOR.fullmatch(name))
        return
    with safe_open(file, framework="pt") as tensors:
        for name in filter(VISION_TENSOR.fullmatch, tensors.keys()):
            yield name, tensors.get_tensor(name)


def _cached_folder(request: ModelRequest) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(request.model, revision=request.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):  # said where the model is fetched
        return None


def dtype_name(dtype: str | torch.dtype) -> str:
    """What `dtype` is called here, where it is one of torch's; any other is left as it is."""
    return next((name for name, full in DTYPES.items() if str(dtype) == f"torch.{full}"), str(dtype))


def resolve_dtype_name(dtype: str) -> str:
    if dtype != "auto" and dtype not in DTYPES:
        raise IdeficsError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    return dtype


def resolve_device(device: str) -> torch.device:
    """`auto` is the first of CUDA and CPU that is there. Raises DeviceError for one that this machine lacks."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]{1,2})?", device):
        raise DeviceError(f"unknown device {device!r}: use auto, cpu, mps, cuda or cuda:N")
    resolved = torch.device(device)
    if resolved.type == "cuda":
        _require_cuda(resolved)
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device 'mps' needs a Mac with Metal, and this machine has none: use --device auto")
    return resolved


def _require_cuda(device: torch.device) -> None:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        build = "is a CPU build" if torch.version.cuda is None else "finds no CUDA device"
        raise DeviceError(
            f"device {str(device)!r} is not here: torch {torch.__version__} {build}; use --device cpu or auto"
        )
    if (device.index or 0) >= count:
        raise DeviceError(f"device {str(device)!r} is not here: this machine has cuda:0 to cuda:{count - 1}")


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on CUDA that has it, else float16 there; float32 elsewhere."""
    import torch

    if resolve_dtype_name(dtype) != "auto":
        return getattr(torch, DTYPES[dtype])
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def local_folder(model: str) -> Path | None:
    """The folder that `model` names, or None for a hub id. Raises CheckpointError for what can be neither."""
    if model == DEMO:
        return DEMO_FOLDER
    path = os.path.expanduser(model)  # unlike pathlib's, these functions raise for no name
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        raise CheckpointError(f"model {model!r} is a file: give the checkpoint's folder")
    if not HUB_ID.fullmatch(model) or model.startswith((".", os.sep)):
        raise CheckpointError(f"no model {model!r}: give a folder that exists, a hub id such as org/name, or 'demo'")
    return None


def inspect_folder(folder: Path, allow_pickle: bool) -> Checkpoint:
    """Architecture, weights and tokenizer are there, and every safetensors file is as long as it says."""
    _require_idefics(folder)
    _require_tokenizer(folder)
    _refuse_adapter(folder)
    files = weight_files(folder, SAFETENSORS)
    if files:
        for file in files:
            _tensor_shapes(file)
        return Checkpoint(folder, files, is_pickled=False)
    if not allow_pickle:
        _refuse_pickles(folder)
    pickles = weight_files(folder, PICKLES)
    if not pickles:
        raise CheckpointError(f"{folder} holds no weights: expected {SAFETENSORS} or {SAFETENSORS}.index.json")
    return Checkpoint(folder, pickles, is_pickled=True)


def _refuse_adapter(folder: Path) -> None:
    """transformers would load it silently over the weights that were looked through, from a pickle if it is one."""
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} holds an adapter beside its weights: merge it into them, or take it out")


def _refuse_pickles(folder: Path) -> None:
    """Of a hub's pickles only the index has been fetched, so it alone tells of them too."""
    for name in (PICKLES, f"{PICKLES}.index.json"):
        if (folder / name).is_file():
            raise CheckpointError(
                f"{folder} holds its weights as pickles only ({name}), which can run code: convert them to "
                "safetensors, or trust them with --allow-pickle"
            )


def _require_idefics(folder: Path) -> None:
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type != "idefics":
        raise CheckpointError(f"{folder} is a {model_type or 'nameless'} model: only model_type idefics can be run")


def _require_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(
            f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model beside the weights"
        )


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}: give a checkpoint's folder")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object: fetch the file again")
    return value


def weight_files(folder: Path, name: str) -> tuple[Path, ...]:
    """`name` itself, or the shards that `name`.index.json lists (each of which must be there), or none."""
    if (folder / name).is_file():
        return (folder / name,)
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return ()
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} maps no weights: fetch the file again")
    shards = sorted(set(map(str, weight_map.values())))
    if any(Path(shard).name != shard for shard in shards):
        raise CheckpointError(f"{index} points out of its folder: do not use this checkpoint")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards ({shown(missing)}): fetch them again"
        )
    return tuple(folder / shard for shard in shards)


def _tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from a safetensors header; the library compares the file's length with it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cut short ({error}): fetch the file again") from error


# ---- loading


def find_checkpoint(request: ModelRequest) -> Checkpoint:
    """The looked-through folder of a request; a hub id is fetched, or taken from the cache when there is no network."""
    folder = local_folder(request.model)
    if folder is None:
        folder = _fetch(request)
    return inspect_folder(folder, request.allow_pickle)


def _fetch(request: ModelRequest) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    def download(patterns: Iterable[str]) -> Path:
        return Path(snapshot_download(request.model, revision=request.revision, allow_patterns=list(patterns)))

    try:
        folder = download((*SIDE_FILES, "*.safetensors"))
        if request.allow_pickle and not weight_files(folder, SAFETENSORS):
            folder = download((*SIDE_FILES, "pytorch_model*.bin"))
        return folder
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"the hub has no model {request.model!r}: check the name, or log in if it is private"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # the layers below the hub's library raise many kinds for a line that breaks
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"model {request.model!r} is not in the cache and cannot be fetched ({reason}): "
            "connect once, or give a local folder"
        ) from error


def load_config(checkpoint: Checkpoint) -> IdeficsConfig:
    """The configuration, without what would have transformers load other files or code than those looked through."""
    from transformers import IdeficsConfig

    path = checkpoint.folder / "config.json"
    try:
        config = IdeficsConfig.from_pretrained(checkpoint.folder)
        config._attn_implementation = "sdpa"  # another may name a kernel on the hub
    except Exception as error:  # the library raises many kinds for a field of a wrong type
        raise CheckpointError(f"{path} is no IDEFICS configuration ({error})") from error
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{path} asks for quantized weights, which cannot be run: name the checkpoint as published"
        )
    for field in LOADER_FIELDS:
        setattr(config, field, None)
    return config


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer as the model was trained with it: `tokenizer.json` to the letter.

    IDEFICS learned texts that begin with a blank behind every special token (`<image>Caption` is an image and
    "▁Caption"), as LLaMA's tokenizers of 2023 had it. Today's LlamaTokenizer builds another one from the same file, in
    which only the first text of a prompt has the blank; for a `tokenizer.model` alone it has to be told (`legacy`).
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder, options = checkpoint.folder, {"trust_remote_code": False, "local_files_only": True}
    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder, **options)
        return AutoTokenizer.from_pretrained(folder, legacy=True, **options)
    except Exception as error:  # the library raises many kinds for a damaged file
        raise CheckpointError(
            f"the tokenizer in {checkpoint.folder} cannot be read ({error}): fetch its files again"
        ) from error


def load_network(
    checkpoint: Checkpoint, config: IdeficsConfig, device: torch.device, dtype: torch.dtype
) -> IdeficsForVisionText2Text:
    """The network, ready to run. Raises CheckpointError naming missing, unexpected and misshapen tensors."""
    import torch
    from transformers import GenerationConfig

    from idefics_cli.model.memory_errors import naming_memory_errors
    from idefics_cli.model.modeling import IdeficsForVisionText2Text

    expected = _expected_shapes(checkpoint, config)
    if not checkpoint.is_pickled:
        shapes = {name: shape for file in checkpoint.weight_files for name, shape in _tensor_shapes(file).items()}
        _require_same_tensors(checkpoint, shapes, expected)
    try:
        with naming_memory_errors():
            model, info = IdeficsForVisionText2Text.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=dtype,
                use_safetensors=not checkpoint.is_pickled,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError as error:
        num_bytes = dtype.itemsize * sum(math.prod(shape) for shape in expected.values())
        raise _memory_ended(torch.device("cpu"), num_bytes) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"the pickles in {checkpoint.folder} hold more than weights, or are damaged: use safetensors"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"the weights in {checkpoint.folder} cannot be read ({error}): fetch them again"
        ) from error
    _require_clean(checkpoint, info)
    # Only the caller's decoding options count, whatever defaults a checkpoint's generation_config.json brings.
    model.generation_config = GenerationConfig()
    return _moved(model, device).eval().requires_grad_(False)


def _moved(model: IdeficsForVisionText2Text, device: torch.device) -> IdeficsForVisionText2Text:
    import torch

    from idefics_cli.model.memory_errors import naming_memory_errors

    try:
        with naming_memory_errors():
            return model.to(device)
    except torch.OutOfMemoryError as error:
        raise _memory_ended(device, model.get_memory_footprint()) from error


def _memory_ended(device: torch.device, num_bytes: int) -> DeviceError:
    mend = "a larger machine or a smaller model"
    if device.type != "cpu":
        mend = "a larger device, a smaller model or --device cpu"
    return DeviceError(f"the memory of {str(device)!r} does not hold the model's {num_bytes / 1e9:.1f} GB: use {mend}")


def _expected_shapes(checkpoint: Checkpoint, config: IdeficsConfig) -> dict[str, tuple[int, ...]]:
    import torch

    from idefics_cli.model.modeling import IdeficsForVisionText2Text

    try:
        with torch.device("meta"):
            model = IdeficsForVisionText2Text(config)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"no network can be made as {checkpoint.folder / 'config.json'} says "
            f"({type(error).__name__}: {error}): restore the published file"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _require_same_tensors(checkpoint: Checkpoint, found: dict, expected: dict) -> None:
    from idefics_cli.model.modeling import IdeficsForVisionText2Text

    relics = IdeficsForVisionText2Text._keys_to_ignore_on_load_unexpected
    known = {name for name in found if not any(re.search(relic, name) for relic in relics)}
    tied = {"lm_head.weight", "lm_head.additional_fc.weight"} if _is_tied(checkpoint) else set()
    both = known & expected.keys()
    _refuse(
        checkpoint,
        missing=sorted(expected.keys() - known - tied),
        unexpected=sorted(known - expected.keys()),
        misshapen=[
            f"{name} {found[name]} instead of {expected[name]}"
            for name in sorted(both)
            if found[name] != expected[name]
        ],
    )


def _is_tied(checkpoint: Checkpoint) -> bool:
    return bool(read_json(checkpoint.folder / "config.json").get("tie_word_embeddings", False))


def _require_clean(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    misshapen = [name if isinstance(name, str) else name[0] for name in info["mismatched_keys"]]
    _refuse(checkpoint, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), sorted(misshapen))


def _refuse(checkpoint: Checkpoint, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    said = [f"{len(names)} {kind} ({shown(names)})" for kind, names in kinds.items() if names]
    if said:
        raise CheckpointError(
            f"the weights in {checkpoint.folder} do not fit their config.json: {'; '.join(said)}; "
            "fetch the checkpoint again, all files of one revision"
        )


def shown(names: list[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
