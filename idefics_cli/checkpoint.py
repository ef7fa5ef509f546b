"""Where a model is, whether it is whole, and how it is loaded: hub id, local folder or `demo` -> network and tokenizer.

A missing or damaged file is reported in one line before a weight is read. Nothing from a checkpoint is ever executed:
weights are safetensors unless the caller allows pickles (then `weights_only`), and `auto_map` is ignored. This module
knows no prompts and no decoding.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from idefics_cli.adapter import merged, require_peft, settings_of
from idefics_cli.errors import CheckpointError, DeviceError, IdeficsError
from idefics_cli.storage.regular_file import POINTER_BYTES, lfs_pointer, read_json_object
from idefics_cli.validation import Help

if TYPE_CHECKING:
    import torch
    from transformers import IdeficsConfig, PreTrainedTokenizerBase

    from idefics_cli.model.modeling import IdeficsForVisionText2Text

DEFAULT_MODEL = "HuggingFaceM4/idefics-9b-instruct"
DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo" / "checkpoint"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SAFETENSORS, PICKLES = "model.safetensors", "pytorch_model.bin"
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
ADAPTER, ADAPTER_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
CAN_RUN_CODE = "which can run code: convert them to safetensors, or trust them with --allow-pickle"
SIDE_FILES = ("*.json", "tokenizer.model")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NAMES_SHOWN = 8
# Files of 2023 hold a buffer too, `position_ids`, which no class reads.
VISION_TENSOR = re.compile(r"(?:base_model\.model\.)?model\.(vision_model|perceiver_resampler)\..*(?<!position_ids)")
VISION_FIELDS = ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
RESAMPLER_FIELDS = ("resampler_n_heads", "resampler_head_dim", "qk_layer_norms_perceiver")
# Fields of a configuration that name another file of weights (even a pickle), or classes to put in place of ours, or
# make a dictionary of as many labels as they say.
LEFT_OUT = ("transformers_weights", "fusion_config", "auto_map", "num_labels", "id2label", "label2id")
HEAD, ADDITIONAL_HEAD = "lm_head.weight", "lm_head.additional_fc.weight"
ADDITIONAL_EMBEDDING = "model.embed_tokens.additional_embedding.weight"

# What a damaged file or a wrong value in config.json raises in torch and transformers.
LOADING_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError),
    *(LookupError, OSError, RuntimeError, TypeError, ValueError),
)


@dataclass(frozen=True)
class ModelRequest:
    """Which model to load, and where it runs, in the caller's words."""

    model: Annotated[
        str | None,
        Help(
            "Hub id, local folder, or `demo` (coloured shapes only, runs anywhere)",
            metavar="MODEL",
            flags=("-m", "--model"),
            envvar="IDEFICS_MODEL",
            default=f"{DEFAULT_MODEL}, or the adapter's base",
        ),
    ] = None
    revision: Annotated[str | None, Help("Branch, tag or commit of the hub model", metavar="NAME")] = None
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32", "bfloat16", "float16", "float32"],
        Help("Number format of the weights; auto: bf16 or fp16 on CUDA, fp16 on MPS, fp32 on the CPU"),
    ] = "auto"
    device: Annotated[str, Help("Where the model runs", metavar="auto|cuda|cuda:N|cpu|mps")] = "auto"
    allow_pickle: Annotated[bool, Help("Load pickled weights (weights only) if the model has no safetensors")] = False
    adapter: Annotated[str | None, Help("Folder of LoRA weights (PEFT) to merge into the model", metavar="DIR")] = None
    eager: Annotated[bool, Help("On CUDA: launch a decode step's operations one by one, not as a graph")] = False

    def __post_init__(self) -> None:
        if self.model is None:
            object.__setattr__(self, "model", DEFAULT_MODEL if self.adapter is None else _base_of(self.adapter))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))


@dataclass(frozen=True)
class Checkpoint:
    """A folder that `inspect_folder` has checked, its weights' files, and whether they are pickles; and another of LoRA
    weights, to be merged into them."""

    folder: Path
    weight_files: tuple[Path, ...]
    is_pickled: bool
    adapter: Checkpoint | None = None


def _require(condition: object, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


# ---- what can be known before anything is loaded


def check_model_request(request: ModelRequest) -> None:
    """Raise what is wrong with dtype, device or a local folder. Reaches no network and reads no weight."""
    resolve_dtype(request.dtype, resolve_device(request.device))
    folder = local_folder(request.model)
    if folder is not None:
        inspect_folder(folder, request.allow_pickle)
    if request.adapter is not None:
        inspect_adapter(request.adapter, request.allow_pickle)


def weights_digest(request: ModelRequest) -> str | None:
    """Equal for equal checkpoints: a digest of every file's size, head and tail; None for one not downloaded yet."""
    from idefics_cli.storage.files import file_digest, local_file  # imports fsspec

    checkpoint = _downloaded(request)
    if checkpoint is None:
        return None
    digest = hashlib.sha256()
    for part in filter(None, (checkpoint, checkpoint.adapter)):
        side_files = {path for pattern in SIDE_FILES for path in part.folder.glob(pattern) if path.is_file()}
        for path in sorted({*part.weight_files, *side_files}):
            digest.update(f"{path.name} {path.stat().st_size} {file_digest(local_file(str(path)))}\n".encode())
    return digest.hexdigest()


def known_vision_fingerprint(request: ModelRequest) -> str | None:
    """`vision_fingerprint` of a model, or None for one not downloaded yet."""
    checkpoint = _downloaded(request)
    return None if checkpoint is None else vision_fingerprint(checkpoint)


def vision_fingerprint(checkpoint: Checkpoint) -> str:
    """Equal for checkpoints that make the same latents of an image, whatever their name, shards and language side.

    A digest of the stored tensors of vision tower and resampler, of the settings that say how they are used, and of how
    pixels are made. The dtype of a run is not part of it: it changes rounding only.
    """
    from idefics_cli.images.preprocess import ImageProcessor

    config = load_config(checkpoint)
    settings = {name: getattr(config.vision_config, name) for name in VISION_FIELDS}
    settings["use_resampler"] = config.use_resampler
    if config.use_resampler:
        settings |= {name: getattr(config.perceiver_config, name) for name in RESAMPLER_FIELDS}
    settings |= asdict(ImageProcessor.from_pretrained(checkpoint.folder))
    tensors = dict(_vision_digests(checkpoint))
    if checkpoint.adapter is not None and (changes := dict(_vision_digests(checkpoint.adapter))):
        tensors |= {**changes, "adapter": adapter_settings(checkpoint.adapter)}
    return hashlib.sha256(json.dumps([settings, tensors], sort_keys=True).encode()).hexdigest()


def _vision_digests(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Names and digests of the tensors of vision tower and resampler."""
    import torch

    for file in checkpoint.weight_files:
        for name, tensor in _tensors(file, checkpoint.is_pickled, VISION_TENSOR):
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
            yield name, digest.hexdigest()


def _tensors(file: Path, is_pickled: bool, wanted: re.Pattern[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of the names that are `wanted`."""
    import torch
    from safetensors import safe_open

    stored = torch.load(file, map_location="cpu", weights_only=True) if is_pickled else safe_open(file, framework="pt")
    for name in filter(wanted.fullmatch, stored.keys()):
        yield name, stored[name] if is_pickled else stored.get_tensor(name)


def _downloaded(request: ModelRequest) -> Checkpoint | None:
    """The checkpoint of a local folder or of the hub's cache, without the network."""
    folder = local_folder(request.model)
    if folder is not None:
        return _inspected(folder, request)
    folder = cached_folder(request.model, request.revision)
    try:
        return None if folder is None else _inspected(folder, request)
    except CheckpointError:  # some of its files are still to be fetched
        return None


def cached_folder(hub_id: str, revision: str | None = None) -> Path | None:
    """What the hub's cache has of a model, perhaps not all of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):  # reported when the model is fetched
        return None


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


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on CUDA devices that have it, float16 on others and on MPS; float32 on the CPU."""
    import torch

    if dtype in DTYPES:
        return getattr(torch, DTYPES[dtype])
    if dtype != "auto":
        raise IdeficsError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    if device.type != "cuda":
        return torch.float16 if device.type == "mps" else torch.float32
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def local_folder(model: str) -> Path | None:
    """The folder that `model` names, or None for a hub id. Raises CheckpointError for what can be neither."""
    if model == DEMO:
        return DEMO_FOLDER
    path = os.path.expanduser(model)  # unlike pathlib's, these functions raise for no name
    if os.path.isdir(path):
        return Path(path)
    _require(not os.path.exists(path), f"model {model!r} is a file: give the checkpoint's folder")
    is_hub_id = HUB_ID.fullmatch(model) and not model.startswith((".", os.sep))
    _require(is_hub_id, f"no model {model!r}: give a folder that exists, a hub id such as org/name, or 'demo'")
    return None


def inspect_side_files(folder: Path) -> None:
    """Check that it is an IDEFICS model with a tokenizer."""
    _require_config(folder, CONFIG)
    model_type = read_json(folder / CONFIG).get("model_type")
    _require(model_type == "idefics", f"{folder} has model_type {model_type!r}: only 'idefics' can be run")
    tokenizers = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    _require(tokenizers, f"{folder} has no tokenizer: add its tokenizer.json or tokenizer.model")
    for path in tokenizers:
        _require_no_pointer(path)


def inspect_folder(folder: Path, allow_pickle: bool) -> Checkpoint:
    """Check its side files, that it has weights, and that no safetensors file is cut short."""
    inspect_side_files(folder)
    # transformers would load an adapter silently over the checked weights, even from a pickle.
    has_adapter = (folder / ADAPTER_CONFIG).exists()
    _require(not has_adapter, f"{folder} holds an adapter beside its weights: put them into folders of their own")
    checkpoint = Checkpoint(folder, weight_files(folder, SAFETENSORS), is_pickled=False)
    if stored_shapes(checkpoint):
        return checkpoint
    # Without allow_pickle only the index of a hub's pickles is fetched.
    pickles = [name for name in (PICKLES, f"{PICKLES}.index.json") if (folder / name).is_file()]
    _require(pickles, f"{folder} has no weights: expected {SAFETENSORS} or {SAFETENSORS}.index.json")
    if not allow_pickle:
        raise CheckpointError(f"{folder} has its weights as pickles only ({pickles[0]}), {CAN_RUN_CODE}")
    return Checkpoint(folder, weight_files(folder, PICKLES), is_pickled=True)


def _require_no_pointer(path: Path) -> None:
    try:
        with path.open("rb") as file:
            pointer = lfs_pointer(file.read(POINTER_BYTES))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; check your access to it") from error
    _require(pointer is None, f"{path} is {pointer}")


def inspect_adapter(folder: str, allow_pickle: bool) -> Checkpoint:
    """Check that it is a folder of LoRA weights, and that PEFT is installed."""
    require_peft()
    path = Path(os.path.expanduser(folder))
    _require_config(path, ADAPTER_CONFIG)
    file = path / ADAPTER
    if not file.is_file():
        file = path / ADAPTER_PICKLE
        _require(file.is_file(), f"{path} has no weights: expected {ADAPTER}")
        _require(allow_pickle, f"{path} has its weights as a pickle only, {CAN_RUN_CODE}")
    checkpoint = Checkpoint(path, (file,), is_pickled=file.name == ADAPTER_PICKLE)
    adapter_settings(checkpoint)
    stored_shapes(checkpoint)
    return checkpoint


def adapter_settings(adapter: Checkpoint) -> dict[str, Any]:
    return settings_of(read_json(adapter.folder / ADAPTER_CONFIG))


def _base_of(adapter: str) -> str:
    """The model that an adapter was trained on. A file's word alone fetches nothing: it is a folder, or cached."""
    path = Path(os.path.expanduser(adapter))
    _require_config(path, ADAPTER_CONFIG)
    base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    _require(isinstance(base, str) and base, f"{path} names no base model: add -m MODEL")
    is_here = os.path.isdir(base) or (HUB_ID.fullmatch(base) and cached_folder(base) is not None)
    _require(is_here, f"{path} was trained on {base!r}, which is not on this machine: name its base, as -m {base}")
    return base


def _require_config(folder: Path, name: str) -> None:
    """Where there is none, say what the folder is."""
    if (folder / name).is_file():
        return
    kind = "checkpoint" if name == CONFIG else "PEFT adapter"
    _require(folder.is_dir(), f"no folder {folder}: give a {kind}'s folder")
    _require(
        name == ADAPTER_CONFIG or not (folder / ADAPTER_CONFIG).is_file(),
        f"{folder} holds an adapter: name it with --adapter, and its base with -m where that is another",
    )
    saved = [path for path in folder.glob("checkpoint-*") if path.name.split("-", 1)[1].isdecimal()]
    if saved:
        newest = max(saved, key=lambda path: int(path.name.split("-", 1)[1]))
        raise CheckpointError(f"{folder} holds checkpoints of a training: name one of them, such as {newest}")
    raise CheckpointError(f"{folder} has no {name}: give a {kind}'s folder")


def read_json(path: Path) -> dict[str, Any]:
    _require(path.is_file(), f"{path.parent} has no {path.name}: give a checkpoint's folder")
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): fetch the file again") from error


def weight_files(folder: Path, name: str) -> tuple[Path, ...]:
    """`name` itself, or the shards that `name`.index.json lists (each of which must be there), or none."""
    if (folder / name).is_file():
        return (folder / name,)
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return ()
    weight_map = read_json(index).get("weight_map")
    _require(weight_map and isinstance(weight_map, dict), f"{index} has no weight_map: fetch the file again")
    shards = sorted(set(map(str, weight_map.values())))
    is_inside = all(Path(shard).name == shard for shard in shards)
    _require(is_inside, f"{index} points out of its folder: do not use this checkpoint")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    _require(not missing, f"{folder} lacks {len(missing)} of {len(shards)} shards ({shown(missing)}): fetch them again")
    return tuple(folder / shard for shard in shards)


def stored_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, without reading them; safetensors compares its header with a file's length."""
    return {name: shape for file in checkpoint.weight_files for name, shape in _shapes(file, checkpoint.is_pickled)}


def _shapes(file: Path, is_pickled: bool) -> list[tuple[str, tuple[int, ...]]]:
    import torch
    from safetensors import SafetensorError, safe_open

    _require_no_pointer(file)
    try:
        if is_pickled:
            tensors = torch.load(file, map_location="meta", weights_only=True)
            return [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
        with safe_open(file, framework="pt") as stored:
            return [(name, tuple(stored.get_slice(name).get_shape())) for name in stored.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cut short ({error}): fetch the file again") from error
    except (*LOADING_ERRORS, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{file} cannot be loaded ({type(error).__name__}): it holds more than weights, or is damaged; "
            "use safetensors"
        ) from error


# ---- loading


def find_checkpoint(request: ModelRequest, with_weights: bool = True) -> Checkpoint:
    """The checked folder of a request; a hub model is fetched, or taken from the cache when there is no network."""
    if not with_weights:
        folder = local_folder(request.model) or _download(request)
        inspect_side_files(folder)
        return Checkpoint(folder, (), is_pickled=False)
    return _inspected(local_folder(request.model) or _fetch(request), request)


def _inspected(folder: Path, request: ModelRequest) -> Checkpoint:
    checkpoint = inspect_folder(folder, request.allow_pickle)
    if request.adapter is None:
        return checkpoint
    return replace(checkpoint, adapter=inspect_adapter(request.adapter, request.allow_pickle))


def _fetch(request: ModelRequest) -> Path:
    folder = _download(request, "*.safetensors")
    if request.allow_pickle and not weight_files(folder, SAFETENSORS):
        folder = _download(request, "pytorch_model*.bin")
    return folder


def _download(request: ModelRequest, *weights: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = [*SIDE_FILES, *weights]
        return Path(snapshot_download(request.model, revision=request.revision, allow_patterns=patterns))
    except Exception as error:  # the layers below the hub's library raise many kinds when a connection breaks
        raise _cannot_fetch(request, error) from error


def _cannot_fetch(request: ModelRequest, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f"model {request.model!r} is not cached and cannot be fetched ({reason}): check its name and the "
        "connection, log in if it is private, or give a local folder"
    )


def bytes_to_fetch(request: ModelRequest) -> int | None:
    """How much of weights the hub has of a model that is not on this machine yet; None for one that is.

    Raises CheckpointError where it cannot be fetched, and DeviceError where it would not fit.
    """
    from huggingface_hub import HfApi

    if _downloaded(request) is not None:
        return None
    try:
        about = HfApi().model_info(request.model, revision=request.revision, files_metadata=True)
    except Exception as error:  # as in `_download`
        raise _cannot_fetch(request, error) from error
    device = resolve_device(request.device)
    dtype = resolve_dtype(request.dtype, device)
    if about.safetensors is not None:
        require_fit(about.safetensors.total * dtype.itemsize, device, dtype)
    names = (".safetensors", ".bin") if request.allow_pickle else (".safetensors",)
    found = sum(each.size or 0 for each in about.siblings or () if each.rfilename.endswith(names))
    _require(found, f"model {request.model!r} has no weights: expected {SAFETENSORS}")
    return found


def load_config(checkpoint: Checkpoint) -> IdeficsConfig:
    """The configuration, without what would have transformers load other files or code than those checked."""
    from transformers import IdeficsConfig

    path = checkpoint.folder / CONFIG
    fields = read_json(path)
    for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        for name in LEFT_OUT:
            part.pop(name, None)
    try:
        config = IdeficsConfig.from_dict(fields)
        config._attn_implementation = "sdpa"  # another may name a kernel on the hub
        config.dropout = config.vision_config.attention_dropout = 0.0  # of training, whatever it says
    except Exception as error:  # the library raises many kinds for a field of a wrong type
        raise CheckpointError(f"{path} is not an IDEFICS configuration ({error}): fetch the file again") from error
    heads = (
        config.num_attention_heads,
        config.vision_config.num_attention_heads,
        config.perceiver_config.resampler_n_heads,
    )
    _require(all(number > 0 for number in heads), f"{path} has {min(heads)} attention heads: fetch the file again")
    is_quantized = getattr(config, "quantization_config", None) is not None
    _require(not is_quantized, f"{path} asks for quantized weights, which cannot be run: use the published checkpoint")
    stored = stored_shapes(checkpoint)
    if HEAD in stored and ADDITIONAL_HEAD not in stored and not config.tie_word_embeddings:
        config.additional_vocab_size = 0  # transformers' resize_token_embeddings leaves one vocabulary
    if checkpoint.weight_files:
        _require_layers(config, stored, path)
    return config


def _require_layers(config: IdeficsConfig, stored: Iterable[str], path: Path) -> None:
    """No more layers than there are tensors for, counted before a network is made of them."""
    numbers = {
        "num_hidden_layers": (config.num_hidden_layers, r"model\.layers"),
        "vision_config.num_hidden_layers": (
            config.vision_config.num_hidden_layers,
            r"model\.vision_model\.encoder\.layers",
        ),
        "perceiver_config.resampler_depth": (
            config.perceiver_config.resampler_depth if config.use_resampler else 0,
            r"model\.perceiver_resampler\.blocks",
        ),
    }
    for name, (number, layers) in numbers.items():
        found = len({match[1] for match in map(re.compile(rf"{layers}\.(\d+)\.").match, stored) if match})
        _require(
            not isinstance(number, int) or number <= found,
            f"{path} says {name} {number} and the weights hold {found}: take all files from one checkpoint",
        )


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer that the model was trained with: `tokenizer.json` to the letter.

    IDEFICS learned texts that begin with a blank after every special token (`<image>Caption` is an image and
    "▁Caption"), as LLaMA's tokenizers of 2023 had it. Today's LlamaTokenizer builds another one from the same file, in
    which only the first text of a prompt has the blank; for a `tokenizer.model` alone it has to be told (`legacy`).
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from idefics_cli.prompts.tokenizer_probe import probe

    folder, options = checkpoint.folder, {"trust_remote_code": False, "local_files_only": True}
    has_file = (folder / "tokenizer.json").is_file()
    complaint = probe(folder / "tokenizer.json") if has_file and folder != DEMO_FOLDER else None
    _require(not complaint, f"{folder}/tokenizer.json cannot be used ({complaint}): fetch the file again")
    with reading_tokenizer(checkpoint):
        if has_file:
            return PreTrainedTokenizerFast.from_pretrained(folder, **options)
        return AutoTokenizer.from_pretrained(folder, legacy=True, **options)


@contextmanager
def reading_tokenizer(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the library raises many kinds for a damaged file
        raise CheckpointError(
            f"the tokenizer in {checkpoint.folder} cannot be read ({error}): fetch its files again"
        ) from error


def load_network(
    checkpoint: Checkpoint, config: IdeficsConfig, device: torch.device, dtype: torch.dtype
) -> IdeficsForVisionText2Text:
    """The network, ready to run. Raises CheckpointError naming missing and unexpected tensors and wrong shapes."""
    import torch
    from transformers import GenerationConfig

    from idefics_cli.model.memory_errors import naming_memory_errors
    from idefics_cli.model.modeling import IdeficsForVisionText2Text

    num_bytes = require_loadable(checkpoint, config, device, dtype)
    if device.type == "cuda":
        _choose_kernels()
    try:
        with naming_memory_errors():
            model = IdeficsForVisionText2Text.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=dtype,
                device_map={"": device},  # tensor by tensor: the host never holds them all
                use_safetensors=not checkpoint.is_pickled,
                local_files_only=True,
                # Only the caller's decoding options count: a checkpoint's generation_config.json is not read.
                generation_config=GenerationConfig(),
            )
            if checkpoint.adapter is not None:
                model = _with_adapter(model, checkpoint.adapter)
    except torch.OutOfMemoryError as error:
        raise _does_not_fit(num_bytes, device, dtype) from error
    except LOADING_ERRORS as error:
        raise _cannot_be_loaded(checkpoint, error) from error
    return model.eval().requires_grad_(False)


def _choose_kernels() -> None:
    """cuDNN's attention makes a plan for each number of keys, which changes in almost every step; and its convolutions
    would compute fp32 in TF32."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = False


def _with_adapter(model: IdeficsForVisionText2Text, adapter: Checkpoint) -> IdeficsForVisionText2Text:
    import torch

    tensors = {
        name: tensor.to(model.device, torch.float32 if ".lora_" in name else model.dtype)  # as PEFT has them
        for name, tensor in _tensors(adapter.weight_files[0], adapter.is_pickled, re.compile(".*"))
    }
    try:
        return merged(model, adapter_settings(adapter), tensors)
    except torch.OutOfMemoryError:
        raise
    except LOADING_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"the adapter in {adapter.folder} does not fit the model ({reason})") from error


def require_loadable(checkpoint: Checkpoint, config: IdeficsConfig, device: torch.device, dtype: torch.dtype) -> int:
    """The bytes of a network whose tensors are those of its files, and which fits on the device."""
    import torch

    from idefics_cli.model.modeling import IdeficsForVisionText2Text

    try:
        with torch.device("meta"):
            expected = IdeficsForVisionText2Text(config)
        _require_same_tensors(checkpoint, expected)
    except LOADING_ERRORS as error:
        raise _cannot_be_loaded(checkpoint, error) from error
    num_bytes = expected.num_parameters() * dtype.itemsize
    require_fit(num_bytes, device, dtype)
    return num_bytes


def _cannot_be_loaded(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.folder} cannot be loaded ({type(error).__name__}: {error}): "
        "fetch its config.json and weights again"
    )


def require_fit(num_bytes: int, device: torch.device, dtype: torch.dtype) -> None:
    from idefics_cli.engine.memory_budget import free_bytes

    if num_bytes > free_bytes(device):
        raise _does_not_fit(num_bytes, device, dtype)


def _does_not_fit(num_bytes: int, device: torch.device, dtype: torch.dtype) -> DeviceError:
    import torch

    from idefics_cli.engine.memory_budget import free_bytes

    free, host = free_bytes(device), free_bytes(torch.device("cpu"))
    remedies = [
        "--dtype bf16" if dtype.itemsize > 2 and num_bytes // 2 <= free else None,
        "--device cpu" if device.type != "cpu" and num_bytes <= host else None,
        "a machine with more memory" if device.type == "cpu" else "a larger device",
    ]
    return DeviceError(
        f"out of memory: the model's {num_bytes / 1e9:.1f} GB in {dtype_name(dtype)} do not fit on {device}, which has "
        f"{free / 1e9:.1f} GB free: use {', '.join(filter(None, remedies))} or a smaller model"
    )


def _require_same_tensors(checkpoint: Checkpoint, model: IdeficsForVisionText2Text) -> None:
    """Compare the files with `model`, of which only names and shapes count, before a weight is read."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    needed = dict(model.named_parameters()).keys()  # names a tied tensor once
    unused = [*model._keys_to_ignore_on_load_unexpected]
    if model.config.additional_vocab_size == 0:
        unused.append(re.escape(ADDITIONAL_EMBEDDING))
    stored = {
        name: shape
        for name, shape in stored_shapes(checkpoint).items()
        if not any(re.search(pattern, name) for pattern in unused)
    }
    shared = sorted(stored.keys() & expected.keys())
    kinds = {
        "missing": sorted(needed - stored.keys()),
        "unexpected": sorted(stored.keys() - expected.keys()),
        "of another shape": [f"{n} {stored[n]} instead of {expected[n]}" for n in shared if stored[n] != expected[n]],
    }
    said = [f"{len(names)} {kind} ({shown(names)})" for kind, names in kinds.items() if names]
    _require(
        not said,
        f"the weights in {checkpoint.folder} do not fit their config.json: {'; '.join(said)}; "
        "fetch the checkpoint again, all files of one revision",
    )


def shown(names: list[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
