"""LoRA weights, as PEFT saves them, merged into a network in memory.

Of an adapter's configuration only the fields count that say what its tensors mean: none that would initialise them,
import a module or name another file.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from idefics_cli.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

FIELDS = (
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
WRAPPED = "base_model.model."  # what PEFT puts before the names of a network's tensors
OWN = (".lora_", ".modules_to_save.", "trainable_tokens_delta")


def require_peft() -> None:
    if find_spec("peft") is None:
        raise CheckpointError("--adapter needs an extra: pip install 'idefics-cli[peft]'")


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that count of an `adapter_config.json`. Raises CheckpointError for what is not plain LoRA."""
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    unknown = sorted(name for name, value in config.items() if value and name not in (*FIELDS, *WITHOUT_EFFECT))
    if kind != "LORA" or unknown or start not in INITIAL:
        what = f"peft_type {kind}" if kind != "LORA" else unknown[0] if unknown else f"init_lora_weights {start}"
        raise CheckpointError(
            f"an adapter with {what} cannot be merged here: merge it with PEFT's merge_and_unload, and save the model"
        )
    return {name: config[name] for name in FIELDS if config.get(name) is not None}


def merged(network: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The network with what `merge_and_unload` makes of its weights.

    Raises CheckpointError for tensors that have no place in it, or are missing; for wrong settings what PEFT raises.
    """
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    modules = {name.removeprefix(WRAPPED).partition(".lora_")[0] for name in tensors if ".lora_" in name}
    config = LoraConfig(**settings, target_modules=sorted(modules), inference_mode=True)
    adapted = PeftModel(network, config, low_cpu_mem_usage=True)
    result = set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
    missing = [name for name in result.missing_keys if any(part in name for part in OWN)]
    for kind, names in (("lacks", missing), ("has no place for", result.unexpected_keys)):
        if names:
            raise CheckpointError(
                f"the adapter does not fit the model: it {kind} {len(names)} tensors, such as {names[0]}"
            )
    return adapted.merge_and_unload()
