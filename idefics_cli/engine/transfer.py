"""From the host to the device. Knows tensors only."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The host's tensor on the device. To CUDA it goes through pinned memory of its own, and the host does not wait."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def send_beside(tensor: Tensor, device: torch.device) -> Tensor:
    """`send` on a stream of its own: the copy does not wait for what the device has yet to compute."""
    if device.type != "cuda":
        return send(tensor, device)
    stream, now = copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        sent = send(tensor, device)
    now.wait_stream(stream)
    sent.record_stream(now)
    return sent


def pixel_values(images: Tensor, pixel_of_byte: Tensor) -> Tensor:
    """The pixels (images, 3, side, side) that bytes stand for by the table (3, 256)."""
    first = torch.arange(0, 768, 256, dtype=torch.int, device=images.device)[:, None, None]
    return pixel_of_byte.flatten()[images + first]


def send_ids(ids: object, device: torch.device | str) -> Tensor:
    """Whole numbers, in lists of one length, as an int64 tensor."""
    return send(torch.tensor(ids, dtype=torch.long), device)
