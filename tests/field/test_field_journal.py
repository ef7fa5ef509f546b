"""The journal in other hands: taken away, changed or locked by others while a run is under way, or between two."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeCaptioner, expected_text, rows_of, save_image
from typer.testing import Result

from idefics_cli.errors import OutputError
from idefics_cli.writers import journal as journals
from idefics_cli.writers import owner, writers
from idefics_cli.writers.journal import Journal, checked
from idefics_cli.writers.output_file import FileOutput

ROWS = 40
ONE = "--workers", "1"  # so that rows come out in order
Run = Callable[..., Result]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(writers, "COMMIT_ROWS", 4)
    for number in range(ROWS):
        save_image(tmp_path / "images" / f"{number:02}.png", number)
    return tmp_path / "images"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "f.jsonl"


def part_of(output: Path) -> Path:
    return output.with_name("f.jsonl.part")


def lock_of(output: Path) -> Path:
    return output.with_name("f.jsonl.lock")


def disturbed(output: Path, disturb: Callable[[], Any], when: int = 5) -> FakeCaptioner:
    """A captioner that does this to the output at its call of this number, when rows are on the disk."""
    calls = iter(range(1, ROWS))

    def act(prompts: Sequence[Any]) -> None:
        if next(calls) == when:
            wait_for_rows(output)
            disturb()

    return FakeCaptioner(before_call=act)


def wait_for_rows(output: Path) -> None:
    while part_of(output).read_bytes().count(b"\n") < 4:
        time.sleep(0.01)


def verify(output: Path, images: Path) -> None:
    """Each image has its row, in order, and nothing is left over."""
    expected = [(path.name, expected_text(path)) for path in sorted(images.iterdir())]
    assert [(row["id"], row["caption"]) for row in rows_of(output.read_bytes())] == expected
    assert {path.name for path in output.parent.iterdir()} == {"f.jsonl", "f.jsonl.run"}


# ---- while a run is under way


def remove(output: Path) -> None:
    part_of(output).unlink()


def replace_by_a_copy(output: Path) -> None:
    copy = output.with_name("copy")
    shutil.copy(part_of(output), copy)
    copy.rename(part_of(output))


def truncate(output: Path) -> None:
    os.truncate(part_of(output), 0)


def cut_a_line(output: Path) -> None:
    whole = part_of(output).read_bytes()
    os.truncate(part_of(output), whole[:-1].rindex(b"\n") + 1)


def add_to_it(output: Path) -> None:
    with open(part_of(output), "ab") as file:
        file.write(b'{"id": "mine"}\n')


def rename_the_folder(output: Path) -> None:
    output.parent.rename(output.parent.with_name("elsewhere"))


def replace_the_folder(output: Path) -> None:
    shutil.copytree(output.parent, output.parent.with_name("copy"), ignore=lambda folder, names: [lock_of(output).name])
    rename_the_folder(output)
    output.parent.with_name("copy").rename(output.parent)


def remove_the_lock(output: Path) -> None:
    lock_of(output).unlink()


HANDS = [
    (remove, "was removed, moved or replaced"),
    (replace_by_a_copy, "was removed, moved or replaced"),
    (rename_the_folder, "was removed, moved or replaced"),
    (replace_the_folder, "was removed, moved or replaced"),
    (truncate, "was changed by another program"),
    (cut_a_line, "was changed by another program"),
    (add_to_it, "was changed by another program"),
    (remove_the_lock, r"f\.jsonl\.lock, which locks .* was removed or taken over"),
]


@pytest.mark.parametrize(("disturb", "said"), HANDS, ids=[hand.__name__ for hand, _ in HANDS])
@pytest.mark.parametrize("when", [5, ROWS // 4])
def test_a_journal_in_other_hands_ends_the_run_and_the_same_command_completes(
    run: Run, images: Path, output: Path, disturb: Callable[[Path], None], said: str, when: int
) -> None:
    """In the middle of a run, and at the last rows."""
    ended = run(
        "caption", images, "--workers", "1", "-o", output, captioner=disturbed(output, lambda: disturb(output), when)
    )
    assert ended.exit_code == 2 and not output.exists()
    (line,) = ended.stderr.splitlines()
    assert line.startswith("Error: ") and re.search(said, line), line
    if disturb is rename_the_folder:  # "put it back"
        output.parent.with_name("elsewhere").rename(output.parent)
    if disturb is add_to_it:
        refused = run("caption", images, *ONE, "-o", output)
        assert refused.exit_code == 2 and "was changed in line" in refused.stderr
        whole = part_of(output).read_bytes()
        part_of(output).write_bytes(whole.replace(b'{"id": "mine"}\n', b""))
    assert run("caption", images, *ONE, "-o", output).exit_code == 0
    verify(output, images)


@pytest.mark.parametrize("disturb", [remove, replace_by_a_copy, truncate, cut_a_line, rename_the_folder])
def test_nothing_is_published_where_the_journal_has_gone_after_its_last_row(
    run: Run, images: Path, output: Path, disturb: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = Journal.end

    def end_and_disturb(self: Journal, summary: Any) -> None:
        end(self, summary)
        disturb(output)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "end", end_and_disturb)
        ended = run("caption", images, *ONE, "-o", output)
    assert ended.exit_code == 2 and "was " in ended.stderr and "finished: " not in ended.stderr
    assert not output.exists() and not list(output.parent.parent.rglob("*.tmp"))
    if disturb is rename_the_folder:
        output.parent.with_name("elsewhere").rename(output.parent)
    assert run("caption", images, *ONE, "-o", output).exit_code == 0
    verify(output, images)


def test_what_has_taken_the_name_of_a_finished_journal_stays(
    run: Run, images: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_journal = Journal.remove

    def replace_and_remove(self: Journal) -> None:
        part_of(output).unlink()
        part_of(output).write_text("mine")
        remove_journal(self)

    monkeypatch.setattr(Journal, "remove", replace_and_remove)
    assert run("caption", images, *ONE, "-o", output).exit_code == 0
    assert part_of(output).read_text() == "mine" and len(rows_of(output.read_bytes())) == ROWS


# ---- bugs in the middle of a batch


@pytest.mark.parametrize("always", [True, False], ids=["of-one-row", "of-the-batch"])
@pytest.mark.parametrize("bad", [0, 17, 18, ROWS - 1])
def test_the_good_rows_of_the_batch_of_a_row_that_crashes_are_kept(
    run: Run, images: Path, output: Path, bad: int, always: bool
) -> None:
    """A bug that one row brings about in any batch, and one that it brings about among others only."""
    text = expected_text(images / f"{bad:02}.png")

    def crash(prompts: Sequence[Any]) -> None:
        if text in prompts and (always or len(prompts) > 1):
            raise RuntimeError("a bug")

    ended = run("caption", images, *ONE, "-o", output, captioner=FakeCaptioner(before_call=crash))
    if bad == ROWS - 1 and not always and ended.exit_code == 0:  # it may have come alone
        return
    assert ended.exit_code == 1 and "a bug: RuntimeError" in ended.stderr
    num_rows = part_of(output).read_bytes().count(b"\n") - 1 if part_of(output).exists() else 0
    assert num_rows == bad if always else num_rows > bad
    assert run("caption", images, *ONE, "-o", output).exit_code == 0
    verify(output, images)


# ---- between two runs


def unfinished(run: Run, images: Path, output: Path) -> list[bytes]:
    """The lines of the journal of a run that a bug has ended."""

    def fail() -> None:
        raise ValueError("a bug")

    assert run("caption", images, *ONE, "-o", output, captioner=disturbed(output, fail, 8)).exit_code == 1
    return part_of(output).read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("command", [[], ["--retry-errors"]])
def test_a_line_that_is_lost_and_two_that_are_swapped_are_refused_by_their_number(
    run: Run, images: Path, output: Path, command: list[str]
) -> None:
    lines = unfinished(run, images, output)
    changes = {3: lines[:2] + lines[3:], 5: [*lines[:4], lines[5], lines[4], *lines[6:]], 9: lines[:8] + lines[7:]}
    for number, changed in changes.items():
        part_of(output).write_bytes(b"".join(changed))
        ended = run("caption", images, *ONE, "-o", output, *command)
        assert ended.exit_code == 2 and f"f.jsonl.part was changed in line {number}: restore the line" in ended.stderr
        assert part_of(output).read_bytes() == b"".join(changed)
    part_of(output).write_bytes(b"".join(lines))  # "restore the line from a copy"
    assert run("caption", images, *ONE, "-o", output).exit_code == 0
    verify(output, images)


def test_a_journal_of_fewer_rows_than_it_says_is_not_published(run: Run, images: Path, output: Path) -> None:
    """One that was made by hand: its checks are right."""
    lines = unfinished(run, images, output)
    texts = [line[: line.rindex(b', "line": ')] + b"}" for line in lines]
    texts.append(b'{"idefics_end": {"rows": %d, "failed": {}}}' % ROWS)
    part_of(output).write_bytes(forged(texts))
    ended = run("caption", images, *ONE, "-o", output)
    assert (
        ended.exit_code == 2
        and "f.jsonl.part is not as a run of this program leaves it" in ended.stderr
        and not output.exists()
    )
    assert run("caption", images, *ONE, "-o", output, "--overwrite").exit_code == 0
    verify(output, images)


# ---- locks


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems, where it succeeds and does nothing."""
    monkeypatch.setattr(journals.fcntl, "flock", lambda file, operation: None)


def test_a_second_run_is_refused_where_flock_does_nothing(run: Run, images: Path, output: Path, no_flock: None) -> None:
    def begin_another() -> None:
        for overwrite in False, True:
            with pytest.raises(OutputError, match=r"another run is writing .*f\.jsonl\.part: wait for it"):
                FileOutput(output, overwrite=overwrite)

    assert run("caption", images, *ONE, "-o", output, captioner=disturbed(output, begin_another)).exit_code == 0
    verify(output, images)


def test_a_run_that_was_killed_does_not_block_the_next(run: Run, images: Path, output: Path, no_flock: None) -> None:
    """Neither while its number is not in use, nor when another process has it by now."""
    unfinished(run, images, output)
    code = f"import os; from pathlib import Path; from idefics_cli.writers.journal import Journal; \
Journal(Path({str(part_of(output))!r})); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code])
    assert killed.returncode == -9
    target = os.readlink(lock_of(output))
    assert f":{platform.node()}:" in target
    with_other_time = owner.TARGET.sub(lambda found: target.replace(f":{found['pid']}:", f":{os.getpid()}:", 1), target)
    for left in target, with_other_time:
        lock_of(output).unlink(missing_ok=True)
        lock_of(output).symlink_to(left)
        FileOutput(output).close()
        assert not os.path.lexists(lock_of(output))
    lock_of(output).symlink_to(target)
    assert run("caption", images, *ONE, "-o", output).exit_code == 0
    verify(output, images)


def test_a_run_of_another_machine_holds_its_lock_until_it_has_been_silent(
    run: Run, images: Path, output: Path, no_flock: None, refused: Callable[..., str]
) -> None:
    unfinished(run, images, output)
    lock_of(output).symlink_to("idefics-run:far:7:123:0badb007:4026531836:0123abcd")
    said = refused("caption", images, "-o", output, "-m", "demo")
    assert "(process 7 on 'far', seen 0 s ago; if it was killed, the same command resumes a minute later)" in said
    long_ago = os.lstat(lock_of(output)).st_mtime - owner.GONE_SECONDS - 1
    os.utime(lock_of(output), (long_ago, long_ago), follow_symlinks=False)
    assert run("caption", images, *ONE, "-o", output).exit_code == 0
    verify(output, images)


def test_a_run_that_is_at_work_is_not_silent(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.01)
    held = FileOutput(output)
    os.utime(lock_of(output), (0, 0), follow_symlinks=False)
    while os.lstat(lock_of(output)).st_mtime < 1:
        time.sleep(0.01)
    held.close()
    assert not list(output.parent.iterdir())


def failing(code: int) -> Callable[..., None]:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("without", ["flock", "symlink"])
def test_one_of_the_locks_is_enough(
    run: Run, images: Path, output: Path, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    """A file system that has no flock, and one that has no links."""
    code = errno.ENOSYS if without == "flock" else errno.EPERM
    monkeypatch.setattr(journals.fcntl if without == "flock" else os, without, failing(code))

    def begin_another() -> None:
        with pytest.raises(OutputError, match="another run is writing"):
            FileOutput(output)

    assert run("caption", images, *ONE, "-o", output, captioner=disturbed(output, begin_another)).exit_code == 0
    verify(output, images)


def test_without_any_lock_nothing_is_written(
    refused: Callable[..., str], images: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals.fcntl, "flock", failing(errno.ENOLCK))
    monkeypatch.setattr(os, "symlink", failing(errno.EOPNOTSUPP))
    said = refused("caption", images, "-o", output, "-m", "demo")
    assert "cannot lock" in said and "name an output on another file system" in said


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, os.mkfifo, lambda path: path.symlink_to("mine")])
def test_a_file_of_the_user_at_the_name_of_the_lock_stays(
    refused: Callable[..., str], images: Path, output: Path, make: Callable[[Path], None]
) -> None:
    make(lock_of(output))
    before = os.lstat(lock_of(output))
    assert "f.jsonl.lock is not a file of this program" in refused("caption", images, "-o", output, "-m", "demo")
    assert os.lstat(lock_of(output)).st_ino == before.st_ino


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_does_not_sync_folders(
    run: Run, images: Path, output: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    sync = os.fsync

    def refuse_folders(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(code, os.strerror(code))
        sync(file)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    assert run("caption", images, *ONE, "-o", output).exit_code == 0
    verify(output, images)


# ---- made by hand


FORGED = [
    [b"[]"],
    [b'{"idefics_run": 1}'],
    [b'{"idefics_run": {}}'],
    [b'{"idefics_run": {"settings": []}}'],
    [b'{"idefics_run": {"settings": {}}}', b"7"],
    [b'{"idefics_run": {"settings": {}}}', b"[" * 100_000],
    [b'{"idefics_run": ' + b'{"settings": ' * 100_000],
    [b'{"idefics_run": {"settings": {"model": 1, "task": [1]}, "replaces": {}}}'],
    [b'{"idefics_run": {"settings": {}}}', b'{"idefics_end": []}'],
    [b'{"idefics_run": {"settings": {}}}', b'{"idefics_end": {"rows": "1", "failed": {}}}'],
    [b'{"idefics_run": {"settings": {}}}', b'{"idefics_end": {"rows": 0, "failed": [1]}}'],
    [b'{"idefics_run": {"settings": {}}}', b'{"idefics_end": {"rows": 0, "failed": {}}}', b"{}"],
]


def forged(texts: Sequence[bytes]) -> bytes:
    """With the right checks."""
    check, lines = 0, []
    for number, text in enumerate(texts, start=1):
        line, check = checked(text, number, check)
        lines.append(line)
    return b"".join(lines)


@pytest.mark.parametrize("texts", FORGED, ids=range(len(FORGED)))
@pytest.mark.parametrize("command", [[], ["--retry-errors"], ["--update"]])
def test_a_forged_journal_is_refused_in_one_line(
    images: Path, output: Path, refused: Callable[..., str], run: Run, texts: list[bytes], command: list[str]
) -> None:
    part_of(output).write_bytes(forged(texts))
    assert str(part_of(output)) in refused("caption", images, *ONE, "-o", output, *command) or not command
    assert part_of(output).read_bytes() == forged(texts)


@pytest.mark.parametrize(
    "row",
    [
        *(b"7", b"[]", b"{}", b'{"id": 5, "error": null}', b'{"id": "00.png"}', b'{"id": "00.png", "error": 7}'),
        b'{"id": "00.png", "image": 7, "caption": [1], "score": "much", "tokens": {}, "error": null}',
        b'{"id": "00.png", "error": null, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_a_forged_row_is_never_a_bug(images: Path, output: Path, run: Run, row: bytes, suffix: str) -> None:
    output = output.with_suffix(suffix)
    part = output.with_name(f"{output.name}.part")

    def fail() -> None:
        raise ValueError("a bug")

    calls = iter(range(9))

    def crash(prompts: Sequence[Any]) -> None:
        if next(calls) > 2:
            fail()

    assert run("caption", images, *ONE, "-o", output, captioner=FakeCaptioner(before_call=crash)).exit_code == 1
    texts = [line[: line.rindex(b', "line": ')] + b"}" for line in part.read_bytes().splitlines()]
    part.write_bytes(forged([*texts[:1], row, *texts[2:]]))
    ended = run("caption", images, *ONE, "-o", output)
    assert ended.exit_code in (0, 2), ended.stderr
    assert ended.exit_code == 0 or len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "record",
    [
        *(b"", b"7\n", b"{}\n", b'{"settings": {}, "rows": 40, "failed": {}}\n', b"[" * 100_000),
        b'{"settings": {}, "rows": "40", "failed": {}}\n{"content": [1]}\n',
        b'{"settings": {}, "rows": 40, "failed": 7}\n{"content": {}}\n',
    ],
)
@pytest.mark.parametrize("command", [[], ["--retry-errors"], ["--update"]])
def test_a_forged_record_is_refused_in_one_line(
    images: Path, output: Path, run: Run, record: bytes, command: list[str]
) -> None:
    assert run("caption", images, *ONE, "-o", output).exit_code == 0
    output.with_name("f.jsonl.run").write_bytes(record)
    ended = run("caption", images, *ONE, "-o", output, *command)
    assert ended.exit_code == 2 and len(ended.stderr.splitlines()) == 1 and "a bug" not in ended.stderr
