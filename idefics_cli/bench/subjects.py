"""What is measured: a model with a checkpoint's or with random weights, and draws of prompts for it.

Prompts are official templates over demo scenes for a checkpoint, and random ids laid out like those templates for
random weights. This module runs nothing.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsRotaryEmbedding, IdeficsVisionEmbeddings

from idefics_cli.checkpoint import ModelRequest, find_checkpoint, load_config, load_network, load_tokenizer
from idefics_cli.demo.scene import EVALUATION_SEEDS, Scene, scene
from idefics_cli.engine.options import DecodingOptions, Vocabulary
from idefics_cli.engine.prompt_source import EncodedPrompt
from idefics_cli.errors import IdeficsError
from idefics_cli.idefics import vocabulary_of
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.model.modeling import IdeficsForVisionText2Text
from idefics_cli.prompts.templates import (
    CAPTION,
    INSTRUCT_CAPTION,
    INSTRUCT_QUESTION,
    QUESTION_ANSWER,
    Shot,
    few_shot_prompt,
)
from idefics_cli.prompts.tokenize import PromptEncoder

FIRST_CALL = 0  # the draw of prompts that the first call gets; timed ones follow
SHOTS_APART = 10_000_000  # shots are none of the scenes they stand before


@dataclass(frozen=True)
class BenchOptions:
    """One benchmark. `random` names a size and leaves the request's model out; `threads` None is torch's own choice.

    `fixed_length`: no text ends before `decoding.max_new_tokens`. `rows` None is one batch. `embeddings`: ours gets the
    images' latents in their place, as `--embeddings` does.
    """

    request: ModelRequest
    random: str | None = None
    rows: int | None = None
    shots: int = 0
    questions_per_image: int = 1
    batch_size: int = 8
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    fixed_length: bool = True
    embeddings: bool = False
    repeats: int = 3
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.random is not None and self.random not in SIZES:
            raise IdeficsError(f"no random model is called {self.random!r}: use {', '.join(SIZES)}")

    @property
    def num_rows(self) -> int:
        return self.rows or self.batch_size

    @property
    def num_images(self) -> int:
        """Images asked about, shots not counted."""
        return -(-self.num_rows // self.questions_per_image)

    @property
    def texts(self) -> DecodingOptions:
        """How texts are decoded, their fixed length included."""
        least = self.decoding.max_new_tokens if self.fixed_length else self.decoding.min_new_tokens
        return DecodingOptions(**{**asdict(self.decoding), "min_new_tokens": least})


# ---- models with random weights


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "cross_layer_interval": 2,
        "vision_config": {
            "embed_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "image_size": 56,
        },
        "perceiver_config": {
            "resampler_depth": 2,
            "resampler_n_latents": 8,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
        },
    },
    "mid": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2752,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "cross_layer_interval": 4,
        "vision_config": {
            "embed_dim": 512,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
            "image_size": 224,
        },
        "perceiver_config": {
            "resampler_depth": 6,
            "resampler_n_latents": 64,
            "resampler_n_heads": 8,
            "resampler_head_dim": 64,
        },
    },
    "9b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "cross_layer_interval": 4,
        "vision_config": {
            "embed_dim": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "intermediate_size": 5120,
            "image_size": 224,
        },
        "perceiver_config": {
            "resampler_depth": 6,
            "resampler_n_latents": 64,
            "resampler_n_heads": 16,
            "resampler_head_dim": 96,
        },
    },
}
BOS, PAD = 1, 0
RANDOM_ENDS = (2, 3, 4)  # several, so that texts of varied length end at different steps
FIRST_WORD = 5  # ids from here to the vocabulary's size are the words of random prompts
HEAD_GAIN, END_GAIN = 3.0, 2.0  # logits as spread as a trained model's; an end wins now and then


def random_config(size: str) -> IdeficsConfig:
    settings = copy.deepcopy(SIZES[size])
    settings["vision_config"] |= {"patch_size": 14, "hidden_act": "gelu"}
    settings["perceiver_config"] |= {"use_resampler": True, "qk_layer_norms_perceiver": True}
    return IdeficsConfig(
        **settings,
        additional_vocab_size=2,
        qk_layer_norms=True,
        use_resampler=True,
        alpha_type="float",
        alpha_initializer="ones",
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def random_model(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> IdeficsForVisionText2Text:
    with torch.device(device):
        model = IdeficsForVisionText2Text._from_config(random_config(size), dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        randomize(name, parameter.data, generator)
    model.lm_head.weight.data[list(RANDOM_ENDS)] *= END_GAIN
    return model.eval().requires_grad_(False)


def randomize(name: str, weight: Tensor, generator: torch.Generator) -> None:
    """In place; products keep the size of what they are given, so every part has its say in the logits."""
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
    config = copy.deepcopy(ours.config)
    with torch.device("meta"):
        theirs = transformers.IdeficsForVisionText2Text._from_config(config, dtype=ours.dtype)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    for module in theirs.modules():  # buffers that no checkpoint holds
        if isinstance(module, IdeficsRotaryEmbedding):
            made = IdeficsRotaryEmbedding(config).to(ours.device)
            module.inv_freq, module.original_inv_freq = made.inv_freq, made.original_inv_freq
        elif isinstance(module, IdeficsVisionEmbeddings):
            module.position_ids = torch.arange(module.num_positions, device=ours.device).expand((1, -1))
    left = [name for name, tensor in (*theirs.named_parameters(), *theirs.named_buffers()) if tensor.is_meta]
    assert not left, f"transformers' model has tensors that ours has not: {left}"
    return theirs.eval().requires_grad_(False)


# ---- prompts


class Prompts(Protocol):
    """Draws of prompts: the shots are the same in all, the images asked about are always new."""

    def draw(self, number: int) -> list[EncodedPrompt]: ...


class RandomPrompts:
    """Random ids and pixels where the official templates have words and images: 21 to 25 tokens, and 23 a shot."""

    OPENING, CLOSING, SHOT_WORDS, OWN_WORDS = 2, 3, 18, (12, 16)

    def __init__(self, config: IdeficsConfig, options: BenchOptions):
        self._options, self._words = options, (FIRST_WORD, config.vocab_size)
        self._side = config.vision_config.image_size
        self._around_image = [config.vocab_size, config.vocab_size + 1, config.vocab_size]
        generator = torch.Generator().manual_seed(options.seed)
        self._opening = self._ids(self.OPENING, generator)
        self._closing = self._ids(self.CLOSING, generator)
        self._start = [BOS]
        for _ in range(options.shots):
            self._start += [*self._opening, *self._around_image, *self._ids(self.SHOT_WORDS, generator)]
        self._shots = tuple(self._image(generator) for _ in range(options.shots))

    def draw(self, number: int) -> list[EncodedPrompt]:
        generator = torch.Generator().manual_seed(self._options.seed + 1 + number)
        images = [self._image(generator) for _ in range(self._options.num_images)]
        asked = (images[row // self._options.questions_per_image] for row in range(self._options.num_rows))
        return [self._prompt(image, generator) for image in asked]

    def _prompt(self, image: Tensor, generator: torch.Generator) -> EncodedPrompt:
        least, most = self.OWN_WORDS
        own = self._ids(int(torch.randint(least, most + 1, (), generator=generator)), generator)
        input_ids = [*self._start, *self._opening, *self._around_image, *own, *self._closing]
        return EncodedPrompt(input_ids, (*self._shots, image))

    def _ids(self, count: int, generator: torch.Generator) -> list[int]:
        return torch.randint(*self._words, (count,), generator=generator).tolist()

    def _image(self, generator: torch.Generator) -> Tensor:
        return torch.randn(3, self._side, self._side, generator=generator)


class ScenePrompts:
    """Demo scenes in the official templates: captions, or questions where several are asked about one image."""

    def __init__(self, encoder: PromptEncoder, images: ImageProcessor, options: BenchOptions):
        self.encoder, self._images, self._options = encoder, images, options
        self._asks = options.questions_per_image > 1
        first = EVALUATION_SEEDS + SHOTS_APART + options.seed
        self._shots = [self._shot(scene(first + number), number) for number in range(options.shots)]

    def draw(self, number: int) -> list[EncodedPrompt]:
        first = EVALUATION_SEEDS + self._options.seed + number * self._options.num_images
        drawn = [scene(seed) for seed in range(first, first + self._options.num_images)]
        pixels = [self._images.pixels(each.image) for each in drawn]
        places = (divmod(row, self._options.questions_per_image) for row in range(self._options.num_rows))
        return [self._prompt(drawn[place], pixels[place], question) for place, question in places]

    def _shot(self, drawn: Scene, number: int) -> Shot:
        question, answer = drawn.questions[number % len(drawn.questions)]
        pixels = self._images.pixels(drawn.image)
        return Shot(pixels, answer, question) if self._asks else Shot(pixels, drawn.caption)

    def _prompt(self, drawn: Scene, pixels: Tensor, number: int) -> EncodedPrompt:
        if self._asks:
            template = INSTRUCT_QUESTION if self.encoder.is_instruct else QUESTION_ANSWER
            query = Shot(pixels, question=drawn.questions[number % len(drawn.questions)][0])
        else:
            template = INSTRUCT_CAPTION if self.encoder.is_instruct else CAPTION
            query = Shot(pixels)
        prompt = few_shot_prompt(template, self._shots, query)
        return EncodedPrompt(self.encoder.encode(prompt), tuple(i for i in prompt if isinstance(i, Tensor)))


@dataclass(frozen=True)
class Subject:
    """A model, what its tokens mean, and prompts for it."""

    model: IdeficsForVisionText2Text
    vocabulary: Vocabulary
    prompts: Prompts

    @property
    def image_size(self) -> int:
        return self.model.config.vision_config.image_size


def random_subject(options: BenchOptions, device: torch.device, dtype: torch.dtype) -> Subject:
    assert options.random is not None, options
    model = random_model(options.random, device, dtype, options.seed)
    fake, image = model.config.vocab_size, model.config.vocab_size + 1
    vocabulary = Vocabulary(RANDOM_ENDS, (image, fake), PAD, image)
    return Subject(model, vocabulary, RandomPrompts(model.config, options))


def checkpoint_subject(options: BenchOptions, device: torch.device, dtype: torch.dtype) -> Subject:
    checkpoint = find_checkpoint(options.request)
    config = load_config(checkpoint)
    encoder = PromptEncoder(load_tokenizer(checkpoint))
    prompts = ScenePrompts(encoder, ImageProcessor.from_pretrained(checkpoint.folder), options)
    model = load_network(checkpoint, config, device, dtype)
    return Subject(model, vocabulary_of(encoder), prompts)


def require_room(subject: Subject, options: BenchOptions) -> None:
    longest = max(len(prompt.input_ids) for prompt in subject.prompts.draw(FIRST_CALL))
    room = subject.model.config.max_position_embeddings - options.decoding.max_new_tokens
    if longest > room:
        raise IdeficsError(
            f"prompts are {longest} tokens long and the model takes {room}: lower --shots or --max-new-tokens"
        )
