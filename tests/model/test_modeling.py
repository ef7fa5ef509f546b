"""The network by itself: vocabularies, gates, freezing, loss, checkpointing, and the seam to a memory."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Shape, random_inputs, randomize, relative_error, tiny_config
from torch import Tensor

from idefics_cli.model.decoder import IdeficsDecoupledEmbedding, IdeficsRotaryEmbedding
from idefics_cli.model.kv_interface import PlainMemory, eager_attention, image_visibility
from idefics_cli.model.modeling import IdeficsForVisionText2Text, freeze_model
from idefics_cli.model.packed_linear import IdeficsDecoupledLinear


@pytest.fixture(scope="module")
def model() -> IdeficsForVisionText2Text:
    return randomize(IdeficsForVisionText2Text(tiny_config()))


def labelled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_decoupled_embedding_reads_both_tables() -> None:
    embedding = IdeficsDecoupledEmbedding(5, 2, 3)
    ids = torch.tensor([[0, 4, 5, 6, 1]])
    whole = torch.cat([embedding.weight, embedding.additional_embedding.weight])
    assert torch.equal(embedding(ids), whole[ids])


def test_decoupled_embedding_and_linear_freeze_only_the_old_vocabulary() -> None:
    embedding = IdeficsDecoupledEmbedding(5, 2, 3, partially_freeze=True)
    linear = IdeficsDecoupledLinear(3, 5, 2, partially_freeze=True)
    assert trainable(embedding) == {"additional_embedding.weight"}
    assert trainable(linear) == {"additional_fc.weight", "additional_fc.bias"}


def test_a_padding_index_beyond_the_table_is_refused() -> None:
    with pytest.raises(AssertionError, match="Padding_idx"):
        IdeficsDecoupledEmbedding(5, 2, 3, padding_idx=7)


def test_tokens_that_see_no_image_do_not_depend_on_images(model: IdeficsForVisionText2Text) -> None:
    inputs = random_inputs(model.config)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(1) * 3}
    blind = (inputs["image_attention_mask"].sum(-1) == 0) & inputs["attention_mask"].bool()
    with torch.no_grad():
        first, second = model(**inputs).logits, model(**other).logits
    assert blind.any() and torch.equal(first[blind], second[blind])
    assert not torch.allclose(first[~blind], second[~blind])


def test_padding_on_the_left_changes_nothing(model: IdeficsForVisionText2Text) -> None:
    inputs = random_inputs(model.config)
    row = {name: value[1:2] for name, value in inputs.items()}
    bare = {name: value[:, 3:] if name != "pixel_values" else value for name, value in row.items()}
    with torch.no_grad():
        assert relative_error(model(**bare).logits, model(**row).logits[:, 3:]) < 1e-5


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


def test_an_unknown_kind_cannot_be_spared() -> None:
    with pytest.raises(ValueError, match="Conv2d"):
        freeze_model(torch.nn.Linear(2, 2), ["Conv2d"])


def test_loss_ignores_what_is_labelled_so(model: IdeficsForVisionText2Text) -> None:
    inputs = labelled(random_inputs(model.config))
    counted = inputs["labels"] != -100
    counted[:, 0] = False
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits[counted[:, 1:]], inputs["labels"][counted])
        assert torch.allclose(model(**inputs).loss, expected, rtol=1e-6)


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


def test_exactly_one_kind_of_image_input(model: IdeficsForVisionText2Text) -> None:
    inputs = random_inputs(model.config)
    latents = torch.zeros(5, 4, 5, 24)
    with pytest.raises(ValueError, match="Exactly 1"):
        model(**inputs, perceiver_embeddings=latents)
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="Exactly 1"):
        model(**inputs)


def test_latents_need_a_resampler() -> None:
    model = IdeficsForVisionText2Text(tiny_config(Shape(use_resampler=False)))
    with pytest.raises(ValueError, match="use_resampler"):
        model.model.encode_images(perceiver_embeddings=torch.zeros(1, 1, 5, 24))


def test_images_of_another_size_are_refused(model: IdeficsForVisionText2Text) -> None:
    inputs = random_inputs(model.config)
    inputs["pixel_values"] = torch.zeros(5, 4, 3, 30, 30)
    with pytest.raises(ValueError, match="interpolate_pos_encoding"):
        model(**inputs)


def test_eager_and_fused_attention_agree(model: IdeficsForVisionText2Text) -> None:
    inputs = random_inputs(model.config)
    eager = IdeficsForVisionText2Text._from_config(tiny_config(), attn_implementation="eager")
    randomize(eager)
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        output = eager(**inputs, output_attentions=True)
        assert relative_error(output.logits[seen], model(**inputs).logits[seen]) < 1e-5
    assert len(output.attentions) == 4 and output.attentions[0].shape == (5, 4, 14, 14)


def test_another_memory_serves_the_same_forward_pass(model: IdeficsForVisionText2Text) -> None:
    """The layers need nothing of a memory but its two methods: here one that holds the images' keys and values."""
    inputs = {name: value[4:] for name, value in random_inputs(model.config).items()}
    network = model.model
    with torch.no_grad():
        expected = network(**inputs).last_hidden_state
        images = network.encode_images(pixel_values=inputs["pixel_values"]).flatten(1, 2)
        memory = HoldingMemory(network, images, inputs["image_attention_mask"])
        positions = torch.arange(14).unsqueeze(0)
        got = network.decode(network.embed_tokens(inputs["input_ids"]), positions, memory)
    assert relative_error(got, expected) < 1e-5


class HoldingMemory:
    """Projects the images once, when it is made, and is given none later."""

    def __init__(self, network, images: Tensor, image_attention_mask: Tensor):
        self.images = [layer.cross_attn.project_image(images) for layer in network.gated_cross_attn_layers]
        self.mask, self.gate = image_visibility(image_attention_mask, 5, images.dtype)

    def attend(self, layer, query: Tensor, key: Tensor, value: Tensor):
        causal = torch.full((query.shape[2], query.shape[2]), -torch.inf).triu(1)
        return eager_attention(layer, query, key, value, causal, layer.scaling)

    def attend_image(self, layer, query: Tensor, key: Tensor | None, value: Tensor | None):
        assert key is None and value is None
        output, weights = eager_attention(layer, query, *self.images[layer.layer_idx], self.mask, layer.scaling)
        return output * self.gate[:, :, None, None], weights


def test_a_plain_memory_moves_its_masks() -> None:
    memory = PlainMemory("sdpa", None, torch.zeros(1, 1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
    moved = memory.to("meta")
    assert moved.causal_mask is None
    assert moved.image_mask.device.type == moved.image_gate.device.type == "meta"
