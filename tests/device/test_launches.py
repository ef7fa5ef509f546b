"""How many kernels a decode step of idefics-9b launches, counted without computing anything."""

from __future__ import annotations

import pytest
import torch
from software_cuda import SoftwareCuda

from idefics_cli.bench.options import BenchOptions
from idefics_cli.bench.subjects import PAD, RANDOM_ENDS, RandomPrompts, random_config
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.engine.engine import Engine
from idefics_cli.engine.options import DecodingOptions, Vocabulary
from idefics_cli.engine.prompt_source import EncodedPrompt, IterableSource
from idefics_cli.engine.scheduler import Scheduler
from idefics_cli.model.joined_linear import join_linears
from idefics_cli.model.modeling import IdeficsForVisionText2Text

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counted on the device in software")


def first_step(shots: int, rows: int, beams: int) -> tuple[int, int]:
    """Launches of a step that is captured, too: those by themselves, and those in the graph."""
    config = random_config("9b")
    with torch.device("meta"):
        network = IdeficsForVisionText2Text._from_config(config, dtype=torch.bfloat16)
    prompts = RandomPrompts(config, BenchOptions(ModelRequest(""), random="9b", rows=rows, shots=shots)).draw(1)
    latents = torch.zeros(config.perceiver_config.resampler_n_latents, config.vision_config.embed_dim)
    some = [
        EncodedPrompt(each.input_ids, [latents] * len(each.pixels), each.image_keys, shared_len=each.shared_len)
        for each in prompts
    ]
    added = config.vocab_size + 1
    vocabulary = Vocabulary(RANDOM_ENDS, (added, added - 1), PAD, added)
    with torch.inference_mode(), SoftwareCuda(shapes_only=True) as gpu:
        network = network.eval().requires_grad_(False).to(gpu.device)
        join_linears(network)
        engine = Engine(network, vocabulary, rows)
        scheduler = Scheduler(engine, IterableSource(some), DecodingOptions(beams, 20), vocabulary)
        scheduler.prefill(scheduler.admit())
        gpu.clear()
        scheduler.decode_step()
        return gpu.launches.total() - gpu.captured, gpu.captured


@pytest.mark.parametrize(("shots", "eager", "in_graph"), [(0, 650, 460), (4, 700, 500)])
def test_a_step_of_9b_has_few_launches_whatever_the_rows_and_beams(shots: int, eager: int, in_graph: int) -> None:
    by_itself, captured = first_step(shots, rows=2, beams=3)
    assert by_itself <= eager and captured <= in_graph, (by_itself, captured)
    assert first_step(shots, rows=8, beams=5) == (by_itself, captured)
