"""What only a GPU can tell: `python -m benchmarks.gpu_check versions|correct|memory|photos`. One JSON line on stdout.

*correct*: texts in fp32 beside those of the CPU, and in half precision; latents. *memory*: the same texts when only a
small part of the device's memory is left. *photos*: JPEG files of 1,024 × 768 for `benchmarks/engine_idle.py`.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from idefics_cli.bench.options import BenchOptions
from idefics_cli.bench.subjects import Subject, random_subject
from idefics_cli.checkpoint.devices import DTYPES
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.demo.scene import scene
from idefics_cli.engine.embed import embed
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.engine.prompt_source import EncodedImage, EncodedPrompt, IterableSource
from idefics_cli.engine.scheduler import stream

CPU = torch.device("cpu")
SPARE_BYTES = (512 << 20, 128 << 20, 48 << 20)


def subject_on(device: torch.device, dtype: str, size: str, rows: int, shots: int = 0) -> Subject:
    """The weights are drawn on the CPU, since each device draws its own numbers."""
    options = BenchOptions(ModelRequest("", dtype=dtype), random=size, rows=rows, shots=shots)
    subject = random_subject(options, CPU)
    return replace(subject, model=subject.model.to(device))


def texts(subject: Subject, prompts: Sequence[EncodedPrompt], decoding: DecodingOptions, rows: int) -> list[Any]:
    """Token ids of each prompt's best text, or its error."""
    found = dict(stream(subject.engine(rows), IterableSource(prompts), decoding))
    return [found[i][0].token_ids if isinstance(found[i], list) else str(found[i]) for i in range(len(prompts))]


def versions(device: torch.device, size: str) -> dict[str, Any]:
    found = {name: metadata.version(name) for name in ("torch", "transformers", "idefics-cli")}
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "bytes": properties.total_memory}
    return found


def correct(device: torch.device, size: str) -> dict[str, Any]:
    torch.backends.cudnn.allow_tf32 = False
    report: dict[str, Any] = {}
    for shots, beams in ((0, 3), (4, 3), (0, 5), (2, 1)):
        host, decoding = subject_on(CPU, "fp32", size, 16, shots), DecodingOptions(beams, 12)
        prompts = host.prompts.draw(1)
        expected = texts(host, prompts, decoding, 8)
        for dtype in DTYPES:
            found = texts(subject_on(device, dtype, size, 16, shots), prompts, decoding, 8)
            same = sum(a == b for a, b in zip(found, expected, strict=True))
            report[f"{shots} shots, {beams} beams, {DTYPES[dtype]}: same"] = same / len(expected)
    return report | {"largest difference of latents": latents_difference(device, size)}


def latents_difference(device: torch.device, size: str) -> float:
    host, other = (subject_on(each, "fp32", size, 8) for each in (CPU, device))
    images = [EncodedImage((prompt.pixels[-1],)) for prompt in host.prompts.draw(3)]
    first, second = (
        torch.stack([found for _, found in embed(each.engine(4), IterableSource(images))]) for each in (host, other)
    )
    return float((first - second).abs().max())


def memory(device: torch.device, size: str) -> dict[str, Any]:
    """More rows than fit: the same texts, with fewer rows at a time."""
    subject, decoding = subject_on(device, "fp32", size, 64), DecodingOptions(3, 12)
    prompts = subject.prompts.draw(1)
    expected = texts(subject, prompts, decoding, 4)
    report = {}
    for spare in SPARE_BYTES if device.type == "cuda" else ():
        torch.cuda.empty_cache()
        used, total = torch.cuda.memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (used + spare) / total), device)
        found = texts(subject, prompts, decoding, 64)
        report[f"{spare >> 20} MB spare: same"] = sum(a == b for a, b in zip(found, expected, strict=True)) / 64
    return report


def photos(folder: Path, count: int) -> dict[str, Any]:
    """Scenes with noise, so that they are about as long to decode as a camera's."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        large = np.asarray(scene(number).image.resize((1024, 768)), dtype=np.int16)
        noisy = large + np.random.default_rng(number).integers(-12, 13, large.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=90)
    return {"photos": count, "bytes": sum(each.stat().st_size for each in folder.iterdir())}


PARTS = {"versions": versions, "correct": correct, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "photos"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="mid")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--count", type=int, default=512)
    options = parser.parse_args()
    if options.part == "photos":
        print(json.dumps(photos(options.folder, options.count)))
        return
    device = torch.device("cuda:0" if options.device == "cuda" else options.device)
    print(json.dumps(PARTS[options.part](device, options.size)))


if __name__ == "__main__":
    main()
