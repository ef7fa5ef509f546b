"""Unseen scenes as manifests: `python -m idefics_cli.demo.manifest FOLDER` writes `scenes.parquet` and `shots.parquet`.

A row holds one scene: its `id`, the image's bytes (`image`), one `question` with ten equal `answers` (as VQAv2 has ten
annotators), the `kind` of the question, and its `captions`. Training never draws these scenes, and no scene is in both
files.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import typer

from idefics_cli.demo.evaluate import question_kind
from idefics_cli.demo.scene import EVALUATION_SEEDS, SHOTS_APART, scene

NUM_REFERENCES = 10
GROUP_ROWS = 256


def unseen_row(number: int) -> dict[str, Any]:
    """The `number`-th unseen scene; all kinds of questions take turns."""
    drawn = scene(EVALUATION_SEEDS + number)
    question, answer = drawn.questions[number % len(drawn.questions)]
    image = io.BytesIO()
    drawn.image.save(image, format="PNG")
    return {
        "id": f"scene-{drawn.seed}",
        "image": image.getvalue(),
        "question": question,
        "answers": [answer] * NUM_REFERENCES,
        "kind": question_kind(question),
        "captions": [drawn.caption],
    }


def write_rows(path: Path, numbers: range) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, texts = pa.string(), pa.list_(pa.string())
    schema = pa.schema(
        {"id": text, "image": pa.binary(), "question": text, "answers": texts, "kind": text, "captions": texts}
    )
    pq.write_table(pa.Table.from_pylist(list(map(unseen_row, numbers)), schema), path, row_group_size=GROUP_ROWS)


def write_manifests(folder: Path, scenes: int = 2_000, shots: int = 8) -> tuple[Path, Path]:
    """Write so many unseen scenes, and others to show as shots, into FOLDER, which is created if needed."""
    assert scenes <= SHOTS_APART, f"{scenes} scenes would reach those of the shots"
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "scenes.parquet", folder / "shots.parquet"
    for path, numbers in zip(paths, (range(scenes), range(SHOTS_APART, SHOTS_APART + shots)), strict=True):
        write_rows(path, numbers)
    return paths


if __name__ == "__main__":
    typer.run(write_manifests)
