"""Every command of docs/formats.md, on a small folder of the layout that it names, with real files' fields."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow.parquet as pq
import pytest
import webdataset
from conftest import rows_of, save_image
from test_field_cells import Choosing

PAGE = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
COMMANDS = dict(re.findall(r"^\| ([^|]+?) \|.*\| `(idefics [^`]+)` \|$", PAGE, re.MULTILINE))
JOINS = dict(re.findall(r"^### ([^\n]+)\n\n```sh\n(.+?)```", PAGE, re.MULTILINE | re.DOTALL))
IMAGES = {"NLVR2": {2}, "MMMU": {2}, "ScienceQA": {0, 1}}  # of a row, where it has not one
Layout = Callable[[Path], int]  # makes the folder, and gives the number of rows
LAYOUTS: dict[str, Layout] = {}


def layout(*names: str) -> Callable[[Layout], Layout]:
    def named(make: Layout) -> Layout:
        LAYOUTS.update(dict.fromkeys(names, make))
        return make

    return named


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl" or path.name == "dev.json"  # NLVR2's are lines, whatever they are called
    path.write_text("".join(json.dumps(row) + "\n" for row in value) if lines else json.dumps(value))


def stored(folder: Path, seed: int) -> dict[str, Any]:
    """An image as the datasets library keeps it in Parquet."""
    return {"bytes": save_image(folder.parent / "made.png", seed).read_bytes(), "path": f"{seed}.png"}


@layout("COCO captions", "COCO captions, scored")
def coco(folder: Path) -> int:
    images = [
        {"license": 1, "file_name": f"{i:012d}.jpg", "coco_url": f"http://images.cocodataset.org/val2017/{i:012d}.jpg",
         "height": 8, "width": 8, "date_captured": "2013-11-14", "id": i}
        for i in (139, 285)
    ]  # fmt: skip
    for image in images:
        save_image(folder / "val2017" / image["file_name"], image["id"])
    annotations = [{"image_id": i, "id": 10 * i + k, "caption": f"a thing {k}"} for k in range(5) for i in (285, 139)]
    parts = {"info": {"year": 2017}, "licenses": [{"id": 1, "name": "by"}], "images": images}
    write(folder / "annotations/captions_val2017.json", {**parts, "annotations": annotations})
    return 2


def vqa_files(folder: Path, questions: str, annotations: str, image: int = 42) -> int:
    asked = [{"image_id": image, "question": f"What is {k}?", "question_id": 42000 + k} for k in range(3)]
    answers = [{"answer": "net", "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]
    right = [{"question_type": "what", "multiple_choice_answer": "net", "answers": answers, "answer_type": "other"}]
    ids = [{name: row[name] for name in ("image_id", "question_id")} for row in asked]
    head = {"info": {"version": "2.0"}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {"name": "by"}}
    write(folder / questions, {**head, "data_subtype": "val2014", "questions": asked})
    write(folder / annotations, {**head, "annotations": [{**right[0], **each} for each in reversed(ids)]})
    save_image(folder / f"val2014/COCO_val2014_{image:012}.jpg", image)
    return 3


@layout("VQAv2", "VQAv2, scored")
def vqav2(folder: Path) -> int:
    names = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
    return vqa_files(folder, *names)


@layout("OK-VQA")
def ok_vqa(folder: Path) -> int:
    return vqa_files(folder, "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json")


@layout("TextVQA")
def textvqa(folder: Path) -> int:
    row = {
        "question": "what is the brand?", "image_id": "003a8ae2ef43b901", "image_classes": ["Cassette deck"],
        "flickr_original_url": "https://farm2.staticflickr.com/4/a.jpg", "image_width": 8, "image_height": 8,
        "answers": ["net"] * 10, "question_tokens": ["what"], "question_id": 34602, "set_name": "val",
    }  # fmt: skip
    save_image(folder / "train_images/003a8ae2ef43b901.jpg", 1)
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write(folder / "TextVQA_0.5.1_val.json", {**head, "data": [row, {**row, "question_id": 34603}]})
    return 2


@layout("GQA")
def gqa(folder: Path) -> int:
    row = {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}], "entailed": [],
        "equivalent": ["0"], "question": "Is it overcast?", "imageId": "n161313", "isBalanced": True,
        "groups": {"global": None, "local": "a"}, "answer": "net", "semanticStr": "select", "fullAnswer": "No.",
    }  # fmt: skip
    save_image(folder / "images/n161313.jpg", 1)
    write(folder / "val_balanced_questions.json", {"05451384": row, "05451385": row})
    return 2


@layout("NLVR2")
def nlvr2(folder: Path) -> int:
    rows = [
        {"validation": {"1": "True"}, "sentence": "There are dogs.", "left_url": "https://a.example/b.jpg",
         "writer": "117", "label": label, "right_url": "https://a.example/c.jpg", "synset": "dog",
         "query": "dogs", "identifier": f"dev-850-{k}-0"}
        for k, label in enumerate(["True", "False"])
    ]  # fmt: skip
    for k in range(2):
        for side in range(2):
            save_image(folder / f"dev/dev-850-{k}-img{side}.png", 10 * k + side)
    write(folder / "dev.json", rows)
    return 2


@layout("NLVR2, as Parquet on the hub")
def nlvr2_parquet(folder: Path) -> int:
    rows = [
        {"question_id": f"dev-{k}", "question": "There are dogs.", "answer": label,
         "left_image": stored(folder, k), "right_image": stored(folder, k + 9)}
        for k, label in enumerate(["True", "False"])
    ]  # fmt: skip
    (folder / "data").mkdir()
    pd.DataFrame(rows).to_parquet(folder / "data/balanced_dev-00000-of-00001.parquet")
    return 2


SCIENCE = {
    "question": "Which of these is a mammal?", "choices": ["frog", "dog"], "answer": 1, "hint": "",
    "task": "closed choice", "grade": "grade4", "subject": "natural science", "topic": "biology",
    "category": "Animals", "skill": "x", "lecture": "", "solution": "",
}  # fmt: skip


@layout("ScienceQA")
def scienceqa(folder: Path) -> int:
    rows = {
        "1": {**SCIENCE, "image": None, "split": "train"},
        "4": {**SCIENCE, "image": "image.png", "split": "test"},
        "5": {**SCIENCE, "image": None, "split": "test"},
    }
    save_image(folder / "images/test/4/image.png", 1)
    write(folder / "problems.json", rows)
    return 2


@layout("ScienceQA, as Parquet on the hub")
def scienceqa_parquet(folder: Path) -> int:
    (folder / "data").mkdir()
    rows = [{"image": stored(folder, 1), **SCIENCE}, {"image": None, **SCIENCE}]
    pd.DataFrame(rows).to_parquet(folder / "data/test-00000-of-00001.parquet")
    return 2


@layout("MMMU")
def mmmu(folder: Path) -> int:
    images = {f"image_{k}": stored(folder, k) if k < 3 else None for k in range(1, 8)}
    row = {
        "id": "validation_Art_1", "question": "<image 1> or <image 2>?", "options": "['Baroque', 'Gothic']",
        "explanation": "", **images, "img_type": "['Paintings']", "answer": "B", "topic_difficulty": "Easy",
        "question_type": "multiple-choice", "subfield": "Art History",
    }  # fmt: skip
    features = {name: datasets.Value("string") for name in row} | {name: datasets.Image() for name in images}
    (folder / "Art").mkdir()
    rows = datasets.Dataset.from_list([row, {**row, "id": "validation_Art_2"}], datasets.Features(features))
    rows.to_parquet(folder / "Art/validation-00000-of-00001.parquet")
    return 2


@layout("LLaVA")
def llava(folder: Path) -> int:
    turns = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A bus."}]
    save_image(folder / "train2017/000000033471.jpg", 1)
    rows = [{"id": f"{k}", "image": "000000033471.jpg", "conversations": turns} for k in range(2)]
    write(folder / "llava_instruct_150k.json", rows)
    return 2


def messages(url: str) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]


@layout("OpenAI, chat rows")
def openai(folder: Path) -> int:
    save_image(folder / "a.png", 1)
    answer = {"role": "assistant", "content": "A bus."}
    write(folder / "train.jsonl", [{"messages": [*messages("a.png"), answer]}] * 2)
    return 2


@layout("OpenAI, batch requests")
def openai_batch(folder: Path) -> int:
    save_image(folder / "a.png", 1)
    body = {"model": "gpt-4o", "messages": messages("a.png"), "max_tokens": 30}
    request = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    write(folder / "batch.jsonl", [{"custom_id": f"request-{k}", **request} for k in range(2)])
    return 2


@layout("imagefolder", "imagefolder with metadata")
def imagefolder(folder: Path) -> int:
    names = ["cat/1.png", "dog/2.png"]
    for seed, name in enumerate(names):
        save_image(folder / "train" / name, seed)
    pd.DataFrame({"file_name": names, "text": "A pet."}).to_csv(folder / "train/metadata.csv", index=False)
    return 2


@layout("WebDataset")
def shards(folder: Path) -> int:
    (folder / "shards").mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"shards/{shard:05d}.tar")) as writer:
            for k in range(2):
                fields = {"url": "https://a.example/1.jpg", "status": "success"}
                sample = {"jpg": save_image(folder / "made.png", k).read_bytes(), "txt": "alt", "json": fields}
                writer.write({"__key__": f"{shard:05d}{k:04d}", **sample})
    return 4


@layout("img2dataset")
def img2dataset(folder: Path) -> int:
    shards(folder)
    (folder / "shards").rename(folder / "laion")
    for shard in range(2):
        pd.DataFrame({"key": ["0"], "status": ["success"]}).to_parquet(folder / f"laion/{shard:05d}.parquet")
        write(folder / f"laion/{shard:05d}_stats.json", {"count": 2, "successes": 2})
    return 4


def spark(folder: Path, rows: pd.DataFrame) -> int:
    """What Spark writes: parts with hidden checksums beside them, and an empty file that says the job is done."""
    folder.mkdir()
    for part in range(2):
        name = f"part-{part:05d}-0c9a4c0e-7d2b-4f2a-9a53-0f6d1f2f3a11-c000.snappy.parquet"
        rows.iloc[part::2].to_parquet(folder / name, compression="snappy")
        (folder / f".{name}.crc").write_bytes(b"crc\0")
    (folder / "_SUCCESS").touch()
    (folder / "._SUCCESS.crc").write_bytes(b"crc\0")
    return len(rows)


@layout("Spark, a table")
def spark_table(folder: Path) -> int:
    save_image(folder / "images/a.png", 1)
    return spark(folder / "table", pd.DataFrame({"image": ["a.png"] * 3, "label": [1, 2, 3]}))


@layout("Spark, binary files")
def spark_files(folder: Path) -> int:
    contents = [save_image(folder / "made.png", seed).read_bytes() for seed in range(3)]
    rows = {"path": [f"file:/data/{k}.png" for k in range(3)], "modificationTime": pd.Timestamp("2026-01-01"),
            "length": [len(content) for content in contents], "content": contents}  # fmt: skip
    return spark(folder / "files", pd.DataFrame(rows))


@layout("datasets, `save_to_disk`")
def datasets_saved(folder: Path) -> int:
    rows = {"image": [str(save_image(folder / f"{k}.png", k)) for k in range(3)]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(folder / "set", num_shards=2)
    return 3


@layout("datasets, Parquet")
def datasets_parquet(folder: Path) -> int:
    rows = {"image": [str(save_image(folder / f"{k}.png", k)) for k in range(3)], "label": [0, 1, 0]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(folder / "set.parquet")
    return 3


def test_every_layout_is_tried() -> None:
    assert set(COMMANDS) == set(LAYOUTS) and set(JOINS) < set(LAYOUTS)
    headings = {re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in JOINS}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) == headings


@pytest.mark.skipif(shutil.which("jq") is None, reason="the commands of docs/formats.md need jq")
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_reads_the_layout(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    num_rows = LAYOUTS[name](folder)
    monkeypatch.chdir(folder)
    if name in JOINS:
        subprocess.run(["bash", "-ec", JOINS[name]], check=True)
    words = shlex.split(COMMANDS[name])[1:]
    arguments = [
        each for word in words for each in (sorted(glob.glob(word)) if os.sep in word and "*" in word else [word])
    ]
    captioner = Choosing(is_instruct=True, answer=lambda text: f"net {text[-4:]}" if words[0] != "vqa" else "net")
    captioner.choose = lambda choices: choices[-1]
    result = run(*arguments, captioner=captioner)
    assert result.exit_code == 0, result.output
    assert "--text-only" not in result.stderr and "no row shows an image" not in result.stderr
    shown = {sum(isinstance(item, bytes) for item in prompt) for prompt in captioner.prompts.values()}
    assert shown == next((images for start, images in IMAGES.items() if name.startswith(start)), {1})
    output = Path(words[words.index("-o") + 1])
    if output.suffix == ".json":
        assert json.loads(output.read_text()) == [{"question_id": 42000 + k, "answer": "net"} for k in range(3)]
        return
    rows = pq.read_table(output).to_pylist() if output.suffix == ".parquet" else rows_of(output.read_bytes())
    assert len(rows) == num_rows and all(row["error"] is None for row in rows)
    if "--answers-column" in words and words[0] == "vqa":
        scores = json.loads(result.stdout)
        assert scores["exact_match"] == (0.5 if name.startswith("NLVR2") else 1.0)
