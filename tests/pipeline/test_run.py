from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import FakeCaptioner, expected_text, rows_of, save_image
from hypothesis import given
from hypothesis import strategies as st
from written_manifests import write_manifest

from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.errors import IdeficsError, InputError, OutputError
from idefics_cli.pipeline.prefetch import RunStats
from idefics_cli.pipeline.run import Run, RunOptions, shown_names
from idefics_cli.pipeline.task import Observer, Task
from idefics_cli.prompts.templates import PromptOptions
from idefics_cli.rows import ImageOptions, ReadOptions
from idefics_cli.tasks.caption_vqa import CaptionVqa, CaptionVqaOptions
from idefics_cli.tasks.embed import Embed
from idefics_cli.tasks.few_shot import ShotOptions


class Watch(Observer):
    def __init__(self) -> None:
        self.totals: list[int | None] = []
        self.done = 0  # rows, as a bar shows them

    def on_start(self, total: int | None, num_done: int = 0) -> None:
        self.totals.append(total)
        self.done = self.done_before = num_done

    def on_row(self, number: int = 1) -> None:
        self.done += number


def task_of(prompts: PromptOptions, **more: Any) -> CaptionVqa:
    return CaptionVqa(CaptionVqaOptions(prompts, DecodingOptions(), **more))


class Bench:
    """Runs over a folder of images. `calls` are the model's checks and loads, in order."""

    def __init__(self, folder: Path) -> None:
        self.output, self.calls = folder / "f.jsonl", list[str]()
        inputs, images = (str(folder / "photos"),), ImageOptions(decode_timeout=5.0, workers=2)
        self.options = RunOptions(inputs, str(self.output), ModelRequest("fake"), images=images)
        self.stats, self.observer, self.weights = RunStats(), Watch(), "one"

    def check(self, request: ModelRequest) -> str:
        self.calls.append("check")
        return self.weights

    def load(self, request: ModelRequest, batch_size: int | None) -> Any:
        self.calls.append("load")
        return FakeCaptioner(batch_size or 4)

    def run(
        self,
        questions: tuple[str, ...] = (),
        stdout: io.BytesIO | None = None,
        stdin: io.BytesIO | None = None,
        **changes: Any,
    ) -> bool:
        self.stats, self.observer, self.calls = RunStats(), Watch(), []
        task = task_of(PromptOptions("vqa" if questions else "caption"), questions=questions)
        return self.opened(task, stdin, **changes).run(stdout)

    def opened(self, task: Task, stdin: io.BytesIO | None = None, **changes: Any) -> Run:
        """A run that has looked at its inputs."""
        options = replace(self.options, **changes)
        return Run(options, task, self.check, self.load, self.stats, self.observer, stdin)

    def refuses(self, kind: type[IdeficsError], **changes: Any) -> str:
        with pytest.raises(kind) as caught:
            self.run(**changes)
        return str(caught.value)

    def rows(self) -> list[dict[str, Any]]:
        if self.output.suffix == ".parquet":
            return pq.read_table(self.output).to_pylist()
        return rows_of(self.output.read_text())


@pytest.fixture
def bench(photos: Path) -> Bench:
    return Bench(photos.parent)


def test_rows_counts_and_totals(bench: Bench) -> None:
    assert bench.run()
    assert (bench.stats.rows, bench.stats.safe, bench.stats.resumed) == (7, 7, 0)
    assert bench.stats.failed == {"image_unreadable": 1} and bench.observer.totals == [7]
    assert bench.calls.count("load") == 1


def test_a_finished_run_loads_no_model(bench: Bench) -> None:
    bench.run()
    assert not bench.run()
    assert bench.calls == []
    assert (bench.stats.rows, bench.stats.resumed, bench.stats.num_failed) == (7, 7, 1)


@pytest.mark.parametrize(
    "changes",
    [{"output": "f.txt"}, {"inputs": ("https://a.example/b.png",)}, {"inputs": ("none",)}, {"output": "none/f.jsonl"}],
)
def test_mistakes_are_found_before_the_model_is_looked_at(bench: Bench, changes: dict[str, Any]) -> None:
    bench.refuses(IdeficsError, **changes)
    assert bench.calls == [] and not list(bench.output.parent.glob("f.*"))


def test_stdout_takes_the_rows_and_has_to_be_there(bench: Bench) -> None:
    stdout = io.BytesIO()
    assert bench.run(stdout=stdout, output="-")
    assert [row["id"] for row in rows_of(stdout.getvalue())][:2] == ["a.jpg", "b.png"]
    assert "stdout is closed" in bench.refuses(OutputError, output="-")
    assert not bench.output.exists()


def stopped_after(number: int, bench: Bench, *questions: str, **changes: Any) -> None:
    """A run that is stopped when so many rows have been written."""

    def stop(self: Watch, number_done: int = 1) -> None:
        if bench.stats.rows == number:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "on_row", stop)
        with pytest.raises(KeyboardInterrupt):
            bench.run(questions, **changes)
    assert bench.stats.safe == number


@pytest.mark.parametrize("number", range(1, 8))
@pytest.mark.parametrize("questions", [(), ("What?", "Where?", "Why?")])
def test_a_run_resumes_wherever_it_was_stopped(bench: Bench, number: int, questions: tuple[str, ...]) -> None:
    """Within the questions about an image too."""
    bench.run(questions)
    whole, num_rows = bench.output.read_bytes(), 7 * (len(questions) or 1)
    assert bench.observer.totals == [num_rows]
    bench.output.unlink()
    stopped_after(number, bench, *questions)
    assert not bench.output.exists()
    bench.run(questions)
    assert bench.output.read_bytes() == whole
    assert (bench.stats.rows, bench.stats.resumed, bench.stats.safe) == (num_rows, number, num_rows)


def test_other_weights_of_a_half_done_run_are_named_before_they_are_loaded(bench: Bench) -> None:
    stopped_after(2, bench)
    bench.weights = "two"
    assert "model weights: was 'one', now 'two'" in bench.refuses(OutputError)
    assert "load" not in bench.calls


@pytest.mark.parametrize("questions", [(), ("What?", "Where?")])
def test_failed_rows_are_retried_and_only_these(bench: Bench, photos: Path, questions: tuple[str, ...]) -> None:
    bench.run(questions)
    before, num_rows = bench.rows(), 7 * (len(questions) or 1)
    save_image(photos / "broken.png", 9)
    assert bench.run(questions, retry_errors=True)
    after = bench.rows()
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert [new for new, old in zip(after, before, strict=True) if not old["error"]] == [
        old for old in before if not old["error"]
    ]
    assert not any(row["error"] for row in after)
    assert (bench.stats.rows, bench.stats.num_failed) == (num_rows, 0)
    assert not bench.run(questions, retry_errors=True) and bench.calls == []


def texts_beside(photos: Path) -> dict[str, str]:
    return {path.relative_to(photos).as_posix(): path.read_text() for path in photos.rglob("*.txt")}


def remove_texts(photos: Path) -> None:
    for path in photos.rglob("*.txt"):
        path.unlink()


def test_texts_beside_images_may_be_asked_for_later(bench: Bench, photos: Path) -> None:
    """Of a finished run nothing is done again; of a stopped one neither, and rows that are done get their texts too."""
    bench.run(sidecar=True)
    expected = texts_beside(photos)
    assert expected.keys() == {"a.txt", "b.txt", "c.txt", "m.txt", "z.txt", "sub/a.txt"}
    assert expected["a.txt"] == expected_text(photos / "a.jpg") + "\n"
    remove_texts(photos)
    assert not bench.run(sidecar=True) and "load" not in bench.calls
    assert texts_beside(photos) == expected

    remove_texts(photos)
    bench.run(overwrite=True, max_errors=1)
    assert bench.stats.stopped_early and not texts_beside(photos)
    assert bench.run(sidecar=True) and bench.stats.resumed > 0
    assert texts_beside(photos) == expected


def test_rows_done_again_and_those_that_were_done_get_their_texts(bench: Bench, photos: Path) -> None:
    bench.run()
    save_image(photos / "broken.png", 9)
    bench.run(retry_errors=True, sidecar=True)
    assert texts_beside(photos).keys() == {"a.txt", "b.txt", "c.txt", "m.txt", "z.txt", "sub/a.txt", "broken.txt"}


def test_texts_are_refused_beside_other_images_than_those_that_are_done(bench: Bench, photos: Path) -> None:
    def run(*names: str, **changes: Any) -> bool:
        paths = "".join(f"{photos / name}\n" for name in names)
        return bench.run(stdin=io.BytesIO(paths.encode()), inputs=("-",), **changes)

    run("a.jpg", "broken.png", "z.png", max_errors=1)
    for others in ("b.jpg", "broken.png", "z.png"), ("a.jpg",):
        with pytest.raises(OutputError, match=r"the input has changed .* 1 row gone "):
            run(*others, sidecar=True)
    assert texts_beside(photos).keys() <= {"a.txt"}


def test_a_manifest_without_files_has_no_place_for_texts(bench: Bench, tmp_path: Path) -> None:
    import pyarrow as pa

    pq.write_table(pa.table({"image": [(save_image(tmp_path / "x.png")).read_bytes()]}), tmp_path / "m.parquet")
    assert "leave --sidecar out" in bench.refuses(OutputError, inputs=(str(tmp_path / "m.parquet"),), sidecar=True)
    assert "load" not in bench.calls
    unseen = {"inputs": (str(tmp_path / "m.parquet"),), "reading": ReadOptions(needs_image=False)}
    assert "name its column with --image-column" in bench.refuses(OutputError, sidecar=True, **unseen)


def test_answers_that_cannot_be_scored_are_told_before_the_model_is_loaded(bench: Bench, photos: Path) -> None:
    manifest = photos / "m.jsonl"
    manifest.write_text("".join(json.dumps({"image": name, "truth": [True]}) + "\n" for name in ("a.jpg", "b.png")))
    changes = {"inputs": (str(manifest),), "reading": ReadOptions(keep=("truth",)), "answers_column": "truth"}
    assert "row 1: a reference is bool, not text: name another" in bench.refuses(InputError, **changes)
    assert "load" not in bench.calls and not list(bench.output.parent.glob("f.*"))
    bench.run(**{**changes, "answers_column": None})
    assert [row["id"] for row in bench.rows()] == ["0", "1"]  # the row that is looked at comes, too


def test_shots_may_have_their_images_in_the_inputs_column(bench: Bench, photos: Path) -> None:
    """And folders have no columns, but shots beside them do."""
    shots = photos / "shots.jsonl"
    shots.write_text(json.dumps({"before": "a.jpg", "after": "b.png", "caption": "a cat"}) + "\n")
    for column in "before", "after":
        options = ShotOptions(str(shots), 1, image_column=column)
        task = task_of(PromptOptions("caption", num_shots=1), shots=options)
        changes = {"inputs": (str(photos / "a.jpg"),), "output": str(bench.output.with_name(f"{column}.jsonl"))}
        assert bench.opened(task, reading=ReadOptions(image_column=column), **changes).run(None)


def test_files_have_one_image_each(bench: Bench) -> None:
    """A prompt with places for more would make an error of every row."""
    for text in "{image}{image}", "{image} or {{{image}}}":
        with pytest.raises(InputError, match=r"is not a manifest: name one with a list of 2 images in each row"):
            bench.opened(task_of(PromptOptions("caption", text=text)))
    bench.opened(task_of(PromptOptions("caption", text="{image} or {{image}}")))


def test_images_alone_have_no_columns(bench: Bench) -> None:
    for flag, reading in {
        "--keep": ReadOptions(keep=("author",)),
        "--image-column": ReadOptions(image_column="image"),
        "--id-column": ReadOptions(id_column="name"),
        "--image-root": ReadOptions(image_root="photos"),
    }.items():
        assert bench.refuses(InputError, reading=reading).startswith(f"{flag} needs a manifest, and ")
    assert bench.calls == []


def test_the_image_root_is_that_of_paths_on_stdin_too(bench: Bench, photos: Path) -> None:
    reading = ReadOptions(image_root=str(photos))
    bench.run(stdin=io.BytesIO(b"a.jpg\n"), inputs=("-",), reading=reading)
    assert bench.rows()[0]["error"] is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_run_reads_is_never_its_output(bench: Bench, tmp_path: Path, photos: Path, overwrite: bool) -> None:
    shots, link = tmp_path / "shots.jsonl", tmp_path / "link.jsonl"
    shots.write_text(json.dumps({"image": "photos/a.jpg", "caption": "a cat"}) + "\n")
    link.symlink_to(shots)
    changes = {"output": str(link), "overwrite": overwrite}
    assert "name another output" in bench.refuses(OutputError, inputs=(str(shots),), **changes)
    task = task_of(PromptOptions("caption", num_shots=1), shots=ShotOptions(str(shots), 1))
    with pytest.raises(OutputError, match="is what this run reads: name another output"):
        bench.opened(task, **changes)
    assert "a cat" in shots.read_text()


def test_what_another_command_has_made_is_not_taken_over(bench: Bench) -> None:
    bench.run()
    task = Embed(replace(bench.options.request, model="demo"))
    with pytest.raises(OutputError, match="command: was 'caption', now 'embed'"):
        bench.opened(task).run(None)


# Columns that are passed through


def manifest_of(photos: Path, name: str) -> Path:
    """Of three rows, the second's image broken."""
    images = ["a.jpg", "broken.png", "b.png"]
    rows = [{"image": image, "width": number, "tag": "\u00fc"} for number, image in enumerate(images)]
    return write_manifest(photos / name, rows)


def passing(manifest: Path, **changes: Any) -> dict[str, Any]:
    return {"inputs": (str(manifest),), "reading": ReadOptions(image_column="image", keep=("width", "tag")), **changes}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ["m.jsonl", "m.csv", "m.parquet"])
@pytest.mark.parametrize("questions", [(), ("What?", "Where?")])
def test_columns_of_the_inputs_come_out_beside_every_row(
    bench: Bench, photos: Path, name: str, suffix: str, questions: tuple[str, ...]
) -> None:
    bench.output = bench.output.with_suffix(suffix)
    changes = passing(manifest_of(photos, name), output=str(bench.output))
    bench.run(questions, **changes)
    rows = bench.rows()
    expected = [(row // (len(questions) or 1), "\u00fc") for row in range(3 * (len(questions) or 1))]
    if name == "m.csv":
        expected = [(str(width), tag) for width, tag in expected]
    assert [(row["width"], row["tag"]) for row in rows] == expected
    assert list(rows[0])[-2:] == ["width", "tag"]
    stdout = io.BytesIO()
    bench.run(questions, stdout=stdout, **{**changes, "output": "-"})
    assert rows_of(stdout.getvalue()) == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_inputs_that_change_before_the_end_are_told_and_the_rows_are_kept(
    bench: Bench, photos: Path, suffix: str
) -> None:
    manifest, output = manifest_of(photos, "m.jsonl"), bench.output.with_suffix(suffix)
    before, changes = manifest.read_bytes(), passing(manifest, output=str(output))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "on_row", lambda self, number: manifest.write_bytes(b"{}\n" + before))
        said = bench.refuses(InputError, **changes)
    assert "m.jsonl changed while the run was under way: restore it and run the same command again" in said
    assert bench.stats.safe == 3 and not output.exists()
    manifest.write_bytes(before)
    assert not bench.run(**changes) and bench.calls == []
    assert [bench.stats.rows, bench.stats.num_failed, output.exists()] == [3, 1, True]


def test_a_retry_keeps_good_rows_and_takes_passed_through_columns_again(bench: Bench, photos: Path) -> None:
    for suffix in ".jsonl", ".parquet":
        (photos / "broken.png").write_bytes(b"broken")
        output = bench.output.with_suffix(suffix)
        changes = passing(manifest_of(photos, "m.parquet"), output=str(output))
        bench.run(**changes)
        save_image(photos / "broken.png", 9)
        assert bench.run(retry_errors=True, **changes) and bench.stats.resumed == 2
        retried = output.read_bytes()
        bench.run(overwrite=True, **changes)
        assert output.read_bytes() == retried


def test_rows_that_stand_are_told_of_as_done_when_a_run_begins(bench: Bench, photos: Path) -> None:
    """A retry, one that was stopped and is gone on with, and an update: what a bar counts is what is left to do."""
    for name in "a.png", "zz.png":
        (photos / name).write_bytes(b"broken")

    def counts() -> tuple[int, int]:
        return bench.observer.done_before, bench.observer.done

    bench.run()
    assert counts() == (0, 9)
    stopped_after(5, bench, retry_errors=True)  # two of the failed rows are among them
    assert bench.observer.done_before == 6
    assert bench.run(retry_errors=True)
    assert counts() == (8, 9)
    save_image(photos / "new.png", 9)
    assert bench.run(update=True)
    assert counts() == (9, 10)


def test_a_passed_through_column_with_a_name_of_the_result_is_called_input() -> None:
    assert shown_names({"caption": None, "width": None}, ["id", "caption"]) == {
        "caption": "input_caption",
        "width": "width",
    }


@given(st.sets(st.sampled_from(["id", "image", "input_id", "width", "input_width", "input_image"])))
def test_no_two_columns_have_one_name(kept: set[str]) -> None:
    own = ["id", "image"]
    try:
        names = shown_names(dict.fromkeys(kept), own)
    except InputError as error:
        assert re.search("two columns of --keep would be called input_(id|image)", str(error))
        assert {"id", "input_id"} <= kept or {"image", "input_image"} <= kept
        return
    assert len({*own, *names.values()}) == len(own) + len(kept)


def test_paths_on_stdin_beside_a_manifest_have_nothing_to_pass_through(bench: Bench, photos: Path) -> None:
    changes = passing(manifest_of(photos, "m.jsonl"))
    changes["inputs"] = ("-", *changes["inputs"])
    bench.run(stdin=io.BytesIO(f"{photos / 'c.png'}\n{photos / 'z.webp'}\n".encode()), **changes)
    assert [row["width"] for row in bench.rows()] == [None, None, 0, 1, 2]
