"""Unseen scenes as manifests: `python -m idefics_cli.demo.manifest FOLDER` writes `scenes.parquet` and `shots.parquet`.

A row holds a scene: its `id`, the image's bytes (`image`), one `question` with ten equal `answers` (as VQAv2 has ten
annotators), the `kind` of the question, and its `captions`; with `--all-questions` there is a row for each of them.
Training never draws these scenes, and no scene is in both files.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from idefics_cli.demo.scene import EVALUATION_SEEDS, SHOTS_APART, scene

NUM_REFERENCES = 10
GROUP_ROWS = 256


def unseen_rows(number: int, all_questions: bool) -> Iterator[dict[str, Any]]:
    """The `number`-th unseen scene; of one question each, all kinds take turns."""
    drawn = scene(EVALUATION_SEEDS + number)
    image = io.BytesIO()
    drawn.image.save(image, format="PNG")
    turn = number % len(drawn.questions)
    for index, (question, answer) in enumerate(drawn.questions):
        if all_questions or index == turn:
            yield {
                "id": f"scene-{drawn.seed}" + f"-{index}" * all_questions,
                "image": image.getvalue(),
                "question": question,
                "answers": [answer] * NUM_REFERENCES,
                "kind": question_kind(question),
                "captions": [drawn.caption],
            }


def question_kind(question: str) -> str:
    """Its first two words, or more where these ask different things."""
    if question.startswith("Is the "):
        return "left or right of"
    if " on the far " in question:
        return "left or right"
    by_shape = " object" not in question and question.startswith(("Is there", "What color"))
    return " ".join(question.split()[:2]).lower() + " by shape" * by_shape


def write_rows(path: Path, numbers: Iterable[int], all_questions: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, texts = pa.string(), pa.list_(pa.string())
    schema = pa.schema(
        {"id": text, "image": pa.binary(), "question": text, "answers": texts, "kind": text, "captions": texts}
    )
    rows = [row for number in numbers for row in unseen_rows(number, all_questions)]
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=GROUP_ROWS)


def write_manifests(
    folder: Path, scenes: int = 2_000, shots: int = 8, all_questions: bool = False
) -> tuple[Path, Path]:
    """Write so many unseen scenes, and others to show as shots, into FOLDER, which is created if needed."""
    assert scenes <= SHOTS_APART, f"{scenes} scenes would reach those of the shots"
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "scenes.parquet", folder / "shots.parquet"
    write_rows(paths[0], range(scenes), all_questions)
    write_rows(paths[1], range(SHOTS_APART, SHOTS_APART + shots), all_questions=False)
    return paths


if __name__ == "__main__":
    typer.run(write_manifests)
