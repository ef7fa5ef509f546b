"""What goes wrong on a GPU, planted in the engine one at a time: the tests of the device must see it.

Each plant is a line of the package, changed, and the work or the count that shows it.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from on_device import WORK, alike, moved, steps
from prompts_for_tests import MODELS
from software_cuda import SoftwareCuda

from idefics_cli.engine import (
    beam_search,
    decode_graph,
    embed,
    kv_cache,
    likelihood,
    prefill,
    scheduler,
    tree_attention,
    varlen,
)
from idefics_cli.engine.engine import Engine

needs_software = pytest.mark.skipif(torch.cuda.is_available(), reason="planted for the device in software")


@contextmanager
def planted(function: Any, old: str, new: str) -> Iterator[None]:
    """The function with `new` in place of `old`, which it must hold once."""
    inner = inspect.unwrap(function)
    inner = getattr(inner, "__func__", inner)
    source = textwrap.dedent(inspect.getsource(inner))
    assert source.count(old) == 1, f"{inner.__qualname__} holds {old!r} {source.count(old)} times"
    made: dict[str, Any] = {}
    changed = "from __future__ import annotations\n" + source.replace(old, new)
    exec(compile(changed, inner.__code__.co_filename, "exec"), {**inner.__globals__, "torch": torch}, made)
    found = inspect.unwrap(made[inner.__name__])
    code, inner.__code__ = inner.__code__, getattr(found, "__func__", found).__code__
    try:
        yield
    finally:
        inner.__code__ = code


def waits_of_a_step() -> None:
    assert len(steps(3)[-1].waits) == 1


@cache
def on_cpu(name: str) -> list[Any]:
    return WORK[name](MODELS[0])


def same(name: str, index: int = 0) -> Callable[[], None]:
    def check() -> None:
        with SoftwareCuda(index):
            assert alike(on_cpu(name), WORK[name](moved(MODELS[0], index)))

    check.work = name
    return check


PINNED_INDEX = """pinned = torch.empty(len(ends), dtype=torch.long, pin_memory=True)
    pinned.copy_(torch.tensor(ends))
    sent = pinned.to(packed.device, non_blocking=True)
    pinned.fill_(1)
    return packed[0, sent - 1]"""


@dataclass(frozen=True)
class Plant:
    name: str
    function: Any
    old: str
    new: str
    shown_by: Callable[[], None]


PLANTS = [
    Plant(
        "rows' places stay on the host",
        prefill.PrefillBatch.forward,
        "PackedRows(self.lengths, device,",
        "PackedRows(self.lengths, 'cpu',",
        same("beams"),
    ),
    Plant(
        "the CPU's kernel is called",
        tree_attention.attend_part,
        'query.device.type == "cpu" and query.dtype ==',
        "query.dtype ==",
        same("shots"),
    ),
    Plant(
        "a step asks the device",
        scheduler.Scheduler._next_logits,
        "steps = state.length - 1",
        "steps = state.length - 1 if not (state.length < 1).any() else None",
        waits_of_a_step,
    ),
    Plant(
        "a step indexes by a mask",
        kv_cache.KVStore.advance,
        "places = torch.arange",
        "self.ancestors[self.ancestors]\n    places = torch.arange",
        waits_of_a_step,
    ),
    Plant(
        "storage is not zeroed", kv_cache.KVStore.grow, "old.new_zeros(", "old.new_empty(", same("torch's attention")
    ),
    Plant(
        "a pinned buffer is written before it is sent",
        varlen.PackedRows.last,
        "return packed[0, send_ids(ends, packed.device) - 1]",
        PINNED_INDEX,
        same("beams"),
    ),
    Plant(
        "a result is read before it is there",
        scheduler.Scheduler.evict,
        ".tolist()  #",
        ".to('cpu', non_blocking=True).tolist()  #",
        same("beams"),
    ),
    Plant(
        "numpy of a device's tensor",
        embed._latents,
        "engine.encode_images(batch, distinct).cpu()",
        "torch.from_numpy(engine.encode_images(batch, distinct).numpy())",
        same("latents"),
    ),
    Plant(
        "a mask is made on the host",
        tree_attention.DecodeMemory.of.__func__,
        "mask = torch.zeros(visible.shape, dtype=dtype, device=device)",
        "mask = torch.zeros(visible.shape, dtype=dtype)",
        same("torch's attention"),
    ),
    Plant(
        "latents stay on the host",
        Engine.encode_images,
        "send(latents.to(self.model.dtype), self.model.device)",
        "latents.to(self.model.dtype)",
        same("texts from latents"),
    ),
    Plant(
        "token ids stay on the host",
        prefill.PrefillBatch.forward,
        "send(self._padded(), device)",
        "self._padded()",
        same("shots"),
    ),
    Plant(
        "random numbers stay on the host",
        scheduler.Scheduler._draws,
        "send(torch.stack(draws), self.model.device)",
        "torch.stack(draws)",
        same("samples"),
    ),
    Plant(
        "the step loops over rows on the host",
        scheduler.Scheduler.decode_step,
        "self.engine.times.steps += 1",
        "self.engine.times.steps += int(self.state.length[0]) > 0",
        waits_of_a_step,
    ),
    Plant(
        "choices are read while they are on their way",
        likelihood.log_probabilities,
        ".double().cpu()",
        ".double().to('cpu', non_blocking=True)",
        same("choices"),
    ),
    Plant(
        "a beam's tokens are kept on the host",
        beam_search.extended,
        "return sequences.scatter(2, place,",
        "return sequences.scatter(2, place.cpu(),",
        same("greedy"),
    ),
    Plant(
        "the order of beams is looked up on the host",
        kv_cache.KVStore.advance,
        "table = table.scatter(2, self.newest[rows][:, :, None], True)",
        "slots = self.newest[rows].tolist()\n    table = table.scatter(2, torch.tensor(slots, device="
        "table.device)[:, :, None], True)",
        waits_of_a_step,
    ),
    Plant(
        "a graph asks the device",
        scheduler.Scheduler._next_state,
        "return state",
        "return state if state.done.shape[0] > int(state.done.sum()) - 1 else state",
        same("beams"),
    ),
    Plant(
        "a graph reads what has moved",
        decode_graph.DecodeGraphs._holds,
        "is_same = ",
        "is_same = bool(self._storage) or ",
        same("long texts"),
    ),
    Plant(
        "a graph's rows are not loaded",
        decode_graph.DecodeGraphs.step,
        "if state is not self._given:",
        "if self._given is None:",
        same("greedy"),
    ),
    Plant(
        "a graph is captured on device 0",
        decode_graph.DecodeGraphs._captured,
        "stream=capture_stream(device)",
        "stream=None",
        same("beams", index=1),
    ),
    Plant(
        "device 0 is taken for the model's",
        scheduler.Scheduler._context_of,
        "send_ids(rows, self.model.device)",
        "send_ids(rows, self.model.device.type)",
        same("beams", index=1),
    ),
]


@needs_software
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_bug_is_seen(plant: Plant) -> None:
    if plant.shown_by is not waits_of_a_step:
        on_cpu(plant.shown_by.work)  # before anything is planted
    with planted(plant.function, plant.old, plant.new), pytest.raises(Exception) as caught:
        plant.shown_by()
    assert not isinstance(caught.value, SyntaxError | NameError | AttributeError), caught.value


@needs_software
def test_without_a_plant_nothing_is_seen() -> None:
    waits_of_a_step()
