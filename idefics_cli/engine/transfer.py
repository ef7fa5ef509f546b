"""From the host to the device. Knows tensors only."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The host's tensor on the device. To CUDA it goes through pinned memory of its own, and the host does not wait."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def send_ids(ids: object, device: torch.device | str) -> Tensor:
    """Whole numbers, in lists of one length, as an int64 tensor."""
    return send(torch.tensor(ids, dtype=torch.long), device)
