from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from idefics_cli.storage import once_per_machine as module
from idefics_cli.storage.once_per_machine import cache_folder, once_per_machine


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_only_the_first_measures() -> None:
    assert once_per_machine("a", lambda: 1.5) == once_per_machine("a", lambda: 2.5) == 1.5
    assert once_per_machine("b", lambda: [1, 2]) == [1, 2]


def test_a_user_without_a_home_measures_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a number that no user has, without $HOME
    monkeypatch.chdir(tmp_path)
    assert [once_per_machine("a", lambda: 1.5), once_per_machine("a", lambda: 2.5)] == [1.5, 2.5]
    assert not list(tmp_path.iterdir())


def test_another_processor_measures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    once_per_machine("a", lambda: 1.5)
    monkeypatch.setattr(module, "_processor", lambda: "another")
    assert once_per_machine("a", lambda: 2.5) == 2.5


def test_those_that_measure_at_the_same_time_agree() -> None:
    together, found = threading.Barrier(4), []

    def measure(value: float) -> float:
        together.wait(30)
        return value

    threads = [
        threading.Thread(target=lambda value=value: found.append(once_per_machine("a", lambda: measure(value))))
        for value in (1.0, 2.0, 3.0, 4.0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert [path.suffix for path in (cache_folder() / "measured").iterdir()] == [".json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_damaged_file_is_measured_again(content: bytes) -> None:
    once_per_machine("a", lambda: 1.5)
    (path,) = (cache_folder() / "measured").iterdir()
    path.write_bytes(content)
    assert once_per_machine("a", lambda: 2.5) == once_per_machine("a", lambda: 3.5) == 2.5


def test_a_place_that_cannot_be_written_costs_only_the_time(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert once_per_machine("a", lambda: 1.5) == 1.5
