from __future__ import annotations

import pytest

from idefics_cli.errors import (
    ROW_ERROR_CODES,
    CheckpointError,
    DeviceError,
    IdeficsError,
    InputError,
    OutputError,
    RowError,
)


@pytest.mark.parametrize("kind", [IdeficsError, CheckpointError, DeviceError, InputError, OutputError])
def test_a_mistake_is_one_line(kind: type[IdeficsError]) -> None:
    error = kind("no such folder:\n  photos;\r\n check the path")
    assert str(error) == "no such folder: photos; check the path"
    assert isinstance(error, IdeficsError)


@pytest.mark.parametrize("code", ROW_ERROR_CODES)
def test_a_row_error_reads_code_and_message(code: str) -> None:
    assert str(RowError(code, "it\nwent\twrong")) == f"{code}: it went wrong"


def test_row_errors_are_values() -> None:
    assert RowError("image_missing", "x") == RowError("image_missing", "x")
    with pytest.raises(AssertionError, match="image_lost"):
        RowError("image_lost", "x")
