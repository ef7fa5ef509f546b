"""How soon help is there: `python -m benchmarks.help [RUNS]`.

The commands are started in turn, RUNS times each, with warm files; a bare Python beside them. The table of seconds goes
to stderr, one JSON object of medians and minima to stdout.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

PYTHON = [sys.executable, "-c", "pass"]
IDEFICS = [sys.executable, "-m", "idefics_cli"]
COMMANDS = {
    "python": PYTHON,
    **{
        " ".join(["idefics", *words]): [*IDEFICS, *words]
        for words in (["--version"], ["--help"], ["caption", "--help"])
    },
}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main(runs: int) -> None:
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(runs + 1):
        for name, command in COMMANDS.items():
            if (spent := seconds(command)) and number:  # the first brings the files into memory
                taken[name].append(spent)
    found = {name: {"median": statistics.median(each), "least": min(each)} for name, each in taken.items()}
    for name, each in found.items():
        print(f"{name:24} {each['median']:.3f} s, at least {each['least']:.3f} s", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
