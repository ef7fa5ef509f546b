"""Rows as one batch for transformers' `generate`; `parity/` compares the tensors with those of its processor."""

from __future__ import annotations

import pytest
import torch
from prompts_for_tests import FAKE_ID, IMAGE_ID, IMAGES, VOCABULARY

from idefics_cli.engine.prompt_source import EncodedPrompt
from idefics_cli.engine.reference import collate


def test_a_batch_is_padded_on_the_left() -> None:
    rows = [
        EncodedPrompt([1, FAKE_ID, IMAGE_ID, FAKE_ID, IMAGE_ID, FAKE_ID, 5], (IMAGES[0], IMAGES[1])),
        EncodedPrompt([1, 5]),
        EncodedPrompt([1, FAKE_ID, IMAGE_ID, FAKE_ID], (IMAGES[2],)),
    ]
    batch = collate(rows, VOCABULARY, image_size=IMAGES.shape[-1])
    assert batch["input_ids"].tolist() == [[0] * (7 - len(row.input_ids)) + row.input_ids for row in rows]
    assert batch["attention_mask"].tolist() == [[0] * (7 - length) + [1] * length for length in (7, 2, 4)]
    assert batch["image_attention_mask"].shape == (3, 7, 2)
    assert torch.equal(batch["pixel_values"][0], IMAGES[:2]) and torch.equal(batch["pixel_values"][2, 0], IMAGES[2])
    assert batch["pixel_values"][1].count_nonzero() == batch["pixel_values"][2, 1].count_nonzero() == 0


def test_images_and_image_tokens_have_to_agree() -> None:
    with pytest.raises(AssertionError, match="1 image tokens for 0 images"):
        collate([EncodedPrompt([1, IMAGE_ID])], VOCABULARY, image_size=8)
