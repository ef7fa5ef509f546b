"""`idefics bench` on the smallest model: what it measures, and that both sides say the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from idefics_cli.bench.compare import Bench, Run, agreement, timed_runs, warm_up
from idefics_cli.bench.floor import (
    AttentionProduct,
    Counts,
    Product,
    Work,
    copy_bandwidth,
    floor_seconds,
    work_of,
)
from idefics_cli.bench.memory import MemoryUse, measured, reset_resident_peak
from idefics_cli.bench.options import BenchOptions
from idefics_cli.bench.report import comparison_table, phase_report, phase_table, run
from idefics_cli.bench.subjects import (
    RANDOM_ENDS,
    RandomPrompts,
    Subject,
    checkpoint_subject,
    random_config,
    random_subject,
    require_space,
    transformers_model,
)
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.cli import app as cli
from idefics_cli.engine.engine import PhaseTimes
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.errors import IdeficsError
from idefics_cli.model.modeling import IdeficsForVisionText2Text

CPU = torch.device("cpu")
OPTIONS = BenchOptions(
    ModelRequest("", device="cpu", dtype="fp32"),
    random="tiny",
    rows=3,
    batch_size=2,
    decoding=DecodingOptions(num_beams=2, max_new_tokens=4),
    repeats=1,
)
BF16 = replace(OPTIONS, request=ModelRequest("", device="cpu", dtype="bf16"))
VARIED = replace(OPTIONS, decoding=DecodingOptions(num_beams=3, max_new_tokens=24), length="varied")
counts_memory = pytest.mark.skipif(not reset_resident_peak(), reason="the kernel does not count memory here")


@pytest.fixture(autouse=True)
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idefics_cli.bench.floor.FLOOR_SECONDS", 0.0)
    monkeypatch.setattr("idefics_cli.bench.floor.FLOOR_BYTES", 1 << 20)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(random_subject(OPTIONS, CPU), OPTIONS)


# Models


def test_transformers_computes_the_same_from_the_same_weights() -> None:
    subject = random_subject(OPTIONS, CPU)
    theirs = transformers_model(subject.model)
    ours = subject.model.state_dict()
    assert all(weight.data_ptr() == ours[name].data_ptr() for name, weight in theirs.state_dict().items())
    inputs = subject.inputs(subject.prompts.draw(0))
    with torch.inference_mode():
        logits, expected = subject.model(**inputs).logits, theirs(**inputs).logits
    torch.testing.assert_close(logits[:, -1], expected[:, -1], atol=1e-4, rtol=1e-4)
    assert float(logits[:, -1].std()) > 1  # a choice of tokens, not noise around none


def test_transformers_gets_its_own_buffers_in_half_precision() -> None:
    theirs = transformers_model(random_subject(BF16, CPU).model)
    assert theirs.dtype == torch.bfloat16
    frequencies = [buffer for name, buffer in theirs.named_buffers() if name.endswith("inv_freq")]
    assert frequencies and all(buffer.dtype == torch.float32 for buffer in frequencies)
    assert theirs.model.vision_model.embeddings.position_ids.tolist() == [list(range(17))]


@pytest.mark.parametrize("subject_of", [random_subject, checkpoint_subject])
def test_auto_is_the_number_format_that_a_run_would_take(
    subject_of: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, request=ModelRequest("demo", device="cpu", dtype="auto"))
    assert subject_of(options, CPU).model.dtype == torch.float32
    monkeypatch.setattr("idefics_cli.checkpoint.devices.bf16_gain", lambda config: 2.0)
    assert subject_of(options, CPU).model.dtype == torch.bfloat16


@pytest.mark.parametrize(("size", "millions"), [("mid", 384), ("9b", 8929)])
def test_sizes_have_their_parameters(size: str, millions: int) -> None:
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(random_config(size))
    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


# Prompts


@pytest.mark.parametrize(("shots", "least", "most"), [(0, 20, 25), (4, 110, 120), (32, 755, 765)])
def test_random_prompts_are_as_long_as_official_ones(shots: int, least: int, most: int) -> None:
    config = random_config("tiny")
    prompts = RandomPrompts(config, replace(OPTIONS, shots=shots, rows=20)).draw(0)
    for prompt in prompts:
        assert least <= len(prompt.input_ids) <= most
        assert prompt.input_ids.count(config.vocab_size + 1) == len(prompt.pixels) == shots + 1
        assert not set(prompt.input_ids) & {0, *RANDOM_ENDS}
    assert len({len(prompt.input_ids) for prompt in prompts}) > 1


def test_shots_stay_and_images_change_from_draw_to_draw() -> None:
    drawn = RandomPrompts(random_config("tiny"), replace(OPTIONS, shots=2))
    first, second = drawn.draw(0), drawn.draw(1)
    prompts = [*first, *second]
    assert all(prompt.pixels[:2] == first[0].pixels[:2] for prompt in prompts)
    assert all(prompt.input_ids[:50] == first[0].input_ids[:50] and prompt.shared_len == 50 for prompt in prompts)
    assert len({prompt.pixels[2].sum().item() for prompt in prompts}) == len(prompts)
    again = RandomPrompts(random_config("tiny"), replace(OPTIONS, shots=2)).draw(0)
    assert [prompt.input_ids for prompt in again] == [prompt.input_ids for prompt in first]


def test_several_questions_share_an_image() -> None:
    prompts = RandomPrompts(random_config("tiny"), replace(OPTIONS, rows=5, questions_per_image=2)).draw(0)
    images = [prompt.pixels[0].data_ptr() for prompt in prompts]
    assert images[0] == images[1] != images[2] == images[3] != images[4]
    assert len({tuple(prompt.input_ids) for prompt in prompts}) == 5


@pytest.mark.parametrize("instruct", [False, True])
def test_a_checkpoint_is_asked_about_scenes(tmp_path: Path, instruct: bool) -> None:
    request = ModelRequest(str(save_checkpoint(tmp_path, instruct)), device="cpu")
    options = replace(VARIED, request=request, random=None, shots=1, rows=4, questions_per_image=2)
    prompts = checkpoint_subject(options, CPU).prompts
    drawn = prompts.draw(0)
    texts = [prompts.encoder.decode(prompt.input_ids) for prompt in drawn]
    assert all("What" in text or "How" in text for text in texts)
    assert texts[0] != texts[1] and texts[2] != texts[3]
    assert all(len(prompt.pixels) == 2 for prompt in drawn)
    assert drawn[0].pixels[1].equal(drawn[1].pixels[1])
    start = drawn[0].shared_len
    assert start > 20 and all(each.input_ids[:start] == drawn[0].input_ids[:start] for each in drawn)
    assert drawn[0].input_ids[:start].count(prompts.encoder.image_token_id) == 1
    assert ("Assistant" in texts[0]) == instruct
    captions = checkpoint_subject(replace(options, questions_per_image=1), CPU).prompts.draw(0)
    assert len(captions) == 4 and len({len(prompt.pixels) for prompt in captions}) == 1
    with pytest.raises(IdeficsError, match="lower --shots"):
        require_space(checkpoint_subject(replace(options, shots=8), CPU), options)


# Both sides


@pytest.mark.parametrize("options", [OPTIONS, replace(VARIED, rows=8, batch_size=8)], ids=["fixed", "varied"])
def test_scores_are_those_of_generate_and_of_one_forward_pass(options: BenchOptions) -> None:
    bench = Bench(random_subject(options, CPU), options)
    prompts = bench.draw(1)
    ours, theirs = bench.run_ours(prompts), bench.run_theirs(prompts, with_scores=True)
    without = bench.run_theirs(prompts)
    assert [ids for ids, _ in ours.texts] == [ids for ids, _ in theirs.texts] == [ids for ids, _ in without.texts]
    lengths = {len(ids) for ids, _ in ours.texts}
    assert lengths == {4} if options is OPTIONS else len(lengths) > 1 and min(lengths) < 24
    for prompt, (token_ids, score), (_, our_score) in zip(prompts, theirs.texts, ours.texts, strict=True):
        assert bench.score(prompt, token_ids) == pytest.approx(score, abs=1e-4)
        assert our_score == pytest.approx(score, abs=1e-4)


def test_a_text_that_differs_is_found_and_scored(bench: Bench) -> None:
    theirs = bench.run_theirs(bench.draw(3), with_scores=True)
    assert {len(token_ids) for token_ids, _ in theirs.texts} == {4}, "fixed texts are as long as they may be"
    changed = [((9, 9, 9, 9), -1.0), *theirs.texts[1:]]
    found = agreement(bench, [(replace(theirs, texts=changed), theirs)])
    assert found["identical"] == pytest.approx(2 / 3)
    assert (found["differing_rows"], found["differing_examined"], found["differing_ties"]) == (1, 1, 0)
    assert found["largest_gap"] > 1e-5 and found["max_score_difference"] == 0.0
    same = agreement(bench, [(theirs, theirs)])
    assert same["identical"] == 1.0 and same["largest_gap"] is None


def test_each_side_goes_first_in_turn_and_floors_follow_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noted(name: str) -> None:
        method = getattr(bench, name)
        monkeypatch.setattr(bench, name, lambda *given, **more: order.append(name) or method(*given, **more))

    for name in ("run_ours", "run_theirs", "with_floors"):
        noted(name)
    monkeypatch.setattr(bench, "options", replace(OPTIONS, repeats=2))
    first, metered = warm_up(bench, [].append)
    assert order == ["run_ours", "run_theirs"] * 2
    assert metered[0].memory is not first[0].memory and first[1].memory == MemoryUse()
    pairs, phased = timed_runs(bench, [].append)
    ours, theirs = ["run_ours", "run_ours", "with_floors"], ["run_theirs", "run_theirs"]
    assert order[4:] == [*theirs, *ours, *ours, *theirs], "each timed run after a short one"
    assert [replace(each, floors={}) for each in phased] == [pair[0] for pair in pairs]
    assert all(each.memory == MemoryUse() for pair in pairs for each in pair)


# Memory


@counts_memory
def test_memory_that_is_taken_and_kept_is_counted() -> None:
    with measured(CPU) as memory:
        kept = torch.ones(8 << 20)  # 32 MB
        passing = torch.ones(16 << 20)  # 64 MB
        del passing
    assert 95e6 < memory.rise < 120e6
    assert 28e6 < memory.kept < 40e6
    assert kept.sum() > 0


# The floor


def counts(**changes: float) -> Counts:
    settings = {"images": 3, "prompt_tokens": 40, "steps": 5, "prompts": 2, "rows": 2, "beams": 3}
    return Counts(**{**settings, "prompt_length": 20.0, "text_length": 5.0, **changes})


def operations(work: Work) -> float:
    products = [each for each in work if isinstance(each, Product)]
    return sum(2 * each.rows * weight.numel() * each.times for each in products for weight in each.weights)


def test_vision_is_what_the_network_multiplies(bench: Bench) -> None:
    written_out = sdpa_kernel(SDPBackend.MATH)  # a fused attention's products are not counted on the CPU
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), written_out:
        bench.subject.model.model.encode_images(torch.randn(1, 3, 3, 56, 56))
    work = work_of(bench.theirs, counts())["vision"]
    attention = [each for each in work if isinstance(each, AttentionProduct)]
    pairs = sum(4 * each.batch * each.queries * each.keys * each.head_dim * each.times for each in attention)
    assert operations(work) + pairs == counter.get_total_flops()


def test_a_decode_step_is_what_the_network_multiplies(bench: Bench) -> None:
    inputs = bench.subject.inputs(bench.draw(0)[:1])
    model = bench.theirs

    def flops(num_tokens: int) -> int:
        kept = {name: value[:, :num_tokens] if name != "pixel_values" else value for name, value in inputs.items()}
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(**kept)
        found = counter.get_flop_counts()["Global"].items()
        return sum(count for operation, count in found if str(operation) in ("aten.mm", "aten.addmm"))

    # The tokens between two lengths: each passes every product once, the head included.
    per_token = (flops(18) - flops(12)) / 6
    work = work_of(model, counts(rows=1, beams=1, steps=1, prompts=1))["decode"]
    prefill = work_of(model, counts(rows=1, prompts=1, prompt_tokens=7))["prefill"]
    without_images = work_of(model, counts(rows=1, prompts=1, prompt_tokens=7, images=0))["prefill"]
    keys_and_values = sum(
        2 * 3 * 8 * projection.weight.numel()  # three images, eight latents
        for layer in model.model.gated_cross_attn_layers
        for projection in (layer.cross_attn.k_proj, layer.cross_attn.v_proj)
    )
    assert operations(prefill) - operations(without_images) == keys_and_values
    added = 2 * model.lm_head.additional_fc.weight.numel()  # two columns: not worth a product of its own
    assert operations(work) == per_token - added


@pytest.mark.parametrize("options", [OPTIONS, BF16], ids=["fp32", "bf16"])
def test_floors_are_measured(options: BenchOptions) -> None:
    model = transformers_model(random_subject(options, CPU).model)
    for work in work_of(model, counts()).values():
        floor = floor_seconds(work, None)
        assert floor["products"] > 0 and floor["attention"] > 0 and "bytes" not in floor
        assert floor_seconds(work, 1e9)["bytes"] > 0
    nothing = work_of(model, counts(images=0))["vision"]
    assert floor_seconds(nothing, None) == {"products": 0, "attention": 0}


def test_the_bandwidth_is_that_of_a_copy() -> None:
    assert copy_bandwidth(CPU, 1 << 20) > 0


# The whole


def test_the_report_is_plain_json_and_a_table() -> None:
    told: list[str] = []
    found = json.loads(json.dumps(run(replace(OPTIONS, repeats=2, shots=1), told.append)))
    assert found["agreement"]["identical"] == 1.0 and found["agreement"]["rows"] == 12
    assert found["agreement"]["max_score_difference"] < 1e-4
    assert len(found["ratios"]) == len(found["ours"]["all_seconds"]) == 2 and found["ratio"] > 0
    assert found["ours"]["tokens"] == found["transformers"]["tokens"] == 12
    assert found["work"]["images"] == 3, "the shot's image is encoded in the first call"
    assert found["work"]["prompt_tokens"] > 0 and found["work"]["steps"] >= 4
    assert found["phases"]["decode"]["above_floor"] > 0
    assert found["settings"]["decoding"]["min_new_tokens"] == 4
    assert len(told) == 6
    assert comparison_table(found).row_count > 5 and phase_table(found["phases"]).row_count == 4


@pytest.mark.parametrize(("shots", "dtype"), [(0, "fp32"), (2, "bf16")])
def test_embeddings_give_the_same_texts_without_the_vision_tower(shots: int, dtype: str) -> None:
    options = replace(OPTIONS, request=ModelRequest("", device="cpu", dtype=dtype), shots=shots)
    plain, embedded = (run(replace(options, embeddings=each)) for each in (False, True))
    assert plain["work"]["images"] == 3 and plain["phases"]["vision"]["seconds"] > 0
    assert embedded["work"]["images"] == 0 and embedded["phases"]["vision"]["seconds"] == 0
    for each in (plain, embedded):  # products of other sizes may round otherwise
        assert each["agreement"].pop("max_score_difference") < (1e-5 if dtype == "fp32" else 0.1)
    assert embedded["agreement"] == plain["agreement"]
    assert dtype == "bf16" or plain["agreement"]["identical"] == 1.0


def test_each_run_stands_beside_its_own_floor() -> None:
    def phased(seconds: float, floor: float) -> Run:
        parts = {"products": 0.75 * floor, "attention": 0.25 * floor}
        floors = {"vision": {"products": 0.0, "attention": 0.0}, "prefill": parts, "decode": parts}
        return Run([], [], 4 * seconds, MemoryUse(), PhaseTimes(prefill=seconds, decode=2 * seconds), floors)

    phases = phase_report([phased(1.0, 1.0), phased(3.0, 2.0), phased(8.0, 4.0)], None)
    assert phases["prefill"]["all_above_floor"] == [1.0, 1.5, 2.0]
    assert (phases["prefill"]["above_floor"], phases["decode"]["above_floor"]) == (1.5, 3.0)
    assert (phases["prefill"]["above_products"], phases["prefill"]["floor_seconds"]) == (2.0, 2.0)
    assert phases["vision"]["above_floor"] is None and phases["vision"]["all_above_floor"] == []
    assert phases["other"]["seconds"] == 12.0 - 3.0 - 6.0


# The command


def test_the_command_prints_one_line_of_json() -> None:
    arguments = "--random tiny --rows 2 --max-new-tokens 3 --num-beams 2 --repeats 1 --device cpu"
    result = CliRunner().invoke(cli.app, ["bench", *arguments.split()])
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert found["agreement"]["identical"] == 1.0
    assert found["settings"]["length"] == "fixed"
    assert "times faster" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--random mid -m demo", "-m"),
        ("--random mid --revision main", "--revision"),
        ("--random mid --allow-pickle", "--allow-pickle"),
        ("--random tiny --threads 99999", "1024"),
        ("--random tiny --rows 2 --scenes 2", "--scenes"),
        ("-m /no/such/model", "no model"),
        ("--random huge", "huge"),
        ("--random tiny --device cuda:99", "cuda" if torch.cuda.is_available() else "CUDA is not available"),
    ],
)
def test_mistakes_end_with_two(arguments: str, said: str) -> None:
    result = CliRunner().invoke(cli.app, ["bench", *arguments.split()])
    assert result.exit_code == 2 and said in result.stderr and result.stdout == ""
