"""What shells complete, by the scripts that they are given and by asking as these ask."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from idefics_cli.cli.app import app
from idefics_cli.cli.completion import SHELLS
from idefics_cli.prompts.templates import TEMPLATES

ROOT = Path(__file__).parents[2]


def asked(shell: str, line: str) -> list[str]:
    """As the shell's script asks about the end of a line."""
    words = line.split(" ")
    environment = {"_IDEFICS_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line}
    environment |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    environment |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    result = CliRunner().invoke(app, [], env=environment, prog_name="idefics")
    assert result.exit_code == 0, result.output
    return [line for line in result.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("idefics capt", ["caption"]),
        ("idefics help sal", ["salvage"]),
        ("idefics caption --num-b", ["--num-beams"]),
        ("idefics caption --device-map ba", ["balanced"]),
        ("idefics caption --device c", ["cuda", "cpu"]),
        ("idefics caption --dtype fp", ["fp16", "fp32"]),
        ("idefics caption --batch-size a", ["auto"]),
        ("idefics caption --keep a", ["all"]),
        ("idefics vqa --format v", ["vqav2"]),
        ("idefics caption --format v", []),
        ("idefics vqa --template ", [*TEMPLATES]),
        ("idefics caption -m de", ["demo"]),
        ("idefics info HuggingFaceM4/idefics-9b-i", ["HuggingFaceM4/idefics-9b-instruct"]),
        ("idefics caption exam", []),  # names of files are the shell's own
        ("idefics caption -o o", []),
        ("idefics embed --num-b", []),
    ],
)
def test_what_is_completed(line: str, found: list[str]) -> None:
    assert asked("bash", line) == found


@pytest.mark.parametrize(
    "variable, hub", [("HF_HUB_CACHE", "."), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")]
)
def test_models_at_hand_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, hub: str) -> None:
    for name in "models--me--my-idefics-9b", "models--me--other", "datasets--me--idefics":
        (tmp_path / hub / name).mkdir(parents=True)
    for each in "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME":
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert asked("bash", "idefics caption -m me") == ["me/my-idefics-9b"]


def test_zsh_and_fish_show_what_options_are() -> None:
    about = "Spread the model over GPUs, CPU and disk"
    assert about in asked("zsh", "idefics caption --device-m")[0]
    assert asked("fish", "idefics caption --device-m")[0].startswith(f"--device-map\t{about}")


@pytest.fixture
def shell_home(tmp_path: Path) -> dict[str, str]:
    """`idefics` on the path of shells that are found by their names, and a home of their own."""
    for shell in SHELLS:
        (tmp_path / "bin").mkdir(exist_ok=True)
        shutil.copy(shutil.which(shell) or "/bin/bash", tmp_path / "bin" / shell)
    program = tmp_path / "bin" / "idefics"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m idefics_cli "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {**os.environ, "HOME": str(tmp_path), "PATH": path, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_shown_and_installed(shell_home: dict[str, str], shell: str) -> None:
    def said(command: str) -> str:
        words = [f"{shell_home['HOME']}/bin/{shell}", "-c", f"{command}; true"]
        done = subprocess.run(words, env=shell_home, capture_output=True, text=True, timeout=60)
        assert not done.stderr
        return done.stdout

    script = said("idefics --show-completion")
    assert f"_IDEFICS_COMPLETE=complete_{shell}" in script
    installed = said("idefics --install-completion").splitlines()[0]
    assert installed.startswith(f"{shell} completion installed in {shell_home['HOME']}/")
    assert Path(installed.rpartition(" ")[2]).read_text().strip() == script.strip()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    """Whatever shell this is: in a container there may be none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    runner = CliRunner()

    def said(*words: str) -> str:
        ended = runner.invoke(app, words, prog_name="idefics")
        assert ended.exit_code == 0, ended.output
        return ended.stdout

    script = said("--show-completion", shell)
    assert f"_IDEFICS_COMPLETE=complete_{shell}" in script
    installed = said("--install-completion", shell).splitlines()[0]
    assert installed.startswith(f"{shell} completion installed in {tmp_path}/")
    assert Path(installed.rpartition(" ")[2]).read_text().strip() == script.strip()
    refused = runner.invoke(app, ["--install-completion", "csh"], prog_name="idefics")
    assert refused.exit_code == 2
    assert refused.stderr.endswith("'--install-completion': 'csh' is not one of 'bash', 'zsh', 'fish'\n")


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    home = tmp_path / "a file"
    home.touch()
    command = [sys.executable, "-m", "idefics_cli", "--install-completion", "bash"]
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr.startswith(f"Error: cannot write to {home}")) == (2, True), ended.stderr


def test_bash_completes(shell_home: dict[str, str]) -> None:
    """Nothing where files are meant, which are bash's own to complete."""
    script = """eval "$(idefics --show-completion)"
    for last in --num-b demo exam; do
        COMP_WORDS=(idefics caption -m $last); [[ $last = demo ]] || COMP_WORDS=(idefics caption $last)
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); _idefics_completion idefics; echo "$last:${COMPREPLY[*]}"
    done; complete -p idefics"""
    done = subprocess.run(["bash", "-c", script], env=shell_home, capture_output=True, text=True, timeout=60)
    shown = ["--num-b:--num-beams", "demo:demo", "exam:", "complete -o default -F _idefics_completion idefics"]
    assert done.stdout.splitlines() == shown, done.stderr
