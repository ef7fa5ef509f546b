"""Checkpoints with one seeded mistake each, loaded and run in a process of their own.

`python mutated_checkpoints.py FOLDER KIND,KIND... FIRST COUNT` prints a JSON line for each: its kind, its number, how
it ended, and the seconds it took; then the most memory in bytes, its own and that of
a process it has started.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mistakes import peak, peak_of_children

FILES = {
    "header": "model.safetensors",
    "config": "config.json",
    "tokenizer": "tokenizer.json",
    "images": "preprocessor_config.json",
    "processor": "processor_config.json",
}
ODD = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 10**9, 2**63, -(10**30), 0.5, 1e308, float("nan"), float("inf")),
    *(
        "",
        "x",
        "a" * 5000,
        "\ufdd0",
        "\ud800",
        "../x",
        "auto",
        [],
        {},
        [0],
        [[]],
        {"a": {"b": []}},
        [1, 2, 3],
        ["x"] * 3,
    ),
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values within `value`; of a long list or object a few."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, below in items if len(items) < 60 else items[:: len(items) // 30]:
        yield (*path, key)
        yield from places(below, (*path, key))


def structural(value: Any, draw: random.Random) -> Any:
    """Another JSON value, one to three places of which are changed, removed, copied or put elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            return draw.choice(ODD)
        *above, key = draw.choice(found)
        parent = value
        for step in above:
            parent = parent[step]
        how = draw.randrange(5)
        if how == 0:
            del parent[key]
        elif how == 1 and isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
            parent[key] = draw.choice((-parent[key], parent[key] + 1, parent[key] * 1000, parent[key] * 10**9))
        elif how == 2:
            parent[key] = [copy.deepcopy(parent[key]) for _ in range(draw.choice((0, 1, 3)))]
        elif how == 3:
            other = value
            for step in draw.choice(found):
                other = other[step] if isinstance(other, (dict, list)) and _has(other, step) else other
            parent[key] = copy.deepcopy(other)
        else:
            parent[key] = draw.choice(ODD)
    return value


def _has(value: Any, step: Any) -> bool:
    return step in value if isinstance(value, dict) else isinstance(step, int) and step < len(value)


def raw(data: bytes, draw: random.Random) -> bytes:
    """The bytes with a few flipped, removed, repeated or cut off."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(data) + 1)
        how = draw.randrange(5)
        if how == 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif how == 1:
            del data[at : at + draw.choice((1, 2, 100))]
        elif how == 2:
            data[at:at] = data[at : at + draw.choice((1, 10, 1000))]
        elif how == 3:
            data[at:at] = draw.choice((b"[" * 3000, b"\x00", b"\xff", b'"', b"}", b"9" * 30, b"e9", b"-"))
        elif draw.random() < 0.2:
            del data[at:]
    return bytes(data)


def mutated(kind: str, data: bytes, draw: random.Random) -> bytes:
    if kind != "header":
        return raw(data, draw) if draw.random() < 0.4 else json.dumps(structural(json.loads(data), draw)).encode()
    length = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + length], data[8 + length :]
    if draw.random() < 0.5:
        header = raw(header, draw) if draw.random() < 0.5 else json.dumps(structural(json.loads(header), draw)).encode()
        return len(header).to_bytes(8, "little") + header + tensors
    return raw(data[: 8 + length], draw) + tensors


def outcome(folder: Path) -> str:
    from PIL import Image

    from idefics_cli import Idefics, IdeficsError

    try:
        model = Idefics.from_pretrained(folder, device="cpu")
        image = Image.new("RGB", (8, 8), "red")
        (result,) = model.generate([["a cat? é", image, "b"]], max_new_tokens=2)
    except IdeficsError as error:
        return f"refused: {error}"
    except BaseException as error:
        return f"bug: {type(error).__name__}: {error}"
    return f"row: {result.error}"


def main(folder: Path, kind: str, first: int, count: int) -> None:
    from idefics_cli.checkpoint import load

    if kind != "tokenizer":
        load.probe = lambda path: None  # it would say the same each time
    work = Path(shutil.copytree(folder, folder.parent / f"mutated-{kind}-{first}"))
    if kind != "processor":
        (work / FILES["processor"]).unlink()
    data = (folder / FILES[kind]).read_bytes()
    for number in range(first, first + count):
        (work / FILES[kind]).write_bytes(mutated(kind, data, random.Random(f"{kind} {number}")))
        start = time.monotonic()
        found = outcome(work)
        print(json.dumps([kind, number, found[:300], round(time.monotonic() - start, 2)]), flush=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    for kind in sys.argv[2].split(","):  # the tokenizer last: it is then tried out
        main(Path(sys.argv[1]), kind, int(sys.argv[3]), int(sys.argv[4]))
    print(json.dumps([peak(), peak_of_children()]))
