"""Units on a Ray cluster: the rows are those of one process, whatever dies."""

from __future__ import annotations

import ast
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
from conftest import expected_text, save_image
from faulty_run import Settings, digest_of_fake, load_fake, load_nothing
from hypothesis import given
from hypothesis import strategies as st
from runs import KILLED, Bench, make_bench, slow, wait_for
from test_unit_faults import bench, is_alive, parts, start, verify, workers  # noqa: F401 (bench is a fixture)
from test_units import COMMANDS, inputs, joined, left_over, told  # noqa: F401 (inputs is a fixture)
from tiny_models import save_checkpoint
from transformers import IdeficsForVisionText2Text as TheirIdefics
from typer.testing import CliRunner, Result

from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.cli import app as cli
from idefics_cli.errors import IdeficsError
from idefics_cli.pipeline.options import RunOptions, parse_ray_address
from idefics_cli.readers.inputs import Cut
from idefics_cli.scale import ray as scale_ray
from idefics_cli.scale.units import Done, Job, Unit

PACKAGE = Path(cli.__file__).parents[1]
Run = Callable[..., Result]
HERE = {"num_cpus": 2, "include_dashboard": False}
ENVIRONMENT = {**scale_ray.SETTINGS, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of one of two processors, which lasts for all tests."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        made = cluster_utils.Cluster(True, head_node_args=HERE)
    yield f"127.0.0.1:{made.address.rpartition(':')[2]}"
    made.shutdown()


@pytest.fixture
def run_fake(monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line in this process, with a fake model that other processes find, too."""

    def invoke(*arguments: object, settings: Settings = Settings()) -> Result:  # noqa: B008
        monkeypatch.setattr(cli, "check_model", partial(digest_of_fake, settings))
        monkeypatch.setattr(cli, "load_model", partial(load_fake, settings))
        return CliRunner().invoke(cli.app, [str(each) for each in arguments])

    return invoke


def descendants(pid: int) -> list[int]:
    return [each for child in workers(pid) for each in (child, *descendants(child))]


def in_actors(pid: int) -> list[int]:
    """Actors below a process, and the processes that have their models."""
    found = []
    for each in descendants(pid):
        with suppress(OSError):
            command = Path(f"/proc/{each}/cmdline").read_bytes()
            if command.startswith(b"ray::Actor"):
                found += [each, *descendants(each)]
    return found


def test_only_one_module_imports_ray() -> None:
    def imported(tree: ast.AST) -> set[str]:
        nodes = list(ast.walk(tree))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        return names | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}

    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "ray" for name in imported(ast.parse(path.read_text())))
    }
    assert found == {"scale/ray.py"}


def test_what_is_refused(
    refused: Callable[..., str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--ray has no effect on a single output" in refused("caption", "--ray", photos, "-o", tmp_path / "f.jsonl")
    assert "invalid address 'host'" in refused("caption", photos, "--ray=host", "-o", f"{tmp_path}/parts/")
    assert "--device cuda in place" in refused("caption", photos, "--ray", "-o", tmp_path, "--device", "cuda:1")
    monkeypatch.setattr(scale_ray, "find_spec", lambda name: None)
    said = refused("caption", photos, "--ray", "-o", tmp_path)
    assert said.startswith("Error: --ray needs an extra: pip install 'idefics-cli[ray]'")


@pytest.mark.parametrize("text", ["", "auto", "local", "10.0.0.1:6379", "head.cluster:6379", "[fe80::1]:6379"])
def test_addresses(text: str) -> None:
    assert parse_ray_address(text) == text
    with pytest.raises(IdeficsError, match="expected local, auto or the HOST:PORT"):
        parse_ray_address(f"ray://{text}")


@pytest.mark.parametrize(
    ("kinds", "unit_rows"),
    [(tuple(COMMANDS), 45), *(pytest.param((kind,), n, marks=slow) for kind in COMMANDS for n in (1, 7, 50, 4096))],
)
def test_parts_are_the_rows_of_one_process(
    run_fake: Run,
    cluster: str,
    inputs: Path,  # noqa: F811
    tmp_path: Path,
    kinds: tuple[str, ...],
    unit_rows: int,
) -> None:
    names = [inputs / COMMANDS[kind][0] for kind in kinds]
    kept = COMMANDS[kinds[0]][1:] if len(kinds) == 1 else ()
    command = "caption", *names, *kept, "--format", "jsonl", "--unit-rows", unit_rows
    alone = run_fake("caption", *names, *kept, "-o", tmp_path / "alone.jsonl")
    assert alone.exit_code == 3, alone.output
    result = run_fake(*command, "-o", f"{tmp_path}/parts/", "--ray", cluster)
    assert result.exit_code == 3, result.output
    assert joined(tmp_path / "parts") == (tmp_path / "alone.jsonl").read_bytes()
    assert left_over(tmp_path / "parts") == {"_run.json", "_summary.json"}
    assert told(result) == told(alone)
    again = run_fake(*command, "-o", f"{tmp_path}/parts/")
    assert again.exit_code == 3 and "is finished" in again.stderr


@pytest.mark.parametrize("ends_parent", [False, pytest.param(True, marks=slow)], ids=["process", "actor"])
def test_a_row_that_ends_its_process_costs_itself_only(
    run_fake: Run, cluster: str, tmp_path: Path, ends_parent: bool
) -> None:
    """The one in the actor, or the actor itself."""
    for i in range(6):
        save_image(tmp_path / f"images/{i}.png", i)
    settings = Settings(fatal=expected_text(tmp_path / "images/3.png"), ends_parent=ends_parent)
    options = "-o", f"{tmp_path}/parts/", "--format", "jsonl", "--unit-rows", 2, "--ray", cluster
    result = run_fake("caption", tmp_path / "images", *options, settings=settings)
    assert result.exit_code == 3 and "process_died: 1 row: 3.png" in result.stderr, result.output
    assert joined(tmp_path / "parts").count(b"image ") == 5
    assert left_over(tmp_path / "parts") == {"_run.json", "_summary.json"}


@pytest.mark.parametrize(
    "options",
    [
        ("--adapter",),
        pytest.param((), marks=slow),
        pytest.param(("--adapter", "--quantize"), marks=slow),
        pytest.param(("--quantize",), marks=slow),
    ],
    ids=" ".join,
)
def test_a_fine_tuned_model_on_the_cluster(
    cluster: str, photos: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """An adapter, or the checkpoint into which it is merged. In int8 other batches round otherwise: row by row."""
    pytest.importorskip("torchao")
    adapted = peft.get_peft_model(
        TheirIdefics.from_pretrained(save_checkpoint(tmp_path / "base")),
        peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "base", tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    values = {"--adapter": tmp_path / "adapter", "--quantize": "int8 --batch-size 1"}
    model = tmp_path / ("base" if "--adapter" in options else "merged")
    chosen = [each for name in options for each in (name, *str(values[name]).split())]
    command = ["caption", photos, "-m", model, "--device", "cpu", "--dtype", "fp32", *chosen]
    ways = (tmp_path / "alone.jsonl",), (f"{tmp_path}/parts/", "--format", "jsonl", "--unit-rows", 2, "--ray", cluster)
    for way in ways:
        result = CliRunner().invoke(cli.app, [str(each) for each in (*command, "-o", *way)])
        assert result.exit_code == 3, result.output
    alone, rows = (
        [json.loads(line) for line in data.splitlines()]
        for data in ((tmp_path / "alone.jsonl").read_bytes(), joined(tmp_path / "parts"))
    )
    scores = [[each.pop("score") for each in found] for found in (alone, rows)]
    assert rows == alone and any(row["caption"] for row in rows)
    assert all(one == other or abs(one - other) < 1e-5 for one, other in zip(*scores, strict=True))


def test_a_mistake_on_the_cluster_is_one_line(
    cluster: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "check_model", partial(digest_of_fake, Settings()))
    monkeypatch.setattr(cli, "load_model", load_nothing)
    result = CliRunner().invoke(cli.app, ["caption", str(photos), "-o", f"{tmp_path}/parts/", "--ray", cluster])
    assert result.exit_code == 2, result.output
    assert result.stderr.strip() == "Error: the weights are not on this machine: copy them."
    assert left_over(tmp_path / "parts") == {"_run.json"}


class OfAModule:
    """Another process looks for a module that is not there."""

    def __reduce__(self) -> tuple[object, ...]:
        return import_module, ("here_only",)


def job_of(**parts: Any) -> Job:
    options = RunOptions(inputs=("x",), output="parts/", request=ModelRequest(device="cpu"))
    return Job(**{"options": options, "make_task": None, "check_model": None, "load_model": None, **parts})


def test_actors_that_cannot_begin_are_one_line(cluster: str) -> None:
    refused = "no actor can begin on the cluster .*No module named 'here_only'.*: look at its machines"
    with (
        scale_ray._connected(cluster),
        scale_ray._Actors(job_of(make_task=OfAModule()), str, 2) as actors,
        pytest.raises(IdeficsError, match=refused),
    ):
        list(actors.do(iter([Unit(0, Cut(0), Cut(1))])))


def test_a_run_that_waits_for_a_place_says_so(
    run_fake: Run, cluster: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(scale_ray, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(scale_ray._Actors, "do", lambda actors, units: iter([]))
    monkeypatch.setattr(scale_ray, "CPUS", 3)  # of two
    result = run_fake("caption", photos, "-o", f"{tmp_path}/parts/", "--ray", cluster)
    assert "No actor has begun on the cluster yet" in " ".join(result.stderr.split())
    assert not ray.is_initialized()


class FakeRay:
    """What `_Actors` asks of ray: an actor that begins or does a unit may be lost, by chance or by one of its rows.

    What is asked ends in any order. `stuck` actors wait for a place that they are never given.
    """

    def __init__(self, chance: random.Random, fatal: set[int], often: float, stuck: int) -> None:
        self.chance, self.fatal, self.often, self.stuck = chance, fatal, often, stuck
        self.asked: dict[object, Unit | None] = {}
        self.busy: dict[object, object] = {}
        self.dead: set[object] = set()

    def remote(self, **options: object) -> Callable[[type], SimpleNamespace]:
        assert options["max_restarts"] == 0
        return lambda kind: SimpleNamespace(remote=self.begin)

    def begin(self, *about: object) -> SimpleNamespace:
        actor = SimpleNamespace()
        actor.key, actor.is_stuck = object(), self.stuck > 0
        self.stuck -= 1
        actor.is_there = SimpleNamespace(remote=partial(self.ask, actor, None))
        actor.do = SimpleNamespace(remote=lambda item: self.ask(actor, pickle.loads(item)[0]))
        return actor

    def ask(self, actor: SimpleNamespace, unit: Unit | None) -> object:
        assert actor.key not in self.dead and actor.key not in self.busy.values()
        told = object()
        self.asked[told] = unit
        if not actor.is_stuck:
            self.busy[told] = actor.key
        return told

    def wait(self, asked: list[object]) -> tuple[list[object], list[object]]:
        told = self.chance.choice([each for each in asked if each in self.busy])
        return [told], [each for each in asked if each is not told]

    def get(self, told: object) -> bytes:
        unit, actor = self.asked.pop(told), self.busy.pop(told)
        rows = set[int]()
        if unit is not None:
            rows = set(range(*unit.only)) if unit.only else set(range(unit.begin.index, unit.end.index))
            rows -= set(unit.fatal)
        if rows & self.fatal or self.chance.random() < self.often:
            self.dead.add(actor)
            from ray.exceptions import RayError

            raise RayError("lost")
        return pickle.dumps((unit and Done(unit.number, len(rows)), {("say", "x")}))

    def kill(self, actor: SimpleNamespace) -> None:
        self.dead.add(actor.key)


@given(
    st.integers(0, 2**32),
    st.sets(st.integers(0, 59), max_size=4),
    st.sampled_from([0, 0.01, 0.03]),
    st.integers(1, 4),
    st.integers(0, 2),
)
def test_each_unit_is_done_once_whatever_is_lost(
    seed: int, fatal: set[int], often: float, number: int, stuck: int
) -> None:
    pytest.importorskip("ray")
    units = [Unit(i, Cut(6 * i), Cut(6 * i + 6)) for i in range(10)]
    fake = FakeRay(random.Random(seed), fatal, often, min(stuck, number - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.remote", fake.remote)
        for name in "wait", "get", "kill":
            patch.setattr(f"ray.{name}", getattr(fake, name))
        with scale_ray._Actors(job_of(), str, number) as actors:
            ends = [done for done, _ in actors.do(iter(units))]
    assert sorted(done.unit for done in ends) == list(range(10))
    assert often or sum(done.rows for done in ends) == 60 - len(fatal)


@pytest.mark.parametrize(
    ("number", "kills"),
    [
        pytest.param(signal.SIGTERM, 1, marks=slow),
        pytest.param(signal.SIGINT, 1, marks=slow),
        pytest.param(None, 5, marks=slow),
    ],
)
def test_drivers_that_are_stopped_or_killed(bench: Bench, cluster: str, number: int | None, kills: int) -> None:  # noqa: F811
    """Their actors end with them, and what they have begun is finished another way."""
    for _ in range(kills):
        before = len(parts(bench)) + 3 * bool(number)  # of one at least the driver has heard
        started = start(bench, "--ray", cluster, settings=Settings(delay=0.3))
        wait_for(lambda before=before: len(parts(bench)) > before, 120)
        second = start(bench, "--ray", cluster).wait()
        assert second.code == 2 and "another run is at work on" in second.said, second.stderr
        mine = in_actors(os.getpid())
        started.send(number or signal.SIGKILL)
        ended = started.wait(30)
        assert mine and ended.code == (128 + number if number else KILLED), ended.stderr
        if number:
            assert "The same command continues from there" in ended.said
            assert {path.name for path in bench.output.iterdir()} - {path.name for path in parts(bench)} == {
                "_run.json"
            }
        wait_for(lambda mine=mine: not any(map(is_alive, mine)))
    for place in 3, 1, 2:
        assert start(bench, "--shard", f"{place}/3").wait().code in (0, 3)
    verify(bench)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_of_actors_and_drivers_of_a_long_run(tmp_path: Path) -> None:
    """20 and 5. Each driver has a cluster of its own, which ends with it."""
    made = make_bench(tmp_path, 5000, ".jsonl", output=tmp_path / "captions/x")
    made = replace(made, output=tmp_path / "captions")
    options, settings = ("--processes", "2", "--unit-rows", "100"), Settings(delay=0.1)
    chance = random.Random(0)
    for _ in range(5):
        before = len(parts(made))
        started = start(made, *options, "--ray", "local", settings=settings)
        wait_for(lambda before=before: len(parts(made)) > before, 120)
        for _ in range(4):
            time.sleep(chance.uniform(0.5, 2))
            wait_for(partial(in_actors, started.process.pid), 60)
            os.kill(chance.choice(in_actors(started.process.pid)), signal.SIGKILL)
        time.sleep(chance.uniform(1, 4))
        mine = in_actors(started.process.pid)
        os.kill(started.process.pid, signal.SIGKILL)
        assert started.wait().code == KILLED
        wait_for(lambda mine=mine: not any(map(is_alive, mine)))
    assert len(parts(made)) < 50
    ended = start(made, *options).wait(300)
    assert ended.code == 3, ended.stderr
    verify(made)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("gpus", [0, 1])
def test_a_machine_that_is_lost(bench: Bench, run_fake: Run, gpus: int) -> None:  # noqa: F811
    """One of four, with its actor, in the middle."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        made = Cluster(True, head_node_args={**HERE, "num_gpus": gpus})
        nodes = [made.add_node(num_cpus=1, num_gpus=gpus) for _ in range(3)]
    try:
        address = f"127.0.0.1:{made.address.rpartition(':')[2]}"
        started = start(bench, "--ray", address, "--unit-rows", "2", settings=Settings(delay=1.0))
        wait_for(lambda: len(parts(bench)) > 3, 120)
        made.remove_node(nodes[-1], allow_graceful=False)
        ended = started.wait(240)
        assert ended.code == 3, ended.stderr
        verify(bench)
    finally:
        made.shutdown()
