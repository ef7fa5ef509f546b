"""Unseen scenes as manifests: `python -m idefics_cli.demo.manifest FOLDER` writes `scenes.parquet` and `shots.parquet`.

A row holds one scene: its `id`, the image's bytes (`image`), one `question` with ten equal `answers` (as VQAv2's
annotators give ten), the `kind` of the question, and its `captions`. Training never draws these scenes, and no scene
is in both files.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from idefics_cli.demo.evaluate import SHOTS_APART, question_kind
from idefics_cli.demo.scene import EVALUATION_SEEDS, scene

NUM_REFERENCES = 10
ROWS_AT_A_TIME = 256


def unseen_rows(first: int, number: int) -> Iterator[dict[str, Any]]:
    """Rows of `number` scenes from the `first`-th unseen one on; every kind of question has its turn."""
    for index in range(first, first + number):
        drawn = scene(EVALUATION_SEEDS + index)
        question, answer = drawn.questions[index % len(drawn.questions)]
        image = io.BytesIO()
        drawn.image.save(image, format="PNG")
        yield {
            "id": f"scene-{drawn.seed}",
            "image": image.getvalue(),
            "question": question,
            "answers": [answer] * NUM_REFERENCES,
            "kind": question_kind(question),
            "captions": [drawn.caption],
        }


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A Parquet file, a row group for every ROWS_AT_A_TIME rows."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    texts = pa.list_(pa.string())
    columns = {"id": pa.string(), "image": pa.binary(), "question": pa.string(), "answers": texts, "kind": pa.string()}
    schema = pa.schema([*columns.items(), ("captions", texts)])
    with ParquetWriter(path, schema) as writer:
        for group in _grouped(rows):
            writer.write_table(pa.Table.from_pylist(group, schema))


def _grouped(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for row in rows:
        group.append(row)
        if len(group) == ROWS_AT_A_TIME:
            yield group
            group = []
    if group:
        yield group


def write_manifests(folder: Path, num_scenes: int, num_shots: int) -> tuple[Path, Path]:
    """The two files in `folder`, which is made where it is missing."""
    assert num_scenes <= SHOTS_APART, f"{num_scenes} scenes would reach those of the shots"
    folder.mkdir(parents=True, exist_ok=True)
    scenes, shots = folder / "scenes.parquet", folder / "shots.parquet"
    write_rows(scenes, unseen_rows(0, num_scenes))
    write_rows(shots, unseen_rows(SHOTS_APART, num_shots))
    return scenes, shots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the two files are written")
    parser.add_argument("--scenes", type=int, default=2_000)
    parser.add_argument("--shots", type=int, default=8)
    options = parser.parse_args()
    write_manifests(options.folder, options.scenes, options.shots)


if __name__ == "__main__":
    main()
