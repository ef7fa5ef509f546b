"""Folders of numbered parts: whatever the input, the units, the processes and the shards, the rows are those of one."""

from __future__ import annotations

import csv
import errno
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FakeCaptioner, save_image
from pyarrow.fs import S3FileSystem
from typer.testing import Result

from idefics_cli import ranks
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.errors import IdeficsError, OutputError
from idefics_cli.pipeline.options import RunOptions
from idefics_cli.pipeline.task import Observer
from idefics_cli.readers.inputs import Inputs
from idefics_cli.rows import parse_shard
from idefics_cli.scale import claims, processes
from idefics_cli.scale.claims import Claim, InUse
from idefics_cli.scale.processes import processes_for
from idefics_cli.scale.units import Done, Job, Unit, Units, Worker
from idefics_cli.storage.unit_folder import UnitFolder
from idefics_cli.writers.embeddings_file import EmbeddingFile
from idefics_cli.writers.formats import mark_of

Run = Callable[..., Result]
NUM_ROWS = 60


def failing(error: OSError) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


def told(result: Result) -> list[str]:
    """All but the first errors, which come as they happen, and the time."""
    return [line for line in result.stderr.splitlines()[:-1] if not line.startswith("First ")]


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes have the fake model of the test."""
    monkeypatch.setattr(processes, "START", "fork")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as every kind of input, with bad ones among them."""
    folder = tmp_path_factory.mktemp("inputs")
    for i in range(NUM_ROWS):
        save_image(folder / f"images/{i:03}.png", i)
    for i in range(3, NUM_ROWS, 17):
        (folder / f"images/{i:03}.png").write_bytes(b"broken")
    rows = [{"image": f"images/{i:03}.png", "note": f'a "{i}",\nb' * (i % 3)} for i in range(NUM_ROWS)]
    rows[20]["image"] = "images/missing.png"
    lines = [json.dumps(row).encode() for row in rows]
    lines[7], lines[30] = b"{", b"\n[1]"
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["image", "note"])
    writer.writeheader()
    writer.writerows(rows)
    (folder / "rows.csv").write_text(text.getvalue() + 'images/000.png,"never closed\n')
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=8)
    with tarfile.open(folder / "rows.tar", "w") as archive:
        for path in sorted((folder / "images").iterdir()):
            archive.add(path, path.name)
    return folder


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def joined(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in parts(folder))


def left_over(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {path.name for path in parts(folder)}


COMMANDS = {
    "jsonl": ("rows.jsonl", "--keep", "note"),
    "csv": ("rows.csv", "--keep", "note"),
    "parquet": ("rows.parquet", "--keep", "all"),
    "tar": ("rows.tar",),
    "folder": ("images",),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_parts_are_the_rows_of_one_process(run: Run, inputs: Path, tmp_path: Path, kind: str) -> None:
    name, *more = COMMANDS[kind]
    command = "caption", inputs / name, *more
    alone = run(*command, "-o", tmp_path / "alone.jsonl")
    assert alone.exit_code == 3, alone.output
    expected = (tmp_path / "alone.jsonl").read_bytes()
    for unit_rows in (1, 7, 50, 4096) if kind in ("csv", "tar") else (7, 50):
        folder = tmp_path / f"units{unit_rows}"
        options = "-o", f"{folder}/", "--format", "jsonl", "--unit-rows", unit_rows, "--processes", "2"
        result = run(*command, *options)
        assert result.exit_code == 3, result.output
        assert joined(folder) == expected
        assert left_over(folder) == {"_run.json", "_summary.json"}
        assert told(result) == told(alone)
        again = run(*command, *options)
        assert again.exit_code == 3 and "is finished" in again.stderr
    for place in 2, 1, 3:
        options = "-o", f"{tmp_path}/shards/", "--format", "jsonl", "--unit-rows", 7, "--shard", f"{place}/3"
        result = run(*command, *options)
        assert result.exit_code in (0, 3), result.output
    assert joined(tmp_path / "shards") == expected
    assert left_over(tmp_path / "shards") == {"_run.json", "_summary.json"}


def test_merged_parts_are_the_file_of_one_process(run: Run, inputs: Path, tmp_path: Path) -> None:
    """And known as that: the same command has nothing to do, and redoes failed rows."""
    command = "caption", inputs / "rows.parquet", "--keep", "note"
    for name in "alone.jsonl", "alone.parquet":
        assert run(*command, "-o", tmp_path / name).exit_code == 3
    for form in "jsonl", "parquet":
        folder = f"{tmp_path}/{form}/"
        assert run(*command, "-o", folder, "--format", form, "--unit-rows", 7).exit_code == 3
        for suffix in "jsonl", "parquet", "csv":
            target = tmp_path / f"{form}-merged.{suffix}"
            merged = run("merge", folder, "-o", target)
            assert merged.exit_code == 0 and "60 rows in" in merged.stderr, merged.output
            if suffix == "jsonl":
                assert target.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
            if suffix == "parquet":
                assert pq.read_table(target).equals(pq.read_table(tmp_path / "alone.parquet"))
        again = run(*command, "-o", tmp_path / f"{form}-merged.jsonl")
        assert "is finished" in again.stderr
    assert run("merge", folder, "-o", target).exit_code == 2  # exists already


def test_where_a_merged_file_cannot_be(
    run: Run, refused: Callable[..., str], inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line each; files of others stay, and what a kill has left goes."""
    folder, target = tmp_path / "parts", tmp_path / "all.parquet"
    assert run("caption", inputs / "rows.parquet", "-o", f"{folder}/", "--unit-rows", 20).exit_code == 3
    merge = "merge", folder, "-o"
    assert "would become a part of" in refused(*merge, folder / "all.jsonl")
    assert "does not exist: make it first" in refused(*merge, tmp_path / "none/all.jsonl")
    assert "is an address: name a file on this machine" in refused(*merge, "s3://bucket/all.jsonl")
    for name in "-", tmp_path / "all.txt":
        assert refused(*merge, name).endswith("name a result file that ends in .jsonl, .parquet or .csv.")
    beside = target.with_name("all.parquet.run")
    beside.write_text("mine")
    assert "is not a file of this program, and would be overwritten" in refused(*merge, target)
    assert beside.read_text() == "mine"
    beside.unlink()
    rows = inputs / "rows.jsonl"
    assert run("caption", rows, "-o", target, "--max-errors", 1).exit_code == 3
    assert "all.parquet.part holds rows of another run: finish that, or " in refused(*merge, target)
    target.with_name("all.parquet.part").unlink()
    left = tmp_path / f".idefics-{mark_of(target)}-0.tmp"
    left.touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing(OSError(errno.ENOSPC, "No space left on device")))
        assert "cannot finish" in (said := refused(*merge, target)) and "No space left on device; free some" in said
    assert {path.name for path in tmp_path.iterdir()} == {"parts"}
    assert run(*merge, target).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"parts", "all.parquet", "all.parquet.run"}


def test_a_folder_of_parts_is_read_like_a_file(run: Run, inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    rows = [{"image": f"images/{i:03}.png", "answer": "yes", "question": "Is it?"} for i in range(1, 9)]
    (inputs / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = "vqa", inputs / "asked.jsonl"
    assert (
        run(*asked, "-o", f"{folder}/", "--keep", "answer", "--unit-rows", 3, "--answers-column", "answer").exit_code
        == 3
    )
    alone = run("score", folder, "--answers-column", "input_answer")
    assert json.loads(alone.stdout)["rows"] == 8 and json.loads(alone.stdout)["errors"] == 1
    for name, units in ("latents/", ("--unit-rows", 9)), ("latents.parquet", ()):
        result = run("embed", inputs / "images", "-m", "demo", "-o", f"{tmp_path}/{name}", *units)
        assert result.exit_code == 3, result.output
    several, one = EmbeddingFile(tmp_path / "latents"), EmbeddingFile(tmp_path / "latents.parquet")
    assert (several.shape, several.fingerprint) == (one.shape, one.fingerprint)
    for path in (inputs / "images").iterdir():
        assert str(several.latents(path.name)) == str(one.latents(path.name))
    (folder / "part-00001.parquet").unlink()
    for command in (
        ("score", folder, "--answers-column", "answer"),
        ("caption", folder),
        ("merge", folder, "-o", "f.jsonl"),
    ):
        result = run(*command)
        assert result.exit_code == 2 and "lacks 1 of its 3 parts" in result.stderr, result.output


def test_a_folder_of_another_run_is_refused(run: Run, inputs: Path, tmp_path: Path) -> None:
    options = "-o", f"{tmp_path}/parts/", "--unit-rows", "20"
    assert run("caption", inputs / "images", *options).exit_code == 3
    for more, said in {
        ("--prompt", "{image} x"): "--prompt: was",
        ("--unit-rows", "7"): "--unit-rows: was 20, now 7",
        ("--sidecar",): "--sidecar needs a single file",
        ("--update",): "--update needs a single file",
        ("--overwrite", "--shard", "1/2"): "remove the folder instead",
        ("--shard", "0/3"): "counted from 1, as 1/3 for the first",
    }.items():
        result = run("caption", inputs / "images", *options, *more)
        assert result.exit_code == 2 and said in result.stderr, result.output
    save_image(tmp_path / "other/a.png")
    other = run("caption", tmp_path / "other", *options)
    assert other.exit_code == 2 and "the input is not what it was" in other.stderr
    assert run("caption", tmp_path / "other", *options, "--overwrite").exit_code == 0
    assert len(parts(tmp_path / "parts")) == 1


@pytest.mark.parametrize(("form", "processes"), [("jsonl", 2), ("parquet", 1)])
def test_failed_rows_are_redone_and_no_others(
    run: Run, inputs: Path, tmp_path: Path, form: str, processes: int
) -> None:
    folder = Path(shutil.copytree(inputs, tmp_path / "inputs"))
    command = "caption", folder / "rows.jsonl", "--keep", "note"
    options = "-o", f"{tmp_path}/parts/", "--format", form, "--unit-rows", 7, "--processes", processes
    first = run(*command, *options)
    rows, failed = map(int, re.search(r"(\d+) rows: .* (\d+) failed", first.stderr).groups())
    before = {path.name: path.stat().st_ino for path in parts(tmp_path / "parts")}
    for i in range(3, NUM_ROWS, 17):
        save_image(folder / f"images/{i:03}.png", i)
    expected = run(*command, "-o", tmp_path / "alone.jsonl")
    (folder / "images/004.png").unlink()  # of a row that stands beside a failed one
    again = run(*command, *options, "--retry-errors")
    assert again.exit_code == 3 and "row_invalid: 2 rows" in again.stderr, again.output
    assert told(again) == told(expected) and f"{rows} rows, {rows - failed} of them done before: " in again.stderr
    assert run("merge", tmp_path / "parts", "-o", tmp_path / "merged.jsonl").exit_code == 0
    assert (tmp_path / "merged.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    after = {path.name: path.stat().st_ino for path in parts(tmp_path / "parts")}
    redone = {f"part-{number:05}.{form}" for number in (0, 1, 2, 4, 5, 7)}
    assert {name for name in before if before[name] != after[name]} <= redone


def test_a_retry_that_is_stopped_is_gone_on_with(run: Run, inputs: Path, tmp_path: Path) -> None:
    """A part is the old one or the new one, and the folder as finished as it was."""
    command = "caption", inputs / "images", "-o", f"{tmp_path}/parts/", "--format", "jsonl", "--unit-rows", 7
    assert run(*command).exit_code == 3
    expected = joined(tmp_path / "parts")
    stopped = run(*command, "--retry-errors", "--max-errors", 1)
    assert stopped.exit_code == 3 and left_over(tmp_path / "parts") == {"_run.json"}
    again = run(*command)
    assert again.exit_code == 3 and left_over(tmp_path / "parts") == {"_run.json", "_summary.json"}
    assert joined(tmp_path / "parts") == expected


def test_merged_parts_take_what_a_folder_does_not(run: Run, inputs: Path, tmp_path: Path) -> None:
    """The way that the refusal of `--sidecar` and `--update` names."""
    images = Path(shutil.copytree(inputs / "images", tmp_path / "images"))
    merged = tmp_path / "merged.jsonl"
    assert run("caption", images, "-o", f"{tmp_path}/parts/", "--unit-rows", 7).exit_code == 3
    assert run("merge", tmp_path / "parts", "-o", merged).exit_code == 0
    captioner = FakeCaptioner()
    beside = run("caption", images, "-o", merged, "--sidecar", captioner=captioner)
    assert beside.exit_code == 3 and not captioner.calls, beside.output
    texts = [json.loads(line)["caption"] for line in merged.read_text().splitlines()]
    assert (images / "000.txt").read_text() == f"{texts[0]}\n" and not (images / "003.txt").exists()
    save_image(images / "100.png", 100)
    updated = run("caption", images, "-o", merged, "--update", captioner=captioner)
    assert updated.exit_code == 3 and sum(captioner.calls) == 1, updated.output
    assert merged.read_bytes().count(b"\n") == NUM_ROWS + 1


def test_torchrun_is_for_single_files(run: Run, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ranks.VARIABLES:
        monkeypatch.setenv(name, "2")
    for more in (), ("--ray",), ("--processes", "2"):
        result = run("caption", inputs / "images", "-o", f"{tmp_path}/parts/", *more)
        assert result.exit_code == 2 and "torchrun is for one model in several processes" in result.stderr, more
        assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "parts").exists()


def test_as_many_processes_as_gpus_where_these_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    def number(num_units: int, processes: int | None = None, **request: str) -> int:
        options = RunOptions(("x",), "parts/", processes=processes, request=ModelRequest("demo", **request))
        return processes_for(options, num_units)

    assert (number(5), number(1), number(5, processes=3)) == (2, 1, 3)
    assert number(5, device_map="auto") == number(5, device="cpu") == 1


def test_a_signal_while_a_process_begins(
    run: Run, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is none to be ended then."""

    def stop(process: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", stop)
    stopped = run("caption", inputs / "images", "-o", f"{tmp_path}/out/")
    assert stopped.exit_code == 143, stopped.output
    assert "Stopped by SIGTERM" in stopped.stderr


def test_all_processes_are_told_to_end_before_one_is_waited_for(tmp_path: Path) -> None:
    options = RunOptions(("x",), f"{tmp_path}/parts/", request=ModelRequest(device="cpu"))
    job = Job(options, lambda: None, lambda request: None, None)  # type: ignore[arg-type, return-value]
    said = list[str]()

    class Process:
        exitcode = None

        def terminate(self) -> None:
            said.append("terminate")

        def join(self, seconds: float | None = None) -> None:
            said.append("join")
            self.exitcode = 0

    with pytest.raises(IdeficsError), processes.Crew(job, 3, Observer()) as crew:
        for member in crew._members:
            member.pipe, member._process = multiprocessing.Pipe()[0], Process()
        raise IdeficsError("a mistake")
    assert said == 3 * ["terminate"] + 3 * ["join"]


def test_ids_that_come_twice_are_named_at_the_end(run: Run, inputs: Path, tmp_path: Path) -> None:
    path = inputs / "twice.jsonl"
    path.write_text("".join(json.dumps({"id": f"row {i % 5}", "image": f"images/00{i}.png"}) + "\n" for i in range(7)))
    result = run("caption", path, "-o", f"{tmp_path}/parts/", "--unit-rows", 2, "--format", "jsonl")
    assert "2 rows with the id of a row in another part: row 0, row 1" in result.stderr
    assert joined(tmp_path / "parts").count(b"\n") == 7
    merged = run("merge", tmp_path / "parts", "-o", tmp_path / "f.jsonl")
    assert merged.exit_code == 2 and "row 0, row 1" in merged.stderr


SCHEDULERS = [
    ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}, "auto", (3, 4)),
    (
        {
            "SLURM_ARRAY_TASK_ID": "20",
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_ARRAY_TASK_MAX": "30",
            "SLURM_ARRAY_TASK_STEP": "10",
        },
        "auto",
        (3, 4),
    ),
    ({"LSB_JOBINDEX": "2", "LSB_JOBINDEX_END": "9"}, "auto", (2, 9)),
    ({"SGE_TASK_ID": "3", "SGE_TASK_FIRST": "1", "SGE_TASK_LAST": "9", "SGE_TASK_STEPSIZE": "2"}, "auto", (2, 5)),
    ({"PBS_ARRAY_INDEX": "3"}, "auto/8", (3, 8)),
    ({"JOB_COMPLETION_INDEX": "0"}, "auto/8", (1, 8)),
]


@pytest.mark.parametrize(("variables", "text", "shard"), SCHEDULERS)
def test_schedulers_say_the_shard(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], text: str, shard: tuple[int, int]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert parse_shard(text) == shard


@pytest.mark.parametrize("step", ["1", "4"])
def test_an_array_of_chosen_tasks(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """As of `sbatch --array=3,7,8`: nothing says which of them this one is."""
    for name, value in {"ID": "8", "MIN": "3", "MAX": "8", "COUNT": "3", "STEP": step}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    with pytest.raises(IdeficsError, match="3 tasks, from 3 to 8, are not numbered evenly: make it one from 1 to 3"):
        parse_shard("auto")


def test_a_scheduler_that_does_not_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IdeficsError, match="no scheduler's variables here"):
        parse_shard("auto")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    with pytest.raises(IdeficsError, match="add it, as auto/8"):
        parse_shard("auto")


def test_parts_on_another_file_system(run: Run, inputs: Path, tmp_path: Path, bucket: str) -> None:
    command = "caption", inputs / "images"
    alone = run(*command)
    folder = bucket.format("/parts/")
    assert run(*command, "-o", folder, "--format", "jsonl", "--unit-rows", 25, "--shard", "2/2").exit_code == 3
    result = run(*command, "-o", folder, "--format", "jsonl", "--unit-rows", 25)
    assert result.exit_code == 3 and "40 of them done before" not in result.stderr, result.output
    merged = run("merge", folder, "-o", tmp_path / "f.jsonl")
    assert merged.exit_code == 0, merged.output
    assert (tmp_path / "f.jsonl").read_bytes() == alone.stdout_bytes
    assert "is finished" in run(*command, "-o", folder, "--format", "jsonl", "--unit-rows", 25).stderr


def test_a_bucket_that_does_not_exist(bucket: str) -> None:
    with pytest.raises(OutputError, match=r"cannot write to s3://none/parts.*: Bucket 'none' not found; fix that and"):
        UnitFolder(bucket.replace("bucket", "none", 1).format("/parts/")).make()


def test_of_two_drivers_on_another_file_system_the_second_is_refused(bucket: str) -> None:
    folder = UnitFolder(bucket.format("/claimed/"))
    folder.make()
    with Claim(folder, 0, 5):
        with Claim(folder, 5, 9):
            assert len(list(folder.names())) == 2
        with pytest.raises(InUse, match="another run is at work on"), Claim(folder, 4, 9):
            raise AssertionError("both have it")
    assert not list(folder.names())


def test_a_claim_that_is_released_while_it_beats_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, beats, touch = UnitFolder(str(tmp_path / "parts")), threading.Event(), UnitFolder.touch
    folder.make()

    def late(self: UnitFolder, name: str) -> None:
        if threading.current_thread().name == "claim":
            beats.set()
            time.sleep(0.1)
        touch(self, name)

    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(UnitFolder, "touch", late)
    with Claim(folder):
        assert beats.wait(10)
    time.sleep(0.2)
    assert not list(folder.names())


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    for name, value in [("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("EC2_METADATA_DISABLED", "true")]:
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(processes, "START", "spawn")
    monkeypatch.setattr(processes, "Crew", HereAlone)
    host = f"127.0.0.1:{server.get_host_and_port()[1]}"
    options = {"endpoint_override": host, "scheme": "http", "region": "us-east-1"}
    S3FileSystem(**options, allow_bucket_creation=True).create_dir("bucket")
    yield f"s3://bucket{{}}?endpoint_override={host}&scheme=http&region=us-east-1"
    server.stop()


class HereAlone:
    """In place of processes, which cannot share a fake model and a connection to S3: the units one after the other."""

    def __init__(self, job: Job, number: int, observer: Observer) -> None:
        self._worker = Worker(job, observer)

    def __enter__(self) -> HereAlone:
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.__exit__(*exception)

    def do(self, units: Iterator[Unit], part: Callable[[Unit], Inputs]) -> Iterator[Done]:
        for unit in units:
            yield self._worker.do(unit, pickle.loads(pickle.dumps(part(unit))))


@pytest.mark.parametrize("number", [1_000, 30_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_units(tmp_path: Path, number: int) -> None:
    """Of the driver: bounds are read as they are needed, and what is done is a byte for each unit."""
    folder = UnitFolder(str(tmp_path / "parts"))
    folder.make()
    tracemalloc.start()
    folder.begin({"format": "jsonl"}, ((i * 4096, 0, 0, i * 4096, i * 10**6, i * 4096) for i in range(number + 1)))
    units = Units(folder, None, 0, number)  # type: ignore[arg-type]
    assert sum(unit.num_rows for unit in units.missing()) == units.num_rows() == 4096 * number
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20, peak
