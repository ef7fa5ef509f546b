"""The page that says what is promised names the tests that show it."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "docs" / "reliability.md"


def test_every_test_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    written = {
        name for path in TESTS.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert named and named <= written, named - written


def test_the_page_names_every_test_of_a_fault_that_stops_a_run() -> None:
    named = PAGE.read_text()
    written = {
        name
        for path in ("test_kills.py", "test_disks.py", "test_damage.py", "test_stops.py")
        for name in re.findall(r"^def (test_\w+)", Path(__file__).with_name(path).read_text(), re.M)
    }
    assert all(f"`{name}`" in named for name in written), written
