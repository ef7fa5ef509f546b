"""The images of a terminal in docs/, 80 columns wide: `python -m tools.terminal [NAME...]`.

A command runs in a terminal of its own; its screen, at the end or while a bar is shown, becomes an SVG.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

from idefics_cli.demo.scene import EVALUATION_SEEDS, scene

ROOT = Path(__file__).parents[1]
COLUMNS, LINES = 80, 100
SCENES = 400
SHOTS = {  # what is typed, and which screens are taken: the last that fits
    "help": ("idefics --help", lambda screen: True),
    "help-score": ("idefics score --help", lambda screen: True),
    "run": ("idefics caption photos -m demo -o captions.jsonl", lambda screen: re.search(r"[3-8]\d%", screen)),
    "summary": ("idefics caption photos -m demo -o captions.jsonl --overwrite", lambda screen: True),
}


def screen_of(command: str, folder: Path, is_wanted: Callable[[str], object]) -> list[Text]:
    """The lines of the last wanted screen while the command ran."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    stream.feed(f"$ {command}\r\n".encode())
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    words = [sys.executable, "-m", *command.replace("idefics", "idefics_cli", 1).split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    process = subprocess.Popen(words, cwd=folder, env=environment, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    wanted: list[Text] = []
    while data := read(master):
        stream.feed(data)
        if is_wanted("\n".join(screen.display)):
            wanted = lines_of(screen)
    process.wait()
    return wanted


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # nobody has it open any more
        return b""


def lines_of(screen: pyte.Screen) -> list[Text]:
    """With colours, and without the empty ones at the end."""
    last = max(number for number, line in enumerate(screen.display) if line.strip())
    return [
        Text.assemble(*((screen.buffer[y][x].data, style(screen.buffer[y][x])) for x in range(COLUMNS)))
        for y in range(last + 1)
    ]


def style(char: pyte.screens.Char) -> str:
    """As rich calls it: of 256 colours pyte gives the digits, of the first sixteen the name."""
    is_code = re.fullmatch(r"[0-9a-f]{6}", char.fg) is not None
    colour = f"#{char.fg}" if is_code else {"default": "", "brown": "yellow"}.get(char.fg, char.fg)
    return " ".join(filter(None, ["bold" if char.bold else "", colour.replace("bright", "bright_")]))


def picture(lines: list[Text], title: str) -> str:
    """An SVG that fetches nothing: it has the reader's own fixed font."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for line in lines:
        line.rstrip()
        console.print(line)
    svg = console.export_svg(title=title, unique_id=title.split()[0])
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL).replace("Fira Code", "DejaVu Sans Mono")


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        for number in range(SCENES):
            scene(EVALUATION_SEEDS + number).image.save(folder / "photos" / f"scene-{number:03}.png")
        for number in 31, 250:
            (folder / "photos" / f"scene-{number:03}.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
        for shot, (command, is_wanted) in SHOTS.items():
            if shot in (names or SHOTS):
                lines = screen_of(command, folder, is_wanted)
                (ROOT / "docs" / f"{shot}.svg").write_text(picture(lines, "idefics"), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
