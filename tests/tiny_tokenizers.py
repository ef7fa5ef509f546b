"""LLaMA's kind of tokenizer, small enough to be made while the tests run.

Byte-pair merges, a token for every byte, and IDEFICS's added tokens, in the forms in which checkpoints carry them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAKE, IMAGE, END_OF_UTTERANCE = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
BASE_TOKENS, INSTRUCT_TOKENS = (FAKE, IMAGE), (FAKE, IMAGE, END_OF_UTTERANCE)
CORPUS = [
    "User: what is this? Assistant: a red cat on the mat, and two small dogs.",
    "Image:Caption: hello world. Question: how many? Answer: two",
    "Instruction: provide an answer to the question. Use the image to answer.",
    "</s> <s> <image> fake token around image end of utterance s> </ <",
]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}


def backend(legacy: bool, normalized: bool = False) -> Tokenizer:
    """`legacy`: a normaliser writes a blank before every stretch of text, as in tokenizer files of 2023; else only the
    first has one.

    `normalized`: whether `<s>` and its like are looked for after the normaliser, as those files have it too.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=640, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = description["added_tokens"][:3]  # the bytes are ordinary tokens
    for token in description["added_tokens"]:
        token["normalized"] = normalized
    return Tokenizer.from_str(json.dumps(description))


def verbatim_tokenizer(
    legacy: bool, normalized: bool = False, added: Iterable[str] = BASE_TOKENS
) -> PreTrainedTokenizerBase:
    """A `tokenizer.json` used as it stands."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend(legacy, normalized), padding_side="left", clean_up_tokenization_spaces=False, **NAMED
    )
    return _with_added_tokens(tokenizer, added)


def llama_tokenizer(legacy: bool, added: Iterable[str] = BASE_TOKENS) -> PreTrainedTokenizerBase:
    """The same vocabulary in transformers' own class for it."""
    from transformers import LlamaTokenizer

    model = json.loads(backend(legacy).to_str())["model"]
    tokenizer = LlamaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        legacy=legacy,
        padding_side="left",
        **NAMED,
    )
    return _with_added_tokens(tokenizer, added)


def _with_added_tokens(tokenizer: PreTrainedTokenizerBase, added: Iterable[str]) -> PreTrainedTokenizerBase:
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    return tokenizer


def save_sentencepiece_folder(folder: Path, added: Iterable[str] = INSTRUCT_TOKENS) -> Path:
    """A checkpoint's tokenizer files of 2023: `tokenizer.model` and what belongs to it, no `tokenizer.json`."""
    import sentencepiece

    (folder / "corpus.txt").write_text("\n".join(CORPUS * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    _write(folder / "added_tokens.json", {name: pieces + index for index, name in enumerate(added)})
    _write(folder / "special_tokens_map.json", {**NAMED, "additional_special_tokens": list(added)})
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "padding_side": "left", **NAMED})
    return folder


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
