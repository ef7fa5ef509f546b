"""Which image a token sees, beside the rule written token by token."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.model.kv_interface import image_attention_mask

IMAGE_ID, EOS_ID = 9, 2


def slow_mask(row: list[int], num_images: int) -> list[list[int]]:
    """What the mask means, token by token."""
    rows, seen, ended = [], -1, False
    for token in row:
        if token == IMAGE_ID:
            seen, ended = seen + 1, False
        visible = seen if not ended else -1
        rows.append([int(visible == image) for image in range(num_images)])
        ended = ended or token == EOS_ID
    return rows


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0, EOS_ID, IMAGE_ID, IMAGE_ID, 5, 6]), min_size=1, max_size=20), st.integers(1, 4))
def test_each_token_sees_the_last_image(row, num_images):
    mask = image_attention_mask(torch.tensor([row, row[::-1]]), num_images, IMAGE_ID, EOS_ID)
    assert mask.tolist() == [slow_mask(row, num_images), slow_mask(row[::-1], num_images)]


def test_mask_by_hand():
    row = [5, IMAGE_ID, 5, IMAGE_ID, EOS_ID, 5, IMAGE_ID, 5]
    mask = image_attention_mask(torch.tensor([row]), 3, IMAGE_ID, EOS_ID)
    assert mask.shape == (1, 8, 3)
    assert [[i for i in range(3) if seen[i]] for seen in mask[0].tolist()] == [[], [0], [0], [1], [1], [], [2], [2]]


def test_mask_of_no_tokens():
    assert image_attention_mask(torch.zeros(2, 0, dtype=torch.long), 3, IMAGE_ID, EOS_ID).shape == (2, 0, 3)
