"""`idefics bench` on the smallest model, with an engine that is transformers' `generate` on our network."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import save_checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from idefics_cli.bench.compare import Bench, Phased, Run, agreement, measure, warm_up
from idefics_cli.bench.floor import Counts, PhaseWork, copy_bandwidth, floor_seconds, work_of
from idefics_cli.bench.memory import MemoryMeter, MemoryUse, forget_resident_peak
from idefics_cli.bench.report import phase_report, run, tables
from idefics_cli.bench.subjects import (
    RANDOM_ENDS,
    BenchOptions,
    RandomPrompts,
    checkpoint_subject,
    random_config,
    random_subject,
    require_room,
    transformers_model,
)
from idefics_cli.checkpoint import ModelRequest
from idefics_cli.cli import app as cli
from idefics_cli.engine import reference
from idefics_cli.engine.options import DecodingOptions, Hypothesis, Vocabulary
from idefics_cli.engine.prompt_source import EncodedPrompt
from idefics_cli.engine.reference import collate
from idefics_cli.errors import IdeficsError
from idefics_cli.model.modeling import IdeficsForVisionText2Text

CPU, FP32 = torch.device("cpu"), torch.float32
ROOT = Path(__file__).parents[2]
OPTIONS = BenchOptions(
    ModelRequest("", device="cpu", dtype="fp32"),
    random="tiny",
    rows=3,
    batch_size=2,
    decoding=DecodingOptions(num_beams=2, max_new_tokens=4),
    repeats=1,
)


class PlainEngine:
    """Answers what the engine answers, with `generate` row by row; all of its time is decoding."""

    def __init__(self, model: IdeficsForVisionText2Text, vocabulary: Vocabulary, rows: int):
        self.model, self.vocabulary = model, vocabulary
        self.waits = False
        self.times = SimpleNamespace(reset=self._reset)
        self._reset()

    def _reset(self) -> None:
        vars(self.times).update(vision=0.0, prefill=0.0, decode=0.0, images=0, prompt_tokens=0, steps=0)

    def generate(
        self, prompts: Iterable[EncodedPrompt], options: DecodingOptions
    ) -> Iterator[tuple[int, list[Hypothesis]]]:
        for index, prompt in reversed(list(enumerate(prompts))):
            started = time.perf_counter()
            inputs = vars(collate([prompt], self.vocabulary, self.model.config.vision_config.image_size))
            (found,) = reference.generate(self.model, inputs, options, self.vocabulary)
            self.times.decode += time.perf_counter() - started
            self.times.images += len(prompt.pixels)
            self.times.prompt_tokens += len(prompt.input_ids)
            self.times.steps += len(found[0].token_ids)
            yield index, found


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(random_subject(OPTIONS, CPU, FP32), OPTIONS, PlainEngine)


# Models


def test_the_weights_are_held_once(bench: Bench) -> None:
    ours = bench.subject.model.state_dict()
    theirs = bench.theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)


def test_transformers_computes_the_same_from_them(bench: Bench) -> None:
    prompts = bench.subject.prompts.draw(0)
    inputs = vars(collate(prompts, bench.subject.vocabulary, bench.subject.image_size))
    with torch.inference_mode():
        ours, theirs = bench.subject.model(**inputs).logits, bench.theirs(**inputs).logits
    torch.testing.assert_close(ours[:, -1], theirs[:, -1], atol=1e-4, rtol=1e-4)
    assert float(ours[:, -1].std()) > 1  # a choice of tokens, not noise around none


def test_transformers_gets_its_own_buffers_in_half_precision() -> None:
    ours = random_subject(OPTIONS, CPU, torch.bfloat16).model
    theirs = transformers_model(ours)
    assert theirs.dtype == torch.bfloat16
    frequencies = [buffer for name, buffer in theirs.named_buffers() if name.endswith("inv_freq")]
    assert frequencies and all(buffer.dtype == torch.float32 for buffer in frequencies)
    positions = theirs.model.vision_model.embeddings.position_ids
    assert positions.tolist() == [list(range(17))]


@pytest.mark.parametrize(("size", "millions"), [("mid", 384), ("9b", 8929)])
def test_sizes_have_their_parameters(size: str, millions: int) -> None:
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(random_config(size))
    found = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert found == pytest.approx(millions, rel=0.005)


# Prompts


@pytest.mark.parametrize(("shots", "least", "most"), [(0, 20, 25), (4, 110, 120), (32, 755, 765)])
def test_random_prompts_are_as_long_as_official_ones(shots: int, least: int, most: int) -> None:
    config = random_config("tiny")
    image_token_id = config.vocab_size + 1
    prompts = RandomPrompts(config, replace(OPTIONS, shots=shots, rows=20)).draw(0)
    for prompt in prompts:
        assert least <= len(prompt.input_ids) <= most
        assert prompt.input_ids.count(image_token_id) == len(prompt.pixels) == shots + 1
        assert not set(prompt.input_ids) & {0, *RANDOM_ENDS}
    assert len({len(prompt.input_ids) for prompt in prompts}) > 1


def test_shots_stay_and_images_change_from_draw_to_draw() -> None:
    drawn = RandomPrompts(random_config("tiny"), replace(OPTIONS, shots=2))
    first, second = drawn.draw(0), drawn.draw(1)
    everyone = [*first, *second]
    assert all(prompt.pixels[:2] == first[0].pixels[:2] for prompt in everyone)
    assert all(prompt.input_ids[:47] == first[0].input_ids[:47] for prompt in everyone)
    asked = {prompt.pixels[2].sum().item() for prompt in everyone}
    assert len(asked) == len(everyone)
    again = RandomPrompts(random_config("tiny"), replace(OPTIONS, shots=2)).draw(0)
    assert [prompt.input_ids for prompt in again] == [prompt.input_ids for prompt in first]


def test_several_questions_share_an_image() -> None:
    options = replace(OPTIONS, rows=5, questions_per_image=2)
    prompts = RandomPrompts(random_config("tiny"), options).draw(0)
    images = [prompt.pixels[0].data_ptr() for prompt in prompts]
    assert images[0] == images[1] != images[2] == images[3] != images[4]
    assert len({tuple(prompt.input_ids) for prompt in prompts}) == 5


@pytest.mark.parametrize("instruct", [False, True])
def test_a_checkpoint_is_asked_about_scenes(tmp_path: Path, instruct: bool) -> None:
    request = ModelRequest(str(save_checkpoint(tmp_path, instruct)), device="cpu")
    options = replace(OPTIONS, request=request, random=None, shots=1, rows=4, questions_per_image=2)
    subject = checkpoint_subject(options, CPU, FP32)
    prompts = subject.prompts.draw(0)
    texts = [subject.prompts.encoder.decode(prompt.input_ids) for prompt in prompts]
    assert all("What" in text or "How" in text for text in texts)
    assert texts[0] != texts[1] and texts[2] != texts[3]
    assert all(len(prompt.pixels) == 2 for prompt in prompts)
    assert prompts[0].pixels[1].equal(prompts[1].pixels[1])
    assert ("Assistant" in texts[0]) == instruct
    captions = checkpoint_subject(replace(options, questions_per_image=1), CPU, FP32).prompts.draw(0)
    assert len(captions) == 4 and len({len(prompt.pixels) for prompt in captions}) == 1
    with pytest.raises(IdeficsError, match="lower --shots"):
        require_room(checkpoint_subject(replace(options, shots=8), CPU, FP32), options)


# Both sides


def test_fixed_texts_are_as_long_as_they_may_be(bench: Bench) -> None:
    prompts = bench.subject.prompts.draw(1)
    assert {len(token_ids) for token_ids, _ in bench.run_theirs(prompts).texts} == {4}


def test_varied_texts_end_at_different_steps() -> None:
    decoding = DecodingOptions(num_beams=2, max_new_tokens=24)
    options = replace(OPTIONS, rows=12, batch_size=12, decoding=decoding, fixed_length=False)
    bench = Bench(random_subject(options, CPU, FP32), options, PlainEngine)
    lengths = {len(token_ids) for token_ids, _ in bench.run_theirs(bench.subject.prompts.draw(1)).texts}
    assert len(lengths) > 2 and min(lengths) < 24


def test_scores_are_those_of_generate_and_of_one_forward_pass(bench: Bench) -> None:
    prompts = bench.subject.prompts.draw(2)
    ours, theirs = bench.run_ours(prompts), bench.run_theirs(prompts, with_scores=True)
    without = bench.run_theirs(prompts)
    assert [ids for ids, _ in ours.texts] == [ids for ids, _ in theirs.texts] == [ids for ids, _ in without.texts]
    for prompt, (token_ids, score), (_, ours_score) in zip(prompts, theirs.texts, ours.texts, strict=True):
        assert bench.score(prompt, token_ids) == pytest.approx(score, abs=1e-5)
        assert ours_score == pytest.approx(score, abs=1e-5)


def test_a_text_that_ended_is_scored_with_its_end() -> None:
    options = replace(OPTIONS, decoding=DecodingOptions(num_beams=3, max_new_tokens=24), fixed_length=False)
    bench = Bench(random_subject(options, CPU, FP32), options, PlainEngine)
    prompts = bench.subject.prompts.draw(1)
    texts = bench.run_theirs(prompts, with_scores=True).texts
    ended = [(prompt, *text) for prompt, text in zip(prompts, texts, strict=True) if len(text[0]) < 24]
    assert ended
    for prompt, token_ids, score in ended:
        assert bench.score(prompt, token_ids) == pytest.approx(score, abs=1e-4)


def test_a_text_that_differs_is_found_and_weighed(bench: Bench) -> None:
    prompts = bench.subject.prompts.draw(3)
    theirs = bench.run_theirs(prompts, with_scores=True)
    changed = [((9, 9, 9, 9), -1.0), *theirs.texts[1:]]
    found = agreement(bench, [(prompts, replace(theirs, texts=changed), theirs)])
    assert found["identical"] == pytest.approx(2 / 3)
    assert (found["differing_rows"], found["differing_examined"], found["differing_ties"]) == (1, 1, 0)
    assert found["largest_gap"] > 1e-5 and found["max_score_difference"] == 0.0
    same = agreement(bench, [(prompts, theirs, theirs)])
    assert same["identical"] == 1.0 and same["largest_gap"] is None


# Memory


@pytest.mark.skipif(not forget_resident_peak(), reason="nobody counts a process's memory here")
def test_memory_that_is_taken_and_kept_is_counted() -> None:
    meter = MemoryMeter(CPU)
    with meter.measure() as memory:
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


def operations(work: PhaseWork) -> float:
    return sum(
        2 * product.rows * weight.numel() * product.times for product in work.products for weight in product.weights
    )


def test_vision_is_what_the_network_multiplies(bench: Bench) -> None:
    network = bench.subject.model.model
    written_out = sdpa_kernel(SDPBackend.MATH)  # a fused attention's products are not counted on the CPU
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), written_out:
        network.encode_images(torch.randn(1, 3, 3, 56, 56))
    work = work_of(bench.theirs, counts())["vision"]
    attention = sum(
        4 * product.batch * product.queries * product.keys * product.head_dim * product.times
        for product in work.attention
    )
    assert operations(work) + attention == counter.get_total_flops()


def test_a_decode_step_is_what_the_network_multiplies(bench: Bench) -> None:
    prompts = bench.subject.prompts.draw(0)[:1]
    inputs = vars(collate(prompts, bench.subject.vocabulary, bench.subject.image_size))
    model = bench.theirs

    def flops(num_tokens: int) -> int:
        kept = {name: value[:, :num_tokens] if name != "pixel_values" else value for name, value in inputs.items()}
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(**kept)
        return sum(
            count
            for operation, count in counter.get_flop_counts()["Global"].items()
            if str(operation) in ("aten.mm", "aten.addmm")
        )

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floors_are_measured(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idefics_cli.bench.floor.FLOOR_SECONDS", 0.0)
    model = transformers_model(random_subject(OPTIONS, CPU, dtype).model)
    for work in work_of(model, counts()).values():
        floor = floor_seconds(work, None)
        assert floor["products"] > 0 and floor["attention"] > 0 and "bytes" not in floor
    nothing = work_of(model, counts(images=0))["vision"]
    assert floor_seconds(nothing, None) == {"products": 0, "attention": 0}
    assert copy_bandwidth(CPU) is None


# The whole


def test_the_report_is_plain_json_and_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idefics_cli.bench.floor.FLOOR_SECONDS", 0.0)
    told: list[str] = []
    found = json.loads(json.dumps(run(replace(OPTIONS, repeats=2, shots=1), told.append, PlainEngine)))
    assert found["agreement"]["identical"] == 1.0 and found["agreement"]["rows"] == 12
    assert found["agreement"]["max_score_difference"] < 1e-4
    assert len(found["ratios"]) == len(found["ours"]["all_seconds"]) == 2 and found["ratio"] > 0
    assert found["ours"]["tokens"] == found["transformers"]["tokens"] == 12
    assert found["work"] == {"images": 6, "prompt_tokens": found["work"]["prompt_tokens"], "steps": 12}
    assert found["phases"]["decode"]["above_floor"] > 0
    assert found["settings"]["decoding"]["min_new_tokens"] == 4
    assert len(told) == 6 and len(tables(found)) == 2


@pytest.mark.parametrize("shots", [0, 2])
def test_embeddings_give_the_same_texts_without_the_vision_tower(shots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idefics_cli.bench.floor.FLOOR_SECONDS", 0.0)
    found = {each: run(replace(OPTIONS, shots=shots, embeddings=each)) for each in (False, True)}
    assert found[False]["work"]["images"] == 3 and found[False]["phases"]["vision"]["seconds"] > 0
    assert found[True]["work"]["images"] == 0 and found[True]["phases"]["vision"]["seconds"] == 0
    assert found[True]["agreement"]["identical"] == found[False]["agreement"]["identical"] == 1.0


def test_both_sides_go_first_in_turn(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And floors are timed behind each run of ours that they stand beside."""
    order: list[str] = []
    theirs, ours = bench.run_theirs, bench.run_ours

    def noted(name: str, side: object) -> object:
        def call(*arguments: object, **keywords: object) -> Run:
            order.append(name)
            return side(*arguments, **keywords)

        return call

    monkeypatch.setattr(bench, "run_ours", noted("ours", ours))
    monkeypatch.setattr(bench, "run_theirs", noted("theirs", theirs))
    monkeypatch.setattr(bench, "options", replace(OPTIONS, repeats=2))
    warm = warm_up(bench, lambda line: None)
    assert order == ["ours", "theirs"] * 2
    floored: list[Run] = []

    def floors(run: Run) -> dict[str, dict[str, float]]:
        order.append("floors")
        floored.append(run)
        return {}

    measured = measure(bench, warm, floors, lambda line: None)
    first, second = [*["theirs"] * 2, *["ours"] * 2, "floors"], [*["ours"] * 2, "floors", *["theirs"] * 2]
    assert order[4:] == first + second, "each timed run behind a short one"
    assert floored == measured.ours == [run for run, _ in measured.phased]
    assert len(measured.ratios) == 2


def test_how_far_above_its_floor_each_run_stands_is_told_run_by_run() -> None:
    def phased(seconds: float, floor: float) -> Phased:
        times = {"vision": 0.0, "prefill": seconds, "decode": 2 * seconds}
        nothing = {"products": 0.0, "attention": 0.0}
        parts = {"products": 0.75 * floor, "attention": 0.25 * floor}
        return Phased(Run(4 * seconds, [], MemoryUse(), times), {"vision": nothing, "prefill": parts, "decode": parts})

    phases = phase_report([phased(1.0, 1.0), phased(3.0, 2.0), phased(8.0, 4.0)], None)
    assert phases["prefill"]["all_above_floor"] == [1.0, 1.5, 2.0]
    assert (phases["prefill"]["above_floor"], phases["decode"]["above_floor"]) == (1.5, 3.0)
    assert (phases["prefill"]["above_products"], phases["prefill"]["floor_seconds"]) == (2.0, 2.0)
    assert phases["vision"]["above_floor"] is None and phases["vision"]["all_above_floor"] == []
    assert phases["other"]["seconds"] == 12.0 - 3.0 - 6.0


@pytest.mark.skipif(not forget_resident_peak(), reason="nobody counts a process's memory here")
def test_only_the_pairs_of_the_warm_up_are_watched(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "options", replace(OPTIONS, repeats=1))
    warm = warm_up(bench, lambda line: None)
    measured = measure(bench, warm, lambda run: {}, lambda line: None)
    assert measured.our_peak == warm[0].ours.memory.kept + warm[1].ours.memory.rise
    assert measured.their_peak == warm[1].theirs.memory.rise >= 0
    assert all(run.memory.peak is None for run in (*measured.ours, *measured.theirs))


# The command


def test_the_command_prints_one_line_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idefics_cli.bench.floor.FLOOR_SECONDS", 0.0)
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
        ("--random mid -m demo", "leave -m out"),
        ("--random mid --revision main", "random weights come from no file"),
        ("--random mid --allow-pickle", "random weights come from no file"),
        ("--random tiny --threads 99999", "less than or equal to 1024"),
        ("--random tiny --rows 2 --scenes 2", "give one of them"),
        ("-m /no/such/model", "no model"),
        ("--random huge", "huge"),
        ("--random tiny --device cuda:99", "cuda:99"),
    ],
)
def test_mistakes_end_with_two(arguments: str, said: str) -> None:
    result = CliRunner().invoke(cli.app, ["bench", *arguments.split()])
    assert result.exit_code == 2 and said in result.stderr and result.stdout == ""


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from idefics_cli.cli.app import app
try:
    app(["bench", "--help"])
except SystemExit as end:
    assert end.code == 0
assert not {"torch", "transformers", "numpy", "PIL", "rich"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--questions-per-image" in done.stdout
