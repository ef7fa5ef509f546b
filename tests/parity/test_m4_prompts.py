"""Prompts equal, token for token, those of the M4 evaluation, which `m4_prompts.py` writes without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from real_llama import RealLlama
from tiny_tokenizers import END_OF_UTTERANCE
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from idefics_cli.checkpoint.request import DEMO_FOLDER
from idefics_cli.prompts.templates import PromptOptions, Shot, build_prompt
from idefics_cli.prompts.tokenize import PromptEncoder

GOLDEN = Path(__file__).parent / "m4_prompts.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def demo_tokenizer() -> PreTrainedTokenizerBase:
    """The demo's, with the token that makes it an instruct model's."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    tokenizer.add_special_tokens({"additional_special_tokens": [END_OF_UTTERANCE]}, replace_extra_special_tokens=False)
    return tokenizer


def our_prompt(case: dict, named: bool) -> tuple:
    """The case's prompt as a run makes it, with the template named or by default."""
    name = case["template"]
    instruct = name.startswith("instruct")
    options = PromptOptions("caption" if "caption" in name else "vqa", template=name if named else None)
    images = (object(),) if case["with_images"] else ()
    shots = [Shot(images, question, answer) for question, answer in case["shots"]]
    prompt = build_prompt(options, {"question": case["query"]}, [object()], shots, instruct)
    assert isinstance(prompt, tuple), prompt
    return prompt


def assert_equal_tokens(tokenizer: PreTrainedTokenizerBase, case: dict) -> None:
    encoder = PromptEncoder(tokenizer)
    expected = tokenizer(case["prompt"], add_special_tokens=False).input_ids
    assert expected.count(encoder.image_token_id) == 1 + len(case["shots"]) * case["with_images"]
    assert encoder.encode(our_prompt(case, named=True)) == expected
    if case["template"] != "vizwiz":
        assert encoder.encode(our_prompt(case, named=False)) == expected


def test_the_file_is_what_the_script_writes() -> None:
    script = GOLDEN.with_suffix(".py")
    written = subprocess.run([sys.executable, "-X", "utf8", script], capture_output=True, check=True)
    assert written.stdout.decode() == GOLDEN.read_text(encoding="utf-8")


def name_of(case: dict) -> str:
    images = "" if case["with_images"] else " without images"
    return f"{case['template']}, {len(case['shots'])} shots{images}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_with_the_tokenizer_of_the_demo(demo_tokenizer: PreTrainedTokenizerBase, case: dict) -> None:
    assert_equal_tokens(demo_tokenizer, case)


@pytest.mark.parametrize("legacy", [True, False])
def test_with_the_tokenizer_of_llama(real_llama: RealLlama, legacy: bool) -> None:
    tokenizer = real_llama.tokenizer(legacy)
    for case in CASES:
        assert_equal_tokens(tokenizer, case)
