"""Options from a TOML file and from IDEFICS_... variables: what wins over what, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FakeCaptioner, rows_of
from typer.testing import Result

Run = Callable[..., Result]


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    def written(text: str) -> Path:
        (tmp_path / "run.toml").write_text(text)
        return tmp_path / "run.toml"

    return written


def decoding_of(run: Run, *arguments: str | Path) -> dict[str, object]:
    captioner = FakeCaptioner()
    result = run(*arguments, captioner=captioner)
    assert result.exit_code in (0, 3), result.stderr
    return captioner.decoding


def test_what_wins(run: Run, photos: Path, config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line, then the environment, then the command's table, then the file's top, then the default."""
    file = config("num-beams = 5\ntop_k = 5\nmax-new-tokens = 5\n[caption]\nnum_beams = 4\n--max-new-tokens = 4")
    command = "caption", photos, "--config", file, "--do-sample"
    assert [decoding_of(run, *command)[name] for name in ("num_beams", "max_new_tokens", "top_k")] == [4, 4, 5]
    monkeypatch.setenv("IDEFICS_NUM_BEAMS", "3")
    assert [decoding_of(run, *command)[name] for name in ("num_beams", "max_new_tokens")] == [3, 4]
    assert decoding_of(run, *command, "--num-beams", "2")["num_beams"] == 2
    monkeypatch.setenv("IDEFICS_CONFIG", str(file))
    assert decoding_of(run, *command[:2], "--do-sample")["top_k"] == 5


def test_switches_lists_and_words(run: Run, photos: Path, config: Callable[[str], Path]) -> None:
    file = config('recursive = false\nbare = true\n[vqa]\nquestion = ["What?", "Where?"]\nstop-words = ["a", "b"]')

    def ids(*arguments: str) -> list[str]:
        return [row["id"] for row in rows_of(run("vqa", photos, "--config", file, *arguments).stdout)]

    assert ids("--limit", "2") == ["a.jpg#1", "a.jpg#2", "b.png#1", "b.png#2"]
    assert "sub/a.png#1" not in ids() and "sub/a.png#1" in ids("--recursive")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num-bems = 3", "no command takes num-bems: the nearest is num-beams."),
        ("[caption]\nnum-bems = 3", "[caption] does not take num-bems: the nearest is num-beams."),
        ("[caption]\nquestion = 'a'", "[caption] does not take question: leave it out."),
        ("[capton]", "no command is called [capton]: the nearest is [caption]."),
        ("num-beams = 'three'", "num-beams is 'three': "),
        ("num-beams = true", "num-beams takes N, not true."),
        ("num-beams = 0", "num-beams is 0: "),
        ("num-beams = 1\nnum_beams = 2", "num-beams and num_beams are one option: keep one of them."),
        ("format = 'csv'", "format is 'csv': 'csv' is not one of 'auto', 'jsonl', 'parquet'."),
        ("num-beams = {}", "no command is called [num-beams]"),
        ("dtype = 'int3'", "dtype is 'int3': 'int3' is not one of 'auto', "),
        ("bare = 'yes'", "bare is a switch: write true or false, not 'yes'."),
        ("keep = ['a,b', 'c']", "keep has a comma within a word: write all as one text"),
        ("batch-size = 'all'", "--batch-size: invalid batch size 'all'"),
        ("= 3", "is not valid TOML: "),
    ],
)
def test_what_a_file_may_not_hold(
    refused: Callable[..., str], photos: Path, config: Callable[[str], Path], text: str, said: str
) -> None:
    assert said in refused("caption", photos, "--config", config(text))


def test_a_file_that_is_not_there(refused: Callable[..., str], photos: Path, tmp_path: Path) -> None:
    assert "run.toml cannot be read: No such file" in refused("caption", photos, "--config", tmp_path / "run.toml")


def test_variables(run: Run, refused: Callable[..., str], photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is for other commands is not for this one; one for none is told of."""
    for name, value in ("QUESTION", "What?\nWhere is it?"), ("BARE", "yes"), ("LIMIT", "1"), ("THUMBNAIL", "16"):
        monkeypatch.setenv(f"IDEFICS_{name}", value)
    assert [row["question"] for row in rows_of(run("vqa", photos).stdout)] == ["What?", "Where is it?"]
    assert not run("caption", photos).stderr.startswith("IDEFICS")
    monkeypatch.setenv("IDEFICS_NUM_BEAM", "1")
    told = "IDEFICS_NUM_BEAM is ignored: no command takes it; the nearest is IDEFICS_NUM_BEAMS."
    monkeypatch.setenv("IDEFICS_FOO", "1")
    said = run("caption", photos).stderr.splitlines()
    assert said[:2] == ["IDEFICS_FOO is ignored: no command takes it.", told]
    monkeypatch.delenv("IDEFICS_FOO")
    monkeypatch.setenv("IDEFICS_BARE", "perhaps")
    assert "IDEFICS_BARE is a switch: set it to 1 or 0, not 'perhaps'" in refused("caption", photos)
    monkeypatch.setenv("IDEFICS_BARE", "0")
    monkeypatch.setenv("IDEFICS_LIMIT", "many")
    assert "IDEFICS_LIMIT is 'many': " in refused("caption", photos)
