"""A model with an adapter, and the checkpoint into which PEFT has merged it, in every way in which models are run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from in_ranks import first_result
from test_parallel import Written, assert_same, load, slowly
from tiny_models import save_checkpoint
from transformers import IdeficsForVisionText2Text as TheirIdefics
from transformers.integrations import accelerate

from idefics_cli.checkpoint.quantize import check_saved, settings
from idefics_cli.errors import CheckpointError
from idefics_cli.loaded_model import LoadedModel
from idefics_cli.ranks import Ranks

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
INT8 = {"quantize": "int8"}


@dataclass(frozen=True)
class Tuned:
    base: Path
    adapter: Path
    merged: Path


@pytest.fixture(scope="module", params=[{"modules_to_save": ["v_proj"]}, {"use_dora": True}], ids=["saved", "dora"])
def tuned(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tuned:
    folder = tmp_path_factory.mktemp("tuned")
    made = Tuned(save_checkpoint(folder / "base"), folder / "adapter", folder / "merged")
    targets = ["q_proj", "o_proj", "up_proj", "down_proj", "lm_head"]
    config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False, **request.param)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(TheirIdefics.from_pretrained(made.base), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(made.adapter)
    shutil.copytree(made.base, made.merged)
    adapted.merge_and_unload().save_pretrained(made.merged)
    return made


@pytest.mark.parametrize(
    "options",
    [pytest.param(INT8, marks=needs_torchao, id="int8"), pytest.param({"device_map": "auto"}, id="device_map")],
)
def test_an_adapter_gives_what_the_merged_checkpoint_does(
    tuned: Tuned, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spread over memory and disk, too."""
    if "device_map" in options:
        monkeypatch.setattr(accelerate, "get_max_memory", lambda given=None: {"cpu": 150_000, "disk": 10**9})
    else:
        options = {**options, "device": "cpu"}
    adapted, merged, base = (
        LoadedModel.from_pretrained(folder, adapter=adapter, batch_size=4, dtype="fp32", **options)
        for folder, adapter in ((tuned.base, tuned.adapter), (tuned.merged, None), (tuned.base, None))
    )
    expected = slowly(merged, None)
    assert_same(slowly(adapted, None), expected)
    assert expected != slowly(base, None)


def in_two(ranks: Ranks, folder: Path, options: dict[str, Any]) -> Written:
    model = load(folder, ranks, batch_size=None, dtype="fp32", **options)
    if ranks.rank:
        model.follow()
    plain = [each for each in model.model.parameters() if type(each) is torch.nn.Parameter]
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in plain), "a part holds the whole"
    return slowly(model, None)


@pytest.mark.parametrize(
    "options", [pytest.param({}, id="plain"), pytest.param(INT8, marks=[needs_torchao, pytest.mark.slow], id="int8")]
)
def test_an_adapter_is_split_too(tuned: Tuned, options: dict[str, Any]) -> None:
    """Plain weights give what one process does. In int8 each process rounds the inputs of its part by itself."""
    found = first_result(2, in_two, tuned.base, {"adapter": tuned.adapter, **options})
    assert_same(
        found,
        first_result(2, in_two, tuned.merged, options) if options else slowly(load(tuned.merged, dtype="fp32"), None),
    )


@pytest.mark.slow
def test_a_merged_checkpoint_is_split_like_others(tuned: Tuned) -> None:
    assert_same(first_result(2, in_two, tuned.merged, {}), slowly(load(tuned.merged, dtype="fp32"), None))


@needs_torchao
def test_what_is_saved_in_int8_is_refused() -> None:
    class Config:
        quantization_config = settings("int8", torch.float32).to_dict()

    for is_shared, has_adapter, said in ((True, False, "for one device"), (False, True, "takes no --adapter")):
        with pytest.raises(CheckpointError, match=said):
            check_saved(Config(), is_shared, has_adapter)  # type: ignore[arg-type]
