"""Which checkpoints are refused, before and while they are loaded, and which are loaded."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_inputs, save_checkpoint, tiny_config

from idefics_cli.checkpoint import devices
from idefics_cli.checkpoint.devices import resolve_dtype
from idefics_cli.checkpoint.files import Checkpoint, stored_shapes
from idefics_cli.checkpoint.find import check_model_request, find_checkpoint
from idefics_cli.checkpoint.load import load_config, load_network, meta_network
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.cli.info import model_facts
from idefics_cli.errors import CheckpointError, DeviceError, IdeficsError
from idefics_cli.idefics import Idefics
from idefics_cli.model import packed_linear
from idefics_cli.model.modeling import IdeficsForVisionText2Text

SAFETENSORS = "model.safetensors"
PICKLE = "adapter_model.bin"  # the one pickle's name that transformers takes from a config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def load(folder: Path, **changes: object) -> torch.nn.Module:
    checkpoint = find_checkpoint(ModelRequest(str(folder), **changes))
    expected = meta_network(checkpoint, load_config(checkpoint))
    return load_network(checkpoint, expected, torch.device("cpu"), torch.float32)


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def to_pickles(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def refusal(folder: Path | str, **changes: object) -> str:
    """What loading says; it is one line."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def early_refusal(folder: Path | str, **changes: object) -> str:
    """What is said before anything is loaded."""
    with pytest.raises(IdeficsError) as caught:
        check_model_request(ModelRequest(str(folder), **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_single_and_sharded_files_give_the_same_model(folder: Path, tmp_path: Path) -> None:
    one = load(folder)
    one.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(folder / name, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    many = load(tmp_path / "sharded")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), many.state_dict().values(), strict=True))


def test_no_such_model() -> None:
    for model in ("./nowhere", "/nowhere/at/all", "not a hub id", "onlyname", "~nobody/at/all", f"./{'n' * 5000}"):
        assert "no model" in early_refusal(model)


def test_a_file_is_not_a_model(folder: Path) -> None:
    assert "folder" in early_refusal(folder / "model.safetensors")


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def change_config(**changes: object) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def truncate(kept: int) -> Callable[[Path], object]:
    return lambda folder: (folder / SAFETENSORS).write_bytes((folder / SAFETENSORS).read_bytes()[:kept])


def lose_a_shard(folder: Path) -> None:
    load(folder).save_pretrained(folder, max_shard_size="60KB")
    (folder / SAFETENSORS).unlink(missing_ok=True)
    next(folder.glob("model-00002-*.safetensors")).unlink()


def point_elsewhere(folder: Path) -> None:
    (folder / SAFETENSORS).rename(folder.parent / "elsewhere.safetensors")
    (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))


def leave_an_index_of_pickles(folder: Path) -> None:
    """As a hub's model of pickles is fetched without --allow-pickle."""
    (folder / SAFETENSORS).unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "pytorch_model-1.bin"}}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (remove("config.json"), "config.json"),
        *((write("config.json", text), "config.json") for text in ("{", "[]", '"idefics"', "", "[" * 100_000)),
        (change_config(model_type="llama"), "llama"),
        (remove("tokenizer.json"), "no tokenizer"),
        (remove(SAFETENSORS), "no weights"),
        (write("adapter_config.json", "{}"), "adapter"),
        *((truncate(kept), "damaged or cut short") for kept in (0, 4, 100, -1)),
        (lose_a_shard, "model-00002-"),
        (point_elsewhere, "out of its folder"),
        (leave_an_index_of_pickles, "--allow-pickle"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(folder: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(folder)
    assert said in early_refusal(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": "large"}, "config.json"),
        ({"hidden_act": "no such"}, "config.json"),
        ({"alpha_type": "no such"}, "config.json"),
        ({"num_attention_heads": 7}, "config.json"),
        ({"num_attention_heads": -4}, "has -4 attention heads"),
        ({"cross_layer_interval": 0}, "config.json"),
        ({"pad_token_id": 10_000}, "config.json"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantized"),
    ],
)
def test_a_config_of_which_no_network_can_be_made(folder: Path, change: dict, said: str) -> None:
    edit_json(folder / "config.json", **change)
    assert said in refusal(folder)


def test_nothing_as_large_as_a_damaged_config_says_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_json(folder / "config.json", hidden_size=32_000)
    monkeypatch.setattr(devices, "bf16_gain", None)
    with pytest.raises(CheckpointError, match="do not fit their config"):
        Idefics.from_pretrained(folder, device="cpu")
    with pytest.raises(CheckpointError, match="do not fit their config"):
        model_facts(ModelRequest(str(folder), device="cpu"))


@pytest.mark.parametrize("pickled", [False, True])
def test_wrong_tensors_are_named_before_a_weight_is_read(
    folder: Path, pickled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("model.layers.2.mlp.up_proj.weight")
        tensors.update({"model.extra": torch.ones(2), "model.norm.weight": torch.ones(3)})

    edit_tensors(folder, spoil)
    if pickled:
        to_pickles(folder)
    monkeypatch.setattr(IdeficsForVisionText2Text, "from_pretrained", None)
    said = refusal(folder, allow_pickle=pickled)
    assert "1 missing (model.layers.2.mlp.up_proj.weight)" in said
    assert "1 unexpected (model.extra)" in said
    assert "1 of another shape (model.norm.weight (3,) instead of (32,))" in said


def test_a_tied_tensor_may_be_stored_once(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("lm_head")])
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_unused_buffers_of_2023_are_ignored(folder: Path) -> None:
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.vision_model.embeddings.position_ids": torch.arange(5).unsqueeze(0),
    }
    edit_tensors(folder, lambda tensors: tensors.update(buffers))
    edit_json(folder / "config.json", max_sequence_length=2048, cross_layer_activation_function="swiglu")
    load(folder)


def test_pickles_are_refused_until_allowed(folder: Path) -> None:
    expected = load(folder).state_dict()
    to_pickles(folder)
    assert "--allow-pickle" in early_refusal(folder)
    assert "--allow-pickle" in refusal(folder)
    got = load(folder, allow_pickle=True).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_allowing_pickles_does_not_prefer_them(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    load(folder, allow_pickle=True)


def test_a_pickle_that_would_run_code_does_not(folder: Path, tmp_path: Path) -> None:
    to_pickles(folder)
    torch.save({"model.norm.weight": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    refusal(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_config_names_no_other_weights_and_no_kernels(folder: Path) -> None:
    """transformers would load this pickle although safetensors were asked for, and fetch that code from the hub."""
    expected = load(folder).state_dict()["model.norm.weight"]
    torch.save({**load_file(folder / "model.safetensors"), "model.norm.weight": 0 * expected}, folder / PICKLE)
    edit_json(folder / "config.json", transformers_weights=PICKLE, attn_implementation="kernels-community/flash-attn2")
    assert torch.equal(load(folder).state_dict()["model.norm.weight"], expected)


def full_device(*arguments: object, device_map: dict, **options: object) -> None:
    assert device_map == {"": torch.device("cpu")}
    raise torch.OutOfMemoryError("CUDA out of memory")


def full_machine(*arguments: object, **options: object) -> torch.Tensor:
    return torch.empty(1 << 62, dtype=torch.uint8)


@pytest.mark.parametrize("full", [full_device, full_machine])
def test_a_place_that_does_not_hold_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, full: Callable[..., object]
) -> None:
    monkeypatch.setattr(IdeficsForVisionText2Text, "from_pretrained", full)
    with pytest.raises(DeviceError, match=r"model's \d.* GB in fp32 do not fit on cpu.*: use "):
        load(folder)


@pytest.mark.parametrize("content", [[1], {"model.norm.weight": 1}])
def test_a_pickle_of_something_else(folder: Path, content: object) -> None:
    to_pickles(folder)
    torch.save(content, folder / "pytorch_model.bin")
    assert "cannot be loaded" in refusal(folder, allow_pickle=True)


def test_code_beside_the_weights_is_never_run(folder: Path, tmp_path: Path) -> None:
    for name in ("configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    evil = {"AutoConfig": "configuration_evil.Evil", "AutoModel": "modeling_evil.Evil"}
    edit_json(folder / "config.json", auto_map=evil)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})
    Idefics.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_unknown_dtype_and_device(folder: Path) -> None:
    assert "auto, bf16, fp16, fp32" in early_refusal(folder, dtype="int3")
    for device in ("tpu", "cuda:", "cuda:99999999999999999999"):
        assert "cuda:N" in early_refusal(folder, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_on_a_machine_without(folder: Path) -> None:
    for device in ("cuda", "cuda:3"):
        with pytest.raises(DeviceError, match=r"CUDA is not available: torch .*; use --device cpu"):
            check_model_request(ModelRequest(str(folder), device=device))


def test_automatic_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert resolve_dtype("bf16", torch.device("cpu")) is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for has_bf16, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has_bf16=has_bf16: has_bf16)
        assert resolve_dtype("auto", torch.device("cuda")) is expected


@pytest.mark.parametrize(
    ("has_amx", "bf16_seconds", "smallest", "expected"),
    [(False, 0.1, 0, "32"), (True, 0.9, 0, "32"), (True, 0.5, 0, "b"), (True, 0.5, 1 << 20, "32")],
)
def test_bf16_on_a_cpu_that_is_measured_to_be_faster_in_it(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_amx: bool,
    bf16_seconds: float,
    smallest: int,
    expected: str,
) -> None:
    """The capability and the times of AMX are made up. What was once measured counts later, whatever the clock says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(devices, "SMALLEST_MATRIX", smallest)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    seconds = {torch.float32: 1.0, torch.bfloat16: bf16_seconds}
    monkeypatch.setattr(packed_linear, "seconds_of_layer", lambda hidden, wide, rows, dtype: seconds[dtype])
    model = Idefics.from_pretrained(folder, device="cpu")
    assert model.model.dtype is {"32": torch.float32, "b": torch.bfloat16}[expected]
    seconds[torch.bfloat16] = 1.4 - bf16_seconds  # now the other one is faster
    assert Idefics.from_pretrained(folder, device="cpu").model.dtype is model.model.dtype
    assert Idefics.from_pretrained(folder, device="cpu", dtype="fp32").model.dtype is torch.float32


def test_a_hub_model_that_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "not cached" in refusal("nobody/nothing")


def test_a_line_that_breaks_while_a_model_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args, **options):
        raise RuntimeError("connection reset")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    assert "cannot be fetched (connection reset)" in refusal("some/model")


def test_a_cached_hub_model_loads_offline(folder: Path, put_into_hub: Callable[..., Path]) -> None:
    put_into_hub(folder)
    model = Idefics.from_pretrained("some/model")
    assert model.generate([["hello"]], max_new_tokens=2)[0].error is None


def test_weights_are_those_of_the_file(folder: Path) -> None:
    """Nothing is initialised again, frozen wrongly or cast on the way."""
    model = load(folder)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    inputs = random_inputs(tiny_config())
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_a_file_larger_than_memory_is_measured(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 40]}}).encode()
    file = tmp_path / SAFETENSORS
    with file.open("wb") as written:
        written.write(len(header).to_bytes(8, "little") + header)
        written.truncate(8 + len(header) + (1 << 40))
    assert stored_shapes(Checkpoint(tmp_path, (file,), is_pickled=False)) == {"a": (1 << 20, 1 << 20)}
