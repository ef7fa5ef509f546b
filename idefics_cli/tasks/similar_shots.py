"""Shots that are like the row they stand before (RICES): those whose images the model itself sees as most alike.

Retrieval-based in-context example selection: Yang et al. 2022, section 3.2; Alayrac et al. 2022, appendix A.2. A shot
with an image of the row itself would give its answer away, and is passed over. The pool is seen once; its vectors are
kept for later runs with the same model and the same files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idefics_cli.errors import InputError
from idefics_cli.pipeline.earlier import image_identity
from idefics_cli.prompts.templates import Shot
from idefics_cli.rows import RemoteFile
from idefics_cli.storage.once_per_machine import cache_folder
from idefics_cli.tasks.options import ShotOptions
from idefics_cli.writers.formats import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from idefics_cli.engine.prompt_source import EncodedImage
    from idefics_cli.loaded_model import LoadedModel

OPENED_AT_A_TIME = 64
OPENED_KEPT = 512  # shots whose images stay open, to be shown again
OPENERS = 8
ALIKE = 0.99  # less like each other than this are no two looks at one image, whatever rounding does
SAME_LATENTS = 0.9999  # of a row that comes as latents no pixels are known to compare


class SimilarShots:
    """A pool of shots, to be asked in the model's thread. Raises InputError for a shot without an image.

    The model looks at the pool here, where no earlier run has. `open_shot` gives the shot with its images opened; it is
    called from several threads at once.
    """

    def __init__(
        self,
        options: ShotOptions,
        pool: Sequence[Shot],
        model: LoadedModel,
        open_shot: Callable[[Shot], Shot],
        say: Callable[[str], None],
    ) -> None:
        self._options, self._pool, self._model = options, pool, model
        without = next((number for number, shot in enumerate(pool, start=1) if not shot.images), None)
        if without is not None:
            raise InputError(f"row {without} of {options.place} has no image: choose --shot-selection first or random")
        self._opened = lru_cache(OPENED_KEPT)(lambda index: open_shot(pool[index]))
        if options.file is None:
            self._vectors = self._encoded()
            return
        kept = _kept_vectors(pool, model.fingerprint)
        vectors = _read_vectors(kept, len(pool))
        if vectors is None:
            say(f"Looking at {len(pool)} shots once.")
            vectors = self._encoded()
            _write_vectors(kept, vectors)
        self._vectors = vectors

    def shots_for(self, rows: Sequence[Sequence[EncodedImage]]) -> list[list[Shot]]:
        """For the images of each row its shots, the nearest last."""
        chosen = [
            nearest(vector, self._vectors, self._options.number, partial(self._is_own, images))
            for vector, images in zip(self._row_vectors(rows), rows, strict=True)
        ]
        self._open({index for indices in chosen for index in indices})
        return [[self._opened(index) for index in indices] for indices in chosen]

    def _is_own(self, images: Sequence[EncodedImage], index: int, likeness: float) -> bool:
        """Whether the shot shows one of the row's `images`."""
        if self._options.allow_self or likeness < ALIKE:
            return False
        shown = {key for image in self._opened(index).images for key in image.image_keys}
        are_latents = any(image.pixels[0].ndim == 2 for image in images)
        return any(shown.intersection(image.image_keys) for image in images) or (
            are_latents and likeness > SAME_LATENTS
        )

    def _encoded(self) -> Tensor:
        import torch

        vectors = []
        for first in range(0, len(self._pool), OPENED_AT_A_TIME):
            indices = range(first, min(first + OPENED_AT_A_TIME, len(self._pool)))
            self._open(indices)
            vectors.append(self._row_vectors([self._opened(index).images for index in indices]))
        return torch.cat(vectors)

    def _open(self, indices: Sequence[int] | set[int]) -> None:
        """Several at a time; what has been opened is at hand afterwards."""
        with ThreadPoolExecutor(OPENERS) as openers:
            list(openers.map(self._opened, indices))

    def _row_vectors(self, rows: Sequence[Sequence[Any]]) -> Tensor:
        """(rows, dim): of several images the mean."""
        import torch

        vectors = iter(self._model.image_vectors([image for images in rows for image in images]).float().cpu())
        return torch.stack([torch.stack([next(vectors) for _ in images]).mean(dim=0) for images in rows])


def nearest(
    query: Tensor, pool: Tensor, number: int, is_own: Callable[[int, float], bool] = lambda index, likeness: False
) -> list[int]:
    """Of `pool` (shots, dim) the indices of those most like `query` (dim,), by cosine, the nearest last.

    Those that `is_own`, told index and likeness, are passed over.
    """
    import torch

    likeness = torch.nn.functional.cosine_similarity(pool, query.unsqueeze(0), dim=-1)
    values, indices = torch.sort(likeness, descending=True, stable=True)
    parts = zip(indices.split(OPENED_AT_A_TIME), values.split(OPENED_AT_A_TIME), strict=True)
    ranked = (each for part in parts for each in zip(*(one.tolist() for one in part), strict=True))
    return list(islice((index for index, value in ranked if not is_own(index, value)), number))[::-1]


# ---- vectors of earlier runs


def _kept_vectors(pool: Sequence[Shot], fingerprint: str) -> Path:
    """The file for this pool as this model sees it: another once an image or the model has changed."""
    digest = hashlib.sha256(fingerprint.encode())
    for shot in pool:
        digest.update(b"\0shot")
        for source in shot.images:
            name = "" if isinstance(source, bytes) else getattr(source, "path", source)
            is_remote = isinstance(source, RemoteFile)  # to ask for more than its address takes a round trip for each
            digest.update(b"\0%s\0%s" % (os.fsencode(name), b"" if is_remote else image_identity(source)))
    return cache_folder() / "shots" / f"{digest.hexdigest()}.npy"


def _read_vectors(path: Path, number: int) -> Tensor | None:
    """None if the file is missing or damaged."""
    import numpy as np
    import torch

    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # it is made again
        return None
    return torch.from_numpy(vectors) if vectors.ndim == 2 and len(vectors) == number else None


def _write_vectors(path: Path, vectors: Tensor) -> None:
    """A place that cannot be written only costs the next run the same work."""
    import numpy as np

    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.save(file, vectors.numpy())
