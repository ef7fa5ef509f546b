"""Checkpoints as trainers and libraries leave them: which files count, and what is said of those that cannot be run."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import IMAGE_SIZE, random_inputs, randomize, relative_error, save_checkpoint, tiny_config
from transformers import IdeficsForVisionText2Text as TheirIdefics
from transformers import IdeficsImageProcessor, IdeficsProcessor, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from idefics_cli.checkpoint.find import check_model_request, find_checkpoint, weights_digest
from idefics_cli.checkpoint.fingerprint import known_vision_fingerprint
from idefics_cli.checkpoint.load import load_config, load_network, meta_network
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.cli.app import app
from idefics_cli.engine import memory_budget
from idefics_cli.errors import CheckpointError, DeviceError
from idefics_cli.idefics import Idefics
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.pipeline.run import DECISIVE
from idefics_cli.prompts import tokenizer_probe
from idefics_cli.storage import limited_process
from idefics_cli.validation import by_option

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
    assert "has no processor_config.json or preprocessor_config.json: add the one of the model" in refusal(folder)
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
    expected = meta_network(model.checkpoint, load_config(model.checkpoint))
    loaded = load_network(model.checkpoint, expected, torch.device("cpu"), torch.float32)
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
        {"dropout": 256.0},
    ],
    ids=str,
)
def test_settings_that_do_not_count(folder: Path, change: dict) -> None:
    known = json.loads((folder / "config.json").read_text())
    merged = {k: {**known[k], **v} if k == "vision_config" else v for k, v in change.items()}
    edit_json(folder / "config.json", **merged)
    assert texts(Idefics.from_pretrained(folder))


@pytest.mark.parametrize(
    ("part", "name"),
    [(None, "num_hidden_layers"), ("vision_config", "num_hidden_layers"), ("perceiver_config", "resampler_depth")],
)
def test_layers_are_counted_before_they_are_made(folder: Path, part: str | None, name: str) -> None:
    known = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **({name: 10**8} if part is None else {part: {**known[part], name: 10**8}}))
    assert re.search(rf"config.json says ({part}\.)?{name} 100000000 and the weights hold \d at most", refusal(folder))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        '{"num_beams": 7, "do_sample": true}',
        '{"num_beams": "x", "max_new_tokens": {}}',
        '{"a": ' * 5000,
        LFS,
    ],
)
def test_no_generation_config_is_read(folder: Path, content: str) -> None:
    (folder / "generation_config.json").write_text(content)
    assert Idefics.from_pretrained(folder).model.generation_config.num_beams is None


@pytest.fixture
def brief_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_probe, "MAX_SECONDS", 1.5)


def growing(letter: str, times: int) -> dict:
    doubling = {"type": "Replace", "pattern": {"String": letter}, "content": letter * 2}
    return {"type": "Sequence", "normalizers": [doubling] * times}


@pytest.mark.parametrize("times", [10, 40])
@pytest.mark.parametrize("key", ["normalizer", "decoder"])
def test_texts_may_not_grow_in_the_tokenizer(folder: Path, key: str, times: int, brief_probe: None) -> None:
    made = growing("a", times)
    made = made if key == "normalizer" else {"type": "Sequence", "decoders": made["normalizers"]}
    edit_json(folder / "tokenizer.json", **{key: made})
    assert re.search(r"tokenizer.json cannot be used \((it|the tokenizers library)", refusal(folder))


def test_trying_a_tokenizer_has_an_end_by_the_clock(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it takes no time of a processor, and at most half of the 30 s that a refusal may take."""
    assert tokenizer_probe.MAX_SECONDS <= 15
    monkeypatch.setattr(tokenizer_probe, "MAX_SECONDS", 0.1)
    monkeypatch.setattr(limited_process, "BOOTSTRAP", "import time; time.sleep(60)")
    monkeypatch.setattr(limited_process, "_processes", [])
    assert "tokenizer.json cannot be used (it takes too long)" in refusal(folder)


# ---- LoRA weights beside the model


def train_adapter(base: Path, folder: Path, seed: int = 5, **config: object) -> TheirIdefics:
    """A folder as PEFT's `save_pretrained` writes it, and the network that its `merge_and_unload` makes."""
    settings = {"target_modules": ["q_proj", "v_proj"], "r": 4, **config}
    adapted = peft.get_peft_model(TheirIdefics.from_pretrained(base), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(adapted.named_parameters(), key=lambda named: named[0]):
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**random_inputs(tiny_config())).logits


def texts(model: Idefics) -> list[str]:
    prompts = [["what is", Image.new("RGB", (9, 9), colour), text] for colour in ("red", "blue") for text in ("a", "b")]
    return [result.text for result in model.generate(prompts, max_new_tokens=12)]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": "all-linear", "use_dora": True, "bias": "lora_only"},
        {"bias": "all"},
        {"target_modules": ["embed_tokens", "up_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 2}},
        {"modules_to_save": ["lm_head"], "alpha_pattern": {"layers.1.self_attn.q_proj": 3}, "lora_dropout": 0.1},
    ],
    ids=str,
)
def test_an_adapter_is_merged_as_peft_does(folder: Path, tmp_path: Path, config: dict) -> None:
    theirs = train_adapter(folder, tmp_path / "adapter", **config)
    request = ModelRequest(adapter=str(tmp_path / "adapter"))
    assert request.model == str(folder)
    checkpoint = find_checkpoint(request)
    expected = meta_network(checkpoint, load_config(checkpoint))
    ours = load_network(checkpoint, expected, torch.device("cpu"), torch.float32)
    assert relative_error(logits(ours), logits(theirs)) < 1e-5
    assert not any(parameter.requires_grad for parameter in ours.parameters()) and not ours.training
    merged = Path(shutil.copytree(folder, tmp_path / "merged"))
    theirs.save_pretrained(merged)
    told = texts(Idefics.from_pretrained(adapter=tmp_path / "adapter"))
    assert told == texts(Idefics.from_pretrained(merged)) != texts(Idefics.from_pretrained(folder))


def test_an_adapters_content_and_name_decide_the_rows(folder: Path, tmp_path: Path) -> None:
    plain = ModelRequest(str(folder))
    one = ModelRequest(str(folder), adapter=str(tmp_path / "one"))
    train_adapter(folder, tmp_path / "one")
    digests = {weights_digest(plain), weights_digest(one)}
    prints = {known_vision_fingerprint(plain), known_vision_fingerprint(one)}
    train_adapter(folder, tmp_path / "one", seed=6)
    assert len({*digests, weights_digest(one)}) == 3
    assert len({*prints, known_vision_fingerprint(one)}) == 3  # q_proj is one of the vision tower's, too
    train_adapter(folder, tmp_path / "one", target_modules=["up_proj"])
    assert known_vision_fingerprint(one) in prints
    assert "--adapter" in by_option(one) and "--adapter" in DECISIVE


def test_an_adapter_by_the_command_line(folder: Path, tmp_path: Path, photos: Path) -> None:
    merged = Path(shutil.copytree(folder, tmp_path / "merged"))
    train_adapter(folder, tmp_path / "run" / "checkpoint-7").save_pretrained(merged)
    rows = [
        CliRunner().invoke(app, ["caption", str(photos / "a.jpg"), "--device", "cpu", *options])
        for options in (["--adapter", str(tmp_path / "run/checkpoint-7")], ["-m", str(merged)], ["-m", str(folder)])
    ]
    assert [each.exit_code for each in rows] == [0, 0, 0], rows[0].output
    assert rows[0].stdout == rows[1].stdout != rows[2].stdout


def test_adapters_that_are_refused(
    folder: Path, tmp_path: Path, refused: Callable[..., str], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "run" / "checkpoint-7"
    train_adapter(folder, adapter)
    assert f"{adapter} holds an adapter: name it with --adapter" in refused("caption", photos, "-m", adapter)
    assert f"such as {adapter}" in refused("caption", photos, "--adapter", tmp_path / "run")
    assert "no folder missing: give a PEFT adapter's folder" in refused("caption", photos, "--adapter", "missing")
    assert "has no adapter_config.json: give a PEFT adapter's folder" in refused("caption", photos, "--adapter", folder)
    both = "-m", folder, "--adapter", adapter
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="some/model")
    assert "'some/model', which is not on this machine" in refused("caption", photos, "--adapter", adapter)
    for change, said in (
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"use_qalora": True}, "use_qalora"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
    ):
        known = (adapter / "adapter_config.json").read_text()
        edit_json(adapter / "adapter_config.json", **change)
        assert said in (found := refused("caption", photos, *both)) and "merge_and_unload" in found
        (adapter / "adapter_config.json").write_text(known)
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert "--allow-pickle" in refused("caption", photos, *both)
    pickled = texts(Idefics.from_pretrained(folder, adapter=adapter, allow_pickle=True))
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert pickled == texts(Idefics.from_pretrained(folder, adapter=adapter))
    (adapter / "adapter_model.safetensors").write_text(LFS)
    assert "run `git lfs pull`" in refused("caption", photos, *both)
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 100)
    assert "damaged or cut short" in refused("caption", photos, *both)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'idefics-cli[peft]'" in refused("caption", photos, *both)


@pytest.mark.parametrize("change", ["less", "more", "r", "shape", "name"])
def test_an_adapter_that_does_not_fit(folder: Path, tmp_path: Path, change: str) -> None:
    adapter = tmp_path / "adapter"
    train_adapter(folder, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    if change == "r":
        edit_json(adapter / "adapter_config.json", r=10**9)
    elif change == "more":
        tensors["base_model.model.model.extra.weight"] = torch.ones(2)
    elif change == "shape":
        tensors[name] = torch.ones(4, 7)
    else:
        moved = tensors.pop(name)
        if change == "name":
            tensors[name.replace("layers.1", "layers.9")] = moved
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert "does not fit the model" in refusal(folder, adapter=adapter)


# ---- info says what a run would


def info(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["info", "--device", "cpu", *map(str, arguments)])


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "config.json").rename(folder / "c.json"),
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=9),
        lambda folder: edit_json(folder / "config.json", hidden_size="large"),
        lambda folder: edit_json(folder / "preprocessor_config.json", image_size=56),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        add_word,
        lose_a_tensor,
    ],
)
def test_info_refuses_what_a_run_would(folder: Path, spoil: Callable[[Path], object]) -> None:
    assert info(folder).exit_code == 0
    spoil(folder)
    found = info(folder)
    assert found.exit_code == 2 and "model:" not in found.stdout
    assert found.stderr.strip().removeprefix("Error: ").rstrip(".") == refusal(folder).rstrip(".")


def test_info_tells_size_and_memory(folder: Path, tmp_path: Path) -> None:
    train_adapter(folder, tmp_path / "adapter")
    fact = info("--adapter", tmp_path / "adapter", "--dtype", "float16").stdout.splitlines()[-1]
    assert fact.startswith(f"model: {folder}, 0.") and f"with the adapter {tmp_path}/adapter; takes 0." in fact
    assert re.search(r"MB in fp16 of the [\d,.]+ MB free on cpu$", fact)


def test_a_model_larger_than_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = Idefics.from_pretrained(folder).model.num_parameters() * 4
    remedies = "--dtype bf16, --quantize int8, a machine", "--quantize int8, a machine", "a machine"
    for free, remedy in zip((size - 1, size // 2 - 1, size // 4), (f"use {each}" for each in remedies), strict=True):
        monkeypatch.setattr(memory_budget, "free_bytes", lambda device, free=free: free)
        by_keyword = remedy.replace("--", "")
        with pytest.raises(DeviceError, match=f"GB in fp32 do not fit on cpu, which has 0.0 GB free: {by_keyword}"):
            Idefics.from_pretrained(folder)
        assert remedy in info(folder).stderr
    monkeypatch.setattr(memory_budget, "free_bytes", lambda device: size // 2)
    Idefics.from_pretrained(folder, dtype="bf16")
    assert info(folder, "--dtype", "bf16").exit_code == 0
    monkeypatch.setattr(memory_budget, "free_bytes", lambda device: size // 8)
    said = info(folder, "--quantize", "int8").stderr
    assert "GB in int8 do not fit on cpu" in said and "free: use a machine" in said


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "CONTAINER_LIMIT", tmp_path / "memory.max")
    free = memory_budget.free_bytes(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("1048576\n")
    assert memory_budget.free_bytes(torch.device("cpu")) == 1048576 < free
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_budget.free_bytes(torch.device("cpu")) > 1048576


@pytest.fixture
def hub(folder: Path, put_into_hub: Callable[..., Path]) -> Path:
    """The cache's snapshot of some/model."""
    return put_into_hub(folder)


def test_info_of_a_hub_model(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"model: {hub}, 0." in info("some/model").stdout
    assert "offline mode" in (offline := info("other/model")).stderr and offline.exit_code == 2
    file = SimpleNamespace(rfilename="model.safetensors", size=18_000_000_000)
    about = SimpleNamespace(siblings=[file], safetensors=SimpleNamespace(total=1000))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **options: about)
    assert "other/model, not cached: 18,000.0 MB of weights are fetched when it is used" in info("other/model").stdout
    about.safetensors.total = 10**15
    assert "do not fit on cpu" in info("other/model").stderr
    assert "GB in int8 do not fit on cpu" in info("other/model", "--quantize", "int8").stderr
    about.safetensors.total = 10**9
    monkeypatch.setattr(memory_budget, "free_bytes", lambda device: 3 * 10**9 // 2)
    assert "free: use --quantize int8, a machine" in info("other/model").stderr
    assert "are fetched when it is used" in info("other/model", "--quantize", "int8").stdout
    about.siblings = []
    about.safetensors = None
    assert "has no weights" in info("other/model").stderr


def test_a_fetch_that_was_cut_short_is_continued(hub: Path) -> None:
    """Not refused for the missing files before they can be fetched."""
    (hub / "model.safetensors").unlink()
    assert weights_digest(ModelRequest("some/model")) is None


def test_the_base_of_an_adapter_may_be_cached(hub: Path, folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    train_adapter(folder, adapter)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="some/model")
    assert ModelRequest(adapter=str(adapter)).model == "some/model"
    assert texts(Idefics.from_pretrained(adapter=adapter)) == texts(Idefics.from_pretrained(folder, adapter=adapter))
