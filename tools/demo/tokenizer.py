"""The demo's tokenizer: LLaMA's kind (byte-pair pieces, a byte for anything unknown), with the world's own words.

It is saved in the published form, so that it loads like any IDEFICS checkpoint's: ids 0 to 2 are `<unk>`, `<s>` and
`</s>`, then 256 bytes, then pieces, and after the vocabulary the two added image tokens.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AddedToken, LlamaTokenizer

from idefics_cli.demo.scene import COLORS, MAX_OBJECTS, SHAPES, SIZES, scene
from idefics_cli.prompts.templates import CAPTION, QUESTION_ANSWER, Shot, few_shot_prompt
from idefics_cli.prompts.tokenize import FAKE, IMAGE

SPACE = "▁"
SENTENCES_FROM_SCENES = range(2_000)


def world_texts() -> Iterator[str]:
    """Every word the world speaks, and the official templates' around them."""
    for seed in SENTENCES_FROM_SCENES:
        drawn = scene(seed)
        yield drawn.caption
        for question, answer in drawn.questions:
            yield f"{question} {answer}"
    yield from (f"{size} {color} {shape}" for size in SIZES for color in COLORS for shape in SHAPES)
    yield " ".join(str(number) for number in range(MAX_OBJECTS + 1))
    for template in (CAPTION, QUESTION_ANSWER):
        yield from few_shot_prompt(template, (), Shot(fields={"question": ""}))


def learn_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges. Words are split at spaces and punctuation while learning, so no piece spans two words."""
    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=2_000,
        special_tokens=special,
        initial_alphabet=[SPACE, *string.ascii_letters, *string.digits, *string.punctuation],
        show_progress=False,
    )
    learner.train_from_iterator(world_texts(), trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return learner.get_vocab(), [tuple(pair) for pair in merges]


def build_tokenizer() -> LlamaTokenizer:
    vocab, merges = learn_pieces()
    tokenizer = LlamaTokenizer(
        vocab=vocab, merges=merges, pad_token="<unk>", padding_side="left", model_max_length=2048
    )
    added = [AddedToken(token, special=True, normalized=False) for token in (FAKE, IMAGE)]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    return tokenizer
