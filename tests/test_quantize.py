"""Weights of fewer bits: texts as in fp32, a quarter of the memory, and what is refused."""

from __future__ import annotations

import gc
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from in_ranks import first_result
from tiny_models import relative_error, save_checkpoint
from torch import nn
from transformers.integrations import accelerate

from benchmarks.int8 import loaded
from idefics_cli import Idefics
from idefics_cli.checkpoint import quantize
from idefics_cli.checkpoint.find import check_model_request, find_checkpoint
from idefics_cli.checkpoint.load import load_config, load_network, meta_network
from idefics_cli.checkpoint.request import DEMO_FOLDER, ModelRequest
from idefics_cli.demo.scene import EVALUATION_SEEDS, scene
from idefics_cli.engine.prompt_source import IterableSource
from idefics_cli.errors import DeviceError, IdeficsError
from idefics_cli.loaded_model import LoadedModel
from idefics_cli.model.modeling import IdeficsForVisionText2Text
from idefics_cli.model.packed_linear import PackedInt8Matrix, PackedLinear, pack_linears, packable_dtypes
from idefics_cli.prompts.templates import CAPTION, Shot, few_shot_prompt
from idefics_cli.ranks import Ranks

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
needs_onednn = pytest.mark.skipif(torch.float32 not in packable_dtypes(), reason="oneDNN packs nothing on this machine")


def quantized(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model.requires_grad_(False), Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return model


@needs_torchao
@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_int8_is_packed_and_each_row_is_quantized_by_itself(bias: bool) -> None:
    plain = nn.Sequential(nn.Linear(256, 384, bias))
    inputs = torch.randn(3, 5, 256) * torch.logspace(-3, 3, 5)[:, None]
    expected, model = plain(inputs), quantized(plain)
    weight = model[0].weight.dequantize()
    pack_linears(model)
    joint = model[0].joint
    assert type(joint) is PackedInt8Matrix and relative_error(model[0].plain_weight(), weight) < 1e-6
    for row in range(5):
        assert relative_error(model(inputs)[:, row], expected[:, row]) < 0.04
    assert torch.equal(model(inputs)[1:2, 2:3], model(inputs[1:2, 2:3]))
    assert not model(torch.full((1, 256), torch.nan)).isfinite().any()
    gc.disable()
    try:
        held = [each for each in gc.get_objects() if type(each).__name__ == "Int8Tensor"]
        assert not any(each.shape == (384, 256) for each in held), "held twice"
    finally:
        gc.enable()


@needs_torchao
@needs_onednn
def test_texts_of_int8_are_those_of_fp32() -> None:
    images = [scene(EVALUATION_SEEDS + number).image for number in range(6)]
    plain, model = (Idefics.from_pretrained("demo", device="cpu", quantize=kind) for kind in (None, "int8"))
    assert [each.text for each in model.caption(images)] == [each.text for each in plain.caption(images)]
    assert quantize.kind_of(model.model.config) == "int8"
    packed = [layer for layer in model.model.modules() if isinstance(layer, PackedLinear)]
    assert len(packed) == 93 and all(type(layer.joint) is PackedInt8Matrix for layer in packed)


@needs_torchao
def test_a_model_saved_in_int8_needs_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(DEMO_FOLDER, folder)
    checkpoint = find_checkpoint(ModelRequest("demo"))
    expected = meta_network(checkpoint, load_config(checkpoint))
    model = load_network(checkpoint, expected, torch.device("cpu"), torch.float32, kind="int8")
    model.save_pretrained(folder)
    loaded = Idefics.from_pretrained(folder, device="cpu").model.state_dict()
    weight = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(loaded[weight], model.state_dict()[weight].dequantize())
    with pytest.raises(IdeficsError, match="saved in int8: leave out --quantize nf4"):
        quantize.kind_of(load_config(find_checkpoint(ModelRequest(str(folder)))), "nf4")

    def full_device(**options: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(IdeficsForVisionText2Text, "from_pretrained", full_device)
    with pytest.raises(DeviceError, match=r"GB in int8 do not fit on cpu, .* free: use a machine"):
        Idefics.from_pretrained(folder, device="cpu")


class Weird(torch.Tensor):
    pass


def test_other_subclasses_of_tensors_are_passed_over() -> None:
    layer = nn.Linear(256, 256)
    layer.weight = nn.Parameter(torch.randn(256, 256).as_subclass(Weird), requires_grad=False)
    model = nn.Sequential(layer)
    pack_linears(model)
    assert model[0] is layer


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantize": "nf4"}, "nf4 runs on CUDA, not on cpu: use --quantize int8"),
        ({"quantize": "int8", "dtype": "bf16"}, "computes in fp32 on the CPU: leave out --dtype bf16"),
        ({"quantize": "nf4", "device": "auto", "device_map": "auto"}, "nf4 runs on CUDA"),
        ({"quantize": "int3"}, "unknown quantize 'int3': use int8 or nf4"),
    ],
)
def test_what_is_refused_before_a_weight_is_read(changes: dict, said: str) -> None:
    with pytest.raises(IdeficsError, match=said):
        check_model_request(ModelRequest(**{"model": "demo", "device": "cpu", **changes}))


def test_nf4_is_for_one_device() -> None:
    with pytest.raises(IdeficsError, match="nf4 weights are for one device: use --quantize int8"):
        quantize.check("nf4", torch.device("cuda"), "auto", is_shared=True)


@needs_torchao
@pytest.mark.parametrize("memory", [0, 3_000_000])
def test_int8_weights_are_not_moved_for_each_step(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    """Whether transformers notices as it loads or not. Where all of them stay, they are as on one device."""
    monkeypatch.setattr(accelerate, "get_max_memory", lambda given=None: {"cpu": memory, "disk": 10**9})
    with pytest.raises(IdeficsError, match="do not hold all of the quantized weights"):
        Idefics.from_pretrained("demo", device_map="auto", quantize="int8")
    monkeypatch.undo()
    image = scene(EVALUATION_SEEDS).image
    assert Idefics.from_pretrained("demo", device_map="auto", quantize="int8").caption([image])[0].error is None


def captions_of_two(ranks: Ranks) -> list[tuple[str | None, float | None]]:
    model = LoadedModel.from_pretrained("demo", device="cpu", quantize="int8", ranks=ranks)
    if ranks.rank:
        model.follow()
    return captions_with_scores(model)


def captions_with_scores(model: LoadedModel) -> list[tuple[str | None, float | None]]:
    queries = [Shot(scene(EVALUATION_SEEDS + number).image) for number in range(8)]
    encoded = [model.encode(few_shot_prompt(CAPTION, [], query), 12) for query in queries]
    return [(each.text, each.score) for _, each in sorted(model.stream(IterableSource(encoded), max_new_tokens=12))]


@needs_torchao
def test_two_processes_write_in_int8_what_one_does() -> None:
    """But for rounding: each quantizes what it has of a layer's inputs by itself."""
    found = first_result(2, captions_of_two)
    expected = captions_with_scores(LoadedModel.from_pretrained("demo", device="cpu", quantize="int8"))
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert max(abs(one - other) for (_, one), (_, other) in zip(found, expected, strict=True)) < 0.01


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(IdeficsError, match=r"pip install 'idefics-cli\[quantize\]'"):
        check_model_request(ModelRequest("demo", device="cpu", quantize="int8"))


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq 4-bit"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, "Int4WeightOnly"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
    ],
)
def test_other_kinds_are_named(saved: dict, said: str) -> None:
    class Config:
        quantization_config = saved

    with pytest.raises(IdeficsError, match=said):
        quantize.kind_of(Config())


def bytes_of_loading(folder: Path) -> dict[str, float]:
    return loaded(folder, "int8")[1]


@pytest.mark.slow
@needs_torchao
@needs_onednn
def test_loading_holds_little_more_than_the_int8_weights(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8, "num_attention_heads": 16}
    folder = save_checkpoint(tmp_path / "large", sizes=sizes)
    plain = (folder / "model.safetensors").stat().st_size
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(bytes_of_loading, folder).result()
    assert plain > 500e6 and found["held"] <= found["peak"] <= 0.35 * plain, (plain, found)
