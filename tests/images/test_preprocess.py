"""What a checkpoint says of its images; their pixels are tested beside transformers in `parity/`."""

from __future__ import annotations

import json

import pytest

from idefics_cli.errors import CheckpointError
from idefics_cli.images.preprocess import ImageProcessor

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
    "absent": (None, 224),
}


@pytest.mark.parametrize(("config", "size"), CONFIGS.values(), ids=CONFIGS)
def test_configs(tmp_path, config, size):
    if config is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert ImageProcessor.from_pretrained(tmp_path) == ImageProcessor(image_size=size)


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
