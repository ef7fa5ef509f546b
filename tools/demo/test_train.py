"""Training from nothing, in miniature: it runs, resumes where it stopped, and writes an ordinary checkpoint."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import IdeficsConfig

from idefics_cli.demo.manifest import question_kind
from idefics_cli.demo.scene import EVALUATION_SEEDS, SHAPES, scene
from idefics_cli.idefics import Idefics
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.prompts.templates import PromptOptions, build_prompt, leading_shots
from idefics_cli.prompts.tokenize import PromptEncoder
from tools.demo import train
from tools.demo.lessons import IGNORED, LessonPlan, mentions
from tools.demo.tokenizer import build_tokenizer
from tools.demo.train import IMAGE_SIZE, Stage, Training, patch_targets, rate

SHORT = (
    Stage("see", 1, first_seed=0, scenes=4),
    Stage("speak", 3, first_seed=500_000_000, scenes=8, eyes_share=0.15, captions=4, questions=1),
    Stage("default", 1, first_seed=900_000_000, scenes=8, eyes_share=0.0, captions=2, questions=1, published=2),
)


@pytest.fixture
def short_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "stages", lambda scale: SHORT)
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    monkeypatch.setattr(train, "RECORD_EVERY", 1)
    monkeypatch.setattr(train, "QUIZ_SCENES", 4)


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(build_tokenizer())


def plan(encoder: PromptEncoder) -> LessonPlan:
    return LessonPlan(
        ImageProcessor(image_size=IMAGE_SIZE), encoder, 8, 0, range(4), captions=8, questions=1, published=4
    )


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the demo's takes seconds on a processor without bf16."""
    demo_config = train.demo_config

    def small_config(vocab_size: int) -> IdeficsConfig:
        config = demo_config(vocab_size)
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 32, 48, 1
        config.vision_config.embed_dim, config.vision_config.intermediate_size = 32, 48
        config.vision_config.num_hidden_layers = config.perceiver_config.resampler_depth = 1
        return config

    monkeypatch.setattr(train, "demo_config", small_config)


def test_stopping_and_resuming_changes_nothing_and_makes_an_ordinary_checkpoint(
    short_stages: None, small_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within the second stage, after a step whose optimizers are saved."""
    straight = Training(tmp_path / "straight", "cpu", 1.0, 1)
    straight.run()
    counted = itertools.count(1)
    step = Training._step

    def stop_at_the_third(self, *args):
        if next(counted) == 3:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(Training, "_step", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        Training(tmp_path / "stopped", "cpu", 1.0, 1).run()
    resumed = Training(tmp_path / "stopped", "cpu", 1.0, 1)
    resumed.run()
    for name, weight in straight.pupil.state_dict().items():
        assert torch.equal(weight, resumed.pupil.state_dict()[name]), name
    curves = [(tmp_path / run / "curve.jsonl").read_text().count("\n") for run in ("straight", "stopped")]
    assert curves == [7, 7], "a line for each lesson, and one for each stage's quiz of texts"
    (result,) = Idefics.from_pretrained(tmp_path / "stopped" / "checkpoint").caption([scene(1).image], max_new_tokens=3)
    assert result.error is None


def test_the_last_stage_leaves_the_eyes_as_they_are(
    short_stages: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(train, "stages", lambda scale: (replace(SHORT[-1], name="slips", slips=0.15),))
    training = Training(tmp_path, "cpu", 1.0, 1)
    before = {name: weight.clone() for name, weight in training.pupil.model.state_dict().items()}
    training.run()
    curve = (tmp_path / "curve.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in curve] == ["slips", "slips"]
    after = load_file(tmp_path / "checkpoint" / "model.safetensors")
    learned = {name for name, weight in before.items() if not torch.equal(weight.half(), after[name])}
    assert learned and not any("vision_model" in name or "perceiver" in name for name in learned)


def test_training_never_draws_what_measures_it() -> None:
    assert [stage.name for stage in train.stages(1.0)] == ["see", "speak", "default", "slips"]
    for stage in train.stages(1.0):
        assert stage.first_seed + stage.steps * stage.scenes < train.QUIZ_SEED
    assert train.QUIZ_SEED + train.QUIZ_SCENES < EVALUATION_SEEDS


def test_rates_rise_and_fall() -> None:
    stage = Stage("see", 1_000, first_seed=0)
    assert rate(stage, 0) < 0.05 and rate(stage, 500) == 1.0 and 0 < rate(stage, 999) < 0.01


def test_lessons_teach_the_answers_and_nothing_else(encoder: PromptEncoder) -> None:
    """What is labelled, read back, is a caption or an answer of an image of the lesson, each with its end."""
    lesson = plan(encoder)[2]
    scenes = [scene(seed) for seed in range(16, 24)]
    truths = {drawn.caption for drawn in scenes} | {answer for drawn in scenes for _, answer in drawn.questions}
    for texts in lesson.texts:
        for labels, input_ids in zip(texts.labels.tolist(), texts.input_ids.tolist(), strict=True):
            assert labels[-1] in (IGNORED, encoder.eos_token_id)
            for answer in answers_in(labels, encoder.eos_token_id):
                assert encoder.decode(answer) in truths
            assert input_ids[0] == encoder.bos_token_id
        tokens_with_an_answer = texts.labels != IGNORED
        sees = texts.image_attention_mask.sum(-1).bool()
        assert (sees | ~tokens_with_an_answer).all(), "an answer is learned whose image is not in sight"


def answers_in(labels: list[int], end: int) -> list[list[int]]:
    runs = [list(run) for asked, run in itertools.groupby(labels, lambda label: label != IGNORED) if asked]
    assert all(run[-1] == end and end not in run[:-1] for run in runs)
    return [run[:-1] for run in runs]


def test_the_words_that_mean_objects_are_marked_with_what_they_mean(encoder: PromptEncoder) -> None:
    questions = plan(encoder)[2].texts[1]
    nouns = {*SHAPES, "object", "left", "right", *(f"{shape}s" for shape in SHAPES), "objects", "crosses"}
    assert len(questions.places) >= 8
    for row, place in questions.places.tolist():
        assert encoder.decode([int(questions.input_ids[row, place])]) in nouns
    objects = scene(0).objects  # a large green cross, a small white star and a large white triangle
    cases = {
        "What color is the cross?": [1, 1, 4, 0, 1],
        "Is there a white object?": [IGNORED, 5, IGNORED, IGNORED, 2],
        "Is there a green star?": [IGNORED, IGNORED, IGNORED, IGNORED, 0],
        "What shape is the object on the far right?": [1, 5, 2, 2, 1],
        "How many stars are there?": [0, 5, 3, 1, 1],
    }
    assert {question: [meant for _, meant in mentions(question, objects)] for question in cases} == {
        question: [meant] for question, meant in cases.items()
    }
    first, second = mentions("Is the white star to the left of the green cross?", objects)
    assert (first[0], second[0]) == (len("Is the white star"), len("Is the white star to the left of the green cross"))


def test_a_quiz_asks_every_kind_alone(encoder: PromptEncoder) -> None:
    texts = LessonPlan(ImageProcessor(image_size=IMAGE_SIZE), encoder, 12, 0, range(1)).quiz()[1]
    assert set(texts) == {
        "caption",
        *(question_kind(question) for n in range(12) for question, _ in scene(n).questions),
    }
    assert all(rows.images.shape[1] == 1 for rows in texts.values()) and len(texts["caption"].input_ids) == 12


def test_the_groups_of_texts(encoder: PromptEncoder) -> None:
    captions, questions, shots, published_captions, published_questions = plan(encoder)[0].texts
    assert captions.images.shape == questions.images.shape == (8, 1)
    assert shots.images.shape[1] > 1
    assert published_captions.images.shape == published_questions.images.shape == (4, 1)
    assert captions.image_attention_mask.shape == (*captions.input_ids.shape, 1)


@pytest.mark.parametrize(("task", "group"), [("caption", 3), ("vqa", 4)])
def test_published_texts_begin_as_a_run_begins_its_prompts(encoder: PromptEncoder, task: str, group: int) -> None:
    texts = plan(encoder)[1].texts[group]
    shots = leading_shots(PromptOptions(task), (), instruct=False)
    prompt = build_prompt(PromptOptions(task), {"question": ""}, [object()], shots, instruct=False)
    shared = encoder.encode(prompt[:2])  # up to the image
    for input_ids in texts.input_ids.tolist():
        assert input_ids[: len(shared)] == shared


def test_patches_are_told_what_lies_on_them() -> None:
    objects = torch.full((1, 3, 6), float(IGNORED))
    objects[0, 0] = torch.tensor([0.25, 0.25, 0.17, 1, 2, 3])
    objects[0, 1] = torch.tensor([0.75, 0.75, 0.09, 0, 5, 1])
    targets = {name: target.view(8, 8) for name, target in patch_targets(objects).items()}
    assert targets["covered"][1, 1] == 1 and targets["covered"][6, 1] == 0
    assert targets["rank"][1, 1] == 0 and targets["rank"][5, 5] == 1
    assert targets["color"][2, 2] == 2 and targets["shape"][6, 6] == 1 and targets["size"][5, 6] == 0
    assert targets["color"][6, 1] == IGNORED
