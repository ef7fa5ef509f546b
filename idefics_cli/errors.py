"""The two failures that are not bugs.

An `IdeficsError` is the user's mistake: it ends the run, and its one line says what is wrong and how to fix it.
A `RowError` is a bad row: a value that travels with the row and never stops the run.
Our own mistakes are assertions and have no class here. This module imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ROW_ERROR_CODES = (
    "image_missing",
    "image_unreadable",
    "image_too_large",
    "image_not_allowed",
    "folder_unreadable",
    "storage_unavailable",
    "row_invalid",
    "duplicate_id",
    "prompt_too_long",
    "out_of_memory",
    "overflow",
    "process_died",
)


def one_line(text: str) -> str:
    """`text` with every run of white space, line breaks included, folded to one blank."""
    return " ".join(text.split())


class IdeficsError(Exception):
    """A user's mistake. `str(error)` is one line that names the remedy; the command line exits with 2."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class InputError(IdeficsError):
    """The inputs that were named cannot be read, or two of them collide."""


class OutputError(IdeficsError):
    """The output that was named cannot be written."""


class CheckpointError(IdeficsError):
    """The model that was named cannot be found, trusted or loaded."""


class DeviceError(IdeficsError):
    """The device that was asked for is not available, or too small for the model."""


class StreamClosed(Exception):
    """Whatever reads stdout has had enough (`| head`): not a mistake, and nothing is left to do."""


@dataclass(frozen=True)
class RowError:
    """Why a row has no text. `str()` gives the `error` column: `code: message`, one line."""

    code: str
    message: str

    def __post_init__(self) -> None:
        assert self.code in ROW_ERROR_CODES, f"unknown row error code {self.code!r}"

    def __str__(self) -> str:
        return f"{self.code}: {one_line(self.message)}"


def first_error(values: Iterable[Any]) -> RowError | None:
    return next((value for value in values if isinstance(value, RowError)), None)
