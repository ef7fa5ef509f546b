"""Packed layers: the same results and names as the plain ones, and one copy of the weights."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import Shape, random_inputs, randomize, relative_error, tiny_config
from torch import Tensor, nn
from transformers.activations import GELUActivation

from idefics_cli.model import packed_linear
from idefics_cli.model.modeling import IdeficsForVisionText2Text
from idefics_cli.model.packed_linear import (
    IdeficsDecoupledLinear,
    PackedLinear,
    kernel_rows,
    pack_linears,
    packable_dtypes,
    project,
)
from idefics_cli.model.vision import IdeficsVisionMLP

pytestmark = pytest.mark.skipif(torch.float32 not in packable_dtypes(), reason="oneDNN packs nothing on this machine")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
LEADING = ((), (1,), (0,), (5,), (37,), (40,), (130,), (700,), (5, 257), (2, 3, 4), (8, 0), (3, 1))
PLAIN = Shape()
VISION = {
    "embed_dim": 128,
    "image_size": 28,
    "patch_size": 14,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def wide_network(shape: Shape = PLAIN, **changes: object) -> IdeficsForVisionText2Text:
    """Of the fewest channels that are worth packing; its resampler's heads stay below."""
    sizes = {"hidden_size": 128, "intermediate_size": 144, "vocab_size": 192, "vision_config": VISION}
    model = IdeficsForVisionText2Text(tiny_config(shape, **{**sizes, **changes}))
    return randomize(model, spread=0.05).requires_grad_(False)


def layers(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", sorted(packable_dtypes() & TOLERANCE.keys(), key=str))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", LEADING)
@torch.no_grad()
def test_results_are_those_of_the_plain_layer(dtype: torch.dtype, bias: bool, leading: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(344, 131, bias=bias, dtype=dtype)
    inputs = torch.randn(*leading, 344, dtype=dtype)
    packed, expected = PackedLinear(plain)(inputs), plain(inputs)
    assert packed.shape == expected.shape and packed.dtype == dtype
    assert packed.numel() == 0 or relative_error(packed, expected) <= TOLERANCE[dtype]
    assert torch.equal(packed, PackedLinear(plain)(inputs))


def test_few_sizes_serve_all_numbers_of_rows() -> None:
    sizes = {kernel_rows(rows) for rows in range(1, 5000)}
    assert len(sizes) == 54 and max(sizes) == 512
    assert all(0 <= kernel_rows(rows) - rows < 8 for rows in range(128))
    assert all(0 <= kernel_rows(rows) - rows < 16 for rows in range(128, 512))


@torch.inference_mode()
def test_inputs_need_not_be_contiguous() -> None:
    plain = nn.Linear(128, 128)
    packed = PackedLinear(plain)
    wide = torch.randn(6, 5, 256)
    for inputs in (wide[..., ::2], wide[:, ::2, :128], wide[:, :1, 3:131].expand(6, 5, 128), wide[0, :, :128].t().mT):
        assert relative_error(packed(inputs), plain(inputs)) <= TOLERANCE[torch.float32]


def test_a_gradient_is_refused() -> None:
    packed, inputs = PackedLinear(nn.Linear(128, 128)), torch.randn(2, 128, requires_grad=True)
    with pytest.raises(RuntimeError, match="no_grad"):
        packed(inputs)
    with torch.no_grad():
        assert not packed(inputs).requires_grad
    assert not packed(inputs.detach()).requires_grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("added", [0, 2])
@torch.no_grad()
def test_a_decoupled_layer_keeps_its_second_part(added: int, bias: bool) -> None:
    plain = IdeficsDecoupledLinear(128, 160, added, bias=bias)
    inputs, state = torch.randn(3, 2, 128), copied_state(plain)
    packed = PackedLinear(plain)
    assert relative_error(packed(inputs), plain(inputs)) <= TOLERANCE[torch.float32]
    assert_same_state(packed, state)


@pytest.mark.parametrize("shape", [PLAIN, Shape("vector", False, False, 0, 1)], ids=str)
@torch.inference_mode()
def test_a_packed_network_gives_the_same_logits_and_texts(shape: Shape) -> None:
    model = wide_network(shape)
    inputs = random_inputs(model.config)
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    logits, texts = model(**inputs).logits, model.generate(**inputs, **beams)
    pack_linears(model)
    assert relative_error(model(**inputs).logits, logits) < 1e-5
    assert torch.equal(model.generate(**inputs, **beams), texts)


def test_all_large_layers_are_packed_with_their_plain_weights_gone_and_none_else() -> None:
    model = wide_network()
    large = {name for name in layers(model, nn.Linear) if min(model.get_submodule(name).weight.shape) >= 128}
    small = layers(model, nn.Linear) - large
    weights = [weakref.ref(model.get_submodule(name).weight) for name in large]
    pack_linears(model)
    assert "lm_head" in large and any("vision_model" in name for name in large)
    assert "lm_head.additional_fc" in small
    assert layers(model, PackedLinear) == large and layers(model, nn.Linear) == small
    assert not any(weight() is not None for weight in weights), "a plain weight is still in memory"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list what is mapped")
def test_a_mapped_checkpoint_file_is_let_go(tmp_path: Path) -> None:
    wide_network().save_pretrained(tmp_path)
    model = IdeficsForVisionText2Text.from_pretrained(tmp_path, dtype=torch.float32).requires_grad_(False)
    pack_linears(model)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")


@torch.no_grad()
def test_a_packed_network_is_saved_as_a_plain_one_and_loads_nothing(tmp_path: Path) -> None:
    model = wide_network()
    state, inputs = copied_state(model), random_inputs(model.config)
    logits = model(**inputs).logits
    pack_linears(model)
    assert_same_state(model, state)
    assert not model.lm_head.training
    model.save_pretrained(tmp_path)
    saved = IdeficsForVisionText2Text.from_pretrained(tmp_path)
    assert_same_state(saved, state)
    assert torch.equal(saved(**inputs).logits, logits)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state)


class Pair(nn.Module):
    """Two layers over the same inputs, the second of a size to choose."""

    joint_linears = ("first", "second")

    def __init__(self, second: int, bias: bool):
        super().__init__()
        self.first, self.second = nn.Linear(128, 160, bias), nn.Linear(128, second, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [3, 200, 700])
@torch.inference_mode()
def test_layers_of_the_same_inputs_are_one_matrix(rows: int, bias: bool) -> None:
    pair, inputs = Pair(192, bias), torch.randn(rows, 128)
    state, expected = copied_state(pair), project(inputs, pair.first, pair.second)
    pack_linears(pair)
    assert pair.first.joint is pair.second.joint and pair.first.joint.out_features == 160 + 192
    for outputs in (project(inputs, pair.first, pair.second), [pair.first(inputs), pair.second(inputs)]):
        for output, plain in zip(outputs, expected, strict=True):
            assert relative_error(output, plain) <= TOLERANCE[torch.float32]
    assert_same_state(pair, state)


@torch.inference_mode()
def test_a_layer_that_cannot_be_packed_does_not_join() -> None:
    pair, inputs = Pair(16, True), torch.randn(5, 128)
    expected = project(inputs, pair.first, pair.second)
    pack_linears(pair)
    assert isinstance(pair.first, PackedLinear) and type(pair.second) is nn.Linear
    for output, plain in zip(project(inputs, pair.first, pair.second), expected, strict=True):
        assert relative_error(output, plain) <= TOLERANCE[torch.float32]


@torch.inference_mode()
def test_images_have_kernels_of_their_own_and_prompts_have_not() -> None:
    model = wide_network()
    pack_linears(model)
    recurring = {name for name in layers(model, PackedLinear) if model.get_submodule(name).joint.sizes_recur}
    assert recurring == {name for name in layers(model, PackedLinear) if "vision_model" in name or "perceiver" in name}
    layer, inputs = model.model.vision_model.encoder.layers[0].mlp.fc1, torch.randn(701, 128)
    expected = nn.functional.linear(inputs, layer.plain_weight(), layer.bias)
    assert relative_error(layer(inputs), expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("learns", [True, False])
def test_an_activation_changes_no_inputs(learns: bool) -> None:
    mlp, inputs = IdeficsVisionMLP(tiny_config().vision_config), torch.randn(3, 24)
    mlp.activation_fn = GELUActivation()
    before = inputs.clone()
    with torch.set_grad_enabled(learns):
        output = mlp(inputs)
        assert torch.equal(output, mlp.fc2(nn.functional.gelu(mlp.fc1(inputs))))
    assert torch.equal(inputs, before) and output.requires_grad == learns


def test_a_packed_network_stays_where_and_what_it_is() -> None:
    packed = PackedLinear(nn.Linear(128, 128))
    assert packed.to("cpu").float() is packed
    for elsewhere in torch.float64, "meta":
        with pytest.raises(RuntimeError, match="load the network again"):
            packed.to(elsewhere)


def test_a_tied_head_is_left_alone() -> None:
    model = wide_network(tie_word_embeddings=True)
    pack_linears(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[0].self_attn.q_proj, PackedLinear)


@pytest.mark.parametrize(
    ("device", "dtype", "has_onednn"),
    [("meta", torch.float32, True), ("cpu", torch.float64, True), ("cpu", torch.float32, False)],
)
def test_what_onednn_does_not_pack_is_left_alone(
    device: str, dtype: torch.dtype, has_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = nn.Sequential(nn.Linear(128, 128, device=device, dtype=dtype))
    pack_linears(model)
    assert type(model[0]) is nn.Linear


class Sizes(nn.Sequential):
    """Three layers of shapes of their own, the last too small to be measured."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(512, 600), nn.Linear(600, 640), nn.Linear(640, 128))


def faked_seconds(monkeypatch: pytest.MonkeyPatch, plain: dict[tuple[int, int], float]) -> list[int]:
    """Plain products take so long for so many rows and columns, packed ones 1 second; the number of ways timed."""
    timed: list[int] = []

    def least_seconds(ways: dict) -> dict:
        timed.append(len(ways))
        return {key: [plain[key[1], key[0][1][0][1]], 1.0] for key in ways}

    monkeypatch.setattr(packed_linear, "least_seconds", least_seconds)
    return timed


@pytest.mark.parametrize(
    ("plain", "stay_plain", "timed"),
    [
        ({(32, 512): 0.9, (32, 600): 2.0}, set(), [2, 0]),  # 0.9 may be noise
        ({(32, 512): 0.5, (32, 600): 2.0, (256, 512): 1.0}, {"0"}, [2, 2]),
        ({(32, 512): 2.0, (32, 600): 0.8, (256, 600): 9.0}, set(), [2, 2]),  # lost again in a prefill
    ],
)
@torch.inference_mode()
def test_the_faster_product_of_each_shape_is_taken(
    plain: dict, stay_plain: set[str], timed: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, inputs = Sizes(), torch.randn(3, 512)
    state, expected = copied_state(model), model(inputs)
    counted = faked_seconds(monkeypatch, plain)
    pack_linears(model)
    assert layers(model, nn.Linear) == stay_plain and counted == timed
    assert layers(model, PackedLinear) == {"0", "1", "2"} - stay_plain
    assert relative_error(model(inputs), expected) <= 3 * TOLERANCE[torch.float32]  # of each layer
    assert_same_state(model, state)
    again = Sizes()
    pack_linears(again)
    assert layers(again, nn.Linear) == stay_plain and counted == timed  # measured once


@torch.inference_mode()
def test_of_each_way_the_least_time_is_taken_and_measuring_ends() -> None:
    calls: list[str] = []
    ways = {"a": [lambda: calls.append("a plain"), lambda: calls.append("a packed")], "b": [lambda: calls.append("b")]}
    seconds = packed_linear.least_seconds(ways)
    assert {key: len(found) for key, found in seconds.items()} == {"a": 2, "b": 1}
    assert calls == ["a plain", "a packed", "b"] * (1 + packed_linear.ROUNDS)
    assert 0 < packed_linear.seconds_of_layer(128, 256, 32, torch.float32) < 10
