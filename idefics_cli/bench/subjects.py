"""What is measured: a model with a checkpoint's or with random weights, and draws of prompts for it.

Prompts are official templates over demo scenes for a checkpoint, and random ids laid out like them for random weights.
Shots are the same in all draws, the images asked about are always new. This module runs nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import transformers
from torch import Tensor
from transformers import IdeficsConfig
from transformers.initialization import no_init_weights

from idefics_cli.bench.options import BenchOptions
from idefics_cli.checkpoint.devices import resolve_dtype
from idefics_cli.checkpoint.find import find_checkpoint
from idefics_cli.checkpoint.load import choose_kernels, load_network, meta_network, side_files
from idefics_cli.demo.scene import EVALUATION_SEEDS, SHOTS_APART, Scene, scene
from idefics_cli.engine.engine import Engine
from idefics_cli.engine.options import Vocabulary
from idefics_cli.engine.prompt_source import EncodedPrompt
from idefics_cli.engine.reference import collate
from idefics_cli.engine.transfer import pixel_values
from idefics_cli.errors import IdeficsError
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.loaded_model import vocabulary_of
from idefics_cli.model.modeling import IdeficsForVisionText2Text
from idefics_cli.prompts.templates import PromptOptions, Shot, choose_template, few_shot_prompt
from idefics_cli.prompts.tokenize import PromptEncoder

FIRST_CALL = 0  # the draw of prompts for the first call; those of timed runs follow

# ---- models with random weights

TEXT_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "cross_layer_interval",
)
VISION_SETTINGS = ("embed_dim", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size")
RESAMPLER_SETTINGS = ("resampler_depth", "resampler_n_latents", "resampler_n_heads", "resampler_head_dim")
SIZE_SETTINGS = {
    "tiny": ((1_000, 64, 176, 4, 4, 2), (48, 2, 4, 96, 56), (2, 8, 2, 16)),
    "mid": ((32_000, 1024, 2752, 16, 16, 4), (512, 16, 8, 2048, 224), (6, 64, 8, 64)),
    "9b": ((32_000, 4096, 11008, 32, 32, 4), (1280, 32, 16, 5120, 224), (6, 64, 16, 96)),  # idefics-9b's
}
BOS, PAD = 1, 0
RANDOM_ENDS = (2, 3, 4)  # several, so that texts of varied length end at different steps
FIRST_WORD = 5  # ids from here to the vocabulary's size are the words of random prompts
HEAD_GAIN, END_GAIN = 3.0, 2.0  # logits as spread as a trained model's; an end wins now and then


def random_config(size: str) -> IdeficsConfig:
    text, vision, resampler = SIZE_SETTINGS[size]
    return IdeficsConfig(
        **dict(zip(TEXT_SETTINGS, text, strict=True)),
        vision_config=dict(zip(VISION_SETTINGS, vision, strict=True)),
        perceiver_config={
            **dict(zip(RESAMPLER_SETTINGS, resampler, strict=True)),
            "use_resampler": True,
            "qk_layer_norms_perceiver": True,
        },
        additional_vocab_size=2,
        qk_layer_norms=True,
        use_resampler=True,
    )


def random_model(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> IdeficsForVisionText2Text:
    with no_init_weights(), device:
        model = IdeficsForVisionText2Text._from_config(random_config(size), dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        randomize(name, parameter.data, generator)
    model.lm_head.weight.data[list(RANDOM_ENDS)] *= END_GAIN
    return model.eval().requires_grad_(False)


def randomize(name: str, weight: Tensor, generator: torch.Generator) -> None:
    """In place. Products keep the size of their inputs, so that every part of the network shows in the logits."""
    if "alpha" in name:
        weight.uniform_(0.5, 1.0, generator=generator)
    elif weight.dim() == 1:
        is_norm = "norm" in name and name.endswith("weight")
        weight.normal_(1.0 if is_norm else 0.0, 0.1, generator=generator)
    elif "embed_tokens" in name or "latents" in name:
        weight.normal_(generator=generator)
    else:
        gain = HEAD_GAIN if "lm_head" in name else 1.0
        fan_in = weight.numel() // weight.shape[0]
        weight.normal_(0.0, gain * fan_in**-0.5, generator=generator)


def transformers_model(ours: IdeficsForVisionText2Text) -> transformers.IdeficsForVisionText2Text:
    """transformers' own class around the very tensors of our model."""
    with no_init_weights(), ours.device:  # on the device, so that the buffers are there too
        theirs = transformers.IdeficsForVisionText2Text._from_config(copy.deepcopy(ours.config), dtype=ours.dtype)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    return theirs.eval().requires_grad_(False)


# ---- prompts


class RandomPrompts:
    """Random ids and pixels where the official templates have words and images: 21 to 25 tokens, and 23 a shot."""

    OPENING, CLOSING, SHOT_WORDS, OWN_WORDS = 2, 3, 18, (12, 16)

    def __init__(self, config: IdeficsConfig, options: BenchOptions):
        self._options, self._words = options, (FIRST_WORD, config.vocab_size)
        self._side = config.vision_config.image_size
        generator = torch.Generator().manual_seed(options.seed)
        self._opening = self._ids(self.OPENING, generator)
        self._opening += [config.vocab_size, config.vocab_size + 1, config.vocab_size]  # an image and those around it
        self._closing = self._ids(self.CLOSING, generator)
        self._start = [BOS]
        for _ in range(options.shots):
            self._start += [*self._opening, *self._ids(self.SHOT_WORDS, generator)]
        self._shots = tuple(self._image(generator) for _ in range(options.shots))

    def draw(self, number: int) -> list[EncodedPrompt]:
        generator = torch.Generator().manual_seed(self._options.seed + 1 + number)
        images = [self._image(generator) for _ in range(self._options.num_images)]
        asked = (images[row // self._options.questions_per_image] for row in range(self._options.num_rows))
        return [self._prompt(image, generator) for image in asked]

    def _prompt(self, image: Tensor, generator: torch.Generator) -> EncodedPrompt:
        least, most = self.OWN_WORDS
        own = self._ids(int(torch.randint(least, most + 1, (), generator=generator)), generator)
        input_ids = [*self._start, *self._opening, *own, *self._closing]
        shared_len = len(self._start) + self.OPENING + 1  # up to the image, with the token before it
        return EncodedPrompt(input_ids, (*self._shots, image), shared_len=shared_len if self._shots else 0)

    def _ids(self, count: int, generator: torch.Generator) -> list[int]:
        return torch.randint(*self._words, (count,), generator=generator).tolist()

    def _image(self, generator: torch.Generator) -> Tensor:
        return torch.randint(0, 256, (3, self._side, self._side), generator=generator, dtype=torch.uint8)


class ScenePrompts:
    """Demo scenes in the official templates: captions, or questions where several are asked about one image."""

    def __init__(self, encoder: PromptEncoder, images: ImageProcessor, options: BenchOptions):
        self.encoder, self._images, self._options = encoder, images, options
        self._asks = options.questions_per_image > 1
        self._template = choose_template(PromptOptions("vqa" if self._asks else "caption"), encoder.is_instruct)
        first = EVALUATION_SEEDS + SHOTS_APART + options.seed
        drawn = [scene(first + number) for number in range(options.shots)]
        self._shots = [self._shot(each, images.prepare(each.image), number) for number, each in enumerate(drawn)]

    def draw(self, number: int) -> list[EncodedPrompt]:
        first = EVALUATION_SEEDS + self._options.seed + number * self._options.num_images
        drawn = [scene(seed) for seed in range(first, first + self._options.num_images)]
        pixels = [self._images.prepare(each.image) for each in drawn]
        places = (divmod(row, self._options.questions_per_image) for row in range(self._options.num_rows))
        return [self._prompt(self._shot(drawn[place], pixels[place], question)) for place, question in places]

    def _shot(self, drawn: Scene, pixels: Tensor, number: int) -> Shot:
        question, answer = drawn.questions[number % len(drawn.questions)]
        return Shot(pixels, question, answer) if self._asks else Shot(pixels, answer=drawn.caption)

    def _prompt(self, query: Shot) -> EncodedPrompt:
        prompt = few_shot_prompt(self._template, self._shots, replace(query, answer=""))
        input_ids, pixels = self.encoder.encode(prompt), tuple(item for item in prompt if isinstance(item, Tensor))
        query_image = len(input_ids) - 1 - input_ids[::-1].index(self.encoder.image_token_id)
        # All prompts are alike up to the query's image and the token that opens it.
        return EncodedPrompt(input_ids, pixels, shared_len=query_image - 1 if self._shots else 0)


# ---- both


@dataclass(frozen=True)
class Subject:
    """A model, what its tokens mean, prompts for it, and the pixels that the bytes of their images stand for."""

    model: IdeficsForVisionText2Text
    vocabulary: Vocabulary
    prompts: RandomPrompts | ScenePrompts
    images: ImageProcessor

    @property
    def pixel_of_byte(self) -> Tensor:
        return torch.from_numpy(self.images.pixel_of_byte)

    def engine(self, batch_size: int, eager: bool = False, attention: str = "auto") -> Engine:
        return Engine(self.model, self.vocabulary, batch_size, eager, self.pixel_of_byte, attention)

    def inputs(self, prompts: Sequence[EncodedPrompt]) -> dict[str, Tensor]:
        """What transformers' model takes, as `collate` has it."""
        table = self.pixel_of_byte
        shown = [replace(each, pixels=tuple(pixel_values(torch.stack(each.pixels), table))) for each in prompts]
        return collate(shown, self.vocabulary, self.image_size)

    @property
    def image_size(self) -> int:
        return self.model.config.vision_config.image_size


def random_subject(options: BenchOptions, device: torch.device) -> Subject:
    assert options.random is not None, options
    dtype = resolve_dtype(options.request.dtype, device, random_config(options.random))
    if device.type == "cuda":
        choose_kernels()
    model = random_model(options.random, device, dtype, options.seed)
    fake, image = model.config.vocab_size, model.config.vocab_size + 1
    vocabulary = Vocabulary(RANDOM_ENDS, (image, fake), PAD, image)
    images = ImageProcessor(model.config.vision_config.image_size)
    return Subject(model, vocabulary, RandomPrompts(model.config, options), images)


def checkpoint_subject(options: BenchOptions, device: torch.device) -> Subject:
    checkpoint = find_checkpoint(options.request)
    config, encoder, images = side_files(checkpoint)
    prompts = ScenePrompts(encoder, images, options)
    expected = meta_network(checkpoint, config)
    model = load_network(checkpoint, expected, device, resolve_dtype(options.request.dtype, device, config))
    return Subject(model, vocabulary_of(encoder), prompts, images)


def require_space(subject: Subject, options: BenchOptions) -> None:
    longest = max(len(prompt.input_ids) for prompt in subject.prompts.draw(FIRST_CALL))
    most = subject.model.config.max_position_embeddings - options.decoding.max_new_tokens
    if longest > most:
        raise IdeficsError(f"prompts have {longest} tokens, the model takes {most}: lower --shots or --max-new-tokens")
