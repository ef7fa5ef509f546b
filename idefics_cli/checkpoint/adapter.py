"""An adapter merged into a checkpoint, one tensor at a time as transformers reads it.

So it does not matter what becomes of a tensor then: a part of it under torchrun, int8, a file on the disk. PEFT does
the arithmetic, on a network whose weights take no memory.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from idefics_cli.checkpoint.files import (
    LOADING_ERRORS,
    Checkpoint,
    adapter_settings,
    first_few,
    lazy_tensors,
    require,
    tensors_of,
)
from idefics_cli.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WRAPPED = "base_model.model."  # what PEFT puts before the names of a network's tensors
WRAPPERS = re.compile(r"\.(base_layer|token_adapter|original_module)(?=\.|$)")  # its own modules, around a network's
OF_ADAPTERS = (".lora_", ".modules_to_save.", "trainable_tokens_delta")


def merged_tensors(checkpoint: Checkpoint, network: nn.Module, dtype: torch.dtype, device: torch.device) -> Any:
    """What transformers takes as `state_dict`, of a checkpoint and its adapter. `network` is on the meta device.

    Raises CheckpointError where the adapter does not fit.
    """
    import torch

    try:
        adapted = _adapted(_without_memory(network, dtype, device), checkpoint.adapter)
    except torch.OutOfMemoryError:
        raise
    except LOADING_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"the adapter in {checkpoint.adapter.folder} does not fit the model ({reason}): name the one that it was"
            " trained on with -m"
        ) from error
    tensors = lazy_tensors(checkpoint)
    changed = _changed(adapted, tensors)
    missing = sorted(changed.keys() - tensors.keys())
    require(
        not missing,
        f"the adapter changes {first_few(missing)}, which the model shares with another layer: merge it with PEFT's"
        " merge_and_unload, and save the model",
    )
    return {**tensors, **changed}


def _without_memory(network: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """PEFT puts an adapter's weights where a layer's are, so the meta device will not do."""
    import torch
    from torch import nn

    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            nothing = torch.zeros((), dtype=dtype, device=device).expand(parameter.shape)
            setattr(module, name, nn.Parameter(nothing, requires_grad=False))
            getattr(module, name).is_unread = True
    return network


def _is_unread(parameter: Tensor) -> bool:
    """Whether the checkpoint has what belongs here, and the adapter has not."""
    return getattr(parameter, "is_unread", False)


def _adapted(network: nn.Module, adapter: Checkpoint) -> nn.Module:
    """Raises CheckpointError for tensors that have no place in it, or are missing; for wrong settings what PEFT
    raises."""
    import torch
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    tensors = {
        name: tensor.to(dtype=torch.float32 if ".lora_" in name else network.dtype)  # as PEFT has them
        for name, tensor in tensors_of(adapter.weight_files[0], adapter.is_pickled, re.compile(".*"))
    }
    modules = {name.removeprefix(WRAPPED).partition(".lora_")[0] for name in tensors if ".lora_" in name}
    config = LoraConfig(**adapter_settings(adapter), target_modules=sorted(modules), inference_mode=True)
    adapted = PeftModel(network, config, low_cpu_mem_usage=True)
    result = set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
    missing = [name for name in result.missing_keys if any(part in name for part in OF_ADAPTERS)]
    for kind, names in (("lacks", missing), ("has no place for", result.unexpected_keys)):
        require(
            not names,
            f"the adapter does not fit the model: it {kind} {len(names)} tensors, such as {first_few(names[:1])}",
        )
    return adapted


def _changed(adapted: nn.Module, tensors: dict[str, Any]) -> dict[str, Any]:
    """By their names in the network, the tensors that the adapter changes or replaces."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    changed: dict[str, Any] = {}
    for wrapped, module in adapted.named_modules():
        name = WRAPPERS.sub("", wrapped.removeprefix(WRAPPED))
        if isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[module.active_adapters[0]]
            changed |= {f"{name}.{each}": tensor.detach() for each, tensor in saved.named_parameters()}
        elif isinstance(module, BaseTunerLayer):
            for each, _ in module.get_base_layer().named_parameters(recurse=False):
                changed[f"{name}.{each}"] = MergedTensor(module, name, each, tensors)
        else:  # biases may be trained everywhere
            for each, tensor in module.named_parameters(prefix=name, recurse=False):
                if each in tensors and not _is_unread(tensor):
                    changed.setdefault(each, tensor.detach())
    return changed


class MergedTensor:
    """A parameter of a layer with an adapter, read like safetensors' slices."""

    def __init__(self, layer: Any, layer_name: str, name: str, tensors: dict[str, Any]) -> None:
        self._layer, self._layer_name, self._name, self._tensors = layer, layer_name, name, tensors

    def get_shape(self) -> list[int]:
        return list(getattr(self._layer.get_base_layer(), self._name).shape)

    def __getitem__(self, place: Any) -> Tensor:
        from torch import nn

        base = self._layer.get_base_layer()
        unread = {name: each for name, each in base.named_parameters(recurse=False) if _is_unread(each)}
        for name, each in unread.items():
            stored = self._tensors[f"{self._layer_name}.{name}"][...]
            setattr(base, name, nn.Parameter(stored.to(each.device, each.dtype, copy=True), requires_grad=False))
        self._layer.merge()
        merged = getattr(base, self._name).data[place].clone()  # a part must not hold the whole
        for name, each in unread.items():
            setattr(base, name, each)
        self._layer.merged_adapters.clear()
        return merged
