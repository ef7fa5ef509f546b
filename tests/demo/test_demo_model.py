"""The demo that ships: an ordinary checkpoint, small, that sees; and transformers reads and runs it as well."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, IdeficsForVisionText2Text, IdeficsProcessor
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from idefics_cli import Idefics
from idefics_cli.checkpoint.request import DEMO_FOLDER
from idefics_cli.demo.scene import EVALUATION_SEEDS, SHOTS_APART, Scene, scene
from idefics_cli.prompts.templates import Prompt, PromptOptions, Shot, build_prompt, leading_shots

FIRST_SEED = EVALUATION_SEEDS + 500_000


@pytest.fixture(scope="module")
def demo() -> Idefics:
    return Idefics.from_pretrained("demo", batch_size=32)


def asked_of(scenes: Iterable[Scene], options: PromptOptions) -> Iterator[tuple[Prompt, str]]:
    """Prompts for each scene's caption, or for all of its questions, after shots of others; and the right texts."""

    def questions(drawn: Scene) -> list[tuple[str, str]]:
        return [("", drawn.caption)] if options.task == "caption" else drawn.questions

    for drawn in scenes:
        others = [scene(drawn.seed + SHOTS_APART + number) for number in range(options.num_shots)]
        for number, (question, answer) in enumerate(questions(drawn)):
            pairs = [(other.image, *questions(other)[number % len(questions(other))]) for other in others]
            pool = [Shot(image, asked, text) for image, asked, text in pairs]
            shots = leading_shots(options, pool, instruct=False)
            yield build_prompt(options, {"question": question}, (drawn.image,), shots, instruct=False), answer


def test_it_is_small_and_whole() -> None:
    files = ("config", "generation_config", "preprocessor_config", "tokenizer", "tokenizer_config")
    assert {path.name for path in DEMO_FOLDER.iterdir()} == {"model.safetensors", *(f"{name}.json" for name in files)}
    assert (DEMO_FOLDER / "model.safetensors").stat().st_size <= 8_000_000


@pytest.mark.parametrize(("num_shots", "bare"), [(0, False), (0, True), (2, False)])
def test_it_sees(demo: Idefics, num_shots: int, bare: bool) -> None:
    """A small sample of what the README measures."""
    scenes = [scene(seed) for seed in range(EVALUATION_SEEDS, EVALUATION_SEEDS + 60)]
    for task in "caption", "vqa":
        prompts, texts = zip(*asked_of(scenes, PromptOptions(task, num_shots=num_shots, bare=bare)), strict=True)
        found = [result.text for result in demo.generate(prompts)]
        assert sum(map(str.__eq__, found, texts)) > 0.9 * len(texts), task


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_it_sees_as_well_in_int8() -> None:
    """Within one of a hundred captions, and of a hundred answers."""
    scenes = [scene(seed) for seed in range(EVALUATION_SEEDS, EVALUATION_SEEDS + 100)]
    options = {"batch_size": 32, "device": "cpu", "dtype": "fp32"}
    models = [Idefics.from_pretrained("demo", quantize=kind, **options) for kind in (None, "int8")]
    for task in "caption", "vqa":
        prompts, texts = zip(*asked_of(scenes, PromptOptions(task)), strict=True)
        plain, int8 = ([each.text for each in model.generate(prompts, num_beams=1)] for model in models)
        right = [sum(map(str.__eq__, found, texts)) / len(texts) for found in (plain, int8)]
        assert right[1] >= right[0] - 0.01, (task, right)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_transformers_reads_and_runs_it_alike(demo: Idefics, num_beams: int) -> None:
    theirs = IdeficsForVisionText2Text.from_pretrained(DEMO_FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    processor = IdeficsProcessor(IdeficsImageProcessorPil.from_pretrained(DEMO_FOLDER), tokenizer)
    scenes = [scene(seed) for seed in range(FIRST_SEED, FIRST_SEED + 6)]
    asked = [*asked_of(scenes, PromptOptions("caption", num_shots=1)), *asked_of(scenes, PromptOptions("vqa"))][:24]
    prompts = [prompt for prompt, _ in asked]
    results = demo.generate(prompts, num_beams=num_beams)
    forbidden = tokenizer.convert_tokens_to_ids(["<image>", "<fake_token_around_image>"])
    for prompt, result in zip(prompts, results, strict=True):
        inputs = processor(text=[list(prompt)], return_tensors="pt")
        generated = theirs.generate(
            **inputs, num_beams=num_beams, early_stopping=num_beams > 1, max_new_tokens=30, suppress_tokens=forbidden
        )
        text = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.strip() == result.text


def test_it_takes_images_of_any_kind(demo: Idefics, tmp_path: Path) -> None:
    """Larger, with another mode, through JPEG: the caption stays."""
    drawn = scene(FIRST_SEED + 50)
    large = drawn.image.resize((512, 512))
    large.save(tmp_path / "large.jpg", quality=95)
    drawn.image.convert("RGBA").save(tmp_path / "clear.png")
    drawn.image.convert("P", palette=1, colors=256).save(tmp_path / "palette.gif")
    results = demo.caption([tmp_path / "large.jpg", tmp_path / "clear.png", tmp_path / "palette.gif"])
    assert [result.text for result in results] == [drawn.caption] * 3
