"""Captions for folders of images with IDEFICS.

`from idefics_cli import Idefics` is the Python API; the command line is `idefics`. Importing the package alone does not
import torch: `Idefics` is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from idefics_cli.errors import IdeficsError, RowError
from idefics_cli.prompts.templates import Shot
from idefics_cli.result import Candidate, Result

if TYPE_CHECKING:
    from idefics_cli.idefics import Idefics

__version__ = "0.1.0"
__all__ = ["Candidate", "Idefics", "IdeficsError", "Result", "RowError", "Shot", "__version__"]


def __getattr__(name: str) -> Any:
    if name != "Idefics":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from idefics_cli.checkpoint.quantize import silence

    silence()  # before transformers imports torchao
    from idefics_cli.idefics import Idefics

    return Idefics


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
