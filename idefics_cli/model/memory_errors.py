"""Out of memory by one name: torch.OutOfMemoryError, whichever allocator or library has run out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What other errors say where memory has ended: on the CPU (POSIX, Windows), on MPS, in CUDA's libraries.
NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its workspace is made when it is first used
    "CUDNN_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


@contextmanager
def naming_memory_errors() -> Iterator[None]:
    """Raise torch.OutOfMemoryError, as torch's allocator on CUDA does by itself, wherever memory has ended."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(told in str(error) for told in NO_MEMORY):
            raise
        raise torch.OutOfMemoryError(str(error)) from None
