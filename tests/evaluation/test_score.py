"""Result files in both formats, references in every form, and mistakes as errors of one line."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from idefics_cli.errors import IdeficsError, InputError
from idefics_cli.evaluation.metrics import cider
from idefics_cli.evaluation.score import ScoreOptions, Scores, find_text_column, score_results, score_table
from idefics_cli.readers.references import references_of

ROWS = [
    {"id": "a", "answer": "red", "error": None, "answers": ["red"] * 10, "kind": "color"},
    {"id": "b", "answer": "Blue.", "error": None, "answers": ["blue"] * 2 + ["green"] * 8, "kind": "color"},
    {"id": "c", "answer": "2", "error": None, "answers": ["two"] * 9 + ["three"], "kind": "count"},
    {"id": "d", "answer": None, "error": "image_missing: gone", "answers": ["1"] * 10, "kind": "count"},
    {"id": "e", "answer": "red", "error": None, "answers": None, "kind": None},
]

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)


def save(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["r.jsonl", "r.ndjson", "r.jsonl.gz", "r.parquet"])
def test_totals_groups_and_errors(tmp_path, name):
    report = score_results(save(tmp_path / name, ROWS), ScoreOptions(by="kind")).as_dict()
    assert report == {
        "rows": 4,
        "errors": 1,
        "vqa_accuracy": pytest.approx((1 + 0.6 + 1 + 0) / 4),
        "exact_match": 1 / 4,
        "unscored": 1,
        "single_reference": 0,
        "answers_column": "answers",
        "by": "kind",
        "groups": {
            "color": {"rows": 2, "errors": 0, "vqa_accuracy": pytest.approx(0.8), "exact_match": 0.5},
            "count": {"rows": 2, "errors": 1, "vqa_accuracy": pytest.approx(0.5), "exact_match": 0.0},
        },
    }
    assert json.loads(json.dumps(report)) == report


def test_an_empty_text_beside_an_empty_reference_is_right_but_an_error_never_is(tmp_path):
    rows = [{"answer": "", "answers": [""]}, {"answer": "", "error": "out_of_memory: x", "answers": [""]}]
    scores = score_results(save(tmp_path / "r.jsonl", rows))
    assert (scores.total.values, scores.total.errors) == ({"vqa_accuracy": 0.5, "exact_match": 0.5}, 1)


@given(st.lists(JSON_VALUES, min_size=1, max_size=6))
@example(["café", None])
@example([1, "1", '"1"', None, "(none)", "null", True, "true", 1.0, "é", [1], "[1]"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_different_values_are_different_groups(tmp_path, values):
    rows = [{"answer": "a", "answers": ["a"], "kind": value} for value in values]
    groups = score_results(save(tmp_path / "r.jsonl", rows), ScoreOptions(by="kind")).groups
    assert len(groups) == len({json.dumps(value) for value in values})
    assert sum(group.rows for group in groups.values()) == len(values)
    if all(value is None or isinstance(value, str) for value in values) and "(none)" not in values:
        assert set(groups) == {"(none)" if value is None else value for value in values}, (
            "texts are called by themselves"
        )


def test_captions_get_cider_and_groups_share_the_corpus(tmp_path):
    pytest.importorskip("pycocoevalcap", reason="CIDEr's package is the extra `score`")
    pytest.importorskip("nltk", reason="CIDEr's package is the extra `score`")
    texts = ["a red car", "a dog runs", "a red bus", None]
    references = [["a red car", "one red car"], ["the dog runs"], ["a blue bus"], ["a cat"]]
    rows = [
        {"caption": text, "refs": group, "half": number // 2}
        for number, (text, group) in enumerate(zip(texts, references, strict=True))
    ]
    options = ScoreOptions("refs", "half", tokenization="treebank")
    report = score_results(save(tmp_path / "r.parquet", rows), options).as_dict()
    values = cider([text or "" for text in texts], references, "treebank")
    assert values[0] > values[1] > values[3] == 0
    assert report["cider"] == pytest.approx(sum(values) / 4)
    assert report["groups"]["0"]["cider"] == pytest.approx(sum(values[:2]) / 2)
    assert (report["exact_match"], report["errors"], report["tokenization"]) == (0.25, 1, "treebank")


@pytest.mark.parametrize(
    ("cell", "references"),
    [
        (None, []),
        ([], []),
        ([None], []),
        ("red", ["red"]),
        (["red", None, "blue"], ["red", "blue"]),
        ([{"answer": "red", "answer_id": 1}, {"answer": "blue"}], ["red", "blue"]),
        ({"answer": ["red", "blue"], "answer_id": [1, 2]}, ["red", "blue"]),
        ([{"caption": "a car"}], ["a car"]),
        ({"text": "a car"}, ["a car"]),
        ([2, 3.5], ["2", "3.5"]),
        ("", [""]),
    ],
)
def test_references_in_every_form(cell, references):
    assert references_of(cell) == references


@pytest.mark.parametrize("cell", [[["red"]], [{"word": "red"}], [True], b"red", {"answer": {"answer": [[1]]}}])
def test_references_that_are_not_texts_are_refused_with_their_row(cell):
    scorer = Scores(ScoreOptions(), "answer")
    scorer.add({"answer": "x", "answers": "x"})
    with pytest.raises(InputError, match="row 2"):
        scorer.add({"answer": "x", "answers": cell})


def test_the_reference_column_is_never_the_scored_one(tmp_path):
    rows = [{"caption": "red", "answer": "red"}]
    scores = score_results(save(tmp_path / "r.jsonl", rows), ScoreOptions("answer", metric="exact"))
    assert scores.total.values == {"exact_match": 1.0}


MISTAKES = {
    "no such references": ('{"answer": "x"}', {}, "answers"),
    "no such group": ('{"answer": "x", "answers": "x"}', {"by": "kind"}, "kind"),
    "nothing to score": ('{"answers": "x"}', {}, "answer or caption"),
    "no references at all": ('{"answer": "x", "answers": null}', {}, "none of the 1 rows"),
    "no rows": ("\n", {}, "no rows"),
    "not JSON": ("{", {}, "line 1"),
    "not an object": ('{"answer": "x", "answers": "x"}\n[1]', {}, "line 2"),
    "nested without end": ("[" * 100_000, {}, "line 1"),
    "not UTF-8": (b"\xff\xfe", {}, "line 1"),
}


@pytest.mark.parametrize(("content", "options", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(tmp_path, content, options, said):
    path = tmp_path / "r.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=said) as caught:
        score_results(path, ScoreOptions(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.parquet"])
def test_files_that_are_absent_folders_or_cut_short(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(IdeficsError, match="cannot read"):
        score_results(path)
    whole = save(path, ROWS).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IdeficsError):
        score_results(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(IdeficsError, match="folder"):
        score_results(path)


def test_a_column_of_images_beside_the_texts_is_never_read(tmp_path):
    rows = [{"answer": "x", "answers": ["x"], "image": bytes(200_000)} for _ in range(200)]
    path = tmp_path / "r.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, compression="none", use_dictionary=False)
    del rows
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    score_results(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000, f"{peak} bytes for a file of {path.stat().st_size}"
    assert pa.total_allocated_bytes() - before < 5_000_000


def test_the_table_shows_hundredths_and_what_was_left_out(tmp_path):
    rows = [*ROWS, {"answer": "yes", "answers": "yes", "kind": "[b]other"}]
    scores = score_results(save(tmp_path / "r.jsonl", rows), ScoreOptions(by="kind"))
    console = Console(file=io.StringIO(), width=100)
    console.print(score_table(scores))
    shown = console.file.getvalue()
    lines = [[word for word in line.split() if word.isalnum() or "." in word] for line in shown.splitlines()]
    assert ["color", "2", "0", "80.00", "50.00"] in lines and ["all", "5", "1", "72.00", "40.00"] in lines
    assert "[b]other" in shown
    assert "left out: 1 row without references" in shown and "1 row with one reference" in shown


def test_a_kept_column_is_not_the_text_of_the_run() -> None:
    """A run writes its text right before its score, and kept columns after its own."""
    own = ("id", "image", "caption", "score", "tokens", "error")
    assert find_text_column((*own, "answer", "captions"), ScoreOptions("captions")) == "caption"
    assert find_text_column(("caption", "answer", "answers"), ScoreOptions()) == "answer"
    assert find_text_column(("caption", "answer", "answers"), ScoreOptions("answer")) == "caption"
