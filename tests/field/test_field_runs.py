"""Runs that are repeated: what users change between two of them, and what ends one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import FakeCaptioner, expected_text, rows_of, save_image
from typer.testing import CliRunner, Result

from idefics_cli.cli import app as cli
from idefics_cli.writers.embeddings_file import EmbeddingFile


def test_one_id_twice_in_a_manifest_costs_that_row_alone(run: Callable[..., Result], tmp_path: Path) -> None:
    """And in an output's Parquet as well; the remedy that the summary names helps."""
    images = [save_image(tmp_path / f"{seed}.png", seed) for seed in range(130)]
    ids = [f"r{number}" for number in range(130)]
    ids[110] = "r7"
    pd.DataFrame({"id": ids, "image": [path.name for path in images], "key": range(130)}).to_csv(
        tmp_path / "m.csv", index=False
    )
    for suffix in ".jsonl", ".parquet":
        output = tmp_path / f"f{suffix}"
        result = run("caption", tmp_path / "m.csv", "-o", output)
        rows = rows_of(output.read_text()) if suffix == ".jsonl" else pq.read_table(output).to_pylist()
        assert result.exit_code == 3 and len(rows) == 130
        assert [row["id"] for row in rows] == ids
        assert rows[110]["error"] == "duplicate_id: row 111 has the id of row 8, 'r7'"
        assert [row["id"] for row in rows if row["error"]] == ["r7"]
        assert rows[129]["caption"] == expected_text(images[129])
        assert "duplicate_id: leave such rows out, or name a manifest's column of unique ids" in result.stderr
    assert run("caption", tmp_path / "m.csv", "--id-column", "key", "-o", tmp_path / "g.jsonl").exit_code == 0


def test_embeddings_of_an_id_that_comes_twice_are_those_of_its_first_row(tmp_path: Path) -> None:
    names = [save_image(tmp_path / f"{seed}.png", seed).name for seed in range(3)]
    pd.DataFrame({"id": ["a", "b", "a"], "image": names}).to_json(tmp_path / "m.jsonl", orient="records", lines=True)
    embed = ["embed", str(tmp_path / "m.jsonl"), "-o", str(tmp_path / "e.parquet"), "-m", "demo"]
    assert CliRunner().invoke(cli.app, embed).exit_code == 3
    file = EmbeddingFile(tmp_path / "e.parquet")
    assert file.latents("a").shape == file.latents("b").shape == file.shape


# ---- the input of a repeated run


class Asked(FakeCaptioner):
    """Counts the rows that it is asked about."""

    @property
    def number(self) -> int:
        return sum(self.calls)


def manifest_of(folder: Path, *names: str, suffix: str = ".csv", **columns: Sequence[object]) -> Path:
    """By pandas; each image has the seed that its name tells."""
    for name in names:
        if not (folder / name).exists():
            save_image(folder / name, int(Path(name).stem))
    frame = pd.DataFrame({"id": [Path(name).stem for name in names], "image": names, **columns})
    path = folder / f"m{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=True)
    return path


def names(numbers: Iterable[int]) -> list[str]:
    return [f"{number}.png" for number in numbers]


@pytest.fixture(params=[".jsonl", ".parquet", ".csv"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"f{request.param}"


def ids_of(path: Path) -> list[str]:
    return [row["id"] for row in rows_in(path)]


def rows_in(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    frame = pd.read_csv(path, dtype=str) if path.suffix == ".csv" else pd.read_json(path, lines=True, dtype={"id": str})
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def test_one_new_photo_in_the_folder(run: Callable[..., Result], tmp_path: Path, output: Path) -> None:
    photos = tmp_path / "imgs"
    for seed in 1, 3, 5:
        save_image(photos / f"{seed}.png", seed)
    assert run("caption", photos, "-o", output).exit_code == 0
    before = output.read_bytes()
    save_image(photos / "4.png", 4)
    refused = run("caption", photos, "-o", output)
    assert refused.exit_code == 2 and ": 1 row new (4.png). Add --update " in refused.stderr
    assert output.read_bytes() == before
    captioner = Asked()
    result = run("caption", photos, "-o", output, "--update", captioner=captioner)
    assert result.exit_code == 0 and captioner.number == 1 and "4 rows, 3 of them done before" in result.stderr
    assert [(row["id"], row["caption"]) for row in rows_in(output)] == [
        (f"{seed}.png", expected_text(photos / f"{seed}.png")) for seed in (1, 3, 4, 5)
    ]
    assert "is finished" in run("caption", photos, "-o", output, "--update").stderr


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_appended_inserted_moved_changed_and_removed(
    run: Callable[..., Result], tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / "out.parquet"
    manifest = manifest_of(tmp_path, *names(range(1, 7)), suffix=suffix)
    assert run("caption", manifest, "-o", output).exit_code == 0
    for numbers, said, asked in [
        ([1, 2, 3, 4, 5, 6, 7, 8], "2 rows new (7, 8)", 2),
        ([9, 1, 2, 3, 4, 5, 6, 7, 8], "1 row new (9)", 1),
        ([9, 2, 3, 4, 5, 6, 7, 8], "1 row gone (1)", 0),
        ([8, 7, 6, 5, 4, 3, 2, 9], "its rows come in another order", 0),
        ([7, 1, 3, 9], "1 row new (1), 5 rows gone (8, 6, 5, ...)", 1),
    ]:
        manifest_of(tmp_path, *names(numbers), suffix=suffix)
        before = output.read_bytes()
        assert said in run("caption", manifest, "-o", output).stderr and output.read_bytes() == before
        captioner = Asked()
        result = run("caption", manifest, "-o", output, "--update", captioner=captioner)
        assert result.exit_code == 0 and said in result.stderr and captioner.number == asked, result.stderr
        assert [(row["id"], row["caption"]) for row in rows_in(output)] == [
            (str(number), expected_text(tmp_path / f"{number}.png")) for number in numbers
        ]


@pytest.mark.parametrize("columns", [{}, {"keep": "note"}])
def test_a_question_that_is_corrected_is_asked_again_and_a_kept_column_is_not(
    run: Callable[..., Result], tmp_path: Path, output: Path, columns: dict[str, str]
) -> None:
    command = ["vqa", tmp_path / "m.csv", "-o", output, *(["--keep", "note"] if columns else [])]
    manifest_of(tmp_path, *names(range(4)), question=["What?"] * 4, note=["a", "b", "c", "d"])
    assert run(*command).exit_code == 0
    manifest_of(tmp_path, *names(range(4)), question=["What?", "Why?", "What?", "What?"], note=["a", "b", "c", "new"])
    changed = "2 rows changed (1, 3)" if columns else "1 row changed (1)"
    assert changed in run(*command).stderr
    captioner = Asked()
    assert changed in run(*command, "--update", captioner=captioner).stderr and captioner.number == 1
    rows = rows_in(output)
    assert [row["question"] for row in rows] == ["What?", "Why?", "What?", "What?"]
    assert [row.get("note") for row in rows] == (["a", "b", "c", "new"] if columns else [None] * 4)
    assert "is finished" in run(*command).stderr


def test_a_limit_that_grows(run: Callable[..., Result], tmp_path: Path, output: Path) -> None:
    manifest = manifest_of(tmp_path, *names(range(10)))
    command = ["caption", manifest, "-o", output]
    assert run(*command, "--limit", "3").exit_code == 0
    assert ": 3 rows new (3, 4, 5). Add --update" in run(*command, "--limit", "6").stderr
    captioner = Asked()
    assert run(*command, "--limit", "6", "--update", captioner=captioner).exit_code == 0 and captioner.number == 3
    assert run(*command, "--update").exit_code == 0 and ids_of(output) == [str(number) for number in range(10)]
    said = run(*command, "--limit", "4").stderr
    assert "6 rows gone (4, 5, 6, ...)" in said and "new or changed, drop what is gone and keep" in said


@pytest.mark.parametrize("limit", [(), ("--limit", "9")])
def test_a_stopped_run_resumes_by_itself_where_rows_come_after_those_that_are_done(
    run: Callable[..., Result], tmp_path: Path, output: Path, limit: tuple[str, ...]
) -> None:
    stop_after(run, 4, "caption", manifest_of(tmp_path, *names(range(6))), "-o", output, "--limit", "5")
    manifest_of(tmp_path, *names(range(12)))
    captioner = Asked()
    assert run("caption", tmp_path / "m.csv", "-o", output, *limit, captioner=captioner).exit_code == 0
    assert (
        ids_of(output) == [str(number) for number in range(9 if limit else 12)]
        and captioner.number <= len(ids_of(output)) - 4
    )


def stop_after(run: Callable[..., Result], number: int, *command: str | Path) -> None:
    """A run that is stopped when so many rows have come out."""
    captioner = FakeCaptioner(1)

    def stop(prompts: Sequence[Any]) -> None:
        if len(captioner.calls) > number:
            os.kill(os.getpid(), signal.SIGTERM)

    captioner.before_call = stop
    assert run(*command, "--workers", "1", captioner=captioner).exit_code == 143


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_names_of_the_input_and_the_images_are_the_same_run(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_finished: bool
) -> None:
    photos = tmp_path / "imgs"
    manifest_of(photos, *names(range(6)))
    monkeypatch.chdir(tmp_path)
    for kind, spellings in {
        "imgs": ["imgs/", str(photos), "../" + tmp_path.name + "/imgs", "moved"],
        "imgs/m.csv": ["./imgs/m.csv", str(photos / "m.csv"), "copy.csv"],
    }.items():
        output = tmp_path / f"{len(kind)}.jsonl"
        root = ("--image-root", "imgs") if kind.endswith("csv") else ()
        if is_finished:
            assert run("caption", kind, "-o", output, *root).exit_code == 0
        else:
            stop_after(run, 3, "caption", kind, "-o", output, *root)
        shutil.copy(photos / "m.csv", "copy.csv")
        monkeypatch.setattr("idefics_cli.__version__", "0.1.99")
        shutil.copytree(photos, "moved", dirs_exist_ok=True)  # with their times
        for spelling in spellings:
            root = ("--image-root", f"{photos}/") if kind.endswith("csv") else ()
            result = run("caption", spelling, "-o", output, *root)
            assert result.exit_code == 0 and (not is_finished or "is finished" in result.stderr), result.stderr
        assert len(ids_of(output)) == 6


def test_another_image_under_an_old_name(run: Callable[..., Result], tmp_path: Path, output: Path) -> None:
    """As many bytes, another time; and bytes in Parquet, by what they hold."""
    manifest = manifest_of(tmp_path, *names(range(3)))
    assert run("caption", manifest, "-o", output).exit_code == 0
    os.utime(save_image(tmp_path / "1.png", 77), ns=(0, 1))
    captioner = Asked()
    result = run("caption", manifest, "-o", output, "--update", captioner=captioner)
    assert "1 row changed (1)" in result.stderr and captioner.number == 1
    assert rows_in(output)[1]["caption"] == expected_text(tmp_path / "1.png")
    held = tmp_path / "held.parquet"
    images = [(tmp_path / f"{number}.png").read_bytes() for number in range(3)]
    pd.DataFrame({"id": ["a", "b", "c"], "image": images}).to_parquet(held)
    assert run("caption", held, "-o", tmp_path / "g.jsonl").exit_code == 0
    pd.DataFrame({"id": ["a", "b", "c"], "image": [images[0], images[1], images[1]]}).to_parquet(held)
    assert "1 row changed (c)" in run("caption", held, "-o", tmp_path / "g.jsonl").stderr


def test_paths_on_stdin_that_have_grown(run: Callable[..., Result], tmp_path: Path, output: Path) -> None:
    paths = [str(save_image(tmp_path / f"{seed}.png", seed)) for seed in range(5)]

    def given(*numbers: int) -> bytes:
        return "".join(f"{paths[number]}\n" for number in numbers).encode()

    assert run("caption", "-", "-o", output, input=given(0, 1, 2)).exit_code == 0
    assert "2 rows new (" in run("caption", "-", "-o", output, input=given(0, 3, 1, 2, 4)).stderr
    captioner = Asked()
    result = run("caption", "-", "-o", output, "--update", input=given(4, 3, 1, 1, 0), captioner=captioner)
    assert captioner.number == 2 and "1 row gone" in result.stderr and result.exit_code == 3
    assert ids_of(output) == [paths[number] for number in (4, 3, 1, 1, 0)]


def test_prompts_that_name_images_are_compared_by_these_too(run: Callable[..., Result], tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 1)
    rows = [{"id": "x", "prompt": ["What is this?", {"image": "a.png"}]}, {"id": "y", "prompt": ["Hello"]}]
    pd.DataFrame(rows).to_json(tmp_path / "m.jsonl", orient="records", lines=True)
    command = ["generate", tmp_path / "m.jsonl", "-o", tmp_path / "f.jsonl"]
    assert run(*command).exit_code == 0
    os.utime(save_image(tmp_path / "a.png", 2), ns=(0, 1))
    captioner = Asked()
    assert "1 row changed (x)" in run(*command, "--update", captioner=captioner).stderr and captioner.number == 1


# ---- mistakes that are fixed, and the same command again


def test_a_mistake_late_in_a_manifest_is_fixed_while_the_run_is_stopped(
    run: Callable[..., Result], tmp_path: Path, output: Path
) -> None:
    """A duplicate id in a row that is not done yet: the rows before it are neither lost nor done again."""
    manifest = manifest_of(tmp_path, *names([*range(8), 2]))
    stop_after(run, 5, "caption", manifest, "-o", output)
    manifest_of(tmp_path, *names(range(9)))
    captioner = Asked()
    assert run("caption", manifest, "-o", output, captioner=captioner).exit_code == 0
    assert ids_of(output) == [str(number) for number in range(9)] and captioner.number <= 4


@pytest.mark.parametrize("option", ["--retry-errors", "--update"])
def test_a_typo_is_fixed_before_failed_rows_are_redone(
    run: Callable[..., Result], tmp_path: Path, output: Path, option: str
) -> None:
    """The failed row takes its new values, and the others need not be as they were where only it is redone."""
    manifest = manifest_of(tmp_path, *names(range(4)), question=["What?", "", "What?", "What?"])
    command = ["vqa", manifest, "-o", output]
    assert run(*command).exit_code == 3
    questions = ["What?", "Why?", "What?", "What now?" if option == "--retry-errors" else "What?"]
    manifest_of(tmp_path, *names(range(4)), question=questions)
    captioner = Asked()
    assert run(*command, option, captioner=captioner).exit_code == 0 and captioner.number == 1
    rows = rows_in(output)
    assert rows[1]["question"] == "Why?" and not any(row["error"] for row in rows)


def test_failed_rows_are_not_redone_beside_a_grown_input_unless_that_is_asked_for(
    run: Callable[..., Result], tmp_path: Path, output: Path
) -> None:
    manifest = manifest_of(tmp_path, *names(range(3)))
    (tmp_path / "1.png").unlink()
    assert run("caption", manifest, "-o", output).exit_code == 3
    manifest_of(tmp_path, *names(range(6)))  # with the image that was missing
    assert "3 rows new (3, 4, 5)" in run("caption", manifest, "-o", output, "--retry-errors").stderr
    captioner = Asked()
    result = run("caption", manifest, "-o", output, "--retry-errors", "--update", captioner=captioner)
    assert result.exit_code == 0 and captioner.number == 4 and len(ids_of(output)) == 6


# ---- while a run is under way


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("keep", [(), ("--keep", "note")])
@pytest.mark.parametrize("change", ["append", "remove", "replace", "rewrite"])
def test_a_manifest_that_changes_while_it_is_read(
    run: Callable[..., Result], tmp_path: Path, suffix: str, keep: tuple[str, ...], change: str
) -> None:
    """The file that was opened is read to its end; only kept columns of one that was written over cannot be had."""
    manifest = manifest_of(tmp_path, *names(range(200)), suffix=suffix, note=range(200))
    old, output = manifest.read_bytes(), tmp_path / "f.jsonl"
    other = manifest_of(tmp_path / "other", *names(range(150, 0, -1)), suffix=suffix, note=range(150)).read_bytes()

    def happen(prompts: Sequence[Any]) -> None:
        if len(captioner.calls) != 2:
            return
        if change == "append" and suffix != ".parquet":
            with open(manifest, "ab") as file:
                file.write(b'{"id": "new", "image": "0.png", "note": 7}\n' if suffix == ".jsonl" else b"new,0.png,7\n")
        elif change in ("remove", "replace"):
            manifest.unlink()
            if change == "replace":
                manifest.write_bytes(other)
        elif change == "rewrite":
            manifest.write_bytes(other)

    captioner = FakeCaptioner(1, before_call=happen)
    command = ["caption", manifest, "-o", output, *keep, "--workers", "1"]
    result = run(*command, captioner=captioner)
    assert "Traceback" not in result.output and "a bug" not in result.stderr
    if change != "rewrite":
        assert result.exit_code == 0, result.stderr
        assert [row["id"] for row in rows_in(output)][:200] == [str(number) for number in range(200)]
        if keep:
            assert [row["note"] for row in rows_in(output)][:200] == list(range(200))
        is_told = f"{manifest} has changed since the run began: --update does what is new or changed" in result.stderr
        assert is_told == (change != "append" or suffix != ".parquet")
    elif keep:
        assert result.exit_code == 2 and "--update" in result.stderr
    if change in ("replace", "rewrite"):  # and what the line says helps
        result = run(*command, "--update")
        assert result.exit_code == 0 and ids_of(output) == [str(number) for number in range(150, 0, -1)]
    if change == "remove":
        manifest.write_bytes(old)
        assert "is finished" in run(*command).stderr


def test_a_path_twice_that_is_left_out_is_told_and_fixed(run: Callable[..., Result], tmp_path: Path) -> None:
    paths, output = [str(save_image(tmp_path / f"{seed}.png", seed)) for seed in (1, 2)], tmp_path / "out.jsonl"
    command = "caption", "-", "-o", output
    said = run(*command, input="\n".join([*paths, paths[0]]).encode()).stderr
    assert "duplicate_id: leave such rows out, or " in said
    assert "other ids come twice. Add --update" in run(*command, input="\n".join(paths).encode()).stderr
    assert run(*command, "--update", input="\n".join(paths).encode()).exit_code == 0
    assert ids_of(output) == paths


# ---- where the input is gone


def test_the_rows_of_a_stopped_run_are_salvaged_without_its_input(
    run: Callable[..., Result], refused: Callable[..., str], tmp_path: Path, output: Path
) -> None:
    """And where the input comes back, the other rows are done."""
    manifest, part = manifest_of(tmp_path, *names(range(8))), Path(f"{output}.part")
    stop_after(run, 4, "caption", manifest, "-o", output)
    kept = manifest.read_bytes()
    manifest.unlink()
    copied = output.with_stem("copy")
    assert run("salvage", part, "-o", copied).exit_code == 0 and part.exists()
    result = run("salvage", part)
    assert result.exit_code == 0 and f"rows in {output}, 0 failed." in result.stderr and not part.exists()
    ids = ids_of(output)
    assert len(ids) >= 4 and ids == ids_of(copied) == [str(number) for number in range(len(ids))]
    assert f"no file {part}: name what a stopped run has left" in refused("salvage", part)
    assert f"no file {part}: " in refused("salvage", output)
    manifest.write_bytes(kept)
    captioner = Asked()
    assert run("caption", manifest, "-o", output, "--update", captioner=captioner).exit_code == 0
    assert ids_of(output) == [str(number) for number in range(8)] and captioner.number == 8 - len(ids)


def test_rows_of_earlier_attempts_are_salvaged_too_and_no_file_is_replaced(
    run: Callable[..., Result], refused: Callable[..., str], tmp_path: Path
) -> None:
    output = tmp_path / "f.jsonl"
    stop_after(run, 6, "caption", manifest_of(tmp_path, *names(range(12))), "-o", output)
    stop_after(run, 1, "caption", manifest_of(tmp_path, *names([20, 21, 22, *range(12)])), "-o", output, "--update")
    output.write_text("mine")
    assert "exists already" in refused("salvage", f"{output}.part")
    assert output.read_text() == "mine" and run("salvage", f"{output}.part", "-o", tmp_path / "g.jsonl").exit_code == 0
    assert {"20", *map(str, range(5))} <= set(ids_of(tmp_path / "g.jsonl"))


def test_where_salvaged_rows_cannot_go(
    run: Callable[..., Result], refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stop_after(run, 4, "caption", manifest_of(tmp_path, *names(range(8))), "-o", tmp_path / "f.jsonl")
    salvage = "salvage", "f.jsonl.part", "-o"
    assert "g.json: a .json file is for answers: name one that ends in .jsonl" in refused(*salvage, "g.json")
    assert refused(*salvage, "-").endswith("name a result file that ends in .jsonl, .parquet or .csv.")
    assert "is an address: name a file on this machine" in refused(*salvage, "s3://bucket/g.jsonl")
    Path("g.jsonl.run").write_text("mine")
    assert "is not a file of this program, and would be overwritten" in refused(*salvage, "g.jsonl")
    assert run(*salvage, tmp_path / "f.jsonl").exit_code == 0 and not Path("f.jsonl.part").exists()
    assert Path("g.jsonl.run").read_text() == "mine"


def test_a_submission_is_salvaged(run: Callable[..., Result], tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, *names(range(8)), question=["What?"] * 8, question_id=range(8))
    output = tmp_path / "f.json"
    stop_after(run, 4, "vqa", manifest, "--format", "vqav2", "-o", output)
    assert run("salvage", output).exit_code == 0  # as good as the name of its .part
    assert [row["question_id"] for row in json.loads(output.read_text())][:4] == [0, 1, 2, 3]
