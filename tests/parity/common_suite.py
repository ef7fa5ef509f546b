"""transformers' common model tests, made to run on IDEFICS classes given from outside.

The sdist of transformers carries `tests/test_modeling_common.py`, but neither the sub-packages which that imports nor
the tests of single models: empty mixins stand in for the former, and the model tester is our own. No verdicts here.
"""

from __future__ import annotations

import importlib.util
import sys
import unittest
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from tiny_models import VOCAB_SIZE, Shape, random_inputs, tiny_config
from torch import Tensor
from transformers import IdeficsConfig, PreTrainedModel, set_seed

PACKAGE = "transformers_sdist_tests"
ABSENT_MIXINS = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


@dataclass(frozen=True)
class Family:
    """One implementation of IDEFICS."""

    base: type[PreTrainedModel]
    head: type[PreTrainedModel]


class IdeficsTester:
    """Configurations and inputs, and the sizes by which the common tests judge what comes out."""

    batch_size, seq_length, num_images = 5, 14, 2
    vocab_size, hidden_size, num_attention_heads, num_hidden_layers = VOCAB_SIZE, 32, 4, 2
    is_training = True

    def __init__(self, shape: Shape):
        self.shape = shape

    def get_config(self) -> IdeficsConfig:
        return tiny_config(self.shape, num_hidden_layers=self.num_hidden_layers)

    def prepare_config_and_inputs_for_common(self) -> tuple[IdeficsConfig, dict[str, Tensor]]:
        config = self.get_config()
        return config, random_inputs(config, num_images=self.num_images, num_tokens=self.seq_length)


def load_common_tests(tests_folder: Path) -> ModuleType:
    """`test_modeling_common.py` of an unpacked sdist, as a module of a package of its own."""
    name = f"{PACKAGE}.test_modeling_common"
    if name not in sys.modules:
        for absent, mixin in ABSENT_MIXINS.items():
            setattr(_register_package(f"{PACKAGE}.{absent}"), mixin, type(mixin, (), {}))
        spec = importlib.util.spec_from_file_location(name, tests_folder / "test_modeling_common.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def _register_package(name: str) -> ModuleType:
    """An empty package under `name`, inside empty packages; the innermost."""
    parent, _, _ = name.rpartition(".")
    if parent and parent not in sys.modules:
        _register_package(parent)
    package = ModuleType(name)
    package.__path__ = []
    return sys.modules.setdefault(name, package)


def common_test_names(common: ModuleType) -> list[str]:
    mixin = common.ModelTesterMixin
    return [name for name in dir(mixin) if name.startswith("test_") and callable(getattr(mixin, name))]


def run_common_test(common: ModuleType, name: str, family: Family, model_class: type, shape: Shape) -> None:
    """Run one common test on one class of `family`, seeded; what it raises passes through, a skip too."""

    def set_up(case: Any) -> None:
        case.model_tester = IdeficsTester(shape)

    attributes = {
        "setUp": set_up,
        "all_model_classes": (model_class,),
        "additional_model_inputs": ["pixel_values", "image_attention_mask"],
        "test_all_params_have_gradient": False,  # the vision tower's pooled vector, and its norm, are not used
        "test_can_init_all_missing_weights_before_2023": True,
    }
    case_class = type("IdeficsModelTest", (common.ModelTesterMixin, unittest.TestCase), attributes)
    set_seed(0)
    common.global_rng.seed(0)
    # Where a test asks the library for the base class, each family answers with its own.
    with patch.object(common, "MODEL_MAPPING", {IdeficsConfig: family.base}):
        case_class(name).debug()
