"""What one benchmark measures. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from idefics_cli.engine.options import DecodingOptions
from idefics_cli.errors import IdeficsError

if TYPE_CHECKING:
    from idefics_cli.checkpoint import ModelRequest

SIZES = ("tiny", "mid", "9b")  # of models with random weights


@dataclass(frozen=True)
class BenchOptions:
    """One benchmark of the request's model, or of random weights of the size that `random` names.

    `rows` None is one batch, `threads` None is torch's own choice. `fixed_length`: no text ends before
    `decoding.max_new_tokens`. `embeddings`: our engine gets the images' latents instead of the images.
    """

    request: ModelRequest
    random: str | None = None
    rows: int | None = None
    shots: int = 0
    questions_per_image: int = 1
    batch_size: int = 8
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    fixed_length: bool = True
    embeddings: bool = False
    repeats: int = 3
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.random is not None and self.random not in SIZES:
            raise IdeficsError(f"unknown random model {self.random!r}: use {', '.join(SIZES)}")

    @property
    def num_rows(self) -> int:
        return self.rows or self.batch_size

    @property
    def num_images(self) -> int:
        """Images asked about, not counting shots."""
        return -(-self.num_rows // self.questions_per_image)

    @property
    def texts(self) -> DecodingOptions:
        """How texts are decoded, with the fixed length."""
        return (
            replace(self.decoding, min_new_tokens=self.decoding.max_new_tokens) if self.fixed_length else self.decoding
        )
