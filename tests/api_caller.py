"""What a user of the Python API may write; `test_api_face.py` checks it with pyright."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from idefics_cli import Candidate, Idefics, IdeficsError, Result, RowError
from idefics_cli.model import IdeficsForVisionText2Text, IdeficsModel


def texts(results: list[Result]) -> list[str | None]:
    return [result.text for result in results]


def use(model: Idefics, image: Image.Image) -> list[str | None]:
    captions: list[Result] = model.caption(["photo.png", Path("photo.png"), b"bytes", image], num_beams=5)
    answers = model.answer([(image, "What is this?")], max_new_tokens=5)
    continued = model.generate([["User:", image, "What is this?"], ("hello",)], num_return_sequences=2)
    scored = model.score([([image, "Is it red?"], ["yes", "no"])], choice_norm="tokens")
    latents: torch.Tensor = model.embed([image])
    again = model.caption(latents)
    best: Candidate = scored[0].candidates[0]
    error: RowError | None = captions[0].error
    network: IdeficsForVisionText2Text = model.model
    tower: IdeficsModel = network.model
    print(best.score, error.code if error else None, tower.dtype)
    return texts([*captions, *answers, *continued, *again])


def load() -> Idefics | None:
    try:
        return Idefics.from_pretrained("demo", dtype=torch.float32, device="cpu", batch_size=4)
    except IdeficsError as error:
        print(error)
        return None
