"""What a run takes by arithmetic, beside what the device in software counts as allocated."""

from __future__ import annotations

import pytest
from software_cuda import SoftwareCuda

from idefics_cli.bench.options import BenchOptions
from idefics_cli.bench.subjects import random_subject
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.engine.memory_budget import VISION_BATCH, MemoryPlan
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.engine.prompt_source import IterableSource
from idefics_cli.engine.scheduler import Scheduler

WITHIN = (0.6, 1.1)  # counted, of what was planned over the weights


@pytest.mark.parametrize(("dtype", "rows", "beams"), [("bf16", 24, 1), ("fp32", 8, 3)])
def test_memory_is_as_planned(dtype: str, rows: int, beams: int) -> None:
    with SoftwareCuda(shapes_only=True) as gpu:
        subject = random_subject(BenchOptions(ModelRequest("", dtype=dtype), random="mid", rows=rows), gpu.device)
        weights = gpu.allocated
        plan = MemoryPlan.of(subject.model.config, subject.model.num_parameters(), subject.model.dtype.itemsize)
        assert weights == pytest.approx(plan.weights, rel=0.01)
        prompts, decoding = IterableSource(subject.prompts.draw(0)), DecodingOptions(num_beams=beams, max_new_tokens=20)
        scheduler = Scheduler(subject.engine(rows), prompts, decoding, subject.vocabulary)
        gpu.peak = gpu.allocated
        for _ in range(3):
            scheduler.advance(scheduler.admit())
    store = scheduler.store
    kept = scheduler.engine.latents.num_bytes
    vision = plan.vision * min(rows, VISION_BATCH) // VISION_BATCH
    planned = rows * plan.row(store.prompt_slots, store.tree_slots, beams) + max(vision, kept)
    assert WITHIN[0] <= (gpu.peak - weights) / planned <= WITHIN[1], (gpu.peak - weights, planned)
