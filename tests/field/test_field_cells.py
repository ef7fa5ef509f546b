"""Tables as people have them: CSV of any dialect, lists in cells, results for other programs, damaged files."""

from __future__ import annotations

import csv
import gzip
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FakeCandidate, FakeCaptioner, FakeResult, prompts_of, rows_of, save_image, written
from hypothesis import given
from hypothesis import strategies as st

from idefics_cli.columns import MAX_COLUMNS, MAX_DEPTH, Column, json_text, list_in
from idefics_cli.errors import InputError, RowError
from idefics_cli.pipeline import prefetch
from idefics_cli.prompts.choices import checked_choices
from idefics_cli.readers.inputs import open_inputs
from idefics_cli.rows import InputRow, ReadOptions
from idefics_cli.writers.formats import Parquet, Passthrough, format_of


@dataclass
class Choosing(FakeCaptioner):
    """Takes one of the choices."""

    choose: Callable[[Sequence[str]], str] = itemgetter(0)

    def encode_choices(self, prompt: Any, choices: Any, start: Any = ()) -> tuple[str, ...] | RowError:
        self.encode(prompt, 0)
        return checked_choices(choices)

    def score_stream(self, source: Any, norm: str) -> Iterator[tuple[int, FakeResult]]:
        number = 0
        while batch := source.take(self.batch_size, True):
            for choices in batch:
                candidates = tuple(FakeCandidate(each, -1.0, 1) for each in choices)
                yield number, FakeResult(self.choose(choices), -1.0, 1, candidates)
                number += 1


# ---- results for other programs


def questions(folder: Path, count: int = 4, **more: Any) -> Path:
    """A manifest whose second image is missing."""
    for number in range(count):
        if number != 1:
            save_image(folder / f"{number}.png", number)
    rows = [{"question_id": 262148000 + i, "image": f"{i}.png", "question": f"Q{i}?"} for i in range(count)]
    frame = pd.DataFrame(rows).assign(**more)
    frame.to_json(folder / "m.jsonl", orient="records", lines=True)
    return folder / "m.jsonl"


def test_a_csv_result_is_what_pandas_reads_and_resumes_and_retries(run: Callable, tmp_path: Path) -> None:
    manifest, out = questions(tmp_path, note='a,"b"\nc', answers=[["a", "b"]] * 4), tmp_path / "f.csv"
    command = ("vqa", manifest, "-o", out, "--keep", "note,answers", "--id-column", "question_id")
    assert run(*command).exit_code == 3 and (tmp_path / "f.csv.run").exists()
    frame = pd.read_csv(out)
    assert list(frame.columns) == ["id", "image", "question", "answer", "score", "tokens", "error", "note", "answers"]
    assert frame.id.tolist() == [262148000 + i for i in range(4)] and set(frame.note) == {'a,"b"\nc'}
    assert frame.answer.isna().tolist() == [False, True, False, False] and set(frame.answers) == {'["a", "b"]'}
    again = FakeCaptioner()
    assert run(*command, captioner=again).exit_code == 3 and not again.calls
    save_image(tmp_path / "1.png", 1)
    assert run(*command, "--retry-errors", captioner=again).exit_code == 0 and again.calls == [1]
    retried = pd.read_csv(out)
    assert retried.error.isna().all() and retried.answer.tolist()[2:] == frame.answer.tolist()[2:]
    out.write_bytes(out.read_bytes().replace(b"Q2", b"Q3"))
    assert "not as a run of this program left it" in run(*command).stderr


def test_a_csv_result_is_scored(run: Callable, tmp_path: Path) -> None:
    manifest, out = questions(tmp_path, answers=["a", "a", "b", None]), tmp_path / "f.csv"
    captioner = FakeCaptioner(answer=lambda text: "a")
    assert run("vqa", manifest, "-o", out, "--keep", "answers", captioner=captioner).exit_code == 3
    found = json.loads(run("score", out).stdout)
    assert (found["rows"], found["errors"], found["unscored"]) == (3, 1, 1)
    assert found["exact_match"] == pytest.approx(1 / 3)


@given(st.lists(st.tuples(st.text(max_size=9), st.none() | st.floats(-9, 0), st.booleans()), max_size=5))
def test_csv_rows_come_back_equal(tmp_path_factory: pytest.TempPathFactory, values: list) -> None:
    names = {"id": "text", "answer": "text", "score": "real", "tokens": "count", "error": "text"}
    rows = [
        {
            "id": f"{i}{text}",
            "answer": None if failed else text,
            "score": score,
            "tokens": i,
            "error": (failed and "x") or None,
        }
        for i, (text, score, failed) in enumerate(values)
    ]
    path = tmp_path_factory.getbasetemp() / "f.csv"
    columns = [Column(name, kind) for name, kind in names.items()]
    format_of(path).write(path, lambda: map(json_text, rows), columns, Passthrough(), {})
    assert list(format_of(path).rows(path, list(names))) == rows
    with open(path, newline="", encoding="utf-8") as file:
        assert len(list(csv.reader(file))) == len(rows) + 1


def test_a_vqav2_submission_has_every_question(run: Callable, refused: Callable, tmp_path: Path) -> None:
    manifest, out = questions(tmp_path), tmp_path / "f.json"
    command = ("vqa", manifest, "-o", out, "--format", "vqav2")
    assert run(*command).exit_code == 3
    found = json.loads(out.read_bytes())
    assert [list(row) for row in found] == [["question_id", "answer"]] * 4
    assert [row["question_id"] for row in found] == [262148000 + i for i in range(4)]
    assert [bool(row["answer"]) for row in found] == [True, False, True, True]
    save_image(tmp_path / "1.png", 1)
    again = FakeCaptioner()
    assert run(*command, captioner=again).exit_code == 3 and not again.calls
    assert run(*command, "--retry-errors", captioner=again).exit_code == 0 and again.calls == [1]
    assert json.loads(out.read_bytes())[2:] == found[2:]
    usual = run("vqa", manifest, "--id-column", "question_id")
    assert [row["answer"] for row in rows_of(usual.stdout)] == [row["answer"] for row in json.loads(out.read_bytes())]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("-o", "f.jsonl"), "ends in .json"),
        (("-o", "f.json", "--keep", "note"), "leave --keep"),
        ((), "-o F.json"),
        (("-o", "f.json", "-q", "What?", "-q", "Who?"), "one question"),
    ],
)
def test_what_a_submission_cannot_hold_is_refused(refused: Callable, tmp_path: Path, more: tuple, said: str) -> None:
    assert said in refused("vqa", questions(tmp_path, note="x"), "--format", "vqav2", *more)


# ---- lists in cells


def table(path: Path, rows: list[dict[str, Any]], **written: Any) -> Path:
    """The rows, each with an image of its own, as pandas writes them."""
    for number, row in enumerate(rows):
        row.setdefault("image", f"{number}.png")
        save_image(path.parent / f"{number}.png", number)
    pd.DataFrame(rows).to_csv(path, index=False, **written)
    return path


ANSWERS = ["red", "red", "crimson"]
WRITTEN = {
    "json": json.dumps(ANSWERS),
    "pandas": ANSWERS,  # pandas writes lists as Python does
    "numpy": np.array(ANSWERS, dtype=object),
    "structs": [{"answer": text, "answer_id": i} for i, text in enumerate(ANSWERS)],
    "numpy of structs": np.array([{"answer": text, "answer_id": i} for i, text in enumerate(ANSWERS)], dtype=object),
}


@pytest.mark.parametrize("cell", WRITTEN.values(), ids=WRITTEN)
def test_answers_in_a_cell_are_a_list_for_scores_and_shots(run: Callable, tmp_path: Path, cell: Any) -> None:
    manifest = table(tmp_path / "m.csv", [{"question": "What color?", "answers": cell}])
    captioner, out = FakeCaptioner(answer=lambda text: "red"), tmp_path / "f.jsonl"
    ended = run("vqa", manifest, "-o", out, "--answers-column", "answers", captioner=captioner)
    assert json.loads(ended.stdout)["vqa_accuracy"] == pytest.approx(4 / 9)
    assert json.loads(run("score", out).stdout)["vqa_accuracy"] == pytest.approx(4 / 9)
    shown = FakeCaptioner()
    ended = run("vqa", manifest, "--shots", manifest, "--num-shots", 1, captioner=shown)
    assert "Answer: red" in prompts_of(shown, rows_of(ended.stdout))[0]


def test_three_right_of_three_answers_are_two_thirds(run: Callable, tmp_path: Path) -> None:
    results = tmp_path / "r.csv"
    results.write_text('answer,answers\nred,"[""red"", ""red"", ""red""]"\n')
    assert json.loads(run("score", results).stdout)["vqa_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("cell", ['["red","blue"]', "['red', 'blue']", "['red' 'blue']", "red,blue"])
def test_choices_in_a_cell_are_a_list(run: Callable, tmp_path: Path, cell: str) -> None:
    manifest = table(tmp_path / "m.csv", [{"question": "What color?", "choices": cell}])
    (row,) = rows_of(run("vqa", manifest, "--choices-column", "choices", captioner=Choosing()).stdout)
    assert [each["text"] for each in row["candidates"]] == ["red", "blue"] and row["error"] is None


@pytest.mark.parametrize(
    "cell", ["[red, blue]", "['red', 'blue'", '["red"', "[np.str_('red')]", "['a' 'b', 'c']", '["red"]', "red"]
)
def test_a_cell_that_is_no_list_of_choices_is_a_bad_row(run: Callable, tmp_path: Path, cell: str) -> None:
    rows = [{"question": "What color?", "choices": each} for each in (cell, '["a", "b"]')]
    manifest = table(tmp_path / "m.csv", rows)
    ended = run("vqa", manifest, "--choices-column", "choices", captioner=Choosing())
    bad, good = rows_of(ended.stdout)
    assert bad["error"].startswith("row_invalid: ") and good["error"] is None and ended.exit_code == 3


def test_one_choice_alone_is_refused(refused: Callable, tmp_path: Path) -> None:
    assert "one choice alone" in refused("vqa", table(tmp_path / "m.csv", [{"question": "?"}]), "--choices", "yes")


def test_bad_answers_cost_their_row_and_count_as_wrong(run: Callable, tmp_path: Path) -> None:
    rows = [{"question": "What color?", "answers": each} for each in ('["red"]', "[red", '["red"]')]
    manifest = table(tmp_path / "m.csv", rows)
    for out in tmp_path / "f.jsonl", tmp_path / "f.csv":
        captioner = FakeCaptioner(answer=lambda text: "red")
        ended = run("vqa", manifest, "-o", out, "--answers-column", "answers", captioner=captioner)
        found = json.loads(ended.stdout)
        assert (ended.exit_code, found["rows"], found["errors"]) == (3, 3, 1)
        assert found["vqa_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("cell", ['["0.png", "1.png"]', "['0.png', '1.png']", "['0.png' '1.png']"])
def test_images_in_a_cell_are_a_list_and_found_by_themselves(run: Callable, tmp_path: Path, cell: str) -> None:
    save_image(tmp_path / "1.png", 1)
    manifest, captioner = table(tmp_path / "m.csv", [{"photos": cell, "image": None}]), FakeCaptioner()
    frame = pd.read_csv(manifest).drop(columns="image")
    frame.to_csv(manifest, index=False)
    ended = run("caption", manifest, "--prompt", "{image} and {image}", captioner=captioner)
    assert prompts_of(captioner, rows_of(ended.stdout)) == ["[0] and [1]"]


def test_a_path_that_begins_with_a_bracket_stays_one(run: Callable, tmp_path: Path) -> None:
    save_image(tmp_path / "[1] a.png")
    (tmp_path / "m.csv").write_text("image\n[1] a.png\n")
    assert rows_of(run("caption", tmp_path / "m.csv").stdout)[0]["error"] is None


def test_prompts_in_a_cell_are_lists_and_texts_of_other_formats_stay_texts(run: Callable, tmp_path: Path) -> None:
    save_image(tmp_path / "1.png", 1)
    prompt = [{"image": "1.png"}, "What is this?"]
    (tmp_path / "m.jsonl").write_text(json.dumps({"prompt": "[INST] Hello"}) + "\n")
    pd.DataFrame({"prompt": [json.dumps(prompt), prompt, "[1.png, What?"]}).to_csv(tmp_path / "m.csv", index=False)
    for name, expected in ("m.csv", ["[1]What is this?"] * 2 + [None]), ("m.jsonl", ["[INST] Hello"]):
        captioner = FakeCaptioner(is_instruct=True)
        ended = run("generate", tmp_path / name, captioner=captioner)
        assert prompts_of(captioner, rows_of(ended.stdout)) == expected


LISTS = st.lists(
    st.text(max_size=5) | st.integers() | st.booleans() | st.none() | st.lists(st.text(max_size=3)), max_size=5
)


@given(LISTS)
def test_what_python_and_json_write_is_read_back(value: list) -> None:
    assert list_in(repr(value)) == list_in(json.dumps(value)) == list_in(json.dumps(value, ensure_ascii=False)) == value


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), min_size=2))
def test_what_numpy_writes_is_read_back(value: list) -> None:
    assert list_in(str(np.array(value, dtype=object))) == value


@given(st.text("[](){},:'\"\\-1.e naNoTrul\n", max_size=30))
def test_any_other_text_is_a_value_or_an_error(text: str) -> None:
    found = list_in("[" + text)
    assert isinstance(found, list | RowError)


HOSTILE = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "a little too deep": "[" * 102 + "]" * 102,
    "signs": "[" + "-" * 100_000 + "1]",
    "not closed": "['" + "a" * 5_000_000,
    "escapes": "['" + "\\" * 200_001,
    "values": "[" + "0," * 2_000_000 + "0]",
    "digits": "[" + "9" * 100_000 + "]",
    "a call": "[__import__('os').system('true')]",
    "a product": "['a' * 10**9]",
    "set": "[{1, 2}]",
    "half a pair": "['\\ud800']",
    "two lists": "['a']['b']",
}


@pytest.mark.parametrize("cell", HOSTILE.values(), ids=HOSTILE)
def test_hostile_cells_are_refused_quickly(cell: str) -> None:
    tracemalloc.start()
    started = time.process_time()
    try:
        assert isinstance(list_in(cell), RowError)
        assert time.process_time() - started < 2 and tracemalloc.get_traced_memory()[1] < 300_000_000
    finally:
        tracemalloc.stop()


# ---- answers that refer to choices


@pytest.mark.parametrize(
    ("answers", "choices"),
    [
        ([1, 0], [["a cat", "a dog"]] * 2),  # ScienceQA
        ([1.0, 0.0], [["a cat", "a dog"]] * 2),
        (["B", "a"], ["['a cat', 'a dog']"] * 2),  # MMMU
        (["a dog", "a cat"], [["a cat", "a dog"]] * 2),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_numbers_and_letters_refer_to_choices(
    run: Callable, tmp_path: Path, answers: list, choices: list, suffix: str
) -> None:
    frame = pd.DataFrame({"question": ["What?"] * 2, "image": ["0.png"] * 2, "answer": answers, "options": choices})
    save_image(tmp_path / "0.png")
    manifest, out = tmp_path / f"m.{suffix}", tmp_path / "f.jsonl"
    write = {
        "csv": frame.to_csv,
        "parquet": frame.to_parquet,
        "jsonl": partial(frame.to_json, orient="records", lines=True),
    }
    write[suffix](manifest, **({} if suffix == "jsonl" else {"index": False}))
    command = ("vqa", manifest, "-o", out, "--choices-column", "options", "--answers-column", "answer")
    found = json.loads(run(*command, captioner=Choosing(choose=lambda choices: choices[1])).stdout)
    assert (found["vqa_accuracy"], found["not_among_choices"]) == (0.5, 0)
    again = run("score", out, "--answers-column", "input_answer", "--choices-column", "options")
    assert json.loads(again.stdout) == found


def test_numbers_refer_to_the_choices_of_all_rows_and_to_those_of_shots(run: Callable, tmp_path: Path) -> None:
    rows = [{"question": "What?", "answer": 1, "choices": ["a cat", "a dog"]}]
    manifest, out = table(tmp_path / "m.csv", rows), tmp_path / "f.jsonl"
    command = ("vqa", manifest, "-o", out, "--choices", "yes,no", "--answers-column", "answer")
    found = json.loads(run(*command, captioner=Choosing(choose=lambda choices: choices[1])).stdout)
    assert found["exact_match"] == 1.0
    captioner = Choosing()
    run("vqa", manifest, "--choices-column", "choices", "--shots", manifest, "--num-shots", 1, captioner=captioner)
    assert "Answer: a dog" in written(next(iter(captioner.prompts.values())))


def test_references_that_are_not_among_the_choices_are_told(run: Callable, tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    rows = [{"answer": "x", "answers": [each], "choices": ["red", "blue"]} for each in ("Red.", "green", 7, "E")]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = run("score", results)
    assert json.loads(ended.stdout)["not_among_choices"] == 3
    assert "in 3 rows no reference is among the choices" in ended.stderr


# ---- dialects and encodings of CSV

QUESTIONS = ["Wie groß ist er?", 'Was heißt "rot"?', "Rot, blau; oder\nbeides?"]


def captioned(run: Callable, manifest: Path, *options: str) -> list[str | None]:
    """What each row was asked about its image."""
    captioner = FakeCaptioner()
    ended = run("caption", manifest, "--prompt", "{image}{question}", *options, captioner=captioner)
    assert ended.exit_code in (0, 3), ended.output
    return prompts_of(captioner, rows_of(ended.stdout))


WRITERS = {
    "semicolons": {"sep": ";"},
    "tabs": {"sep": "\t"},
    "bars": {"sep": "|"},
    "Windows' line ends": {"lineterminator": "\r\n", "sep": ";"},
    "all quoted": {"quoting": csv.QUOTE_ALL, "sep": ";"},
    "UTF-8 with its mark": {"encoding": "utf-8-sig"},
    "UTF-16": {"encoding": "utf-16"},
    "UTF-16 with tabs, as Excel's Unicode text": {"encoding": "utf-16", "sep": "\t"},
    "UTF-32": {"encoding": "utf-32"},
}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz"])
@pytest.mark.parametrize("written_as", WRITERS.values(), ids=WRITERS)
def test_the_beginning_tells_the_dialect(run: Callable, tmp_path: Path, written_as: dict, suffix: str) -> None:
    manifest = table(tmp_path / f"m.{suffix}", [{"question": each} for each in QUESTIONS], **written_as)
    assert captioned(run, manifest) == [f"[{i}]{each}" for i, each in enumerate(QUESTIONS)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("name", ["m.csv", "m.csv.gz"])
def test_a_quote_that_no_line_closes_costs_its_own_line(
    run: Callable, tmp_path: Path, name: str, encoding: str
) -> None:
    save_image(tmp_path / "a.png")
    data = 'image,question\na.png,"What\na.png,How?\n'.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    first, second = rows_of(run("caption", tmp_path / name, "--keep", "question").stdout)
    assert "row_invalid" in first["error"] and second["question"] == "How?"


def test_excels_line_of_the_separator_is_followed(run: Callable, tmp_path: Path) -> None:
    manifest = table(tmp_path / "m.csv", [{"question": each} for each in QUESTIONS], sep="|")
    manifest.write_bytes(b"sep=|\r\n" + manifest.read_bytes())
    assert captioned(run, manifest) == [f"[{i}]{each}" for i, each in enumerate(QUESTIONS)]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16-le", "cp500"])
def test_another_encoding_is_named(run: Callable, refused: Callable, tmp_path: Path, encoding: str) -> None:
    manifest = table(tmp_path / "m.csv", [{"question": each} for each in QUESTIONS], encoding=encoding)
    expected = [f"[{i}]{each}" for i, each in enumerate(QUESTIONS)]
    if encoding != "cp500":
        line = refused("caption", manifest)
        assert "not valid UTF-8" in line and "\n" not in line
        named = line.partition("--encoding ")[2].split(".")[0]
        assert captioned(run, manifest, "--encoding", named) == expected  # what the message says helps
    assert captioned(run, manifest, "--encoding", encoding) == expected
    shots = ("--shots", manifest, "--num-shots", "1", "--encoding", encoding)
    answered = table(
        tmp_path / "s.csv", [{"question": each, "answer": "groß"} for each in QUESTIONS], encoding=encoding
    )
    captioner = FakeCaptioner()
    run("vqa", answered, "--shots", answered, *shots[2:], captioner=captioner)
    assert all("groß" in written(prompt) for prompt in captioner.prompts.values()) and len(captioner.prompts) == 3


def test_a_stray_byte_costs_its_row_where_others_hold_utf_8(run: Callable, tmp_path: Path) -> None:
    manifest = table(tmp_path / "m.csv", [{"question": each} for each in QUESTIONS])
    manifest.write_bytes(manifest.read_bytes().replace("heißt".encode(), "heißt".encode("cp1252")))
    ended = run("caption", manifest)
    bad = [row["error"] for row in rows_of(ended.stdout) if row["error"]]
    assert len(bad) == 1 and "not valid UTF-8: name the file's encoding, as in --encoding cp1252" in bad[0]


def test_a_delimiter_is_named(run: Callable, refused: Callable, tmp_path: Path) -> None:
    rows = [{"question": each} for each in QUESTIONS]
    assert captioned(run, table(tmp_path / "m.csv", rows, sep="~"), "--delimiter", "~")[0] == f"[0]{QUESTIONS[0]}"
    assert captioned(run, table(tmp_path / "m.csv", rows, sep="\t"), "--delimiter", "tab")[0] == f"[0]{QUESTIONS[0]}"
    for option, value in (
        ("--delimiter", "ab"),
        ("--delimiter", '"'),
        ("--encoding", "nonsense"),
        ("--encoding", "rot13"),
    ):
        assert option in refused("caption", tmp_path / "m.csv", option, value)
    assert "--encoding needs a manifest" in refused("caption", tmp_path / "0.png", "--encoding", "cp1252")


@pytest.mark.parametrize("header", ["image", "image; or none"])
def test_a_column_alone_stays_alone(run: Callable, tmp_path: Path, header: str) -> None:
    save_image(tmp_path / "a, b.png")
    (tmp_path / "m.tsv").write_text(f"{header}\na, b.png\n")
    (row,) = rows_of(run("caption", tmp_path / "m.tsv", "--image-column", header).stdout)
    assert row["error"] is None


LETTERS = ['"Red" said the dog', '5" nails', 'it is 5"', '"never closed', 'say "hi"', "plain"]


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_quotes_of_tsv_may_be_letters(run: Callable, tmp_path: Path, suffix: str) -> None:
    rows = [{"question": each} for each in LETTERS]
    manifest = table(tmp_path / f"m.{suffix}", rows, sep="\t", quoting=csv.QUOTE_NONE, quotechar=None)
    assert captioned(run, manifest) == [f"[{i}]{each}" for i, each in enumerate(LETTERS)]
    quoted = table(tmp_path / "q.tsv", rows, sep="\t")
    assert captioned(run, quoted) == [f"[{i}]{each}" for i, each in enumerate(LETTERS)]


@pytest.mark.parametrize("text", ["x" * 200_000, "word\n" * 40_000], ids=["a line", "lines"])
def test_long_cells_are_read(run: Callable, tmp_path: Path, text: str) -> None:
    manifest = table(tmp_path / "m.csv", [{"question": text}, {"question": "short"}])
    captioner = FakeCaptioner(room=10**6)
    ended = run("caption", manifest, "--prompt", "{image}{question}.", captioner=captioner)
    assert prompts_of(captioner, rows_of(ended.stdout)) == [f"[0]{text}.", "[1]short."]


def test_a_quote_that_is_never_closed_costs_its_row(run: Callable, tmp_path: Path) -> None:
    manifest = table(tmp_path / "m.csv", [{"question": f"Q{i}"} for i in range(300)])
    manifest.write_text(manifest.read_text().replace("Q7,", '"Q7,'))
    rows = rows_of(run("caption", manifest).stdout)
    assert [row["id"] for row in rows if row["error"]] == ["7"] and len(rows) == 300
    assert "line 9 is not valid CSV" in rows[7]["error"]


@given(st.binary(max_size=60) | st.text('a,;\t|"\n\r =sep', max_size=60).map(str.encode))
def test_any_bytes_are_rows_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(b"image" + data)
    with suppress(InputError):
        for row in open_inputs([str(path)], ReadOptions(image_column="image", keep="all")).rows:
            assert row.error or row.sources


# ---- Parquet that is damaged

CASES = Path(__file__).parent / "bad_parquet"


@pytest.mark.parametrize("name", ["encrypted_columns.parquet", "not_utf8.parquet"])
def test_files_that_end_arrows_process_are_refused(refused: Callable, tmp_path: Path, name: str) -> None:
    """Small changes of files of Apache's own tests: encrypted metadata of a column; a name that is not UTF-8."""
    line = refused("caption", CASES / name, "--image-column", "x")
    assert line.startswith(f"Error: cannot read {CASES / name}: ") and "fetch or make it again" in line
    save_image(tmp_path / "0.png")
    (tmp_path / "m.jsonl").write_text('{"image": "0.png"}\n')
    assert "cannot read" in refused("caption", tmp_path / "m.jsonl", "--embeddings", CASES / name)


def test_no_bit_of_a_finished_file_changes_unnoticed(run: Callable, tmp_path: Path) -> None:
    """Each is refused before the rows are read, and after its repair the failed rows are done again."""
    manifest, out = questions(tmp_path, 6), tmp_path / "f.parquet"
    command = ("vqa", manifest, "-o", out, "--keep", "question_id", "--retry-errors")
    assert run(*command[:-1]).exit_code == 3
    whole, random = out.read_bytes(), Random(14)
    places = random.sample(range(8 * len(whole)), 800)
    noticed = 0
    for place in places:
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        out.write_bytes(changed)
        noticed += Parquet().run_of(out) is None
    assert noticed == len(places)
    assert "not as a run of this program left it" in run(*command).stderr
    out.write_bytes(whole)
    save_image(tmp_path / "1.png", 1)
    captioner = FakeCaptioner()
    assert run(*command, captioner=captioner).exit_code == 0 and captioner.calls == [1]
    assert Parquet().run_of(out)["failed"] == {} and pd.read_parquet(out).error.isna().all()


# ---- what a row may hold


@pytest.mark.parametrize("options", [(), ("-o", "f.jsonl"), ("-o", "f.parquet"), ("-o", "f.csv")])
def test_deep_json_is_a_bad_row(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple) -> None:
    """Python reads what is nested 967 to 984 deep, and cannot write it again."""
    monkeypatch.chdir(tmp_path)
    save_image(tmp_path / "0.png")
    depths = [1, MAX_DEPTH - 1, MAX_DEPTH + 1, *range(960, 1000), 5_000]
    lines = [f'{{"image": "0.png", "x": {"[" * depth}{"]" * depth}}}\n' for depth in depths]
    (tmp_path / "m.jsonl").write_text("".join(lines))
    ended = run("caption", "m.jsonl", "--keep", "all", *options)
    assert ended.exit_code == 3 and f"{len(depths) - 2} failed" in ended.stderr
    if not options:
        rows = rows_of(ended.stdout)
        assert [row["error"] is None for row in rows] == [True, True] + [False] * (len(depths) - 2)
        assert f"nested more than {MAX_DEPTH} deep" in rows[2]["error"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_too_many_columns_are_refused(refused: Callable, tmp_path: Path, suffix: str) -> None:
    row = {"image": "0.png", **{f"c{i}": "1" for i in range(MAX_COLUMNS)}}
    if suffix == "csv":
        (tmp_path / "m.csv").write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    elif suffix == "jsonl":
        (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.table({name: [value] for name, value in row.items()}), tmp_path / "m.parquet")
    assert "10,001 columns, more than 10,000" in refused("caption", tmp_path / f"m.{suffix}", "--keep", "all")


def test_too_many_images_and_values_are_a_bad_row(run: Callable, tmp_path: Path) -> None:
    save_image(tmp_path / "0.png")
    many = ["0.png"] * 100_000
    rows = [{"image": ["0.png"]}, {"image": many}, {"image": ["0.png"], "x": [0] * 1_000_002}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    good, images, values = rows_of(run("caption", tmp_path / "m.jsonl").stdout)
    assert good["error"] is None and images["image"] is None
    assert "100,000 images, more than the 1,000" in images["error"] and "more than 1,000,000 values" in values["error"]
    prompts = [{"prompt": ["x"]}, {"prompt": [{"image": each} for each in many]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    good, images = rows_of(run("generate", tmp_path / "p.jsonl").stdout)
    assert good["error"] is None and "more than the 1,000 images" in images["error"]


@pytest.mark.parametrize("nest", [list, lambda text: {"a": text}, str])
def test_few_long_rows_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nest: Callable) -> None:
    monkeypatch.setattr(prefetch, "MAX_BYTES_IN_FLIGHT", 1_000_000)
    read, left = [], []

    def rows() -> Iterator[InputRow]:
        for number in range(50):
            read.append(number)
            assert len(read) - len(left) <= 14, "a million bytes, and what is read at once"
            yield InputRow(number, str(number), None, (), {"x": nest(["a" * 200_000])})

    def stream(source: Any) -> Iterator[tuple[int, FakeResult]]:
        number = 0
        while prompts := source.take(4, True):
            for _ in prompts:
                yield number, FakeResult("x", -1.0, 1)
                number += 1

    flow = prefetch.FlowOptions(batch_size=64, workers=2)
    steps = prefetch.Steps(lambda row: row, stream)
    write = lambda row, finished: left.append(row.index)  # noqa: E731
    prefetch.run_rows(rows(), steps, write, flow, prefetch.RunStats(), lambda finished: None)
    assert left == list(range(50))
