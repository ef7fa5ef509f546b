"""The coloured-shapes world of the `demo` model: a seed gives an image, its caption, and questions with their answers.

One to three shapes of two sizes and six colours stand on a plain or noisy ground, never touching and with a clear gap
from left to right, because captions name them in that order. The seed alone decides everything. Knows no model and no
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 40, 40),
    "green": (34, 160, 60),
    "blue": (44, 84, 224),
    "yellow": (242, 212, 36),
    "purple": (146, 44, 190),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = {"small": (0.082, 0.098), "large": (0.155, 0.18)}  # radius over the image's side
_CROSS = [(0.33, -1.0), (0.33, -0.33), (1.0, -0.33), (1.0, 0.33), (0.33, 0.33), (0.33, 1.0)]  # one half
OUTLINES = {  # corners around the centre, within about one radius; y points down
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)],
    "star": [
        (reach * math.cos(angle), reach * math.sin(angle))
        for reach, angle in ((1.1 if i % 2 == 0 else 0.44, math.pi * (i / 5 - 0.5)) for i in range(10))
    ],
    "cross": _CROSS + [(-x, -y) for x, y in _CROSS],
}
IMAGE_SIDE = 128
OVERSAMPLING = 2
MIN_HORIZONTAL_GAP = 0.17  # between centres, over the image's side
MAX_OBJECTS = 3
EVALUATION_SEEDS = 1_000_000_000  # from here on: scenes that training never draws
SHOTS_APART = 10_000_000  # from the seeds of queries to those of their shots


@dataclass(frozen=True)
class SceneObject:
    """One shape; `x`, `y` (centre) and `radius` are fractions of the image's side."""

    size: str
    color: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.size} {self.pair}"

    @property
    def pair(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a seed stands for; `objects` are in order from left to right."""

    seed: int
    objects: tuple[SceneObject, ...]

    @property
    def caption(self) -> str:
        names = [f"a {item.name}" for item in self.objects]
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

    @cached_property
    def questions(self) -> list[tuple[str, str]]:
        """(question, answer) pairs: one for each kind that this scene can answer without doubt."""
        return list(_questions(self.objects, _generator(self.seed, stream=1)))

    @cached_property
    def image(self) -> Image.Image:
        """The image, RGB, IMAGE_SIDE pixels wide and high."""
        return _draw(self.objects, _generator(self.seed, stream=2))


def scene(seed: int, max_objects: int = MAX_OBJECTS) -> Scene:
    """The scene of this seed, with one to `max_objects` shapes."""
    generator = _generator(seed, stream=0)
    count = int(generator.integers(1, max_objects + 1))
    placed: list[SceneObject] = []
    while len(placed) < count:
        candidate = _random_object(generator)
        if all(_apart(candidate, other) for other in placed):
            placed.append(candidate)
    return Scene(seed, tuple(sorted(placed, key=lambda item: item.x)))


def _generator(seed: int, stream: int) -> np.random.Generator:
    """Independent streams, so that drawing an image never changes which questions are asked about it."""
    return np.random.default_rng([seed, stream])


def _random_object(generator: np.random.Generator) -> SceneObject:
    size = str(generator.choice(list(SIZES)))
    radius = float(generator.uniform(*SIZES[size]))
    margin = radius + 0.02
    x, y = generator.uniform(margin, 1 - margin, size=2)
    color, shape = str(generator.choice(list(COLORS))), str(generator.choice(SHAPES))
    return SceneObject(size, color, shape, float(x), float(y), radius)


def _apart(first: SceneObject, second: SceneObject) -> bool:
    distance = math.hypot(first.x - second.x, first.y - second.y)
    clear = distance > first.radius + second.radius + 0.03
    return clear and abs(first.x - second.x) > MIN_HORIZONTAL_GAP


def _questions(objects: tuple[SceneObject, ...], generator: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Of each kind one that has no doubt: attributes, counts, existence (once with each answer) and sides."""
    colors, shapes = [item.color for item in objects], [item.shape for item in objects]
    where, item = _one_end(objects, generator)
    yield f"What color is the object{where}?", item.color
    for item in _shuffled(objects, generator):
        if colors.count(item.color) == 1:
            yield f"What shape is the {item.color} object?", item.shape
            break
    for item in _shuffled(objects, generator):
        if [(other.color, other.shape) for other in objects].count((item.color, item.shape)) == 1:
            yield f"What size is the {item.color} {item.shape}?", item.size
            break
    yield "How many objects are there?", str(len(objects))
    shape = str(generator.choice(SHAPES + tuple(shapes)))
    yield f"How many {_plural(shape)} are there?", str(shapes.count(shape))
    yield f"Is there a {generator.choice(colors)} object?", "yes"
    yield f"Is there a {generator.choice([color for color in COLORS if color not in colors])} object?", "no"
    if len(objects) > 1:
        where, item = _one_end(objects, generator)
        kind = str(generator.choice(["size", "shape"]))
        yield f"What {kind} is the object{where}?", getattr(item, kind)
    yield from _questions_of_pairs(objects, generator)


def _questions_of_pairs(objects: tuple[SceneObject, ...], generator: np.random.Generator) -> Iterator[tuple[str, str]]:
    """An object found by its shape, by colour and shape together, and one object beside another."""
    shapes, pairs = [item.shape for item in objects], [item.pair for item in objects]
    for item in _shuffled(objects, generator):
        if shapes.count(item.shape) == 1:
            yield f"What color is the {item.shape}?", item.color
            break
    yield f"Is there a {generator.choice(pairs)}?", "yes"
    yield f"Is there a {generator.choice(_near_misses(objects))}?", "no"
    known = [item for item in _shuffled(objects, generator) if pairs.count(item.pair) == 1]
    if len(known) > 1:
        (item, other), side = known[:2], str(generator.choice(["left", "right"]))
        answer = "yes" if (item.x < other.x) == (side == "left") else "no"
        yield f"Is the {item.pair} to the {side} of the {other.pair}?", answer


def _near_misses(objects: tuple[SceneObject, ...]) -> list[str]:
    """Pairs that are not there although their colour and their shape are; or, where there are none, one of the two."""
    colors, shapes = {item.color for item in objects}, {item.shape for item in objects}
    absent = [(c, s) for c in COLORS for s in SHAPES if f"{c} {s}" not in {item.pair for item in objects}]
    near = [pair for pair in absent if pair[0] in colors and pair[1] in shapes]
    return [f"{c} {s}" for c, s in near or absent if c in colors or s in shapes]


def _one_end(objects: tuple[SceneObject, ...], generator: np.random.Generator) -> tuple[str, SceneObject]:
    """How to say which object is meant, the first or the last one, and the object."""
    if len(objects) == 1:
        return "", objects[0]
    side, item = (("left", objects[0]), ("right", objects[-1]))[int(generator.integers(2))]
    return f" on the far {side}", item


def _shuffled(objects: tuple[SceneObject, ...], generator: np.random.Generator) -> list[SceneObject]:
    return [objects[int(index)] for index in generator.permutation(len(objects))]


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _draw(objects: tuple[SceneObject, ...], generator: np.random.Generator) -> Image.Image:
    side = IMAGE_SIDE * OVERSAMPLING
    mask = Image.new("L", (side, side), 0)
    flat = Image.new("RGB", (side, side))
    for item in objects:
        color = tuple(int(value) for value in np.clip(np.array(COLORS[item.color]) + generator.normal(0, 6, 3), 0, 255))
        for canvas, ink in ((mask, 255), (flat, color)):
            _draw_shape(ImageDraw.Draw(canvas), item, side, ink)
    # Halved by box averaging: the edges come out smooth.
    coverage = np.asarray(mask.reduce(OVERSAMPLING), dtype=np.float32)[..., None] / 255
    # A half-covered pixel of `flat` is half black: dividing by the coverage gives the pure ink back.
    ink = np.asarray(flat.reduce(OVERSAMPLING), dtype=np.float32) / np.maximum(coverage, 1 / 255)
    pixels = coverage * np.minimum(ink, 255) + (1 - coverage) * _ground(generator)
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def _draw_shape(draw: ImageDraw.ImageDraw, item: SceneObject, side: int, ink: int | tuple[int, ...]) -> None:
    x, y, radius = item.x * side, item.y * side, item.radius * side
    if item.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
    else:
        draw.polygon([(x + radius * dx, y + radius * dy) for dx, dy in OUTLINES[item.shape]], fill=ink)


def _ground(generator: np.random.Generator) -> np.ndarray:
    """Float32 (side, side, 3): a muted plain, slanted, striped or speckled ground, with or without fine noise."""
    side = IMAGE_SIDE
    base = generator.uniform(55, 165) + generator.uniform(-14, 14, 3)
    ground = base.astype(np.float32) + _relief(generator)[..., None]
    if generator.random() < 0.5:
        ground = ground + generator.standard_normal((side, side, 1), dtype=np.float32) * generator.uniform(2, 12)
    return np.clip(ground, 0, 200)


def _relief(generator: np.random.Generator) -> np.ndarray:
    """Float32 (side, side)."""
    side, kind = IMAGE_SIDE, ("plain", "slanted", "striped", "speckled")[int(generator.integers(4))]
    if kind == "plain":
        return np.zeros((side, side), dtype=np.float32)
    if kind == "speckled":
        coarse = generator.normal(0, 9, (side // 8, side // 8)).astype(np.float32)
        return np.kron(coarse, np.ones((8, 8), dtype=np.float32))
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    angle = generator.uniform(0, 2 * math.pi)
    if kind == "slanted":
        return 22 * (math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None])
    waves = generator.uniform(4, 20)
    return 8 * np.sin(waves * (math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]))
