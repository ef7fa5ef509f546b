"""Power cuts: whatever the disk may hold after one, the same command makes all rows of it, once and in order."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from faulty_run import Settings
from power_cuts import Disk, changes_in, disk_of, disk_on, disks_after_power_cuts
from runs import Bench, expected_rows, make_bench, repair_images, slow

ROWS = 20
FEW_AT_ONCE = Settings(commit_rows=4, batch_size=2, delay=0.005)
KINDS = {  # what is written, the options, and the exit code: 0 where an earlier run's failed rows have become good ones
    "jsonl": (".jsonl", (), 3),
    "csv": (".csv", (), 3),
    "parquet": (".parquet", (), 3),
    "sidecar": (".jsonl", ("--sidecar",), 3),
    "retry-jsonl": (".jsonl", ("--retry-errors",), 0),
    "retry-parquet": (".parquet", ("--retry-errors",), 0),
    "update-jsonl": (".jsonl", ("--update",), 0),
    "overwrite-parquet": (".parquet", ("--overwrite",), 0),
}


@pytest.mark.parametrize("number", [3, pytest.param(None, marks=slow)], ids=["sample", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_command_completes_what_a_power_cut_has_left(tmp_path: Path, kind: str, number: int | None) -> None:
    suffix, options, code = KINDS[kind]
    bench = make_bench(tmp_path, ROWS, suffix)
    if code == 0:
        assert bench.run(settings=FEW_AT_ONCE).code == 3
        repair_images(bench)
    folders = bench.output.parent, bench.images
    log = tmp_path / "changes"
    recording = replace(FEW_AT_ONCE, changes=(str(log), tuple(map(str, folders))))
    assert bench.run(*options, settings=recording).code == code
    verify(bench, options)
    changes = changes_in(log)
    assert disk_of(changes) == disk_on(folders), "some call that changes files is not recorded"
    disks = disks_after_power_cuts(changes)
    assert len(disks) >= 30, len(disks)
    for disk in disks if number is None else random.Random(kind).sample(disks, number):
        restore(disk, folders)
        shown = {Path(name).name: data for name, data in disk.items() if not name.endswith(".png")}
        ended = bench.run(*options)
        assert ended.code == code, (ended, shown)
        verify(bench, options)


def verify(bench: Bench, options: tuple[str, ...]) -> None:
    bench.verify()
    expected = expected_rows(bench.images)
    texts = {f"{Path(name).stem}.txt": f"{text}\n" for name, text, _ in expected if text and "--sidecar" in options}
    beside = [path for path in bench.images.iterdir() if path.suffix != ".png"]
    assert {path.name: path.read_text() for path in beside} == texts


def restore(disk: Disk, folders: tuple[Path, ...]) -> None:
    """Images stay as they are, their times too."""
    there = disk_on(folders)
    for name in there.keys() - {name for name, data in disk.items() if there.get(name) == data}:
        Path(name).unlink()
    for name, data in disk.items():
        if isinstance(data, str) and there.get(name) != data:
            Path(name).symlink_to(data)
        elif isinstance(data, bytes) and there.get(name) != data:
            Path(name).write_bytes(data)
