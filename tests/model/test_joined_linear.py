"""Joined products: the plain layers' results while their weights lie in the matrix, and after they have left it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import randomize, tiny_config
from torch import nn

from idefics_cli.model import joined_linear
from idefics_cli.model.joined_linear import JoinedMatrix, add_product, join_linears
from idefics_cli.model.modeling import IdeficsForVisionText2Text
from idefics_cli.model.packed_linear import project


class Layer(nn.Module):
    joint_linears = ("q_proj", "k_proj")

    def __init__(self, bias: bool = False):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 6, bias), nn.Linear(8, 4, bias)
        self.requires_grad_(False)


@pytest.fixture(autouse=True)
def _the_cpu_counts_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_linear, "ALONE", ("meta",))


def outputs(layer: Layer, inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(project(inputs, layer.q_proj, layer.k_proj)), dim=-1)


@pytest.mark.parametrize("bias", [False, True])
def test_the_names_and_results_are_those_of_the_layers(bias: bool) -> None:
    layer, inputs = Layer(bias), torch.randn(2, 3, 8)
    state, expected = copy.deepcopy(layer.state_dict()), outputs(layer, inputs)
    join_linears(layer)
    assert layer.q_proj.joint.serves([layer.q_proj, layer.k_proj])
    torch.testing.assert_close(outputs(layer, inputs), expected)
    assert layer.state_dict().keys() == state.keys()
    assert all(value.equal(state[name]) for name, value in layer.state_dict().items())
    layer.load_state_dict({name: 2 * value for name, value in state.items()})  # into the matrix
    torch.testing.assert_close(outputs(layer, inputs), 2 * expected)


CHANGES = {
    "replaced": lambda layer: setattr(layer.q_proj, "weight", nn.Parameter(torch.ones(6, 8), False)),
    "other data": lambda layer: setattr(layer.q_proj.weight, "data", torch.ones(6, 8)),
    "another module": lambda layer: setattr(layer, "q_proj", nn.Linear(8, 6)),
    "converted": lambda layer: layer.double().float(),
    "copied": lambda layer: vars(layer).update(vars(copy.deepcopy(layer))),
    "to be trained": lambda layer: layer.q_proj.requires_grad_(True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_have_left_count(change) -> None:
    layer, inputs = Layer(), torch.randn(2, 8)
    join_linears(layer)
    joint = layer.q_proj.joint
    change(layer)
    assert not joint.serves([layer.q_proj, layer.k_proj])
    torch.testing.assert_close(outputs(layer, inputs), torch.cat([layer.q_proj(inputs), layer.k_proj(inputs)], dim=-1))


def test_layers_with_hooks_are_left_alone() -> None:
    layer = Layer()
    layer.k_proj.register_forward_hook(lambda *_: None)  # tensor parallelism sums there
    join_linears(layer)
    assert not isinstance(getattr(layer.q_proj, "joint", None), JoinedMatrix)


def test_a_product_is_added_in_place_without_a_gradient() -> None:
    linear, inputs, residual = nn.Linear(8, 6, bias=False), torch.randn(2, 3, 8), torch.randn(2, 3, 6)
    expected = residual + linear(inputs)
    assert add_product(residual, inputs, linear).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(add_product(residual, inputs, linear), expected)
        torch.testing.assert_close(residual, expected)


def test_a_joined_network_is_saved_and_adapted_like_any_other(tmp_path) -> None:
    network = randomize(IdeficsForVisionText2Text(tiny_config())).requires_grad_(False)
    plain = copy.deepcopy(network.state_dict())
    join_linears(network)
    network.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(value.equal(plain[name]) for name, value in saved.items())
    adapted = get_peft_model(network, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    attention = adapted.base_model.model.model.layers[0].self_attn
    inputs = torch.randn(1, 2, attention.k_proj.in_features)
    torch.testing.assert_close(project(inputs, attention.q_proj, attention.k_proj)[0], attention.q_proj(inputs))
    merged = adapted.merge_and_unload().model.layers[0].self_attn
    torch.testing.assert_close(
        project(inputs, merged.q_proj, merged.k_proj, merged.v_proj)[0], inputs @ merged.q_proj.weight.T
    )
