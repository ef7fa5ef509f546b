"""How well the `demo` model sees: `python -m idefics_cli.demo.evaluate`.

Scenes that training never draws (seeds from EVALUATION_SEEDS on) are captioned and asked about with the prompts of
`idefics caption` and `idefics vqa`. A text counts when it is right to the letter. Prints one JSON object to stdout,
progress to stderr.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from idefics_cli.demo.scene import EVALUATION_SEEDS, SHOTS_APART, Scene, scene
from idefics_cli.prompts.templates import Prompt, PromptOptions, Shot, build_prompt, leading_shots

if TYPE_CHECKING:
    from idefics_cli.idefics import Idefics

Asked = tuple[str, Prompt, str]  # the kind of question, the prompt, the text that is right


def asked_of(scenes: Iterable[Scene], options: PromptOptions) -> Iterator[Asked]:
    """What the task of `options` asks about each scene: its caption, or all of its questions."""
    for drawn in scenes:
        for number, (question, answer) in enumerate(_questions(drawn, options)):
            shots = leading_shots(options, list(_pool(drawn, options, number)), instruct=False)
            prompt = build_prompt(options, {"question": question}, (drawn.image,), shots, instruct=False)
            assert isinstance(prompt, tuple), prompt
            yield question_kind(question) if question else "caption", prompt, answer


def _questions(drawn: Scene, options: PromptOptions) -> list[tuple[str, str]]:
    return [("", drawn.caption)] if options.task == "caption" else drawn.questions


def _pool(drawn: Scene, options: PromptOptions, number: int) -> Iterator[Shot]:
    """Shots of other unseen scenes, with their `number`-th question."""
    first = drawn.seed * options.num_shots + SHOTS_APART
    for shot in map(scene, range(first, first + options.num_shots)):
        questions = _questions(shot, options)
        question, answer = questions[number % len(questions)]
        yield Shot((shot.image,), answer, {"question": question})


def question_kind(question: str) -> str:
    """Its first two words; questions about left or right are a kind of their own."""
    return "left or right" if " on the far " in question else " ".join(question.split()[:2]).lower()


def run(model: Idefics, asked: Sequence[Asked], num_beams: int) -> dict[str, list[bool]]:
    """Whether each text is right, by kind."""
    right: dict[str, list[bool]] = defaultdict(list)
    window = 8 * model.batch_size
    for first in tqdm(range(0, len(asked), window), file=sys.stderr):
        chosen = asked[first : first + window]
        results = model.generate([prompt for _, prompt, _ in chosen], num_beams=num_beams)
        for (kind, _, expected), result in zip(chosen, results, strict=True):
            right[kind].append(result.text == expected)
    return right


def evaluate(
    model: Idefics, num_scenes: int, num_shots: int = 0, bare: bool = False, num_beams: int = 3
) -> dict[str, object]:
    scenes = [scene(seed) for seed in range(EVALUATION_SEEDS, EVALUATION_SEEDS + num_scenes)]
    captions, by_kind = (
        run(model, list(asked_of(scenes, PromptOptions(task, num_shots=num_shots, bare=bare))), num_beams)
        for task in ("caption", "vqa")
    )
    answers = list(chain(*by_kind.values()))
    return {
        "scenes": num_scenes,
        "shots": num_shots,
        "bare": bare,
        "num_beams": num_beams,
        "captions": len(captions["caption"]),
        "captions_exact": fmean(captions["caption"]),
        "answers": len(answers),
        "answers_right": fmean(answers),
        "answers_by_kind": {kind: fmean(right) for kind, right in sorted(by_kind.items())},
    }


def main(
    model: str = "demo",
    device: str = "auto",
    scenes: int = 2_000,
    shots: int = 0,
    bare: Annotated[bool, typer.Option("--bare", help="Show no shots, not even the two usual texts.")] = False,
    num_beams: int = 3,
    batch_size: int = 64,
) -> None:
    """How well the model sees scenes that training never draws."""
    from idefics_cli.idefics import Idefics

    loaded = Idefics.from_pretrained(model, device=device, batch_size=batch_size)
    print(json.dumps(evaluate(loaded, scenes, shots, bare, num_beams)))


if __name__ == "__main__":
    typer.run(main)
