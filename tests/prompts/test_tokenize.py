"""Texts and token ids on their own; `parity/` compares them with transformers."""

from __future__ import annotations

import functools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from real_llama import RealLlama
from tiny_tokenizers import BASE_TOKENS, INSTRUCT_TOKENS, llama_tokenizer, verbatim_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from idefics_cli.errors import CheckpointError, IdeficsError
from idefics_cli.prompts.postprocess import PostProcess
from idefics_cli.prompts.templates import INSTRUCT_CAPTION, TASKS, Shot, SpecialToken, few_shot_prompt
from idefics_cli.prompts.tokenize import PromptEncoder

IMAGE = Image.new("RGB", (5, 4), "teal")
KINDS = ("verbatim", "legacy", "normalized", "llama")


@functools.cache
def encoder_of(kind: str) -> PromptEncoder:
    makers = {
        "verbatim": lambda: verbatim_tokenizer(legacy=False, added=INSTRUCT_TOKENS),
        "legacy": lambda: verbatim_tokenizer(legacy=True, added=INSTRUCT_TOKENS),
        "normalized": lambda: verbatim_tokenizer(legacy=True, normalized=True, added=INSTRUCT_TOKENS),
        "llama": lambda: llama_tokenizer(legacy=False, added=INSTRUCT_TOKENS),
        "base": lambda: llama_tokenizer(legacy=False, added=BASE_TOKENS),
    }
    return PromptEncoder(makers[kind]())


# ---- special tokens


def test_ids_come_from_the_tokenizer() -> None:
    encoder, base = encoder_of("llama"), encoder_of("base")
    assert encoder.is_instruct and not base.is_instruct
    assert encoder.end_token_ids == (encoder.eos_token_id, encoder.image_token_id + 1)
    assert base.end_token_ids == (base.eos_token_id,)
    assert encoder.banned_token_ids == (encoder.image_token_id, encoder.fake_token_id)
    assert encoder.pad_token_id == 0
    without_padding = llama_tokenizer(legacy=False)
    without_padding.pad_token = None
    assert PromptEncoder(without_padding).pad_token_id == without_padding.unk_token_id


def test_a_special_token_that_is_missing_or_has_no_image_is_refused() -> None:
    with pytest.raises(CheckpointError, match="<image>"):
        PromptEncoder(llama_tokenizer(legacy=False, added=()))
    with pytest.raises(IdeficsError, match="end_of_utterance"):
        encoder_of("base").encode(few_shot_prompt(INSTRUCT_CAPTION, (), Shot((IMAGE,))))
    with pytest.raises(IdeficsError, match="image"):
        encoder_of("llama").encode((SpecialToken("<image>"),))


@pytest.mark.parametrize("kind", KINDS)
def test_neighbouring_images_share_the_token_between_them(kind):
    encoder = encoder_of(kind)
    bos, fake, image = encoder.bos_token_id, encoder.fake_token_id, encoder.image_token_id
    assert encoder.encode(()) == encoder.encode(("",)) == [bos]
    assert encoder.encode((IMAGE,)) == [bos, fake, image, fake]
    assert encoder.encode((IMAGE, "", IMAGE)) == [bos, fake, image, fake, image, fake]
    apart = encoder.encode((IMAGE, "cat", IMAGE))
    assert apart.count(fake) == 4
    assert apart.count(image) == 2


# ---- text is text


AWKWARD = {
    "special tokens": "<image> </s> <s> <unk> <fake_token_around_image> <end_of_utterance>",
    "inside words": "a<image>b</s>c<s>",
    "addresses": "https://example.org/cat.jpg data:image/png;base64,AAAA file:///etc/passwd",
    "emoji": "👩‍👩‍👧 é e\u0301 🇩🇪",
    "control characters": "a\x00b\x1b[31m\x7f\u202e",
    "halves of pairs": "caf\udce9 \ud800 \udfff",
    "markers": "\ufdd0\ufdd1\ufdd2 \ufdef \uffff",
    "blanks": "  \t \r\n  ",
    "the letter LLaMA writes for a blank": "a▁b ▁▁ <0x41>",
    "braces": "{question} {0} %s",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD)
def test_awkward_text_gives_no_special_token(kind, text):
    assert_only_images_are_special(encoder_of(kind), (text, IMAGE, text, IMAGE))


TEXTS = st.one_of(
    st.text(max_size=12), st.sampled_from(list(AWKWARD.values())), st.text("<>/simage_▁ \ufdd0", max_size=12)
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.one_of(TEXTS, st.just(IMAGE)), max_size=7))
def test_as_many_image_tokens_as_images_whatever_the_texts(kind, items):
    assert_only_images_are_special(encoder_of(kind), tuple(items))


def assert_only_images_are_special(encoder: PromptEncoder, prompt: tuple) -> None:
    ids = encoder.encode(prompt)
    num_images = sum(item is IMAGE for item in prompt)
    assert ids[0] == encoder.bos_token_id
    assert ids.count(encoder.bos_token_id) == 1
    assert ids.count(encoder.image_token_id) == num_images
    assert num_images + bool(num_images) <= ids.count(encoder.fake_token_id) <= 2 * num_images
    assert not set(ids) & set(encoder.end_token_ids)


def test_halves_of_pairs_and_markers_become_the_replacement_character():
    encoder = encoder_of("llama")
    assert encoder.encode(("a\udcffb\ufdd0c",)) == encoder.encode(("a\ufffdb\ufffdc",))


def test_text_comes_back_as_it_went_in():
    encoder = encoder_of("llama")
    for text in ("Question: a red cat, é 🙂?\n\nyes", "a <image> of </s>", "x\x00y"):
        assert encoder.decode(encoder.encode((text, IMAGE))) == text


def test_decoding_takes_ids_of_any_kind():
    encoder = encoder_of("llama")
    ids = encoder.encode(("hello world",))
    assert encoder.decode(torch.tensor(ids)) == encoder.decode(tuple(ids)) == "hello world"
    assert encoder.decode([]) == ""
    assert encoder.decode([*ids, *encoder.end_token_ids, *encoder.banned_token_ids]) == "hello world"


def test_a_vocabulary_whose_letters_add_up_to_a_special_token():
    """Neither merges that end in `</s>`, nor a model that looks whole words up, lets text become one."""
    tokenizer = llama_tokenizer(legacy=False)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["model"]["vocab"] |= {"</": 900, "s>": 901}
    description["model"]["merges"] = [["<", "/"], ["s", ">"], ["</", "s>"]]
    backend = Tokenizer.from_str(json.dumps(description))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    encoder = PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, **names))
    assert encoder.encode(("</s>",)) == [1, 900, 901]

    vocab = {name: index for index, name in enumerate(["<unk>", "<s>", "</s>", *BASE_TOKENS, "cat"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    encoder = PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=words, **names))
    assert encoder.encode(("<image>", IMAGE, "cat", IMAGE, "</s>")) == [1, 0, 3, 4, 3, 5, 3, 4, 3, 0]


def test_a_text_of_a_million_letters():
    encoder = encoder_of("llama")
    start = time.monotonic()
    assert len(encoder.encode(("what is this? " * 70_000, IMAGE))) > 100_000
    assert time.monotonic() - start < 20


def test_one_encoder_for_many_threads():
    encoder = encoder_of("llama")
    prompts = [(f"image {n} of", IMAGE, "a cat") for n in range(50)]
    expected = [encoder.encode(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(encoder.encode, prompts * 8)) == expected * 8


# ---- what is never written


@pytest.mark.parametrize("legacy", [True, False])
def test_banned_words_are_those_of_the_published_evaluation(real_llama: RealLlama, legacy: bool):
    """LLaMA writes a line break as a byte, after a piece for the blank that every text begins with."""
    tokenizer = real_llama.tokenizer(legacy)
    words = TASKS["vqa"].banned_words
    found = PromptEncoder(tokenizer).banned_sequences(words)
    assert found == ((29871, 13), (29871, 13, 13))
    assert [list(sequence) for sequence in found] == tokenizer(list(words), add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_banned_words_are_the_tokenizers_own(kind):
    encoder = encoder_of(kind)
    words = ("\n", "\n\n", "cat", "<image>", "\n")
    sequences = encoder.banned_sequences(words)
    assert [encoder.decode(sequence) for sequence in sequences] == ["", "", "cat", "<image>"]
    assert not {token_id for sequence in sequences for token_id in sequence} & {*encoder.banned_token_ids, 0, 1, 2}


def test_a_text_ends_where_a_line_ends_though_no_blank_is_before_it(real_llama: RealLlama):
    """Nothing bans the byte right after a word: there the written text is cut."""
    encoder = PromptEncoder(real_llama.tokenizer(legacy=True))
    written = [*encoder.encode(("red",))[1:], 13, *encoder.encode(("Image:",))[1:]]
    assert encoder.decode(written).startswith("red\n")
    assert PostProcess(TASKS["vqa"].cut_words)(encoder.decode(written)) == "red"
