"""Weights in int8 beside fp32 on the CPU: `python -m benchmarks.int8`, with random weights of `mid`.

Each kind has a process of its own, and the two take turns. Bytes are those of anonymous memory: what is a file's can be
read again. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

KINDS = None, "int8"


def held() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])


def loaded(folder: Path, kind: str | None) -> tuple[Any, dict[str, float]]:
    """The model, and what it held at the peak and holds now, beside a small one that was loaded in the same way."""
    from idefics_cli.loaded_model import LoadedModel

    options = {"device": "cpu", "dtype": "fp32", "quantize": kind}
    LoadedModel.from_pretrained("demo", **options)
    before, peak, is_loaded, started = held(), [0], threading.Event(), time.perf_counter()

    def watch() -> None:
        while not is_loaded.wait(0.002):
            peak[0] = max(peak[0], held())

    watching = threading.Thread(target=watch)
    watching.start()
    model = LoadedModel.from_pretrained(folder, **options)
    is_loaded.set()
    watching.join()
    seconds = time.perf_counter() - started
    return model, {"peak": peak[0] - before, "held": held() - before, "seconds of loading": seconds}


def save(size: str, folder: Path) -> int:
    """A checkpoint of random weights, with demo's tokenizer. Its bytes."""
    import torch

    from idefics_cli.bench.subjects import random_model
    from idefics_cli.checkpoint.request import DEMO_FOLDER

    model = random_model(size, torch.device("cpu"), torch.float32, 0)
    model.save_pretrained(folder)
    for path in DEMO_FOLDER.glob("tokenizer*"):
        shutil.copy(path, folder)
    side = model.config.vision_config.image_size
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_size": side}))
    return sum(each.nbytes for each in model.parameters())


def work(pipe: Connection, folder: Path, kind: str | None, rows: int, beams: int, tokens: int) -> None:
    import torch

    from idefics_cli.demo.scene import EVALUATION_SEEDS, scene
    from idefics_cli.engine.prompt_source import IterableSource

    torch.set_num_threads(1)
    model, about = loaded(folder, kind)
    pipe.send(about)
    while (number := pipe.recv()) is not None:
        shown = [scene(EVALUATION_SEEDS + number * rows + row).image for row in range(rows)]
        encoded = [model.encode([image, "a caption"], tokens) for image in shown]
        started = time.perf_counter()
        list(model.stream(IterableSource(encoded), num_beams=beams, min_new_tokens=tokens, max_new_tokens=tokens))
        pipe.send(time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", default="mid")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    found: dict[str, Any] = dict(vars(given))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        found["fp32 bytes"] = save(given.random, Path(folder))
        pipes = {}
        for kind in KINDS:
            pipes[kind], theirs = context.Pipe()
            settings = Path(folder), kind, given.rows, given.beams, given.tokens
            context.Process(target=work, args=(theirs, *settings), daemon=True).start()
            found[str(kind)] = pipes[kind].recv()
        seconds: dict[str | None, list[float]] = {kind: [] for kind in KINDS}
        for number in range(given.repeats + 1):
            for kind in KINDS:
                pipes[kind].send(number)
                seconds[kind].append(pipes[kind].recv())
    for kind in KINDS:
        found[str(kind)]["seconds"] = seconds[kind][1:]  # the first has kernels compiled
    int8, plain = found["int8"], found["None"]
    found["share at the peak"] = int8["peak"] / found["fp32 bytes"]
    found["gain"] = statistics.median(plain["seconds"]) / statistics.median(int8["seconds"])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
