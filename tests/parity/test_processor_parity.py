"""Ids, masks and pixels beside transformers' own IDEFICS processor: equal, not close."""

from __future__ import annotations

import functools
import random
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_tokenizers import (
    INSTRUCT_TOKENS,
    llama_tokenizer,
    save_sentencepiece_folder,
    verbatim_tokenizer,
)
from transformers import AutoTokenizer, IdeficsProcessor, LlamaTokenizer
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids,
    incremental_to_binary_attention_mask,
)

from idefics_cli.engine.prompt_source import EncodedPrompt
from idefics_cli.engine.reference import collate
from idefics_cli.engine.transfer import pixel_values
from idefics_cli.images.decode import load_image
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.loaded_model import vocabulary_of
from idefics_cli.model.kv_interface import image_attention_mask
from idefics_cli.prompts.templates import END_OF_UTTERANCE, INSTRUCT_QUESTION, Shot, SpecialToken, few_shot_prompt
from idefics_cli.prompts.tokenize import PromptEncoder

WORDS = [
    "a red cat",
    "User:",
    "Assistant: two dogs",
    "Question: how many?",
    "\n",
    "é漢字🙂",
    "  mat",
    "x",
    "hello world.\n\n",
]
# As LLaMA's own sentencepiece has them, which begins every text with a blank.
LLAMA_IDS = {
    "grabbed": [2646, 1327, 287],
    "\n": [29871, 13],
    "ax\n####\nboo": [4853, 13, 4136, 13, 833, 29877],
    "镇": [29871, 30411],
    "🦙Ꙋ": [29871, 243, 162, 169, 156, 237, 156, 141],
}
TOKENIZERS = {
    "verbatim": functools.partial(verbatim_tokenizer, legacy=False),
    "verbatim, legacy": functools.partial(verbatim_tokenizer, legacy=True),
    "verbatim, legacy, normalized": functools.partial(verbatim_tokenizer, legacy=True, normalized=True),
    "llama": functools.partial(llama_tokenizer, legacy=False),
    "llama, legacy": functools.partial(llama_tokenizer, legacy=True),
    "llama, instruct": functools.partial(llama_tokenizer, legacy=False, added=INSTRUCT_TOKENS),
}


@functools.cache
def tokenizer_of(kind: str):
    return TOKENIZERS[kind]()


@functools.cache
def images(size: int = 32) -> tuple[Image.Image, ...]:
    rng = random.Random(0)
    return tuple(
        Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
        for width, height in [(size, size), (7, 50), (61, 13), (40, 40)]
    )


def generated_prompt(rng: random.Random) -> list:
    """Texts and 0-4 images at any places. The texts neither begin nor end with a blank: transformers drops those."""
    items: list = [" ".join(rng.choices(WORDS, k=rng.randint(1, 6))).strip(" ") for _ in range(rng.randint(0, 3))]
    for _ in range(rng.randint(0 if items else 1, 4)):
        items.insert(rng.randint(0, len(items)), rng.choice(images()))
    return items


def ours(prompts: list[list], encoder: PromptEncoder, processor: ImageProcessor):
    def encode(prompt: list) -> EncodedPrompt:
        images = [item for item in prompt if isinstance(item, Image.Image)]
        return EncodedPrompt(encoder.encode(tuple(prompt)), tuple(pixels(processor, image) for image in images))

    return collate([encode(prompt) for prompt in prompts], vocabulary_of(encoder), processor.image_size)


def theirs(prompts: list[list], tokenizer, image_size: int = 32, **options):
    processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=image_size), tokenizer)
    return processor(text=prompts, return_tensors="pt", add_end_of_utterance_token=False, **options)


def assert_same(inputs, expected) -> None:
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    # transformers gives its mask as bool, with nothing in it, when no row of the batch holds an image.
    assert torch.equal(inputs["image_attention_mask"], expected["image_attention_mask"].long())


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_200_generated_prompts(kind):
    rng = random.Random(kind)
    encoder, processor = PromptEncoder(tokenizer_of(kind)), ImageProcessor(image_size=32)
    prompts = [generated_prompt(rng) for _ in range(200)]
    assert any(isinstance(a, Image.Image) and isinstance(b, Image.Image) for p in prompts for a, b in pairwise(p))
    for start in range(0, len(prompts), 5):
        batch = prompts[start : start + 5]
        assert_same(ours(batch, encoder, processor), theirs(batch, tokenizer_of(kind)))


def test_a_batch_without_images():
    prompts = [["hello world"], ["a red cat on the mat"]]
    tokenizer = tokenizer_of("llama")
    inputs = ours(prompts, PromptEncoder(tokenizer), ImageProcessor(image_size=32))
    assert inputs["pixel_values"].shape == (2, 1, 3, 32, 32)
    assert_same(inputs, theirs(prompts, tokenizer))


def test_the_end_of_an_utterance_is_the_token_transformers_finds_in_its_text():
    tokenizer, image = tokenizer_of("llama, instruct"), images()[0]
    prompt = few_shot_prompt(INSTRUCT_QUESTION, (), Shot((image,), fields={"question": "how many dogs?"}))
    assert SpecialToken("<end_of_utterance>") in prompt
    spelled = [item.name if item == END_OF_UTTERANCE else item for item in prompt]
    assert PromptEncoder(tokenizer).encode(prompt) == theirs([spelled], tokenizer)["input_ids"][0].tolist()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_decoded_text(kind):
    tokenizer = tokenizer_of(kind)
    encoder = PromptEncoder(tokenizer)
    for text in WORDS:
        ids = encoder.encode((text, object(), text))
        expected = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # A token that is looked for after the normaliser is written out by the library, special or not.
        assert encoder.decode(ids) == expected.removeprefix("<s>").strip()


# ---- tokenizers as checkpoints carry them


@pytest.mark.parametrize("form", ["tokenizer.model", "tokenizer.json"])
def test_tokenizer_files(tmp_path, form):
    (tmp_path / "config.json").write_text('{"model_type": "idefics"}')
    if form == "tokenizer.model":
        pytest.importorskip("sentencepiece")
        pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with protobuf")
        save_sentencepiece_folder(tmp_path)
        check_like_a_checkpoint(LlamaTokenizer.from_pretrained(tmp_path))
    else:
        tokenizer_of("verbatim, legacy, normalized").save_pretrained(tmp_path)
    check_like_a_checkpoint(AutoTokenizer.from_pretrained(tmp_path))


def check_like_a_checkpoint(tokenizer) -> None:
    encoder, processor, rng = PromptEncoder(tokenizer), ImageProcessor(image_size=32), random.Random(1)
    prompts = [generated_prompt(rng) for _ in range(20)]
    assert_same(ours(prompts, encoder, processor), theirs(prompts, tokenizer))
    ids = encoder.encode(("</s> <s> <image> <unk>", images()[0]))
    assert ids[0] == encoder.bos_token_id
    assert ids.count(encoder.bos_token_id) == ids.count(encoder.image_token_id) == 1
    assert encoder.eos_token_id not in ids


@pytest.mark.parametrize("legacy", [True, False])
def test_a_real_llama_tokenizer(real_llama, legacy):
    tokenizer = real_llama.tokenizer(legacy)
    encoder = PromptEncoder(tokenizer)
    assert (encoder.bos_token_id, encoder.eos_token_id, encoder.pad_token_id) == (1, 2, 0)
    assert (encoder.fake_token_id, encoder.image_token_id, encoder.end_token_ids) == (32000, 32001, (2, 32002))
    for text, ids in LLAMA_IDS.items() if legacy else ():
        assert encoder.encode((text,)) == [1, *ids], text
    assert encoder.encode(("</s>",)).count(2) == 0
    check_like_a_checkpoint(tokenizer)


# ---- the image mask

IMAGE_ID, EOS_ID = 9, 2


def reference_mask(input_ids: torch.Tensor, num_images: int) -> torch.Tensor:
    class Ids:
        eos_token_id = EOS_ID

        def convert_tokens_to_ids(self, token: str) -> int:
            return IMAGE_ID

    incremental, _ = image_attention_mask_for_packed_input_ids(input_ids, Ids(), "pt")
    return incremental_to_binary_attention_mask(incremental, "pt", num_classes=num_images)


ROWS = st.lists(st.sampled_from([0, EOS_ID, IMAGE_ID, IMAGE_ID, 5, 6]), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(ROWS, st.integers(1, 5))
def test_each_token_sees_the_last_image_until_a_text_ends(row, num_images):
    ids = torch.tensor([row, row[::-1]])
    assert torch.equal(image_attention_mask(ids, num_images, IMAGE_ID, EOS_ID), reference_mask(ids, num_images))
    assert image_attention_mask(ids[:, :0], num_images, IMAGE_ID, EOS_ID).shape == (2, 0, num_images)


# ---- pixels


def pixels(processor: ImageProcessor, image: object) -> torch.Tensor:
    """As the engine makes them of an image's bytes."""
    return pixel_values(processor.prepare(image)[None], torch.from_numpy(processor.pixel_of_byte))[0]


def photographs() -> list[Path]:
    """What scikit-image and scikit-learn ship in their wheels."""
    data = Path(pytest.importorskip("skimage").__file__).parent / "data"
    images = Path(pytest.importorskip("sklearn").__file__).parent / "datasets" / "images"
    return sorted([*data.glob("*.png"), *data.glob("*.jpg"), *images.glob("*.jpg")])


@pytest.mark.parametrize("image_size", [224, 64])
def test_pixels_of_photographs_bit_for_bit(image_size):
    paths = photographs()
    assert len(paths) >= 20
    processor, reference = ImageProcessor(image_size=image_size), IdeficsImageProcessorPil(image_size=image_size)
    for path in paths:
        with Image.open(path) as image:
            image.load()
            expected = reference(image, return_tensors="pt")
        assert torch.equal(pixels(processor, path), expected[0]), path.name


def test_a_checkpoint_with_other_statistics(tmp_path):
    config = {"image_size": 30, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.7, 0.33], "rescale_factor": 1 / 128}
    theirs = IdeficsImageProcessorPil(**config)
    theirs.save_pretrained(tmp_path)
    image = images()[2]
    assert torch.equal(pixels(ImageProcessor.from_pretrained(tmp_path), image), theirs(image, return_tensors="pt")[0])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK"])
def test_every_colour_mode_alike(mode):
    image = images()[0].convert("RGBA")
    image.putalpha(images()[3].convert("L").resize(image.size))
    image = image.convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = IdeficsImageProcessorPil(image_size=48)(image, return_tensors="pt")[0]
    assert torch.equal(pixels(ImageProcessor(image_size=48), image), expected)


def test_orientation_is_applied_before_the_pixels_are_made():
    image = images()[1]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = image.copy()
    turned.info["exif"] = exif.tobytes()
    upright = load_image(turned)
    assert upright.size == image.size[::-1]
    expected = IdeficsImageProcessorPil(image_size=48)(upright, return_tensors="pt")[0]
    assert torch.equal(pixels(ImageProcessor(image_size=48), turned), expected)
