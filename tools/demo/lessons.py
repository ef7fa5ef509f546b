"""What the demo learns from: scenes, what lies where in them, and texts about them in the official templates.

A lesson is made from a range of seeds alone, so training can stop and resume anywhere. One image serves several texts:
its caption, some questions, prompts in which other images of the batch are the shots, and prompts after the text-only
shots that base models are shown by default.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from idefics_cli.demo.manifest import question_kind
from idefics_cli.demo.scene import COLORS, MAX_OBJECTS, SHAPES, SIZES, Scene, SceneObject, scene
from idefics_cli.engine.transfer import pixel_values
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.model.kv_interface import image_attention_mask
from idefics_cli.prompts.templates import (
    CAPTION,
    QUESTION_ANSWER,
    TEXT_ONLY_SHOTS,
    Prompt,
    PromptOptions,
    Shot,
    Template,
    few_shot_prompt,
    leading_shots,
    merge_texts,
)
from idefics_cli.prompts.tokenize import PromptEncoder

IGNORED = -100
ANSWER = " Answer:"
HARD_KINDS = {"left or right of": 3.0}  # asked more often than the others
MAX_SHOTS = 4
ATTRIBUTES = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": SHAPES}
MEANT = {**{name: len(values) for name, values in ATTRIBUTES.items()}, "rank": MAX_OBJECTS, "count": MAX_OBJECTS + 1}
MENTION = re.compile(
    rf"(?P<color>{'|'.join(COLORS)})? ?\b(?:(?P<shape>{'|'.join(SHAPES)})|object)(?:e?s)?\b"
    r"(?: on the far (?P<side>left|right))?"
)


@dataclass(frozen=True)
class Texts:
    """Token rows about the images of a lesson.

    `input_ids` and `labels` (rows, tokens), padded on the right; `attention_mask` the same; `images` (rows, images)
    indexes the lesson's images; `image_attention_mask` (rows, tokens, images). `places` (mentions, 2) holds row and
    token of the words that mean objects, and `meant` (mentions, MEANT) what they mean.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    images: Tensor
    image_attention_mask: Tensor
    places: Tensor
    meant: Tensor


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


def mentions(question: str, objects: Sequence[SceneObject]) -> Iterator[tuple[int, list[int]]]:
    """Where in a question words that mean objects end, and what they mean, in the order of MEANT.

    An attribute is what all of these objects have in common, IGNORED if they differ.
    """
    for found in MENTION.finditer(question):
        wanted = {name: found[name] for name in ("color", "shape") if found[name]}
        ends = {None: range(len(objects)), "left": (0,), "right": (len(objects) - 1,)}
        meant = [
            rank
            for rank in ends[found["side"]]
            if all(getattr(objects[rank], name) == value for name, value in wanted.items())
        ]
        shared = [
            common({values.index(getattr(objects[rank], name)) for rank in meant})
            for name, values in ATTRIBUTES.items()
        ]
        yield found.end(), [*shared, common(set(meant)), len(meant)]


def common(values: set[int]) -> int:
    return values.pop() if len(values) == 1 else IGNORED


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
        texts = tuple(self._texts(drawn, np.random.default_rng([first, 7]))) if self.questions else ()
        return Lesson(self._pixels(drawn), object_table(drawn), texts)

    def _texts(self, scenes: list[Scene], generator: np.random.Generator):
        """Captions without shots, questions without shots, and both with shots; then both after the default's."""
        asked = [self._choose(drawn, generator) for drawn in scenes]
        yield collate_texts([self._caption_row(scenes, [index]) for index in range(self.captions)], self.encoder)
        yield collate_texts([self._dialogue_row(scenes, i, which) for i, which in enumerate(asked)], self.encoder)
        yield collate_texts(list(self._shot_rows(scenes, generator)), self.encoder)
        if self.published:
            yield collate_texts([self._published_caption_row(scenes, [i]) for i in range(self.published)], self.encoder)
            rows = [self._published_question_row(scenes, [i], asked[i][:1]) for i in range(self.published)]
            yield collate_texts(rows, self.encoder)

    def _choose(self, drawn: Scene, generator: np.random.Generator) -> list[int]:
        """Which of a scene's questions are asked, in which order."""
        weights = np.array([HARD_KINDS.get(question_kind(question), 1.0) for question, _ in drawn.questions])
        size = min(self.questions, len(weights))
        return generator.choice(len(weights), size, replace=False, p=weights / weights.sum()).tolist()

    def quiz(self) -> tuple[Tensor, dict[str, Texts]]:
        """The images of the first scenes, and texts about them by kind: captions and all questions, each alone, after
        the default's text-only shots if the lessons have them."""
        drawn = [scene(self.first_seed + number) for number in range(self.scenes)]
        caption, ask = self._caption_row, self._question_row
        if self.published:
            caption, ask = self._published_caption_row, self._published_question_row
        rows = {"caption": [caption(drawn, [index]) for index in range(self.scenes)]}
        for index, each in enumerate(drawn):
            for which, (question, _) in enumerate(each.questions):
                rows.setdefault(question_kind(question), []).append(ask(drawn, [index], [which]))
        return self._pixels(drawn), {kind: collate_texts(each, self.encoder) for kind, each in sorted(rows.items())}

    def _pixels(self, scenes: list[Scene]) -> Tensor:
        as_bytes = torch.stack([self.images.prepare(each.image) for each in scenes])
        return pixel_values(as_bytes, torch.from_numpy(self.images.pixel_of_byte))

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
        turns = [Shot(index, answer=scenes[index].caption) for index in indices]
        return self._shot_row(scenes, CAPTION, turns, text_only)

    def _question_row(
        self, scenes: list[Scene], indices: list[int], questions: list[int], text_only: bool = False
    ) -> Row:
        asked = [(index, *scenes[index].questions[which]) for index, which in zip(indices, questions, strict=True)]
        turns = [Shot(index, question, answer) for index, question, answer in asked]
        return self._shot_row(scenes, QUESTION_ANSWER, turns, text_only)

    def _published_caption_row(self, scenes: list[Scene], indices: list[int]) -> Row:
        shots = leading_shots(PromptOptions("caption"), (), instruct=False)
        turns = [Shot(index, answer=scenes[index].caption) for index in indices]
        return self._shot_row(scenes, CAPTION, [*shots, *turns])

    def _published_question_row(self, scenes: list[Scene], indices: list[int], questions: list[int]) -> Row:
        shots = leading_shots(PromptOptions("vqa"), (), instruct=False)
        asked = [(index, *scenes[index].questions[which]) for index, which in zip(indices, questions, strict=True)]
        turns = [Shot(index, question, answer) for index, question, answer in asked]
        return self._shot_row(scenes, QUESTION_ANSWER, [*shots, *turns])

    def _shot_row(self, scenes: list[Scene], template: Template, turns: list[Shot], text_only: bool = False) -> Row:
        """Shots and query as a run writes them."""
        shots = [replace(shot, image=()) if text_only else shot for shot in turns[:-1]]
        turns = [*shots, turns[-1]]
        prompts = [
            few_shot_prompt(template, shots[:number], replace(turn, answer="")) for number, turn in enumerate(turns)
        ]
        return self._row(scenes, prompts, turns)

    def _dialogue_row(self, scenes: list[Scene], index: int, questions: list[int]) -> Row:
        """One image and several questions, one after the other: they cost a third of what they would cost alone."""
        turns = [Shot(index, *scenes[index].questions[which]) for which in questions]
        prompts = [few_shot_prompt(QUESTION_ANSWER, (), replace(turns[0], answer=""))]
        for before, turn in itertools.pairwise(turns):
            prompts.append(merge_texts((*prompts[-1], f" {before.answer}\nQuestion: {turn.question}{ANSWER}")))
        row = self._row(scenes, prompts, turns)
        return replace(row, images=[index])

    def _row(self, scenes: list[Scene], prompts: list[Prompt], turns: list[Shot]) -> Row:
        """Each turn's answer after its prompt; those that have their image in sight are learned, with their ends."""
        row = Row([], [], [index for turn in turns for index in turn.images], [], [])
        for prompt, turn in zip(prompts, turns, strict=True):
            start = len(self.encoder.encode(prompt))
            row.input_ids[:] = self.encoder.encode((*prompt, f" {turn.answer}"))
            row.labels.extend([IGNORED] * (start - len(row.labels)))
            learned = [*row.input_ids[start:], self.encoder.eos_token_id]
            row.labels.extend(learned if turn.images else [IGNORED] * len(learned))
            if turn.images and turn.question:
                self._mark_mentions(row, prompt, turn.question, scenes[turn.image].objects)
        row.input_ids.append(self.encoder.eos_token_id)
        return row

    def _mark_mentions(self, row: Row, prompt: Prompt, question: str, objects: Sequence[SceneObject]) -> None:
        before = prompt[-1][: -len(question + ANSWER)]
        for end, meant in mentions(question, objects):
            row.places.append(len(self.encoder.encode((*prompt[:-1], before + question[:end]))) - 1)
            row.meant.append(meant)


@dataclass(frozen=True)
class Row:
    """One text: `labels` of the same length as `input_ids`; `images` are indices into the lesson's images; `places` are
    the tokens that mean objects, and `meant` which.

    After a shot's answer the label is `</s>` although a line break follows: an answer always ends the same way.
    """

    input_ids: list[int]
    labels: list[int]
    images: list[int]
    places: list[int]
    meant: list[list[int]]


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
        places=torch.tensor([(i, place) for i, row in enumerate(rows) for place in row.places], dtype=torch.long).view(
            -1, 2
        ),
        meant=torch.tensor([meant for row in rows for meant in row.meant], dtype=torch.long).view(-1, len(MEANT)),
    )


def pad(rows: Sequence[list[int]], filler: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])
