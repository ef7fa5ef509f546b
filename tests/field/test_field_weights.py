"""Checkpoints as trainers and libraries leave them: which files count, and what is said of those that cannot be run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import IMAGE_SIZE, save_checkpoint
from transformers import IdeficsImageProcessor, IdeficsProcessor, PreTrainedTokenizerFast

from idefics_cli.checkpoint import ModelRequest, check_model_request
from idefics_cli.errors import CheckpointError
from idefics_cli.idefics import Idefics
from idefics_cli.images.preprocess import ImageProcessor

OWN = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "checkpoint")


def refusal(folder: Path, **request: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        Idefics.from_pretrained(folder, **request)
    return str(caught.value)


# ---- processor_config.json


def save_processor(folder: Path, image_size: int, remove: bool = True) -> None:
    """As transformers 5 writes it, `processor_config.json` alone."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if remove:
        (folder / "preprocessor_config.json").unlink()
    IdeficsProcessor(IdeficsImageProcessor(image_size=image_size, **OWN), tokenizer).save_pretrained(folder)


@pytest.mark.parametrize("remove", [True, False], ids=["alone", "beside the old file"])
def test_a_processor_saved_by_transformers_5(folder: Path, remove: bool) -> None:
    save_processor(folder, IMAGE_SIZE, remove)
    assert (folder / "processor_config.json").exists()
    model = Idefics.from_pretrained(folder)
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    theirs = IdeficsImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    assert torch.equal(model.prepare_image(image), theirs.reshape(3, IMAGE_SIZE, IMAGE_SIZE))
    assert model.images.image_mean == tuple(OWN["image_mean"]) and model.images.image_std == tuple(OWN["image_std"])


def test_the_file_that_was_read_is_named(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_size": 56}))
    said = refusal(folder)
    assert f"{folder}/preprocessor_config.json resizes to 56 but the model takes {IMAGE_SIZE}" in said
    (folder / "preprocessor_config.json").unlink()
    assert "has no processor_config.json or preprocessor_config.json" in refusal(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_size": IMAGE_SIZE}))
    save_processor(folder, 42)
    assert f"{folder}/processor_config.json resizes to 42" in refusal(folder)


def test_a_processor_config_without_images_leaves_them_to_the_other_file(folder: Path) -> None:
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "IdeficsProcessor"}))
    assert ImageProcessor.from_pretrained(folder).image_size == IMAGE_SIZE


@pytest.mark.parametrize("content", ["{", "[]", '{"image_processor": []}', '{"image_processor": {"resample": 2}}'])
def test_a_processor_config_that_cannot_be_used(folder: Path, content: str) -> None:
    (folder / "processor_config.json").write_text(content)
    assert f"{folder}/processor_config.json cannot be used" in refusal(folder)


# ---- folders that are not a checkpoint


def test_the_folder_above_a_trainers_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-500", "checkpoint-1000", "checkpoint-best", "logs"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert f"such as {tmp_path}/run/checkpoint-1000" in refusal(tmp_path / "run")
    save_checkpoint(tmp_path / "run/checkpoint-1000")
    check_model_request(ModelRequest(str(tmp_path / "run/checkpoint-1000")))


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "processor_config.json", "pytorch_model.bin"]
)
def test_a_git_lfs_pointer(folder: Path, name: str) -> None:
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(LFS)
    said = refusal(folder, allow_pickle=True)
    assert str(folder / name) in said and "a Git LFS pointer: run `git lfs pull`" in said


# ---- --dtype


@pytest.mark.parametrize(
    ("long", "short"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float32", "fp32"), (torch.float16, "fp16")]
)
def test_dtypes_by_torchs_names(long: str | torch.dtype, short: str) -> None:
    assert ModelRequest(dtype=long) == ModelRequest(dtype=short)


@pytest.mark.parametrize("command", ["caption", "vqa", "generate", "embed", "info", "bench"])
def test_every_command_takes_torchs_names(command: str, refused: Callable[..., str]) -> None:
    said = refused(command, *([] if command == "bench" else ["x"]), "--dtype", "int4")
    assert all(f"'{name}'" in said for name in ("bfloat16", "float16", "float32"))


def test_a_run_resumes_by_the_other_name(run: Callable[..., object], photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert run("caption", photos, "-o", output, "--dtype", "float16").exit_code == 3
    again = run("caption", photos, "-o", output, "--dtype", "fp16")
    assert again.exit_code == 3 and "is finished" in again.stderr, again.stderr
