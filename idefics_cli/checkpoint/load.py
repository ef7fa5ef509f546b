"""A checkpoint's files -> configuration, tokenizer and network."""

from __future__ import annotations

import atexit
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idefics_cli.checkpoint import quantize
from idefics_cli.checkpoint.devices import does_not_fit, require_fit
from idefics_cli.checkpoint.files import (
    CONFIG,
    LOADING_ERRORS,
    Checkpoint,
    first_few,
    read_json,
    require,
    stored_shapes,
)
from idefics_cli.checkpoint.request import DEMO_FOLDER
from idefics_cli.errors import CheckpointError, DeviceError
from idefics_cli.images.preprocess import SETTINGS_FILES, ImageProcessor, settings_file
from idefics_cli.prompts.tokenize import PromptEncoder
from idefics_cli.prompts.tokenizer_probe import probe

if TYPE_CHECKING:
    import torch
    from transformers import IdeficsConfig

    from idefics_cli.model.modeling import IdeficsForVisionText2Text
    from idefics_cli.ranks import Ranks


# Fields of a configuration that name another file of weights (even a pickle), or classes to put in place of ours, or
# make a dictionary of as many labels as they say.
LEFT_OUT = ("transformers_weights", "fusion_config", "auto_map", "num_labels", "id2label", "label2id")
HEAD, ADDITIONAL_HEAD = "lm_head.weight", "lm_head.additional_fc.weight"
ADDITIONAL_EMBEDDING = "model.embed_tokens.additional_embedding.weight"


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
    require(all(number > 0 for number in heads), f"{path} has {min(heads)} attention heads: fetch the file again")
    quantize.kind_of(config)
    stored = stored_shapes(checkpoint)
    if HEAD in stored and ADDITIONAL_HEAD not in stored and not config.tie_word_embeddings:
        config.additional_vocab_size = 0  # transformers' resize_token_embeddings leaves one vocabulary
    if checkpoint.weight_files:
        _require_layers(config, stored, path)
    return config


def _require_layers(config: IdeficsConfig, stored: Iterable[str], path: Path) -> None:
    """No more layers of any kind than there are tensors for, counted before a network is made of them."""
    numbers = {
        "num_hidden_layers": config.num_hidden_layers,
        "vision_config.num_hidden_layers": config.vision_config.num_hidden_layers,
        "perceiver_config.resampler_depth": config.perceiver_config.resampler_depth if config.use_resampler else 0,
    }
    found = len({match[1] for match in map(re.compile(r".*?\.(\d+)\.").match, stored) if match})
    for name, number in numbers.items():
        require(
            not isinstance(number, int) or number <= found,
            f"{path} says {name} {number} and the weights hold {found} at most: take all files from one checkpoint",
        )


def side_files(checkpoint: Checkpoint) -> tuple[IdeficsConfig, PromptEncoder, ImageProcessor]:
    """What is read of a model beside its weights. Raises CheckpointError where the parts do not fit together."""
    config, encoder = load_config(checkpoint), _load_encoder(checkpoint)
    images, folder = ImageProcessor.from_pretrained(checkpoint.folder), checkpoint.folder
    size, image_size = config.vocab_size + config.additional_vocab_size, config.vision_config.image_size
    require(
        encoder.vocab_size <= size,
        f"the tokenizer in {folder} has {encoder.vocab_size} tokens but the model has {size}: take both from one "
        f"checkpoint, or save the model after resize_token_embeddings({encoder.vocab_size})",
    )
    if images.image_size != image_size:
        settings = settings_file(folder)
        require(settings, f"{folder} has no {' or '.join(SETTINGS_FILES)}: add the one of the model")
        raise CheckpointError(
            f"{settings} resizes to {images.image_size} but the model takes {image_size}: take both from one checkpoint"
        )
    return config, encoder, images


def _load_encoder(checkpoint: Checkpoint) -> PromptEncoder:
    """With the tokenizer that the model was trained with: `tokenizer.json` to the letter.

    IDEFICS learned texts that begin with a blank after every special token (`<image>Caption` is an image and
    "▁Caption"), as LLaMA's tokenizers of 2023 had it. Today's LlamaTokenizer builds another one from the same file, in
    which only the first text of a prompt has the blank; for a `tokenizer.model` alone it has to be told (`legacy`).
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder, options = checkpoint.folder, {"trust_remote_code": False, "local_files_only": True}
    has_file = (folder / "tokenizer.json").is_file()
    complaint = probe(folder / "tokenizer.json") if has_file and folder != DEMO_FOLDER else None
    require(not complaint, f"{folder}/tokenizer.json cannot be used ({complaint}): fetch the file again")
    try:
        if has_file:
            return PromptEncoder(PreTrainedTokenizerFast.from_pretrained(folder, **options))
        return PromptEncoder(AutoTokenizer.from_pretrained(folder, legacy=True, **options))
    except CheckpointError:
        raise
    except Exception as error:  # the library raises many kinds for a damaged file
        raise CheckpointError(f"the tokenizer in {folder} cannot be read ({error}): fetch its files again") from error


def load_network(
    checkpoint: Checkpoint,
    expected: IdeficsForVisionText2Text,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks | None = None,
    device_map: str | None = None,
    kind: str | None = None,
) -> IdeficsForVisionText2Text:
    """The network, ready to run: on one device, as accelerate spreads it, or this process's part of what `ranks` share.

    `expected`: its `meta_network`. `kind`: how weights are quantized. Raises CheckpointError for what cannot be loaded.
    """
    import torch
    from transformers import GenerationConfig

    from idefics_cli.model.memory_errors import naming_memory_errors
    from idefics_cli.model.modeling import IdeficsForVisionText2Text
    from idefics_cli.model.parallel import join_ranks

    placement = _placement(device, ranks, device_map)
    size = 1 if ranks is None else ranks.size
    config = expected.config
    num_bytes = require_memory(expected, device, dtype, size, device_map, kind)
    if device.type == "cuda":
        choose_kernels()
    try:
        one_at_a_time = quantize.one_at_a_time(kind is not None or checkpoint.adapter is not None)
        with naming_memory_errors(), _without_bars(), one_at_a_time:
            model = IdeficsForVisionText2Text.from_pretrained(
                **_weights(checkpoint, config, dtype, device if device_map is None else torch.device("cpu")),
                config=config,
                dtype=dtype,
                **placement,
                use_safetensors=not checkpoint.is_pickled,
                local_files_only=True,
                # Only the caller's decoding options count: a checkpoint's generation_config.json is not read.
                generation_config=GenerationConfig(),
                quantization_config=quantize.settings(kind, dtype),
            )
            if kind is not None and {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values()):
                raise _cannot_be_moved()
            if ranks is not None:
                join_ranks(model, ranks)
    except torch.OutOfMemoryError as error:
        raise does_not_fit(num_bytes, device, dtype, quantize.kind_of(config, kind)) from error
    except LOADING_ERRORS as error:
        if kind is not None and device_map is not None and device.type == "cpu":  # transformers quantizes on CUDA
            raise _cannot_be_moved() from error
        raise _cannot_be_loaded(checkpoint, error) from error
    return model.eval().requires_grad_(False)


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers' own would stand among the lines of whoever loads the model."""
    from transformers.utils import logging

    before = logging.set_tqdm_hook(lambda make, given, named: make(*given, **{**named, "disable": True}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _weights(checkpoint: Checkpoint, config: IdeficsConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` reads: the files or, where an adapter is merged into them, tensors on their way."""
    import torch

    from idefics_cli.checkpoint.adapter import merged_tensors
    from idefics_cli.model.modeling import IdeficsForVisionText2Text

    if checkpoint.adapter is None:
        return {"pretrained_model_name_or_path": checkpoint.folder}
    with torch.device("meta"):
        network = IdeficsForVisionText2Text(config)
    tensors = merged_tensors(checkpoint, network, dtype, device)
    return {"pretrained_model_name_or_path": None, "state_dict": tensors}


def _placement(device: torch.device, ranks: Ranks | None, device_map: str | None) -> dict[str, Any]:
    """What `from_pretrained` is told: tensor by tensor, the host never holds them all."""
    from transformers.distributed import DistributedConfig

    from idefics_cli.model.parallel import PLAN

    if device_map is not None:
        # Weights for the disk stay where they are, or are written here where the files have another dtype.
        folder = tempfile.TemporaryDirectory(prefix="idefics-")
        atexit.register(folder.cleanup)
        return {"device_map": device_map, "offload_folder": folder.name}
    if ranks is None:
        return {"device_map": {"": device}}
    return {"distributed_config": DistributedConfig(tp_size=ranks.size, tp_plan=PLAN)}


def _cannot_be_moved() -> DeviceError:
    return DeviceError(
        "the devices do not hold all of the quantized weights, and these cannot be moved for each step: leave out"
        " --quantize or --device-map"
    )


def choose_kernels() -> None:
    """Of CUDA. cuDNN's attention makes a plan for each number of keys, which changes in almost every step; and its
    convolutions would compute fp32 in TF32."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = False


def meta_network(checkpoint: Checkpoint, config: IdeficsConfig) -> IdeficsForVisionText2Text:
    """The network on the meta device: nothing as large as `config` says is made before the files have its tensors.

    Raises CheckpointError naming missing and unexpected tensors and wrong shapes.
    """
    import torch

    from idefics_cli.model.modeling import IdeficsForVisionText2Text

    try:
        with torch.device("meta"):
            expected = IdeficsForVisionText2Text(config)
        _require_same_tensors(checkpoint, expected)
    except LOADING_ERRORS as error:
        raise _cannot_be_loaded(checkpoint, error) from error
    return expected


def require_memory(
    expected: IdeficsForVisionText2Text,
    device: torch.device,
    dtype: torch.dtype,
    num_processes: int = 1,
    device_map: str | None = None,
    kind: str | None = None,
) -> int:
    """The bytes of a process's part of the network, which fits on the device."""
    from idefics_cli.model.parallel import require_divisible

    require_divisible(expected.config, num_processes)
    kind = quantize.kind_of(expected.config, kind)
    num_bytes = quantize.weight_bytes(expected, kind, dtype, num_processes)
    if device_map is None:
        require_fit(num_bytes, device, dtype, kind)
    return num_bytes


def _cannot_be_loaded(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.folder} cannot be loaded ({type(error).__name__}: {error}): "
        "fetch its config.json and weights again"
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
        for name, shape in quantize.plain_shapes(stored_shapes(checkpoint)).items()
        if not any(re.search(pattern, name) for pattern in unused)
    }
    shared = sorted(stored.keys() & expected.keys())
    misfits = [name for name in shared if stored[name] not in (None, expected[name])]
    kinds = {
        "missing": sorted(needed - stored.keys()),
        "unexpected": sorted(stored.keys() - expected.keys()),
        "of another shape": [f"{name} {stored[name]} instead of {expected[name]}" for name in misfits],
    }
    said = [f"{len(names)} {kind} ({first_few(names)})" for kind, names in kinds.items() if names]
    require(
        not said,
        f"the weights in {checkpoint.folder} do not fit their config.json: {'; '.join(said)}; "
        "fetch the checkpoint again, all files of one revision",
    )
