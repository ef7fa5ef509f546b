"""transformers' own common model tests pass on our classes wherever they pass on transformers' own."""

from __future__ import annotations

import re
import textwrap
import unittest
from pathlib import Path
from types import ModuleType

import pytest
import transformers
from common_suite import Family, common_test_names, load_common_tests, run_common_test
from sdist import sdist
from tiny_models import Shape

from idefics_cli.model import modeling

THEIRS = Family(transformers.IdeficsModel, transformers.IdeficsForVisionText2Text)
OURS = Family(modeling.IdeficsModel, modeling.IdeficsForVisionText2Text)
SHAPES = {
    "patches": Shape("vector", False, use_resampler=False, additional_vocab_size=0, cross_layer_interval=1),
    "resampler": Shape("float", True, use_resampler=True, additional_vocab_size=0, cross_layer_interval=1),
    "published": Shape("float", True, use_resampler=True, additional_vocab_size=2, cross_layer_interval=2),
}
# transformers fails these with an additional vocabulary, whose logits its loss does not expect: we pass them anyway.
ANYWAY = {
    "test_causal_lm_loss_honors_shift_labels",
    "test_enable_input_require_grads_with_gradient_checkpointing",
    "test_model_outputs_equivalence",
    "test_training",
    "test_training_gradient_checkpointing",
    "test_training_gradient_checkpointing_use_reentrant_false",
    "test_training_gradient_checkpointing_use_reentrant_true",
}
# Should these stop passing on transformers' own, our tester is broken, and the others are skipped for nothing.
SURE_TO_PASS = ("test_save_load", "test_training", "test_eager_matches_sdpa_inference_09_fp32_pad_left")

# The common tests warn of what they do on purpose: deprecated arguments, sizes that do not fit.
pytestmark = pytest.mark.filterwarnings("ignore")
Skipped = (unittest.SkipTest, pytest.skip.Exception)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "common_test" in metafunc.fixturenames:
        source = (common_tests_folder() / "test_modeling_common.py").read_text(encoding="utf-8")
        for mark in set(re.findall(r"\bmark\.(\w+)", source)):  # strict markers hold for imported modules too
            metafunc.config.addinivalue_line("markers", f"{mark}: of transformers' common tests")
        metafunc.parametrize("common_test", common_test_names(load()))


def common_tests_folder() -> Path:
    return sdist("transformers", transformers.__version__) / "tests"


def load() -> ModuleType:
    return load_common_tests(common_tests_folder())


def obstacle(common_test: str, role: str, shape: Shape) -> str | None:
    """Why transformers' own class does not pass, in one line, or None."""
    try:
        run_common_test(load(), common_test, THEIRS, getattr(THEIRS, role), shape)
    except (*Skipped, Exception, pytest.fail.Exception) as reason:
        return textwrap.shorten(f"{type(reason).__name__}: {reason}", 160)
    return None


@pytest.mark.parametrize("role", ["base", "head"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_passes_where_transformers_own_does(common_test: str, role: str, shape: Shape) -> None:
    reason = obstacle(common_test, role, shape)
    if reason and not (role == "head" and common_test in ANYWAY):
        pytest.skip(f"does not pass on transformers' own either: {reason}")
    try:
        run_common_test(load(), common_test, OURS, getattr(OURS, role), shape)
    except Skipped as skipped:
        pytest.fail(f"passes on transformers' own and is skipped on ours: {skipped}")


@pytest.mark.parametrize("shape", [SHAPES["patches"], SHAPES["resampler"]], ids=["patches", "resampler"])
def test_our_tester_suits_transformers_own(shape: Shape) -> None:
    assert {name: obstacle(name, "head", shape) for name in SURE_TO_PASS} == dict.fromkeys(SURE_TO_PASS)
