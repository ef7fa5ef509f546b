"""Pixels on their own; beside transformers they stand in `parity/`."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from idefics_cli.errors import CheckpointError, RowError
from idefics_cli.images.preprocess import ImageProcessor


def test_pixels_by_hand():
    processor = ImageProcessor(image_size=4)
    pixels = processor.prepare(Image.new("RGB", (9, 2), (255, 0, 128)))
    assert pixels.shape == (3, 4, 4)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    for channel, value in enumerate((1, 0, 128 / 255)):
        expected = (value - processor.image_mean[channel]) / processor.image_std[channel]
        assert pixels[channel].min().item() == pixels[channel].max().item() == pytest.approx(expected, rel=1e-6)


def test_a_bad_image_is_a_value(tmp_path):
    assert ImageProcessor().prepare(tmp_path / "none.png").code == "image_missing"
    assert isinstance(ImageProcessor().prepare(b"no image"), RowError)


def test_pixels_are_made_from_rgb():
    with pytest.raises(AssertionError, match="CMYK"):
        ImageProcessor().array(Image.new("CMYK", (2, 2)))


CONFIGS = {
    "published in 2023": (
        {"image_size": 224, "image_num_channels": 3, "image_processor_type": "IdeficsImageProcessor"},
        224,
    ),
    "of today": (
        {"size": {"height": 64, "width": 64}, "resample": 3, "do_resize": True, "rescale_factor": 1 / 255},
        64,
    ),
    "both": ({"image_size": 32, "size": {"height": 32, "width": 32}}, 32),
    "empty": ({}, 224),
}


@pytest.mark.parametrize(("config", "size"), CONFIGS.values(), ids=CONFIGS)
def test_configs(tmp_path, config, size):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert ImageProcessor.from_pretrained(tmp_path) == ImageProcessor(image_size=size)


def test_no_config_means_the_published_values(tmp_path):
    assert ImageProcessor.from_pretrained(tmp_path) == ImageProcessor()


BROKEN_CONFIGS = {
    "not JSON": "{",
    "not an object": "[1]",
    "not UTF-8": b"\xff\xfe\x00",
    "not square": '{"size": {"height": 1, "width": 2}}',
    "by the shortest edge": '{"size": {"shortest_edge": 224}}',
    "size as text": '{"image_size": "large"}',
    "another resampling": '{"resample": 2}',
    "a crop": '{"do_center_crop": true}',
    "two means": '{"image_mean": [0.1, 0.2]}',
    "no size at all": '{"image_size": -3}',
    "a zero deviation": '{"image_std": [0.1, 0, 0.2]}',
    "an endless size": '{"image_size": Infinity}',
    "nested without end": "[" * 100_000,
}


@pytest.mark.parametrize("text", BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS)
def test_a_config_that_cannot_be_used_is_one_line_with_its_path(tmp_path, text):
    path = tmp_path / "preprocessor_config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json") as caught:
        ImageProcessor.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
