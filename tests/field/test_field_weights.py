"""Checkpoints as trainers and libraries leave them: which files count, and what is said of those that cannot be run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import IMAGE_SIZE, random_inputs, randomize, relative_error, save_checkpoint, tiny_config
from transformers import IdeficsForVisionText2Text as TheirIdefics
from transformers import IdeficsImageProcessor, IdeficsProcessor, PreTrainedTokenizerFast

from idefics_cli.checkpoint import ModelRequest, check_model_request, load_config, load_network
from idefics_cli.errors import CheckpointError
from idefics_cli.idefics import Idefics
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.prompts import tokenizer_probe

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


# ---- a tokenizer with more words than the network


def add_word(folder: Path, word: str = "glorp") -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.add_tokens([word]) == 1
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_word_that_the_network_lacks(folder: Path) -> None:
    size = len(add_word(folder))
    said = refusal(folder)
    assert f"has {size} tokens but the model has {size - 1}" in said and f"resize_token_embeddings({size})" in said


def test_a_network_that_was_resized_for_it(folder: Path) -> None:
    """transformers leaves a head of one vocabulary, and the additional embedding without use."""
    resized = TheirIdefics.from_pretrained(folder)
    resized.resize_token_embeddings(len(add_word(folder)))
    randomize(resized, seed=3)
    resized.save_pretrained(folder)
    model = Idefics.from_pretrained(folder)
    inputs = random_inputs(tiny_config(), num_tokens=14)
    inputs["input_ids"][:, -1] = len(model.encoder._tokenizer.get_vocab()) - 1
    with torch.no_grad():
        theirs = resized(**inputs).logits
    assert theirs.shape[-1] == model.encoder.vocab_size
    loaded = load_network(model.checkpoint, load_config(model.checkpoint), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        assert relative_error(loaded(**inputs).logits, theirs) < 1e-5
    (result,) = model.generate([["a red glorp", Image.new("RGB", (9, 9), "red"), "glorp"]], max_new_tokens=5)
    assert result.error is None and result.tokens


# ---- files made to harm


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "change",
    [
        {"num_labels": 10**9},
        {"vision_config": {"num_labels": 10**9}},
        {"id2label": {str(i): "x" for i in range(1000)}},
        {"auto_map": {"AutoConfig": "evil.Evil"}},
    ],
    ids=str,
)
def test_labels_do_not_count(folder: Path, change: dict) -> None:
    known = json.loads((folder / "config.json").read_text())
    merged = {k: {**known[k], **v} if k == "vision_config" else v for k, v in change.items()}
    edit_json(folder / "config.json", **merged)
    Idefics.from_pretrained(folder)


@pytest.mark.parametrize(
    ("part", "name"),
    [(None, "num_hidden_layers"), ("vision_config", "num_hidden_layers"), ("perceiver_config", "resampler_depth")],
)
def test_layers_are_counted_before_they_are_made(folder: Path, part: str | None, name: str) -> None:
    known = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **({name: 10**8} if part is None else {part: {**known[part], name: 10**8}}))
    assert re.search(rf"config.json says ({part}\.)?{name} 100000000 and the weights hold \d:", refusal(folder))


@pytest.mark.parametrize("content", ["{", "[1]", '{"num_beams": "x", "max_new_tokens": {}}', '{"a": ' * 5000, LFS])
def test_no_generation_config_is_read(folder: Path, content: str) -> None:
    (folder / "generation_config.json").write_text(content)
    Idefics.from_pretrained(folder)


@pytest.fixture
def brief_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_probe, "MAX_SECONDS", 1)


def growing(letter: str, times: int) -> dict:
    doubling = {"type": "Replace", "pattern": {"String": letter}, "content": letter * 2}
    return {"type": "Sequence", "normalizers": [doubling] * times}


@pytest.mark.parametrize("times", [10, 40])
@pytest.mark.parametrize("key", ["normalizer", "decoder"])
def test_texts_may_not_grow_in_the_tokenizer(folder: Path, key: str, times: int, brief_probe: None) -> None:
    made = growing("a", times)
    made = made if key == "normalizer" else {"type": "Sequence", "decoders": made["normalizers"]}
    edit_json(folder / "tokenizer.json", **{key: made})
    assert re.search(r"tokenizer.json cannot be used \(it", refusal(folder))
