"""Where the files of a model are: in a folder, in the hub's cache, or still to be fetched."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from idefics_cli.checkpoint import quantize
from idefics_cli.checkpoint.devices import require_fit, resolve_device, resolve_dtype
from idefics_cli.checkpoint.files import (
    CONFIG,
    SAFETENSORS,
    Checkpoint,
    inspect_adapter,
    inspect_folder,
    inspect_side_files,
    read_json,
    require,
    weight_files,
)
from idefics_cli.checkpoint.request import ModelRequest, cached_folder, local_folder
from idefics_cli.errors import CheckpointError

SIDE_FILES = ("*.json", "tokenizer.model")


def check_model_request(request: ModelRequest) -> None:
    """Raise what is wrong with dtype, device or a local folder. Reaches no network and reads no weight."""
    device = resolve_device(request.device)
    resolve_dtype(request.dtype, device)
    quantize.check(request.quantize, device, request.dtype, request.device_map is not None)
    folder = local_folder(request.model)
    if folder is not None:
        inspect_folder(folder, request.allow_pickle)
    if request.adapter is not None:
        inspect_adapter(request.adapter, request.allow_pickle)


def find_checkpoint(request: ModelRequest, with_weights: bool = True) -> Checkpoint:
    """The checked folder of a request; a hub model is fetched, or taken from the cache when there is no network."""
    if not with_weights:
        folder = local_folder(request.model) or _download(request)
        inspect_side_files(folder)
        return Checkpoint(folder, (), is_pickled=False)
    return _inspected(local_folder(request.model) or _fetch(request), request)


def downloaded(request: ModelRequest) -> Checkpoint | None:
    """The checkpoint of a local folder or of the hub's cache, without the network."""
    folder = local_folder(request.model)
    if folder is not None:
        return _inspected(folder, request)
    folder = cached_folder(request.model, request.revision)
    try:
        return None if folder is None else _inspected(folder, request)
    except CheckpointError:  # some of its files are still to be fetched
        return None


def known_positions(request: ModelRequest) -> int | None:
    """How many tokens prompt and text may have, where the configuration that says it is on this machine."""
    checkpoint = downloaded(request)
    positions = read_json(checkpoint.folder / CONFIG).get("max_position_embeddings") if checkpoint else None
    return positions if isinstance(positions, int) else None


def _inspected(folder: Path, request: ModelRequest) -> Checkpoint:
    checkpoint = inspect_folder(folder, request.allow_pickle)
    if request.adapter is None:
        return checkpoint
    return replace(checkpoint, adapter=inspect_adapter(request.adapter, request.allow_pickle))


def weights_digest(request: ModelRequest) -> str | None:
    """Equal for equal checkpoints: a digest of every file's size, head and tail; None for one not downloaded yet."""
    from idefics_cli.storage.files import file_digest, local_file  # imports fsspec

    checkpoint = downloaded(request)
    if checkpoint is None:
        return None
    digest = hashlib.sha256()
    for part in filter(None, (checkpoint, checkpoint.adapter)):
        side_files = {path for pattern in SIDE_FILES for path in part.folder.glob(pattern) if path.is_file()}
        for path in sorted({*part.weight_files, *side_files}):
            digest.update(f"{path.name} {path.stat().st_size} {file_digest(local_file(str(path)))}\n".encode())
    return digest.hexdigest()


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

    if downloaded(request) is not None:
        return None
    try:
        about = HfApi().model_info(request.model, revision=request.revision, files_metadata=True)
    except Exception as error:  # as in `_download`
        raise _cannot_fetch(request, error) from error
    device = resolve_device(request.device)
    dtype = resolve_dtype(request.dtype, device)
    if about.safetensors is not None and request.device_map is None:
        each = dtype.itemsize if request.quantize is None else quantize.BYTES[request.quantize]
        require_fit(round(about.safetensors.total * each), device, dtype, request.quantize)
    names = (".safetensors", ".bin") if request.allow_pickle else (".safetensors",)
    found = sum(each.size or 0 for each in about.siblings or () if each.rfilename.endswith(names))
    require(found, f"model {request.model!r} has no weights: expected {SAFETENSORS}")
    return found
