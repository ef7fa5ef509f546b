"""The engine on a CUDA device: the CPU's results, no mixed devices, and no wait of the host where none belongs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from on_device import (
    AFTER_SHOTS,
    BEAMS,
    MIXED,
    QUESTIONS_AFTER_SHOTS,
    WORK,
    advances,
    alike,
    device,
    moved,
    require_same_as_on_cpu,
    scores,
    steps,
    texts,
)
from prompts_for_tests import MODELS, VOCABULARY, after_shots, options, prompts, run_out_of_memory, some_prompts
from software_cuda import SoftwareCuda, Wait
from test_likelihood import questions

from idefics_cli import Idefics
from idefics_cli.bench import floor, report
from idefics_cli.bench.options import BenchOptions
from idefics_cli.checkpoint.devices import resolve_dtype
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.engine.engine import Engine
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.model.decoder import IdeficsRotaryEmbedding

few = settings(max_examples=3, deadline=None, phases=[Phase.explicit, Phase.generate])
lists = {"min_size": 13, "max_size": 13}
some_or_many = pytest.mark.parametrize("examples", [3, pytest.param(10, marks=pytest.mark.slow)])
networks = st.sampled_from(MODELS)
PHOTOS = sorted(Path("examples/images").glob("*.png"))


@pytest.mark.parametrize("name", WORK)
def test_results_are_those_of_the_cpu(name: str) -> None:
    require_same_as_on_cpu(WORK[name])


def test_another_device_than_the_first() -> None:
    require_same_as_on_cpu(WORK["beams"], index=1)


@some_or_many
def test_any_texts_are_those_of_the_cpu(examples: int) -> None:
    @settings(few, max_examples=examples)
    @given(networks, st.lists(prompts(longest_text=30), **lists), options(longest=8), st.integers(1, 4))
    def check(network, some, chosen, rows) -> None:
        require_same_as_on_cpu(
            lambda here: [[ids for ids, _ in row] for row in texts(here, some, chosen, rows)], network
        )

    check()


@some_or_many
def test_after_any_shots_too(examples: int) -> None:
    @settings(few, max_examples=examples)
    @given(
        networks,
        prompts(max_images=2, longest_text=12),
        st.lists(prompts(longest_text=12), **lists),
        options(longest=6),
    )
    def check(network, shots, some, chosen) -> None:
        some = [after_shots(shots, each) for each in some]
        require_same_as_on_cpu(lambda here: [[ids for ids, _ in row] for row in texts(here, some, chosen)], network)

    check()


@few
@given(networks, st.lists(prompts(longest_text=12), min_size=4, max_size=9), options(longest=6), st.integers(1, 4))
def test_a_graphs_texts_are_the_eager_steps(network, some, chosen, rows) -> None:
    with device():
        moved_network = moved(network)
        graph, eager = (texts(moved_network, some, chosen, rows, eager=eager) for eager in (False, True))
    assert alike(eager, graph), (eager, graph)


@few
@given(networks, st.lists(questions, min_size=1, max_size=4))
def test_any_choices_have_the_cpus_scores(network, some) -> None:
    require_same_as_on_cpu(lambda here: scores(here, some), network)


def test_angles_that_depend_on_positions_are_not_captured() -> None:
    network = copy.deepcopy(MODELS[0])
    rope = network.config.rope_parameters | {"rope_type": "dynamic", "factor": 2.0}
    network.config.rope_parameters = rope
    network.model.rotary_emb = IdeficsRotaryEmbedding(network.config)
    require_same_as_on_cpu(WORK["greedy"], network)


def test_rows_back_off_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = texts(MODELS[0], MIXED, BEAMS)
    with device():
        network = moved(MODELS[0])
        monkeypatch.setattr("prompts_for_tests.MODELS", [network])
        run_out_of_memory(monkeypatch, lambda memory: memory.rows.num_rows > 2)
        assert alike(expected, texts(network, MIXED, BEAMS, rows=6))


def test_the_python_api() -> None:
    def everything(model: Idefics) -> list:
        asked = [(photo, "What is this?") for photo in PHOTOS[:3]]
        return [
            [(each.text, each.score) for each in model.caption(PHOTOS[:3], max_new_tokens=8)],
            [(each.text, each.score) for each in model.answer(asked, num_beams=1, max_new_tokens=4)],
            [each.candidates[0].text for each in model.score([([PHOTOS[0], "Is it red?"], ["yes", "no"])])],
            model.embed(PHOTOS[:2]).tolist(),
            model.image_vectors(PHOTOS[:2]).tolist(),
        ]

    expected = everything(Idefics.from_pretrained("demo", device="cpu", dtype="fp32"))
    with device():
        assert alike(expected, everything(Idefics.from_pretrained("demo", device="cuda", dtype="fp32")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["triton", "sdpa"])
def test_scores_of_attention_are_never_written_out(dtype: torch.dtype, attention: str) -> None:
    """Neither in prefill, nor in a step, nor where choices are scored: what has heads ends with their size."""
    config = MODELS[0].config
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    vision_dim = config.vision_config.hidden_size // config.vision_config.num_attention_heads
    sizes = {head_dim, vision_dim, config.perceiver_config.resampler_head_dim, 1}  # 1: a part's share
    with SoftwareCuda() as gpu:
        network = moved(MODELS[0]).to(dtype)
        texts(network, AFTER_SHOTS, BEAMS, attention=attention)
        texts(network, MIXED, BEAMS, attention=attention)
        scores(network, QUESTIONS_AFTER_SHOTS)
        assert sum(shape[-1:] == (head_dim,) for shape in gpu.results) > 10
        of_heads = [each for each in gpu.results if len(each) == 4 and heads in each[1:3] and each[-1] not in sizes]
        assert not of_heads, of_heads
        fused = {"part_attention"} if dtype == torch.bfloat16 else {"_scaled_dot_product_efficient_attention"}
        assert gpu.launches.keys() & fused


def test_a_gpu_is_taken_as_it_is() -> None:
    with SoftwareCuda() as gpu:
        model = Idefics.from_pretrained("demo")
        assert (model.model.device, model.model.dtype) == (gpu.device, torch.bfloat16)
        assert not torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cudnn.allow_tf32
        weights = sum(each.nbytes for each in model.model.parameters())
        assert gpu.peak <= 1.1 * weights, "each weight goes straight to its place"
        torch.cuda.is_bf16_supported = lambda including_emulation=True: including_emulation
        assert resolve_dtype("auto", gpu.device) == torch.float16


BENCHMARKS = [  # every pair of dtype, shots, questions and embeddings
    ("fp32", 0, 1, False),
    ("fp32", 2, 3, True),
    ("bf16", 0, 3, False),
    ("bf16", 2, 1, True),
    ("fp16", 0, 1, True),
    ("fp16", 2, 3, False),
]


@pytest.mark.parametrize(("dtype", "shots", "questions_each", "embeddings"), BENCHMARKS)
def test_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, dtype: str, shots: int, questions_each: int, embeddings: bool
) -> None:
    monkeypatch.setattr(floor, "FLOOR_BYTES", 1 << 16)
    monkeypatch.setattr(floor, "FLOOR_SECONDS", 0.001)
    chosen = BenchOptions(
        ModelRequest("", dtype=dtype, device="cuda"),
        random="tiny",
        shots=shots,
        questions_per_image=questions_each,
        rows=3,
        batch_size=3,
        embeddings=embeddings,
        repeats=1,
        decoding=DecodingOptions(num_beams=2, max_new_tokens=2),
    )
    torch.backends.cuda.enable_cudnn_sdp(True)
    with device():
        found = report.run(chosen, lambda said: None)
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "random weights take the same kernels"
    assert found["phases"]["copy_bandwidth_bytes_per_second"] > 0
    assert found["ours"]["peak_bytes"] > 0 and found["transformers"]["peak_bytes"] > 0
    if dtype == "fp32":
        assert found["agreement"]["identical"] == 1.0


# ---- counts: of the device in software


def test_a_step_waits_once_and_its_launches_do_not_grow_with_the_rows() -> None:
    step = steps(2)[-1]
    assert [wait.line.rsplit(" ", 1)[-1] for wait in step.waits] == ["evict"], step.waits
    assert step.launches == steps(6)[-1].launches


def is_capture(wait: Wait) -> bool:
    return wait.kind == "capture begins"


@pytest.mark.parametrize("shots", [False, True])
def test_the_host_waits_once_for_a_step_twice_where_rows_end_and_not_as_they_begin(shots: bool) -> None:
    """For who has ended, and then for their texts. Whatever is sent goes through pinned memory."""
    found = advances(AFTER_SHOTS * 2 if shots else MIXED, 4, DecodingOptions(num_beams=3, max_new_tokens=10))
    assert sum(each.num_admitted > 0 for each in found) > 2
    for each in found:
        waits = [wait for wait in each.waits if not is_capture(wait)]
        assert len(waits) == (2 if each.num_ended else 0 if each.num_admitted else 1), each


def test_a_step_is_one_graph() -> None:
    for rows in (2, 5):
        admitted, first, *later = steps(rows, shots=True, eager=False)
        assert later and all(step.launches == 1 and len(step.waits) == 1 for step in later), (admitted, first, later)


def test_a_graph_is_captured_once_for_each_number_of_rows_and_prefix() -> None:
    """Texts end one by one: 7 rows are stepped over as 8, 4, 2 and 1."""
    some = [*AFTER_SHOTS, *AFTER_SHOTS, *MIXED, *MIXED]
    with SoftwareCuda() as gpu:
        texts(moved(MODELS[0]), some, DecodingOptions(num_beams=1, max_new_tokens=20), rows=7)
        assert 2 <= gpu.captures <= 2 * 4
        assert gpu.capture_modes == {"thread_local"}, "other threads may use the device meanwhile"
        assert gpu.launches["graph replay"] > 20
        gpu.clear()
        texts(moved(MODELS[0]), some_prompts(3), DecodingOptions(num_beams=4, max_new_tokens=60, min_new_tokens=60))
        assert gpu.captures <= 2 * 4 + 3, "the tree's storage has grown at most twice"


def test_waits_are_for_the_engines_own_device() -> None:
    with device(1) as gpu:
        if gpu is None:
            pytest.skip("counted on the device in software")
        engine = Engine(moved(MODELS[0], 1), VOCABULARY, 2)
        gpu.clear()
        with engine.timed_on_device(), engine.timed("decode"):
            pass
        assert [wait.kind for wait in gpu.waits] == ["synchronize"]
