"""What the demo learns from: scenes, what lies where in them, and texts about them in the official templates.

A lesson is made from a range of seeds alone, so training can stop and resume anywhere. One image serves several texts:
its caption, some questions, prompts in which other images of the batch are the shots, and prompts after the text-only
shots that base models are shown by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from idefics_cli.demo.scene import COLORS, MAX_OBJECTS, SHAPES, SIZES, Scene, scene
from idefics_cli.engine.transfer import pixel_values
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.model.kv_interface import image_attention_mask
from idefics_cli.prompts.templates import (
    CAPTION,
    QUESTION_ANSWER,
    TEXT_ONLY_SHOTS,
    PromptOptions,
    Shot,
    Template,
    few_shot_prompt,
    leading_shots,
)
from idefics_cli.prompts.tokenize import PromptEncoder

IGNORED = -100
MAX_SHOTS = 4
ATTRIBUTES = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": SHAPES}


@dataclass(frozen=True)
class Texts:
    """Token rows about the images of a lesson.

    `input_ids` and `labels` (rows, tokens), padded on the right; `attention_mask` the same; `images` (rows, images)
    indexes the lesson's images; `image_attention_mask` (rows, tokens, images).
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    images: Tensor
    image_attention_mask: Tensor


@dataclass(frozen=True)
class Lesson:
    """`pixel_values` (scenes, 3, side, side); `objects` (scenes, MAX_OBJECTS, 6): x, y, radius, size, color, shape,
    the last three −100 where there is no object; `texts`: groups of rows of similar length."""

    pixel_values: Tensor
    objects: Tensor
    texts: tuple[Texts, ...]


def object_table(scenes: Sequence[Scene]) -> Tensor:
    """(scenes, MAX_OBJECTS, 6), the objects from left to right."""
    table = torch.full((len(scenes), MAX_OBJECTS, 6), float(IGNORED))
    for row, drawn in enumerate(scenes):
        for column, item in enumerate(drawn.objects):
            kinds = [names.index(getattr(item, attribute)) for attribute, names in ATTRIBUTES.items()]
            table[row, column] = torch.tensor([item.x, item.y, item.radius, *kinds])
    return table


@dataclass(frozen=True)
class LessonPlan(torch.utils.data.Dataset):
    """Lesson `step` of `steps` shows the scenes from seed `first_seed + step * scenes` on.

    The first `captions` of them are captioned, each is asked `questions` questions, and all stand once more in prompts
    with shots; no texts at all without questions. The first `published` of them are captioned, and asked a question,
    after the default's text-only shots too, whose texts are of a world that the demo does not know. Few shapes come
    first: one during a third of `easy_steps`, then two, then all.
    """

    images: ImageProcessor
    encoder: PromptEncoder
    scenes: int
    first_seed: int
    steps: range
    captions: int = 0
    questions: int = 0
    published: int = 0
    easy_steps: int = 0

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Lesson:
        step = self.steps[index]
        first = self.first_seed + step * self.scenes
        max_objects = min(MAX_OBJECTS, 1 + MAX_OBJECTS * step // self.easy_steps) if self.easy_steps else MAX_OBJECTS
        drawn = [scene(seed, max_objects) for seed in range(first, first + self.scenes)]
        as_bytes = torch.stack([self.images.prepare(each.image) for each in drawn])
        pixels = pixel_values(as_bytes, torch.from_numpy(self.images.pixel_of_byte))
        texts = tuple(self._texts(drawn, np.random.default_rng([first, 7]))) if self.questions else ()
        return Lesson(pixels, object_table(drawn), texts)

    def _texts(self, scenes: list[Scene], generator: np.random.Generator):
        """Captions without shots, questions without shots, and both with shots; then both after the default's."""
        asked = [
            (index, int(question))
            for index, drawn in enumerate(scenes)
            for question in generator.permutation(len(drawn.questions))[: self.questions]
        ]
        yield collate_texts([self._caption_row(scenes, [index]) for index in range(self.captions)], self.encoder)
        yield collate_texts([self._question_row(scenes, [i], [question]) for i, question in asked], self.encoder)
        yield collate_texts(list(self._shot_rows(scenes, generator)), self.encoder)
        if self.published:
            yield collate_texts([self._published_caption_row(scenes, i) for i in range(self.published)], self.encoder)
            rows = [self._published_question_row(scenes, *pair) for pair in asked[: self.published]]
            yield collate_texts(rows, self.encoder)

    def _shot_rows(self, scenes: list[Scene], generator: np.random.Generator):
        """Every image once more, in prompts of one to four shots, some of them with text-only shots."""
        left = [int(index) for index in generator.permutation(len(scenes))]
        while len(left) > MAX_SHOTS:
            text_only = generator.random() < 0.3
            shots = TEXT_ONLY_SHOTS if text_only else int(generator.integers(1, MAX_SHOTS + 1))
            indices, left = left[: shots + 1], left[shots + 1 :]
            if generator.random() < 0.5:
                yield self._caption_row(scenes, indices, text_only)
            else:
                questions = [int(generator.integers(len(scenes[index].questions))) for index in indices]
                yield self._question_row(scenes, indices, questions, text_only)

    def _caption_row(self, scenes: list[Scene], indices: list[int], text_only: bool = False) -> Row:
        return self._row(CAPTION, [Shot(index, answer=scenes[index].caption) for index in indices], text_only)

    def _question_row(
        self, scenes: list[Scene], indices: list[int], questions: list[int], text_only: bool = False
    ) -> Row:
        asked = [(index, *scenes[index].questions[which]) for index, which in zip(indices, questions, strict=True)]
        return self._row(
            QUESTION_ANSWER,
            [Shot(index, question, answer) for index, question, answer in asked],
            text_only,
        )

    def _published_caption_row(self, scenes: list[Scene], index: int) -> Row:
        shots = leading_shots(PromptOptions("caption"), (), instruct=False)
        return self._row(CAPTION, [*shots, Shot(index, answer=scenes[index].caption)])

    def _published_question_row(self, scenes: list[Scene], index: int, which: int) -> Row:
        shots = leading_shots(PromptOptions("vqa"), (), instruct=False)
        question, answer = scenes[index].questions[which]
        return self._row(QUESTION_ANSWER, [*shots, Shot(index, question, answer)])

    def _row(self, template: Template, turns: list[Shot], text_only: bool = False) -> Row:
        """Token ids of shots, query and answer; every answer that has its image in sight is learned, with its end."""
        shots = [replace(shot, image=()) if text_only else shot for shot in turns[:-1]]
        input_ids: list[int] = []
        labels: list[int] = []
        for number, turn in enumerate([*shots, turns[-1]]):
            prompt = few_shot_prompt(template, shots[:number], replace(turn, answer=""))
            start = len(self.encoder.encode(prompt))
            input_ids = self.encoder.encode((*prompt, f" {turn.answer}"))
            labels += [IGNORED] * (start - len(labels))
            learned = [*input_ids[start:], self.encoder.eos_token_id]
            labels += learned if turn.images else [IGNORED] * len(learned)
        images = [index for turn in (*shots, turns[-1]) for index in turn.images]
        return Row([*input_ids, self.encoder.eos_token_id], labels, images)


@dataclass(frozen=True)
class Row:
    """One text: `labels` of the same length as `input_ids`; `images` are indices into the lesson's images.

    After a shot's answer the label is `</s>` although a line break follows: an answer always ends the same way.
    """

    input_ids: list[int]
    labels: list[int]
    images: list[int]


def collate_texts(rows: Sequence[Row], encoder: PromptEncoder) -> Texts:
    """Pad to the longest row and the most images (with the row's last one, which no token sees again)."""
    input_ids = pad([row.input_ids for row in rows], encoder.pad_token_id)
    images = [row.images for row in rows]
    num_images = max(map(len, images))
    return Texts(
        input_ids=input_ids,
        labels=pad([row.labels for row in rows], IGNORED),
        attention_mask=pad([[1] * len(row.input_ids) for row in rows], 0),
        images=torch.tensor([indices + indices[-1:] * (num_images - len(indices)) for indices in images]),
        image_attention_mask=image_attention_mask(input_ids, num_images, encoder.image_token_id, encoder.eos_token_id),
    )


def pad(rows: Sequence[list[int]], filler: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])
