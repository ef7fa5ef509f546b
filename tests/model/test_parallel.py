"""One model in two processes beside the same in one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from in_ranks import first_result
from PIL import Image
from tiny_models import save_checkpoint, tiny_config
from transformers.integrations import accelerate

from idefics_cli.engine import kv_cache
from idefics_cli.engine.kv_cache import NO_PREFIX
from idefics_cli.engine.prompt_source import IterableSource
from idefics_cli.engine.tree_attention import PrefillMemory
from idefics_cli.engine.varlen import PackedRows
from idefics_cli.errors import DeviceError, IdeficsError
from idefics_cli.loaded_model import LoadedModel
from idefics_cli.model import modeling, vision
from idefics_cli.model.decoder import IdeficsAttention, IdeficsMLP
from idefics_cli.model.parallel import PLAN, require_divisible, style_of
from idefics_cli.ranks import Ranks
from idefics_cli.result import Result

TEXTS = ["a red dog", "two", "what is this ?", "on a hill", "yes", "blue"]
Written = list[tuple[str, float]]


def load(folder: Path, ranks: Ranks | None = None, **options: Any) -> LoadedModel:
    return LoadedModel.from_pretrained(folder, device="cpu", ranks=ranks, **{"batch_size": 4, **options})


def images() -> list[Image.Image]:
    draw = random.Random(1)
    return [Image.frombytes("RGB", (28, 28), draw.randbytes(28 * 28 * 3)) for _ in range(6)]


def prompts(num_shots: int) -> list[list[Any]]:
    shown = images()
    shots = [part for shot in range(num_shots) for part in (shown[shot], TEXTS[shot])]
    return [[*shots, shown[index], TEXTS[-1 - index]] for index in range(6)]


def written(results: Iterable[Result]) -> Written:
    return [(each.text, each.score) for result in results for each in result.candidates]


def everything(model: LoadedModel) -> Written:
    """With 0 and 4 shots, of 1, 3 and 5 beams, samples, choices, and latents in place of images."""
    found: Written = []
    for num_shots in (0, 4):
        asked = prompts(num_shots)
        for beams in (1, 3, 5):
            found += continued(model, asked, num_beams=beams, num_return_sequences=beams)
        found += in_order(model.score_stream(IterableSource([model.encode_choices(each, TEXTS[:4]) for each in asked])))
    latents = [each for _, each in model.embed_stream(IterableSource(list(map(model.encode_image, images()))))]
    found += continued(model, [[each, "what"] for each in latents])
    return found + continued(model, asked, do_sample=True, seed=3)


def continued(model: LoadedModel, asked: list[list[Any]], **decoding: Any) -> Written:
    encoded = [model.encode(prompt, 5) for prompt in asked]
    return in_order(model.stream(IterableSource(encoded), max_new_tokens=5, **decoding))


def in_order(results: Iterable[tuple[int, Result]]) -> Written:
    """In the order of the prompts."""
    return written(result for _, result in sorted(results, key=lambda each: each[0]))


def assert_same(found: Written, expected: Written) -> None:
    assert [text for text, _ in found] == [text for text, _ in expected]
    torch.testing.assert_close(
        torch.tensor([score for _, score in found]), torch.tensor([score for _, score in expected]), atol=1e-5, rtol=0
    )


def split_bytes(model: LoadedModel) -> int:
    named = model.model.named_parameters()
    return sum(each.nbytes for name, each in named if style_of(name.removesuffix(".weight")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def in_two(ranks: Ranks, folder: Path, num_schedules: int) -> tuple[Written, int, list[Written]]:
    model = load(folder, ranks)
    if ranks.rank:
        model.follow()
    return everything(model), split_bytes(model), [slowly(model, seed) for seed in range(num_schedules)]


class SlowSource:
    """Prompts that are ready at random times."""

    def __init__(self, encoded: list[Any], seed: int) -> None:
        self._left, self._draw = iter(encoded), random.Random(seed)

    def take(self, most: int, wait: bool) -> list[Any]:
        time.sleep(self._draw.choice((0, 0, 0.002)))
        return list(islice(self._left, self._draw.randint(int(wait), most)))


def slowly(model: LoadedModel, seed: int | None) -> Written:
    encoded = [model.encode(prompt, 4) for prompt in [*prompts(0), *prompts(1)]]
    source = IterableSource(encoded) if seed is None else SlowSource(encoded, seed)
    return in_order(model.stream(source, num_beams=2, max_new_tokens=4))


@pytest.mark.parametrize("num_schedules", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_two_processes_write_what_one_does(checkpoint: Path, num_schedules: int) -> None:
    """And none waits for ever, whenever prompts are ready; each holds half of the split weights."""
    model = load(checkpoint)
    found, num_bytes, slow = first_result(2, in_two, checkpoint, num_schedules)
    assert_same(found, everything(model))
    assert num_bytes * 2 == split_bytes(model)
    expected = slowly(model, None)
    for each in slow:
        assert_same(each, expected)


@pytest.mark.parametrize("device_map", ["auto", pytest.param("sequential", marks=pytest.mark.slow)])
def test_a_model_spread_over_memory_and_disk_writes_what_one_in_memory_does(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, device_map: str
) -> None:
    expected = everything(load(checkpoint))
    monkeypatch.setattr(accelerate, "get_max_memory", lambda given=None: {"cpu": 150_000, "disk": 10**9})
    model = LoadedModel.from_pretrained(checkpoint, device_map=device_map, batch_size=4)
    places = set(model.model.hf_device_map.values())
    away = [name for name, each in model.model.named_parameters() if each.is_meta]
    assert places == {"cpu", "disk"} and len(away) > 50, (places, away)
    assert_same(everything(model), expected)
    assert model.model.device == torch.device("cpu") and model.engine.is_eager


def test_what_cannot_be_spread_is_refused(checkpoint: Path) -> None:
    with pytest.raises(IdeficsError, match="--device cannot be used with --device-map"):
        LoadedModel.from_pretrained(checkpoint, device_map="auto", device="cpu")
    with pytest.raises(IdeficsError, match="--device-map is for one process"):
        LoadedModel.from_pretrained(checkpoint, device_map="auto", ranks=SimpleNamespace())


def test_a_memory_moves_with_a_spread_model() -> None:
    """What is on a layer's device stays, masks and tables move to it."""
    rows = PackedRows([2, 1])
    moved = PrefillMemory(NO_PREFIX, rows, [torch.zeros(1)], [], torch.zeros(1), torch.zeros(1)).to("meta")
    assert moved.image_mask.is_meta and moved.rows.pack(torch.zeros(2, 2, device="meta")).is_meta
    assert not moved.key_values[0].is_meta


def without_memory(ranks: Ranks, folder: Path, faults: tuple[tuple[int, str, int], ...]) -> tuple[Written, int]:
    """Memory ends in the process of a rank at the call of a number in a part of the model."""
    model = load(folder, ranks)
    parts: dict[str, tuple[Any, str]] = {
        "mlp": (IdeficsMLP, "forward"),
        "attention": (IdeficsAttention, "forward"),
        "head": (modeling.IdeficsForVisionText2Text, "logits"),
        "vision": (vision.IdeficsVisionTransformer, "forward"),
        "space": (kv_cache.KVStore, "grow"),
    }
    for rank, name, number in faults:
        if rank == ranks.rank:
            owner, attribute = parts[name]
            setattr(owner, attribute, failing_at(number, getattr(owner, attribute)))
    if ranks.rank:
        model.follow()
    return slowly(model, None), model.engine.batch_size.now


def failing_at(number: int, work: Callable[..., Any]) -> Callable[..., Any]:
    calls: Iterator[int] = iter(range(10**9))

    def failing(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == number:
            raise torch.OutOfMemoryError("planted")
        return work(*arguments, **keywords)

    return failing


@pytest.mark.parametrize(
    "faults",
    [
        ((1, "mlp", 3), (0, "attention", 40)),
        ((0, "head", 2), (1, "space", 5)),
        pytest.param(((1, "vision", 0), (0, "mlp", 0)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_memory_that_ends_in_one_process_ends_in_all(checkpoint: Path, faults: tuple[Any, ...]) -> None:
    """Both do fewer rows from then on, and no text changes."""
    found, batch_size = first_result(2, without_memory, checkpoint, faults)
    assert_same(found, slowly(load(checkpoint), None))
    assert batch_size == 4 // 2 ** sum(name != "vision" for _, name, _ in faults)


def test_heads_that_cannot_be_dealt_out_are_refused() -> None:
    with pytest.raises(DeviceError, match="4 attention heads cannot be split over 3 processes: start 2 or 4"):
        require_divisible(tiny_config(), 3)


def test_every_layer_of_the_text_side_is_split_and_no_other() -> None:
    model = modeling.IdeficsForVisionText2Text(tiny_config())
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    split = {name for name in linear if style_of(name)}
    assert split == {name for name in linear if name.startswith(("model.layers.", "model.gated_cross_attn_layers."))}
    assert {style_of(name) for name in split} == set(PLAN.values())
