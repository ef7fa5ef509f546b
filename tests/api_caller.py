"""What a caller of the library writes: `test_api_face.py` checks it with pyright, strictly."""
# pyright: strict

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from idefics_cli import Candidate, Idefics, IdeficsError, Result, RowError, Shot
from idefics_cli.model import IdeficsForVisionText2Text, IdeficsModel


def texts(results: list[Result]) -> list[str | None]:
    return [result.text for result in results]


def use(model: Idefics, image: Image.Image) -> list[str | None]:
    captions: list[Result] = model.caption(["photo.png", Path("photo.png"), b"bytes", image], num_beams=5)
    answers = model.answer([(image, "What is this?")], max_new_tokens=5)
    continued = model.generate([["User:", image, "What is this?"], ("hello",)], num_return_sequences=2)
    scored = model.score([([image, "Is it red?"], ["yes", "no"])], choice_norm="tokens")
    latents: torch.Tensor = model.embed([image])
    again: list[Result] = model.caption(latents)
    best: Candidate = scored[0].candidates[0]
    error: RowError | None = captions[0].error
    network: IdeficsForVisionText2Text = model.model
    tower: IdeficsModel = network.model
    print(best.score, error.code if error else None, tower.dtype)
    return texts([*captions, *answers, *continued, *again])


def ask_one(model: Idefics, image: Image.Image) -> str | None:
    shots = [Shot("dog.png", "What is this?", "a dog"), Shot(image=image, question="And this?", answer="a cat")]
    caption: Result = model.caption("photo.png", stop_words=["Image"], template="caption", shots=shots, num_shots=1)
    row: Result = model.caption({"image": ["left.png", image], "title": "Two"}, prompt="{title}: {image}")
    answer: Result = model.answer(image, "What is this?", choices=["a cat", "a dog"], early_stopping="never")
    chat: Result = model.generate([{"role": "user", "content": [{"type": "image", "image": image}, "What is this?"]}])
    fits: Result = model.score([image, "Is it red?"], ["yes", "no"])
    prompt: str = model.render_prompt("vqa", (image, "What is this?"), bare=True)
    print(row.ok, chat.raise_for_error().text, fits.index, caption.input, prompt)
    return answer.text


def stream(model: Idefics) -> Iterator[str]:
    for result in model.caption_iter(Path("photos").iterdir(), progress=True, workers=4, do_sample=True, seed=1):
        if result.ok and result.text is not None:
            yield result.text
    yield from (result.text or "" for result in model.answer_iter([("photo.png", "What?")]))
    yield from (result.text or "" for result in model.generate_iter([["hello"]], progress=iter))


async def ask_many(model: Idefics) -> list[str | None]:
    one: Result = await model.acaption("photo.png")
    many: list[Result] = await model.aanswer(["photo.png"], "What is this?", num_beams=1)
    streamed = [result.text async for result in model.acaption_iter(["photo.png"])]
    return [one.text, *texts(many), *streamed]


def run(model: Idefics) -> int:
    stats = model.run(
        "caption", "photos", "captions.parquet", on_row=print, keep=["title"], shard=(1, 2), overwrite=True
    )
    return stats.rows - stats.num_failed


def load() -> Idefics | None:
    try:
        with Idefics.from_pretrained("demo", dtype=torch.float32, device="cpu", batch_size=4) as model:
            return model
    except IdeficsError as error:
        print(error)
        return None
