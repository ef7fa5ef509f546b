"""The network by itself: gates, freezing, gradient checkpointing and attention; `parity/` has its numbers."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Shape, random_inputs, randomize, relative_error, tiny_config
from torch import Tensor

from idefics_cli.model.decoder import IdeficsRotaryEmbedding
from idefics_cli.model.kv_interface import PlainMemory
from idefics_cli.model.modeling import IdeficsForVisionText2Text, freeze_model


@pytest.fixture(scope="module")
def model() -> IdeficsForVisionText2Text:
    return randomize(IdeficsForVisionText2Text(tiny_config()))


def labelled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_tokens_that_see_no_image_do_not_depend_on_images(model: IdeficsForVisionText2Text) -> None:
    inputs = random_inputs(model.config)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(1) * 3}
    blind = (inputs["image_attention_mask"].sum(-1) == 0) & inputs["attention_mask"].bool()
    with torch.no_grad():
        first, second = model(**inputs).logits, model(**other).logits
    assert blind.any() and torch.equal(first[blind], second[blind])
    assert not torch.allclose(first[~blind], second[~blind])


@pytest.mark.parametrize("freeze_text", [True, False])
@pytest.mark.parametrize("freeze_vision", [True, False])
def test_freezing_follows_the_configuration(freeze_text: bool, freeze_vision: bool) -> None:
    config = tiny_config(freeze_text_layers=freeze_text, freeze_vision_layers=freeze_vision, freeze_lm_head=freeze_text)
    learns = trainable(IdeficsForVisionText2Text(config))
    assert any(name.startswith("model.layers.") for name in learns) is not freeze_text
    assert ("model.embed_tokens.weight" in learns) is not freeze_text
    assert ("lm_head.weight" in learns) is not freeze_text
    assert any("vision_model" in name for name in learns) is not freeze_vision
    always = {"model.embed_tokens.additional_embedding.weight", "lm_head.additional_fc.weight"}
    assert always < learns
    assert any("gated_cross_attn_layers" in name for name in learns)
    assert any("perceiver_resampler" in name for name in learns)


def test_freezing_spares_the_excepted_kinds() -> None:
    config = tiny_config(
        freeze_text_layers=True,
        freeze_vision_layers=True,
        freeze_text_module_exceptions=["Linear"],
        freeze_vision_module_exceptions=["LayerNorm"],
    )
    learns = trainable(IdeficsForVisionText2Text(config))
    text = {name for name in learns if name.startswith("model.layers.")}
    vision = {name for name in learns if "vision_model" in name}
    assert text and all("proj" in name for name in text)
    assert vision and all("norm" in name or "layrnorm" in name for name in vision)
    with pytest.raises(ValueError, match="Conv2d"):
        freeze_model(torch.nn.Linear(2, 2), ["Conv2d"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    plain = randomize(IdeficsForVisionText2Text(tiny_config())).train()
    saving = randomize(IdeficsForVisionText2Text(tiny_config())).train()
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    inputs = labelled(random_inputs(plain.config))
    for each in (plain, saving):
        each(**inputs).loss.backward()
    for (name, expected), got in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (expected.grad is None) == (got.grad is None), name
        if expected.grad is not None:
            assert torch.allclose(got.grad, expected.grad, atol=1e-6), name


def test_rotary_angles_are_computed_once_per_forward(
    model: IdeficsForVisionText2Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = IdeficsRotaryEmbedding.forward
    monkeypatch.setattr(IdeficsRotaryEmbedding, "forward", lambda self, *args: calls.append(1) or forward(self, *args))
    with torch.no_grad():
        model(**random_inputs(model.config))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("use_resampler", "changes", "said"),
    [
        (True, {"perceiver_embeddings": torch.zeros(5, 4, 5, 24)}, "Exactly 1"),
        (True, {"pixel_values": None}, "Exactly 1"),
        (True, {"pixel_values": torch.zeros(5, 4, 3, 30, 30)}, "interpolate_pos_encoding"),
        (False, {"pixel_values": None, "perceiver_embeddings": torch.zeros(5, 4, 5, 24)}, "use_resampler"),
    ],
)
def test_images_that_the_network_cannot_take_are_refused(use_resampler: bool, changes: dict, said: str) -> None:
    model = IdeficsForVisionText2Text(tiny_config(Shape(use_resampler=use_resampler)))
    with pytest.raises(ValueError, match=said):
        model(**{**random_inputs(model.config), **changes})


def test_eager_and_fused_attention_agree(model: IdeficsForVisionText2Text) -> None:
    inputs = random_inputs(model.config)
    eager = IdeficsForVisionText2Text._from_config(tiny_config(), attn_implementation="eager")
    randomize(eager)
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        output = eager(**inputs, output_attentions=True)
        assert relative_error(output.logits[seen], model(**inputs).logits[seen]) < 1e-5
    assert len(output.attentions) == 4 and output.attentions[0].shape == (5, 4, 14, 14)


def test_a_plain_memory_moves_its_masks() -> None:
    memory = PlainMemory("sdpa", None, torch.zeros(1, 1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
    moved = memory.to("meta")
    assert moved.causal_mask is None
    assert moved.image_mask.device.type == moved.image_gate.device.type == "meta"
