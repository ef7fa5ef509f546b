"""The files of a checkpoint, or of an adapter: checked before a weight is read."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idefics_cli.errors import CheckpointError
from idefics_cli.storage.regular_file import POINTER_BYTES, lfs_pointer, read_json_object

if TYPE_CHECKING:
    import torch


SAFETENSORS, PICKLES = "model.safetensors", "pytorch_model.bin"
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
ADAPTER, ADAPTER_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
CAN_RUN_CODE = "which can run code: convert them to safetensors, or trust them with --allow-pickle"
# Of an adapter's configuration only the fields count that say what its tensors mean: none that would initialise them,
# import a module or name another file.
LORA_FIELDS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "lora_bias"),
    *("modules_to_save", "trainable_token_indices", "fan_in_fan_out"),
)
WITHOUT_EFFECT = (  # on what the tensors mean; the tensors' names say which modules they belong to
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("inference_mode", "lora_dropout", "init_lora_weights", "loftq_config", "eva_config", "runtime_config"),
    *("megatron_core", "qalora_group_size"),
)
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")  # others have changed the base model too
NAMES_SHOWN = 8
# What a damaged file or a wrong value in config.json raises in torch and transformers.
LOADING_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError),
    *(LookupError, OSError, RuntimeError, TypeError, ValueError),
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder that `inspect_folder` has checked, its weights' files, and whether they are pickles; and another of LoRA
    weights, to be merged into them."""

    folder: Path
    weight_files: tuple[Path, ...]
    is_pickled: bool
    adapter: Checkpoint | None = None


def require(condition: object, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


def inspect_side_files(folder: Path) -> None:
    """Check that it is an IDEFICS model with a tokenizer."""
    require_config(folder, CONFIG)
    model_type = read_json(folder / CONFIG).get("model_type")
    require(model_type == "idefics", f"{folder} has model_type {model_type!r}: only 'idefics' can be run")
    tokenizers = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    require(tokenizers, f"{folder} has no tokenizer: add its tokenizer.json or tokenizer.model")
    for path in tokenizers:
        require_no_pointer(path)


def inspect_folder(folder: Path, allow_pickle: bool) -> Checkpoint:
    """Check its side files, that it has weights, and that no safetensors file is cut short."""
    inspect_side_files(folder)
    # transformers would load an adapter silently over the checked weights, even from a pickle.
    has_adapter = (folder / ADAPTER_CONFIG).exists()
    require(not has_adapter, f"{folder} holds an adapter beside its weights: put them into folders of their own")
    checkpoint = Checkpoint(folder, weight_files(folder, SAFETENSORS), is_pickled=False)
    if stored_shapes(checkpoint):
        return checkpoint
    # Without allow_pickle only the index of a hub's pickles is fetched.
    pickles = [name for name in (PICKLES, f"{PICKLES}.index.json") if (folder / name).is_file()]
    require(pickles, f"{folder} has no weights: expected {SAFETENSORS} or {SAFETENSORS}.index.json")
    if not allow_pickle:
        raise CheckpointError(f"{folder} has its weights as pickles only ({pickles[0]}), {CAN_RUN_CODE}")
    return Checkpoint(folder, weight_files(folder, PICKLES), is_pickled=True)


def inspect_adapter(folder: str, allow_pickle: bool) -> Checkpoint:
    """Check that it is a folder of LoRA weights, and that PEFT is installed."""
    require(find_spec("peft"), "--adapter needs an extra: pip install 'idefics-cli[peft]'")
    path = Path(os.path.expanduser(folder))
    require_config(path, ADAPTER_CONFIG)
    file = path / ADAPTER
    if not file.is_file():
        file = path / ADAPTER_PICKLE
        require(file.is_file(), f"{path} has no weights: expected {ADAPTER}")
        require(allow_pickle, f"{path} has its weights as a pickle only, {CAN_RUN_CODE}")
    checkpoint = Checkpoint(path, (file,), is_pickled=file.name == ADAPTER_PICKLE)
    adapter_settings(checkpoint)
    stored_shapes(checkpoint)
    return checkpoint


def adapter_settings(adapter: Checkpoint) -> dict[str, Any]:
    """The fields that count of its configuration. Raises CheckpointError for what is not plain LoRA."""
    config = read_json(adapter.folder / ADAPTER_CONFIG)
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    unknown = sorted(name for name, value in config.items() if value and name not in (*LORA_FIELDS, *WITHOUT_EFFECT))
    if kind != "LORA" or unknown or start not in INITIAL:
        what = f"peft_type {kind}" if kind != "LORA" else unknown[0] if unknown else f"init_lora_weights {start}"
        raise CheckpointError(
            f"an adapter with {what} cannot be merged here: merge it with PEFT's merge_and_unload, and save the model"
        )
    return {name: config[name] for name in LORA_FIELDS if config.get(name) is not None}


def require_config(folder: Path, name: str) -> None:
    """Where there is none, say what the folder is."""
    if (folder / name).is_file():
        return
    kind = "checkpoint" if name == CONFIG else "PEFT adapter"
    require(folder.is_dir(), f"no folder {folder}: give a {kind}'s folder")
    require(
        name == ADAPTER_CONFIG or not (folder / ADAPTER_CONFIG).is_file(),
        f"{folder} holds an adapter: name it with --adapter, and its base with -m where that is another",
    )
    saved = [path for path in folder.glob("checkpoint-*") if path.name.split("-", 1)[1].isdecimal()]
    if saved:
        newest = max(saved, key=lambda path: int(path.name.split("-", 1)[1]))
        raise CheckpointError(f"{folder} holds checkpoints of a training: name one of them, such as {newest}")
    raise CheckpointError(f"{folder} has no {name}: give a {kind}'s folder")


def require_no_pointer(path: Path) -> None:
    try:
        with path.open("rb") as file:
            pointer = lfs_pointer(file.read(POINTER_BYTES))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; check your access to it") from error
    require(pointer is None, f"{path} is {pointer}")


def read_json(path: Path) -> dict[str, Any]:
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
    require(weight_map and isinstance(weight_map, dict), f"{index} has no weight_map: fetch the file again")
    shards = sorted(set(map(str, weight_map.values())))
    is_inside = all(Path(shard).name == shard for shard in shards)
    require(is_inside, f"{index} points out of its folder: do not use this checkpoint")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    require(
        not missing, f"{folder} lacks {len(missing)} of {len(shards)} shards ({first_few(missing)}): fetch them again"
    )
    return tuple(folder / shard for shard in shards)


def stored_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, without reading them; safetensors compares its header with a file's length."""
    return {name: shape for file in checkpoint.weight_files for name, shape in _shapes(file, checkpoint.is_pickled)}


def _shapes(file: Path, is_pickled: bool) -> list[tuple[str, tuple[int, ...]]]:
    import torch
    from safetensors import SafetensorError, safe_open

    require_no_pointer(file)
    try:
        if is_pickled:
            tensors = torch.load(file, map_location="meta", weights_only=True)
            return [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
        with safe_open(file, framework="np") as stored:
            return [(name, tuple(stored.get_slice(name).get_shape())) for name in stored.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cut short ({error}): fetch the file again") from error
    except (*LOADING_ERRORS, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{file} cannot be loaded ({type(error).__name__}): it holds more than weights, or is damaged; "
            "use safetensors"
        ) from error


def tensors_of(file: Path, is_pickled: bool, wanted: re.Pattern[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of the names that are `wanted`."""
    import torch
    from safetensors import safe_open

    stored = torch.load(file, map_location="cpu", weights_only=True) if is_pickled else safe_open(file, framework="pt")
    for name in filter(wanted.fullmatch, stored.keys()):
        yield name, stored[name] if is_pickled else stored.get_tensor(name)


def lazy_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    """All, by name; those of safetensors are slices, which are read when they are indexed."""
    import torch
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for file in checkpoint.weight_files:
        if checkpoint.is_pickled:
            found |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        else:
            stored = safe_open(file, framework="pt")
            found |= {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
    return found


def first_few(names: list[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
