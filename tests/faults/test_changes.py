"""What has changed between two runs, or goes while one is under way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import save_image
from faulty_run import Settings
from runs import Bench, Ended, make_bench

ROWS = 60

both_formats = pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])


def with_another_prompt(bench: Bench) -> Ended:
    return bench.run("--prompt", "{image} In short:")


def with_another_prefix(bench: Bench) -> Ended:
    return bench.run("--prefix", "A ")


def with_other_decoding(bench: Bench) -> Ended:
    return bench.run("--num-beams", "5")


def with_another_model(bench: Bench) -> Ended:
    return bench.run("-m", "other/model")


def with_other_weights(bench: Bench) -> Ended:
    return bench.run(settings=Settings(weights="other"))


def with_fewer_rows(bench: Bench) -> Ended:
    return bench.run("--limit", "5")


def with_another_image(bench: Bench) -> Ended:
    added = save_image(bench.images / "added.png")
    ended = bench.run()
    added.unlink()
    return ended


def with_more_texts(bench: Bench) -> Ended:
    return bench.run("--num-return-sequences", "2")


@both_formats
@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize(
    ("run_again", "said"),
    [
        (with_another_prompt, "(--prompt: was unset, now '{image} In short:')"),
        (with_another_prefix, "(--prefix: was '', now 'A ')"),
        (with_other_decoding, "(--num-beams: was 3, now 5)"),
        (with_another_model, "(--model: was 'HuggingFaceM4/idefics-9b-instruct', now 'other/model')"),
        (with_fewer_rows, "(--limit: was unset, now 5)"),
        (with_another_image, "files: was 60, now 61"),
        (with_more_texts, "--num-return-sequences: was 1, now 2"),
    ],
)
def test_a_change_is_named_and_nothing_touched(
    tmp_path: Path, suffix: str, is_finished: bool, run_again: Callable[[Bench], Ended], said: str
) -> None:
    bench = make_bench(tmp_path, ROWS, suffix)
    begin(bench, is_finished)
    refuse(bench, run_again, said)
    assert bench.run().code == 3
    bench.verify()


@both_formats
def test_other_weights_under_the_same_name(tmp_path: Path, suffix: str) -> None:
    bench = make_bench(tmp_path, ROWS, suffix)
    begin(bench, is_finished=False)
    refuse(bench, with_other_weights, "(model weights: was 'fake', now 'other')")


def begin(bench: Bench, is_finished: bool) -> None:
    """A run that is finished, or killed after its first rows."""
    if is_finished:
        assert bench.run().code == 3
    else:
        assert bench.run_with_fault(8, "kill") is not None
        assert bench.part.read_bytes().count(b"\n") > 20


def refuse(bench: Bench, run_again: Callable[[Bench], Ended], said: str) -> None:
    before = {path: path.read_bytes() for path in bench.output.parent.iterdir()}
    ended = run_again(bench)
    assert ended.code == 2, ended
    assert said in ended.said and "--overwrite" in ended.said
    assert {path: path.read_bytes() for path in bench.output.parent.iterdir()} == before


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
