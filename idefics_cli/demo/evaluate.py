"""How well the `demo` model sees: `python -m idefics_cli.demo.evaluate`.

Scenes that training never draws (seeds from EVALUATION_SEEDS on) are captioned and asked about through the public
`Idefics`, with the prompts that `idefics caption` and `idefics vqa` make: without shots, the default's two text-only
ones stand before the query, or none with `--bare`. A caption counts when it is right to the letter, an answer likewise.
Prints a table to stderr and one JSON object to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from idefics_cli.demo.scene import EVALUATION_SEEDS, Scene, scene
from idefics_cli.prompts.templates import Prompt, PromptOptions, Shot, build_prompt, leading_shots

if TYPE_CHECKING:
    from idefics_cli.idefics import Idefics

SHOTS_APART = 10_000_000  # shots are unseen too, and never one of the scenes they stand before


@dataclass(frozen=True)
class DemoPrompt:
    """One prompt and the text that is right."""

    kind: str
    prompt: Prompt
    expected: str


def caption_tasks(scenes: Iterable[Scene], num_shots: int = 0, bare: bool = False) -> Iterator[DemoPrompt]:
    options = PromptOptions("caption", num_shots=num_shots, bare=bare)
    for drawn in scenes:
        pool = [Shot(shot.image, shot.caption) for shot in shots_for(drawn, num_shots)]
        yield DemoPrompt("caption", prompt_of(options, drawn, {}, pool), drawn.caption)


def question_tasks(scenes: Iterable[Scene], num_shots: int = 0, bare: bool = False) -> Iterator[DemoPrompt]:
    options = PromptOptions("vqa", num_shots=num_shots, bare=bare)
    for drawn in scenes:
        for number, (question, answer) in enumerate(drawn.questions):
            asked = [(shot, *shot.questions[number % len(shot.questions)]) for shot in shots_for(drawn, num_shots)]
            pool = [Shot(shot.image, said, shot_question) for shot, shot_question, said in asked]
            yield DemoPrompt(question_kind(question), prompt_of(options, drawn, {"question": question}, pool), answer)


def prompt_of(options: PromptOptions, drawn: Scene, fields: dict[str, str], pool: Sequence[Shot]) -> Prompt:
    prompt = build_prompt(options, fields, (drawn.image,), leading_shots(options, pool, instruct=False), instruct=False)
    assert isinstance(prompt, tuple), prompt
    return prompt


def shots_for(drawn: Scene, num_shots: int) -> list[Scene]:
    first = drawn.seed * num_shots + SHOTS_APART
    return [scene(seed) for seed in range(first, first + num_shots)]


def question_kind(question: str) -> str:
    """The first two words, and left or right apart."""
    return "left or right" if " on the far " in question else " ".join(question.split()[:2]).lower()


def run(model: Idefics, tasks: Sequence[DemoPrompt], num_beams: int, label: str) -> Counter:
    """Counts of (kind, right)."""
    counts: Counter = Counter()
    window = 8 * model.batch_size
    with tqdm(total=len(tasks), desc=label, file=sys.stderr, unit="text") as bar:
        for first in range(0, len(tasks), window):
            chosen = tasks[first : first + window]
            results = model.generate([task.prompt for task in chosen], num_beams=num_beams)
            for task, result in zip(chosen, results, strict=True):
                counts[task.kind, result.text == task.expected] += 1
            bar.update(len(chosen))
    return counts


def accuracy(counts: Counter, kinds: Iterable[str]) -> float:
    kinds = list(kinds)
    right = sum(counts[kind, True] for kind in kinds)
    return right / sum(counts[kind, outcome] for kind in kinds for outcome in (True, False))


def evaluate(
    model: Idefics, num_scenes: int, num_shots: int = 0, bare: bool = False, num_beams: int = 3
) -> dict[str, object]:
    scenes = [scene(seed) for seed in range(EVALUATION_SEEDS, EVALUATION_SEEDS + num_scenes)]
    captions = run(model, list(caption_tasks(scenes, num_shots, bare)), num_beams, "captions")
    answers = run(model, list(question_tasks(scenes, num_shots, bare)), num_beams, "answers")
    kinds = sorted({kind for kind, _ in answers})
    return {
        "scenes": num_scenes,
        "shots": num_shots,
        "bare": bare,
        "num_beams": num_beams,
        "captions": captions.total(),
        "captions_exact": accuracy(captions, ["caption"]),
        "answers": answers.total(),
        "answers_right": accuracy(answers, kinds),
        "answers_by_kind": {kind: accuracy(answers, [kind]) for kind in kinds},
    }


def show(report: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    shots = "bare" if report["bare"] else f"{report['shots']} shots"
    table = Table(title=f"{report['scenes']} unseen scenes, {shots}")
    table.add_column("what")
    table.add_column("right", justify="right")
    table.add_row("captions", f"{report['captions_exact']:.1%}")
    table.add_row("answers", f"{report['answers_right']:.1%}")
    for kind, share in report["answers_by_kind"].items():
        table.add_row(f"  {kind}", f"{share:.1%}")
    Console(stderr=True).print(table)


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
    report = evaluate(model, options.scenes, options.shots, options.bare, options.num_beams)
    show(report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
