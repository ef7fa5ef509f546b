"""Our network beside transformers' own, in fp32 and on random weights: logits, loss, gradients, texts and files.

A seeded sample of the grid of configurations runs always, all of it with `-m grid`.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny_models import GRID, Shape, random_inputs, randomize, relative_error, tiny_config
from transformers import IdeficsForVisionText2Text as TheirModel

from idefics_cli.model.modeling import IdeficsForVisionText2Text as OurModel

TOLERANCE = 1e-5
SAMPLE = random.Random(20).sample(GRID, 8)


def whole_grid(sample: list[Shape]) -> list:
    """Each configuration as a test; those outside the sample with the marker `grid`."""
    return [pytest.param(s, id=str(s), marks=[] if s in sample else [pytest.mark.grid]) for s in GRID]


def pair(shape: Shape, **changes: object) -> tuple[OurModel, TheirModel]:
    """Both models with the same weights, passed by name."""
    theirs = randomize(TheirModel(tiny_config(shape, **changes)))
    ours = OurModel(tiny_config(shape, **changes)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def visible_logits(model, inputs: dict) -> torch.Tensor:
    return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("shape", whole_grid(SAMPLE))
def test_logits(shape: Shape) -> None:
    ours, theirs = pair(shape)
    inputs = random_inputs(ours.config)
    with torch.no_grad():
        assert relative_error(visible_logits(ours, inputs), visible_logits(theirs, inputs)) < TOLERANCE


@pytest.mark.parametrize("shape", whole_grid(SAMPLE))
def test_loss_and_gradients(shape: Shape) -> None:
    ours, theirs = pair(shape)
    inputs = random_inputs(ours.config)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[0, 4:6] = -100
    our_loss = ours(**inputs, labels=labels).loss
    their_loss = loss_by_hand(theirs(**inputs).logits, labels)
    if shape.additional_vocab_size == 0:  # where transformers' own loss works, it is the measure
        assert torch.allclose(theirs(**inputs, labels=labels).loss, their_loss, rtol=1e-6)
    assert relative_error(our_loss, their_loss) < TOLERANCE
    our_loss.backward()
    their_loss.backward()
    theirs_by_name = dict(theirs.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters() if p.grad is not None)
    for name, parameter in ours.named_parameters():
        reference = theirs_by_name[name].grad
        if reference is None:  # the pooled vector's norm takes no part
            assert parameter.grad is None, name
            continue
        assert float((parameter.grad - reference).abs().max()) < TOLERANCE * largest, name


def loss_by_hand(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean of −log p(next token) over the tokens that count, written out."""
    log_probabilities = logits[:, :-1].log_softmax(dim=-1)
    target = labels[:, 1:]
    counted = target != -100
    chosen = log_probabilities.gather(-1, target.masked_fill(~counted, 0).unsqueeze(-1)).squeeze(-1)
    return -(chosen * counted).sum() / counted.sum()


@pytest.mark.parametrize(("num_beams", "use_cache"), [(1, True), (3, True), (5, True), (3, False)])
@pytest.mark.parametrize("shape", whole_grid(SAMPLE[:4]))
def test_generate(shape: Shape, num_beams: int, use_cache: bool) -> None:
    ours, theirs = pair(shape)
    inputs = random_inputs(ours.config)
    settings = {"num_beams": num_beams, "max_new_tokens": 12, "do_sample": False, "use_cache": use_cache}
    settings["eos_token_id"] = [5, 9]
    assert torch.equal(ours.generate(**inputs, **settings), theirs.generate(**inputs, **settings))


@pytest.mark.parametrize("shape", whole_grid(SAMPLE[:3]))
def test_files_pass_both_ways(shape: Shape, tmp_path: Path) -> None:
    ours, theirs = pair(shape)
    inputs = random_inputs(ours.config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", max_shard_size="40KB")
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists(), "this is to be read from shards"
    with torch.no_grad():
        expected = visible_logits(theirs, inputs)
        read_by_us = OurModel.from_pretrained(tmp_path / "theirs").eval()
        read_by_them = TheirModel.from_pretrained(tmp_path / "ours").eval()
        assert torch.equal(visible_logits(read_by_them, inputs), expected)
        assert relative_error(visible_logits(read_by_us, inputs), expected) < TOLERANCE
    assert read_by_us.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("additional_vocab_size", [0, 2])
def test_tied_heads(additional_vocab_size: int, tmp_path: Path) -> None:
    shape = Shape(additional_vocab_size=additional_vocab_size)
    theirs = TheirModel(tiny_config(shape, tie_word_embeddings=True))
    randomize(theirs).tie_weights()
    theirs.save_pretrained(tmp_path)
    ours = OurModel.from_pretrained(tmp_path).eval()
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    if additional_vocab_size:
        assert ours.lm_head.additional_fc.weight is ours.model.embed_tokens.additional_embedding.weight
    inputs = random_inputs(ours.config)
    with torch.no_grad():
        assert relative_error(visible_logits(ours, inputs), visible_logits(theirs, inputs)) < TOLERANCE


def test_larger_images_with_stretched_positions() -> None:
    ours, theirs = pair(Shape())
    inputs = random_inputs(ours.config)
    inputs["pixel_values"] = torch.nn.functional.interpolate(
        inputs["pixel_values"].flatten(0, 1), size=(42, 56), mode="bilinear"
    ).unflatten(0, (5, 4))
    with torch.no_grad():
        got = ours(**inputs, interpolate_pos_encoding=True).logits
        expected = theirs(**inputs, interpolate_pos_encoding=True).logits
    seen = inputs["attention_mask"].bool()
    assert relative_error(got[seen], expected[seen]) < TOLERANCE


@pytest.mark.parametrize("shape", [Shape(use_resampler=True), Shape(use_resampler=False)], ids=str)
def test_precomputed_images(shape: Shape) -> None:
    """The vision tower's output, and the resampler's, can be given in place of pixels."""
    ours, theirs = pair(shape)
    inputs = random_inputs(ours.config)
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        expected = visible_logits(theirs, {**inputs, "pixel_values": pixels})
        patches = ours.model.vision_model(pixels.flatten(0, 1)).last_hidden_state.unflatten(0, pixels.shape[:2])
        got = visible_logits(ours, {**inputs, "image_encoder_embeddings": patches})
        assert relative_error(got, expected) < TOLERANCE
        if shape.use_resampler:
            latents = ours.model.encode_images(pixel_values=pixels)
            assert (
                relative_error(visible_logits(ours, {**inputs, "perceiver_embeddings": latents}), expected) < TOLERANCE
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """In half precision the two differ by rounding only."""
    ours, theirs = pair(Shape())
    inputs = random_inputs(ours.config)
    with torch.no_grad():
        exact = visible_logits(theirs, inputs)
        got = visible_logits(ours.to(dtype), inputs).float()
        expected = visible_logits(theirs.to(dtype), inputs).float()
    assert relative_error(got, exact) < 2 * relative_error(expected, exact) + 1e-4
