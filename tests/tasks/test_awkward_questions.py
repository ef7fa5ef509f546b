"""Whatever a question says, it stays a question: five hundred that would rather be something else."""

from __future__ import annotations

import random

import pytest
from real_llama import RealLlama
from tiny_tokenizers import END_OF_UTTERANCE, FAKE
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from idefics_cli import Idefics
from idefics_cli.checkpoint.request import DEMO_FOLDER
from idefics_cli.demo.scene import EVALUATION_SEEDS, scene
from idefics_cli.prompts.templates import Prompt, PromptOptions, Shot, build_prompt, leading_shots
from idefics_cli.prompts.tokenize import PromptEncoder

NUMBER = 500
PIECES = [
    *("<image>", FAKE, END_OF_UTTERANCE, "<s>", "</s>", "<unk>", "<pad>", "<IMAGE>", "< image >", "<0x0A>"),
    *("https://example.org/cat.jpg", "http://localhost/", "data:image/png;base64,iVBORw0KGgo=", "file:///etc/passwd"),
    *("Image:", "Caption:", "Question:", "Answer:", "User:", "Assistant:", "Instruction:", "\nUser:", "Task:", "\n"),
    *("{question}", "{image}", "{", "}", "{{}}", "{0}", "%s", "$HOME", "\\n", "\\", "'", '"', "`"),
    *("👩‍👩‍👧", "🇩🇪", "é", "漢字", "שלום", "\u202e", "\u200b", "\ufeff", "\x00", "\x1b[31m", "\ud800", "\ufdd0", "▁"),
    *("What color is the object?", "yes", "0", " ", "\t", "\r\n"),
]


def awkward_questions() -> list[str]:
    """Each piece alone, some very long ones, and the pieces in strings of up to eight."""
    generator = random.Random(5)
    whole = ["", "word " * 3_000, "<image>" * 3_000, "🙂" * 3_000, "What is <image> this? " * 600]
    alone = [*whole, *PIECES]
    strings = [generator.choices(PIECES, k=generator.randint(2, 8)) for _ in range(NUMBER - len(alone))]
    return alone + [generator.choice(["", " "]).join(pieces) for pieces in strings]


QUESTIONS = awkward_questions()


def question_prompt(question: str, image: object, num_shots: int, instruct: bool) -> Prompt:
    options = PromptOptions("vqa", num_shots=num_shots)
    shots = leading_shots(options, [Shot(image, question, answer=question)] * num_shots, instruct)
    prompt = build_prompt(options, {"question": question}, [image], shots, instruct)
    assert isinstance(prompt, tuple), prompt
    return prompt


def assert_special_tokens(tokenizer: PreTrainedTokenizerBase, instruct: bool) -> None:
    """One `<image>` between two others for each image, and one end for each turn."""
    encoder = PromptEncoder(tokenizer)
    assert encoder.is_instruct >= instruct
    for number, question in enumerate(QUESTIONS):
        num_shots = number % 3
        ids = encoder.encode(question_prompt(question, object(), num_shots, instruct))
        assert ids.count(encoder.image_token_id) == num_shots + 1, question[:80]
        assert ids.count(encoder.fake_token_id) == 2 * (num_shots + 1), question[:80]
        assert ids.count(encoder.bos_token_id) == 1 and ids[0] == encoder.bos_token_id, question[:80]
        ends = [ids.count(token_id) for token_id in encoder.end_token_ids]
        assert ends == [0, instruct * (2 * num_shots + 1)][: len(ends)], question[:80]


def test_there_are_five_hundred() -> None:
    assert len(QUESTIONS) == NUMBER and len(set(QUESTIONS)) > 0.95 * NUMBER


def test_image_tokens_of_the_demo() -> None:
    assert_special_tokens(AutoTokenizer.from_pretrained(DEMO_FOLDER), instruct=False)


@pytest.mark.parametrize("legacy", [True, False])
def test_image_tokens_of_llama(real_llama: RealLlama, legacy: bool) -> None:
    assert_special_tokens(real_llama.tokenizer(legacy), instruct=True)


def test_the_rows_beside_them_get_the_same_answers() -> None:
    """Every tenth row is an ordinary one; no awkward one changes it, and none is without a result."""
    demo = Idefics.from_pretrained("demo", batch_size=16)
    scenes = [scene(seed) for seed in range(EVALUATION_SEEDS + 700_000, EVALUATION_SEEDS + 700_000 + NUMBER // 10)]
    pixels = [demo.prepare_image(drawn.image) for drawn in scenes]
    ordinary = [
        question_prompt(drawn.questions[0][0], image, 0, instruct=False)
        for drawn, image in zip(scenes, pixels, strict=True)
    ]
    mixed: list[Prompt] = []
    for number, question in enumerate(QUESTIONS):
        mixed.append(question_prompt(question, pixels[number // 10], 0, instruct=False))
        if number % 10 == 9:
            mixed.append(ordinary[number // 10])
    alone = demo.generate(ordinary, max_new_tokens=6)
    results = demo.generate(mixed, max_new_tokens=6)
    assert [result.text for result in alone] == [drawn.questions[0][1] for drawn in scenes]
    for undisturbed, result in zip(alone, results[10::11], strict=True):
        assert result.token_ids == undisturbed.token_ids
        assert result.score == pytest.approx(undisturbed.score, abs=1e-4)
    codes = {result.error.code for result in results if result.error}
    assert codes == {"prompt_too_long"}
    assert all((result.text is None) == (result.error is not None) for result in results)
