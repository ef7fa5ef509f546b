"""Result files of every form become one page, whole or not at all; what a row holds stays text. Without a browser."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import save_image
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from idefics_cli.report.options import ReportOptions
from idefics_cli.report.page import embedded, write_report
from idefics_cli.storage.unit_folder import UnitFolder

ROWS = [
    {"id": "a.png", "image": "imgs/a.png", "caption": "a red square", "score": -0.5, "tokens": 3, "error": None},
    {"id": "b.png", "image": "imgs/b.png", "caption": "a cat", "score": -1.5, "tokens": 2, "error": None},
    {"id": "c.png", "image": "imgs/c.png", "caption": None, "score": None, "tokens": None, "error": "image_missing: c"},
]
ANSWERS = [
    {"id": str(n), "question": "what?", "answer": text, "score": -0.1, "tokens": 1, "error": None, "kind": kind}
    | {"candidates": [{"text": text, "score": -0.1, "tokens": 1}], "answers": answers, "choices": ["red", "blue"]}
    for n, (text, kind, answers) in enumerate(
        [("red", "x", ["red"] * 10), ("Blue.", "y", ["blue"] * 2 + ["green"] * 8), ("2", "y", ["three"])]
    )
]


class Reader(HTMLParser):
    """The scripts of a page by class or id, and every tag it has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: dict[str, list[str]] = {}
        self.tags: list[str] = []
        self.policy = self._kind = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        self._kind = (found.get("class") or found.get("id") or "script") if tag == "script" else tag
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"]

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.scripts.setdefault(self._kind, []).append(data)

    def column(self, name: str) -> list[Any]:
        chunks = [json.loads(text) for text in self.scripts["rows"]]
        return [value for chunk in chunks for value in chunk[name] or [None] * len(chunk["id"])]

    def rows(self, kind: str) -> list[Any]:
        return [row for text in self.scripts[kind] for row in json.loads(text)["rows"]]

    def one(self, name: str) -> Any:
        return json.loads("".join(self.scripts[name]))


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(results: Path, tmp_path: Path, **options: Any) -> Reader:
    page = tmp_path / "page.html"
    write_report(str(results), ReportOptions(output=str(page), overwrite=True, **options))
    return Reader(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.parquet", "parts/part-00000.parquet"])
def test_every_form_of_results(tmp_path, name):
    path = save(tmp_path / name, ANSWERS)
    if path.parent != tmp_path:
        path = path.parent
        UnitFolder(str(path)).begin({"format": "parquet"}, iter([(0,), (3,)]))
    page = read(path, tmp_path)
    assert page.column("id") == ["0", "1", "2"] and page.column("text") == ["red", "Blue.", "2"]
    assert page.column("question") == ["what?"] * 3 and page.column("score") == [-0.1] * 3
    assert page.column("value") == pytest.approx([1, 0.6, 0]) and page.column("error") == [None] * 3
    about = page.one("about")
    assert (about["text"], about["measure"], about["kept"]) == ("answer", "vqa_accuracy", ["kind"])
    assert [chunk["kept"] for chunk in map(json.loads, page.scripts["rows"])] == [[["x", "y", "y"]]]
    first, second, third = page.rows("details")
    assert first["references"] == [["red", 10, True]] and third["references"] == [["three", 1, False]]
    assert second["references"] == [["green", 8, False], ["blue", 2, True]]
    assert first["candidates"] == [["red", -0.1, 1]] and first["choices"] == ["red", "blue"]


def test_thumbnails_and_why_there_are_none(tmp_path):
    save_image(tmp_path / "imgs" / "a.png", 7)
    (tmp_path / "imgs" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    page = read(save(tmp_path / "r.jsonl", ROWS), tmp_path)
    good, *none = page.rows("thumbnails")
    assert Image.open(io.BytesIO(base64.b64decode(good))).size == (8, 8) and none == ["", ""]
    reasons = page.column("missing")
    assert reasons[0] is None and reasons[1].startswith("image_unreadable") and reasons[2].startswith("image_missing")
    assert page.column("link") == ["imgs/a.png", "imgs/b.png", "imgs/c.png"]
    linked = read(tmp_path / "r.jsonl", tmp_path, link=True)
    assert linked.rows("thumbnails") == [] and linked.column("missing") == [None] * 3


def test_images_below_the_working_folder(tmp_path, monkeypatch):
    """As `idefics caption imgs -o out/r.jsonl` leaves them; nothing outside is shown, wherever a file points."""
    save_image(tmp_path / "work" / "imgs" / "a.png")
    secret = save_image(tmp_path / "secret.png")
    rows = [ROWS[0], ROWS[0] | {"image": str(secret)}, ROWS[0] | {"image": "https://example.org/a.png"}]
    path = save(tmp_path / "work" / "out" / "r.jsonl", rows)
    monkeypatch.chdir(tmp_path / "work")
    page = read(path, tmp_path)
    first, second, third = page.column("missing")
    assert first is None and second.startswith("image_not_allowed") and third.startswith("image_not_allowed")


def test_images_of_the_runs_input(tmp_path):
    image = save_image(tmp_path / "a.png").read_bytes()
    scenes = [{"id": str(n), "image": image if n != 1 else b"broken"} for n in range(4)]
    source = save(tmp_path / "scenes.parquet", scenes)
    rows = [{"id": f"{n}#{q}", "image": None, "answer": "x", "score": 0.0} for n in (0, 1, 2) for q in (1, 2)]
    rows += [{"id": "none", "image": None, "answer": "x", "score": 0.0}, rows[0]]  # one is not there, one comes again
    page = read(save(tmp_path / "r.jsonl", rows), tmp_path, images_from=str(source))
    reasons = [reason and reason.partition(":")[0] for reason in page.column("missing")]
    assert reasons == [None, None, "image_unreadable", "image_unreadable", None, None, "image_missing", None]


def test_two_runs(tmp_path):
    other = [ANSWERS[1] | {"answer": "green"}, ANSWERS[0], ANSWERS[0] | {"id": "9"}]
    save(tmp_path / "b.parquet", other)
    page = read(save(tmp_path / "a.jsonl", ANSWERS), tmp_path, compare=str(tmp_path / "b.parquet"))
    assert page.column("text2") == ["red", "green", None] and page.column("value2") == pytest.approx([1, 1, None])
    assert page.one("end")["unmatched"] == 1


HOSTILE = "</script><script>alert(1)</script><!--<script>&amp;\u2028\0\x1b[31m\u202edlrow\ud7ff"


@settings(deadline=None)
@given(st.recursive(st.text() | st.none() | st.floats(), st.lists, max_leaves=5))
@example(HOSTILE)
@example("]]><style>@import 'x'")
def test_nothing_ends_the_data_or_begins_a_tag(value):
    text = str(embedded({"value": value}))
    assert not re.search("[<>&\u2028\u2029]", text)
    found = json.loads(text)["value"]
    assert found == json.loads(json.dumps(value), parse_constant=lambda _: None)


def test_hostile_rows_stay_text(tmp_path):
    rows = [{"id": HOSTILE, "image": HOSTILE, "caption": HOSTILE, "score": "NaN", "error": None, HOSTILE: HOSTILE}]
    plain = [{"id": "a", "image": "a", "caption": "a", "score": "0", "error": None, "k": "v"}]
    hostile, usual = (read(save(tmp_path / f"{n}.jsonl", each), tmp_path) for n, each in enumerate((rows, plain)))
    assert hostile.tags == usual.tags
    assert hostile.column("text") == [HOSTILE] and hostile.one("about")["kept"] == [HOSTILE]
    script, style = "".join(hostile.scripts["script"]), "".join(hostile.scripts["style"])
    for text in (script, style):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in hostile.policy
    assert "unsafe" not in hostile.policy and "http" not in hostile.policy


def test_the_same_results_give_the_same_page(tmp_path):
    path = save(tmp_path / "r.jsonl", ROWS)
    pages = [read(path, tmp_path).scripts for _ in range(2)]
    assert pages[0] == pages[1]


def test_memory_does_not_grow_with_the_rows(tmp_path):
    row = {"id": "x", "caption": "word " * 2_000, "score": -1.0, "error": None}
    path = save(tmp_path / "r.jsonl", [row] * 2_000)  # 20 MB
    tracemalloc.start()
    read_only = ReportOptions(output=str(tmp_path / "page.html"), link=True)
    write_report(str(path), read_only)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6, f"{peak / 1e6:.0f} MB"


def test_the_command(run, tmp_path):
    path = save(tmp_path / "r.jsonl", ROWS)
    result = run("report", path, "-o", tmp_path / "r.html")
    assert result.exit_code == 0 and result.stdout == ""
    assert "3 rows in" in result.stderr and "3 of them without an image" in result.stderr
    assert ", first: " in result.stderr and ", first: image_" not in result.stderr  # the code is said once
    assert "image_missing: 3 rows" in result.stderr
    assert "; --image-root FOLDER or --images INPUT says where images are" in " ".join(result.stderr.split())
    streamed = run("report", "-", "-o", "-", "--limit", "2", input=path.read_bytes())
    assert streamed.exit_code == 0 and streamed.stdout.startswith("<!doctype html>")
    assert Reader(streamed.stdout).column("id") == ["a.png", "b.png"]
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_refusals(refused, tmp_path):
    path, page = save(tmp_path / "r.jsonl", ROWS), tmp_path / "r.html"
    assert "add -o R.html" in refused("report", path)
    assert "exists already" in refused("report", path, "-o", save_image(tmp_path / "there.html"))
    assert "ends in .html" in refused("report", path, "-o", path, "--overwrite")
    assert "does not exist" in refused("report", path, "-o", tmp_path / "none" / "r.html")
    assert "is a folder" in refused("report", path, "-o", tmp_path)
    assert "not a file of results" in refused("report", save_image(tmp_path / "a.png"), "-o", page)
    assert "no column answer or caption or text" in refused(
        "report", save(tmp_path / "x.jsonl", [{"id": "a"}]), "-o", page
    )
    assert "no column 'gold'" in refused("report", path, "-o", page, "--answers-column", "gold")
    assert "no column 'gold'" in refused("report", path, "-o", page, "--keep", "gold")
    assert "cannot read" in refused("report", tmp_path / "none.jsonl", "-o", page)
    save_image(tmp_path / "images" / "a.png")
    assert "no results" in refused("report", tmp_path / "images", "-o", page)
    assert "--images" in refused("report", path, "-o", page, "--image-column", "x")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(path.read_text() + '{"id": "d", "cap')
    assert "line 4 is not valid JSON" in refused("report", broken, "-o", page)
    assert not page.exists() and not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_a_page_of_before_stays_until_the_new_one_is_whole(run, tmp_path):
    page = tmp_path / "r.html"
    page.write_text("before")
    broken = tmp_path / "broken.jsonl"
    broken.write_text("".join(json.dumps(row) + "\n" for row in ROWS) * 200 + "[")
    assert run("report", broken, "-o", page, "--overwrite").exit_code == 2 and page.read_text() == "before"
    assert run("report", save(tmp_path / "r.jsonl", ROWS), "-o", page, "--overwrite").exit_code == 0
    assert page.read_text().startswith("<!doctype html>")
