"""How well the `demo` model sees: `python -m idefics_cli.demo.evaluate`.

Scenes that training never draws (seeds from EVALUATION_SEEDS on) are captioned and asked about through the public
`Idefics`, with the prompts that `idefics caption` and `idefics vqa` make: without shots, the default's two text-only
ones precede the query, or none with `--bare`. A caption or an answer counts when it is right to the letter. Prints one
JSON object to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scenes", type=int, default=2_000)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--bare", action="store_true", help="no shots at all, not even the default's text-only ones")
    parser.add_argument("--num-beams", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    from idefics_cli.idefics import Idefics

    model = Idefics.from_pretrained(options.model, device=options.device, batch_size=options.batch_size)
    print(json.dumps(evaluate(model, options.scenes, options.shots, options.bare, options.num_beams)))


if __name__ == "__main__":
    main()
