"""What has changed between two runs, or goes while one is under way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import save_image
from faulty_run import Settings
from runs import PLAIN, Bench, both_formats, make_bench

ROWS = 60

CHANGES = [
    (("--prompt", "{image} In short:"), "(--prompt: was unset, now '{image} In short:')"),
    (("--template", "caption"), "(--template: was unset, now 'caption')"),
    (("--bare",), "(--bare: was False, now True)"),
    (("--prefix", "A "), "(--prefix: was '', now 'A ')"),
    (("--stop-words", "dog"), "(--stop-words: was unset, now ['dog'])"),
    (("--num-beams", "5"), "(--num-beams: was 3, now 5)"),
    (("--num-return-sequences", "2"), "(--num-return-sequences: was 1, now 2)"),
    (("--model", "other/model"), "(--model: was 'HuggingFaceM4/idefics-9b-instruct', now 'other/model')"),
    (("--draft",), "(--draft: was False, now True)"),
]


@both_formats
@pytest.mark.parametrize("is_finished", [False, True])
def test_a_change_is_named_and_nothing_touched(tmp_path: Path, suffix: str, is_finished: bool) -> None:
    bench = make_bench(tmp_path, ROWS, suffix)
    begin(bench, is_finished)
    for options, said in CHANGES:
        refuse(bench, said, *options)
    refuse(bench, "rows gone (0005.png, 0006.png, 0007.png, ...). Add --update ", "--limit", "5")
    added = save_image(bench.images / "0000-added.png")
    refuse(bench, ": 1 row new (0000-added.png)." if is_finished else ": its rows come in another order, ")
    added.unlink()
    for name, said in ("0001.png", "1 row changed (0001.png)"), ("0002.png", "1 row gone (0002.png)"):
        path = bench.images / name
        before = path.read_bytes(), path.stat()
        path.unlink() if "gone" in said else path.write_bytes(b"broken")
        refuse(bench, said)
        path.write_bytes(before[0])
        os.utime(path, ns=(before[1].st_atime_ns, before[1].st_mtime_ns))
    assert bench.run().code == 3
    bench.verify()


def test_other_weights_under_the_same_name(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, ROWS, ".jsonl")
    begin(bench, is_finished=False)
    refuse(bench, "(model weights: was 'fake', now 'other')", settings=Settings(weights="other"))


def begin(bench: Bench, is_finished: bool) -> None:
    """A run that is finished, or killed after its first rows."""
    if is_finished:
        assert bench.run().code == 3
    else:
        assert bench.run_with_fault(8, "kill") is not None
        assert bench.part.read_bytes().count(b"\n") > 20


def refuse(bench: Bench, said: str, *options: str, settings: Settings = PLAIN) -> None:
    before = bench.files()
    ended = bench.run(*options, settings=settings)
    assert ended.code == 2, ended
    assert said in ended.said and "--overwrite" in ended.said
    assert bench.files() == before


@both_formats
def test_a_finished_run_is_not_done_again(tmp_path: Path, suffix: str) -> None:
    bench = make_bench(tmp_path, ROWS, suffix)
    assert bench.run().code == 3
    before = bench.output.stat()
    ended = bench.run()
    assert ended.code == 3
    assert ended.said.startswith(f"{bench.output} is finished: 60 rows, 4 of them failed (--retry-errors")
    assert (bench.output.stat().st_mtime_ns, bench.output.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


@both_formats
def test_a_result_that_its_owner_has_changed_is_not_touched(tmp_path: Path, suffix: str) -> None:
    bench = make_bench(tmp_path, ROWS, suffix)
    assert bench.run().code == 3
    bench.output.write_bytes(bench.output.read_bytes()[:-20])
    ended = bench.run()
    assert ended.code == 2 and "not as a run of this program left it" in ended.said


def test_a_result_that_is_changed_while_its_failed_rows_are_done_again(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, ROWS, ".jsonl")
    assert bench.run().code == 3
    # Killed when the record is renamed and the result is not: which of the two has changed cannot be told.
    assert bench.run_with_fault(2, "kill", "--retry-errors", calls=("rename",)) is not None
    lines = bench.output.read_bytes().splitlines(keepends=True)
    for changed in b"".join(lines[6:]), b"notes of mine\n" + b"".join(lines):
        bench.output.write_bytes(changed)
        ended = bench.run()
        assert ended.code == 2 and "was changed or removed while its failed rows were being retried" in ended.said
        assert bench.output.read_bytes() == changed
    bench.output.write_bytes(b"".join(lines))
    assert bench.run().code == 3
    bench.verify()


@both_formats
def test_images_that_go_while_a_run_is_under_way_are_rows_with_a_reason(tmp_path: Path, suffix: str) -> None:
    bench = make_bench(tmp_path, 200, suffix)
    run = bench.start("--batch-size", "2", settings=Settings(delay=0.01, commit_rows=2))
    bench.wait_for_rows(2)
    gone, unreadable = bench.images / "0199.png", bench.images / "0198.png"
    gone.unlink()
    unreadable.unlink()
    unreadable.mkdir()
    ended = run.wait()
    assert ended.code == 3 and len(bench.rows()) == 200
    assert bench.rows()[199]["error"].startswith("image_missing: ")
    assert bench.rows()[198]["error"].startswith("image_not_allowed: ")
