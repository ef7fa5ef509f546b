"""Latents in place of images: the same answers without the vision tower, and whose latents they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import IMAGE_SIZE, Shape, randomize, save_checkpoint, tiny_config

from idefics_cli import Idefics, IdeficsError, RowError
from idefics_cli.checkpoint.fingerprint import known_vision_fingerprint
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.engine.memory_budget import AdaptiveBatchSize
from idefics_cli.engine.prompt_source import IterableSource
from idefics_cli.model.modeling import IdeficsForVisionText2Text


def load(folder: Path) -> Idefics:
    return Idefics.from_pretrained(folder, batch_size=3, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=[True, False], ids=["resampler", "patches"])
def base(folder: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Idefics:
    if request.param:
        return load(folder)
    other = save_checkpoint(tmp_path_factory.mktemp("patches"))
    config = json.loads((other / "config.json").read_text())
    shape = Shape(use_resampler=False)
    randomize(IdeficsForVisionText2Text(tiny_config(shape, vocab_size=config["vocab_size"]))).save_pretrained(other)
    return load(other)


def image(seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (30, 40, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@contextmanager
def counted_images(model: Idefics) -> Iterator[list[int]]:
    """How many images each call of the vision tower has seen."""
    counts: list[int] = []
    hook = model.model.model.vision_model.register_forward_hook(
        lambda module, args, output: counts.append(args[0].shape[0])
    )
    try:
        yield counts
    finally:
        hook.remove()


def test_answers_from_latents_are_those_from_images_and_the_vision_tower_rests(base: Idefics) -> None:
    base.engine.clear_caches()
    images = [image(seed) for seed in range(5)]
    asked = [(each, f"what is this? {number}") for number, each in enumerate(images)]
    expected = base.answer(asked, max_new_tokens=6)
    with counted_images(base) as counts:
        latents = base.embed(images)
        assert counts == [], "the engine knows these images"
        base.engine.clear_caches()
        assert torch.allclose(base.embed(images), latents, atol=1e-5)
        assert counts == [3, 2]
        base.engine.clear_caches()
        given = zip(latents, [question for _, question in asked], strict=True)
        answers = base.answer(given, max_new_tokens=6)
        assert counts == [3, 2], "no image was seen for latents"
    assert [result.token_ids for result in answers] == [result.token_ids for result in expected]
    assert [result.score for result in answers] == pytest.approx([result.score for result in expected], abs=1e-4)


def test_images_and_latents_stand_in_one_prompt(base: Idefics) -> None:
    one, other = image(1), image(2)
    latents = base.embed([one])[0]
    (expected,) = base.generate([["a", one, "b", other, "c"]], max_new_tokens=5)
    (got,) = base.generate([["a", latents, "b", other, "c"]], max_new_tokens=5)
    assert got.token_ids == expected.token_ids
    scored = [base.score([(["a", first, "b"], ["yes", "no"])])[0] for first in (one, latents)]
    assert scored[0].score == pytest.approx(scored[1].score, abs=1e-4)


def test_an_image_is_embedded_once_and_stands_wherever_it_was(base: Idefics) -> None:
    base.engine.clear_caches()
    seeds = [1, 2, 1, 3, 2, 1, 4]
    with counted_images(base) as counts:
        latents = base.embed([image(seed) for seed in seeds])
    assert sum(counts) == 4
    assert latents.shape == (7, *base.latents_shape)
    for row, seed in zip(latents, seeds, strict=True):
        base.engine.clear_caches()
        assert torch.allclose(row, base.embed([image(seed)])[0], atol=1e-5)


def test_latents_are_what_the_network_makes_of_pixels(base: Idefics) -> None:
    pixels = base.prepare_image(image(6))
    with torch.no_grad():
        expected = base.model.model.encode_images(pixel_values=pixels[None, None])[0, 0]
    assert torch.allclose(base.embed([image(6)])[0], expected, atol=1e-5)
    assert torch.allclose(base.image_vectors([image(6)])[0], expected.mean(dim=0), atol=1e-5)
    assert base.embed([]).shape == (0, *base.latents_shape)


def test_an_image_that_does_not_fit_alone_is_an_error_among_others(
    base: Idefics, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, wrong, sizes = base.model.model.encode_images, base.prepare_image(image(3)), []

    monkeypatch.setattr(base.engine, "image_batch_size", AdaptiveBatchSize(16))

    def scarce(pixel_values):
        sizes.append(len(pixel_values))
        if any(torch.equal(each, wrong) for each in pixel_values[:, 0]):
            raise torch.OutOfMemoryError("no more")
        return encode(pixel_values=pixel_values)

    base.engine.clear_caches()
    monkeypatch.setattr(base.model.model, "encode_images", scarce)
    source = IterableSource([base.encode_image(image(seed)) for seed in range(6)])
    found = list(base.embed_stream(source))
    assert [number for number, _ in found] == list(range(6))
    codes = [each.code if isinstance(each, RowError) else None for _, each in found]
    assert codes == [*[None] * 3, "out_of_memory", *[None] * 2]
    assert sizes[0] == 3 and sizes[-1] == 2, "the others are seen together, before and after it"


def test_an_image_whose_numbers_overflow_is_an_error_among_others(
    base: Idefics, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, wrong = base.model.model.encode_images, base.prepare_image(image(4))

    def overflowing(pixel_values):
        spoilt = torch.tensor([torch.equal(each, wrong) for each in pixel_values[:, 0]])
        return encode(pixel_values=pixel_values).masked_fill(spoilt[:, None, None, None], torch.nan)

    base.engine.clear_caches()
    monkeypatch.setattr(base.model.model, "encode_images", overflowing)
    source = IterableSource([base.encode_image(image(seed)) for seed in range(6)])
    found = list(base.embed_stream(source))
    assert [each.code if isinstance(each, RowError) else None for _, each in found] == [None] * 4 + ["overflow", None]
    vectors = base.image_vectors([image(3), image(4)])
    assert vectors[0].any() and not vectors[1].any()
    with pytest.raises(IdeficsError, match=r"an image cannot be embedded .*non-finite values .*in float32"):
        base.embed([image(4)])
    with pytest.raises(IdeficsError, match=r"^the model computes non-finite values .*in float32"):
        list(base.embed_stream(IterableSource([base.encode_image(image(4))] * 16)))
    base.engine.clear_caches()


def test_mistakes_are_told_in_one_line(base: Idefics, tmp_path: Path) -> None:
    with pytest.raises(IdeficsError, match=r"shape \(3, 4\).*as from embed"):
        base.caption([torch.zeros(3, 4)])
    with pytest.raises(IdeficsError, match="image_missing"):
        base.embed([image(), tmp_path / "gone.png"])
    assert isinstance(base.encode_image(tmp_path / "gone.png"), RowError)


def fingerprint(folder: Path) -> str:
    known = known_vision_fingerprint(ModelRequest(str(folder)))
    assert known is not None
    return known


def test_the_fingerprint_is_that_of_the_vision_side(folder: Path, tmp_path: Path) -> None:
    """Not of the name, the shards or the language side; but of each setting that latents depend on."""
    model = load(folder)
    assert model.fingerprint == fingerprint(folder)
    sharded = save_checkpoint(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert fingerprint(sharded) == model.fingerprint
    with torch.no_grad():
        model.model.lm_head.weight.add_(1)
        model.model.save_pretrained(sharded)
        assert fingerprint(sharded) == model.fingerprint
        model.model.model.vision_model.encoder.layers[1].mlp.fc2.bias.add_(1e-6)
    model.model.save_pretrained(sharded)
    assert fingerprint(sharded) != model.fingerprint


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("preprocessor_config.json", {"image_size": IMAGE_SIZE, "image_mean": [0.5, 0.5, 0.5]}),
        ("config.json", {"perceiver_config": {"resampler_n_heads": 4}}),
        ("config.json", {"vision_config": {"layer_norm_eps": 0.01}}),
    ],
)
def test_settings_are_part_of_the_fingerprint(folder: Path, tmp_path: Path, file: str, change: dict) -> None:
    other = save_checkpoint(tmp_path / "other")
    assert fingerprint(other) == fingerprint(folder)
    known = json.loads((other / file).read_text())
    for name, value in change.items():
        known[name] = {**known[name], **value} if isinstance(value, dict) else value
    (other / file).write_text(json.dumps(known))
    assert fingerprint(other) != fingerprint(folder)
