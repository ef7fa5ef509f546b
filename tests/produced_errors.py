"""Every message that users can get is produced by a test: those that were are recorded, and a whole run of the suite
names those that were not, and fails where REQUIRE_MESSAGES is set.

`conftest.py` takes the two hooks. What processes of their own have raised is not seen here, so such a message has a
test in this process as well.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import idefics_cli
from idefics_cli.errors import IdeficsError, RowError
from tools.docs.errors import Site, catalogue

PACKAGE = str(Path(idefics_cli.__file__).parent)
produced: defaultdict[str, set[int]] = defaultdict(set)


def pytest_configure() -> None:
    check = RowError.__post_init__

    def made(cls: type[IdeficsError], *arguments: Any, **keywords: Any) -> IdeficsError:
        remember(sys._getframe(1))
        return Exception.__new__(cls, *arguments)

    def checked(self: RowError) -> None:
        remember(sys._getframe(2))
        check(self)

    IdeficsError.__new__ = made  # type: ignore[assignment]
    RowError.__post_init__ = checked  # type: ignore[method-assign]


def remember(frame: FrameType | None) -> None:
    """The line, in the package, that has made an error, or has asked `require` for it."""
    while frame is not None and frame.f_code.co_name == "require":
        frame = frame.f_back
    if frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        produced[frame.f_code.co_filename.removeprefix(f"{PACKAGE}/")].add(frame.f_lineno)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """One of xdist's processes has ended."""
    for file, lines in getattr(node, "workeroutput", {}).get("produced", {}).items():
        produced[file].update(lines)


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["produced"] = {file: sorted(lines) for file, lines in produced.items()}
        return
    has_ended = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if is_whole(config) and has_ended and (missing := never_produced()):
        if os.environ.get("REQUIRE_MESSAGES"):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        lines = [f"{site.file}:{site.first}: {site.kind}: {site.message}" for site in missing]
        print("\nMessages that no test produces:", *lines, sep="\n")


def is_whole(config: pytest.Config) -> bool:
    """Whether the usual tests run, and all of them."""
    told = config.option
    is_usual = config.args_source == config.ArgsSource.TESTPATHS and told.markexpr == "not slow and not grid"
    return is_usual and not (told.keyword or told.collectonly or getattr(told, "lf", False))


def never_produced() -> list[Site]:
    return [site for site in catalogue() if not produced[site.file].intersection(range(site.first, site.last + 1))]
