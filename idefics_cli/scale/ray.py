"""The units of a folder on a Ray cluster: one bar and one summary, as of one process. The only module that imports ray.

An actor has a GPU, or a machine without, and there a `Crew` of one process with one model: a row that ends the process
costs the actor nothing. An actor or a machine that is lost costs its unit another try, on whatever is left; where that
helps none, they are done one by one, and halves of them, until the rows are found that end their actor.
Only counts come back. Units are sent in waves, so that the driver's memory does not grow with them.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from socket import create_connection, gaierror
from typing import Any

from idefics_cli.errors import IdeficsError
from idefics_cli.pipeline.options import RunOptions
from idefics_cli.pipeline.task import Observer, Relay, told
from idefics_cli.scale.processes import Crew
from idefics_cli.scale.units import Done, Job, Unit, Units, attempts
from idefics_cli.storage.unit_folder import UnitFolder

WAVE = 2048  # units: models are loaded again in the next
RETRIES = 3
ANSWER_SECONDS = 10.0
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_BACKEND_LOG_LEVEL": "fatal"}


def require_ray(options: RunOptions) -> None:
    """Raise what can be known to be wrong before anything is begun."""
    if find_spec("ray") is None:
        raise IdeficsError("--ray needs an extra: pip install 'idefics-cli[ray]'")
    if options.request.device.startswith("cuda:"):
        raise IdeficsError(f"--ray chooses the GPUs: --device cuda in place of {options.request.device}")


def do_on_cluster(job: Job, observer: Observer, units: Units) -> Iterator[Done]:
    """In the order of finishing. Raises what a worker raises."""
    missing, said = units.missing(), set[tuple[str, Any]]()
    with _connected(job.options.ray):
        while wave := {unit.number: unit for unit in islice(missing, WAVE)}:
            if not said:
                observer.on_loading(f"{job.options.request.model}")
            for done, words in _do_wave(job, units, wave):
                for kind, value in sorted(words - said, key=str):
                    told(observer, kind, value)
                said |= words
                observer.on_row(done.rows)
                yield done


def _do_wave(job: Job, units: Units, wave: dict[int, Unit]) -> Iterator[tuple[Done, set[tuple[str, Any]]]]:
    """What is lost more often than Ray tries again is sent again, as long as anything is done."""
    from ray.exceptions import RayError

    while num_left := len(wave):
        try:
            for done, messages in _ends(job, units, list(wave.values())):
                del wave[done.unit]
                yield done, messages
        except RayError as error:
            if len(wave) == num_left:
                yield from _do_narrowly(job, units, wave.pop(min(wave)), error)


def _do_narrowly(job: Job, units: Units, unit: Unit, lost: Exception) -> Iterator[tuple[Done, set[tuple[str, Any]]]]:
    """By itself, down to the rows that end their actor."""
    if not _try(job, units, replace(unit, only=(unit.begin.index, unit.begin.index))):
        raise IdeficsError(
            f"the cluster has lost unit {unit.number} {RETRIES + 1} times, and loses its actors without any row, too"
            f" ({str(lost).splitlines()[0]}): look at the memory of its machines"
        )
    tries = attempts(unit)
    trial = next(tries)
    while not (found := _try(job, units, trial)) or trial.only is not None:
        trial = tries.send(bool(found))
    yield from found


def _try(job: Job, units: Units, unit: Unit) -> list[tuple[Done, set[tuple[str, Any]]]]:
    """Nothing where its actor has ended."""
    from ray.exceptions import RayError

    with suppress(RayError):
        return list(_ends(job, units, [unit], retries=0))
    return []


def _ends(
    job: Job, units: Units, wave: list[Unit], retries: int = RETRIES
) -> Iterator[tuple[Done, set[tuple[str, Any]]]]:
    """Raises what an actor has raised, and RayError for a unit that is lost."""
    from ray.data import ActorPoolStrategy, from_items

    number, gpus = _actors(job.options, len(wave))
    items = [{"unit": pickle.dumps((unit, pickle.dumps(units.part(unit))))} for unit in wave]
    ended = from_items(items, override_num_blocks=len(items)).map_batches(
        Actor,
        fn_constructor_args=(job, os.getcwd(), os.environ.get("OMP_NUM_THREADS"), _version()),
        batch_size=1,
        compute=ActorPoolStrategy(min_size=1, initial_size=number, max_size=number, max_tasks_in_flight_per_actor=1),
        num_gpus=gpus,
        num_cpus=0.5,
        max_restarts=-1,
        max_task_retries=retries,
        scheduling_strategy="SPREAD",
    )
    for row in ended.iter_rows():
        done, messages = pickle.loads(row["ended"])
        if isinstance(done, Exception):
            raise done
        yield done, messages


def _actors(options: RunOptions, num_units: int) -> tuple[int, float]:
    """How many, and how much of a GPU each has."""
    import ray

    wants_gpu = options.request.device in ("auto", "cuda")
    gpus = int(ray.cluster_resources().get("GPU", 0)) if wants_gpu else 0
    machines = sum(node["Alive"] for node in ray.nodes())
    number = min(num_units, options.processes or gpus or machines)
    return number, min(1, gpus / number) if gpus else float(options.request.device == "cuda")


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """To the cluster at the address; without one, to that which runs here, else to one of this machine alone."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.data import DataContext

    for name in "ray", "ray.data":
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=__name__)  # of options that Ray is to have under other names
    context = DataContext.get_current()
    context.max_errored_blocks, context.enable_progress_bars, context.print_on_execution_start = 0, False, False
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        _require_answer(address)
        with _hushed():
            ray.init(address or None, include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        yield
    except (ConnectionError, TimeoutError, gaierror) as error:
        raise IdeficsError(
            f"no Ray cluster at {address or 'hand'} ({str(error).splitlines()[0]}): look at its address"
        ) from error
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if host:
        create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()


@contextmanager
def _hushed() -> Iterator[None]:
    """Ray says how loud it will be, whatever that is."""
    with open(os.devnull, "w") as nothing, os.fdopen(os.dup(2), "w") as before:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before.fileno(), 2)


def _version() -> str:
    """Looked up, not imported: the package itself leads to the library, which lies above."""
    return sys.modules["idefics_cli"].__version__


# ---- on the cluster


class Actor(Relay):
    """Units, one after the other, in a process of its own. What that raises is a value, which is not tried again."""

    def __init__(self, job: Job, folder: str, threads: str | None, version: str) -> None:
        super().__init__()
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray would have one thread for half a processor
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
        with suppress(OSError):  # where all names are absolute, it is not needed
            os.chdir(folder)
        self._job, self._version, self._said = job, version, set[tuple[str, Any]]()
        self._crew = Crew(_own_share(job), 1, self)

    def tell(self, kind: str, value: Any) -> None:
        self._said.add((kind, value))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        (item,) = batch["unit"]
        try:
            self._require_place()
            unit, part = pickle.loads(item)
            (ended,) = self._crew.do(iter([unit]), lambda _: _Pickled(part))
        except Exception as error:
            ended = error
        return {"ended": [pickle.dumps((ended, self._said))]}

    def _require_place(self) -> None:
        """What the machine must have."""
        where = f"on the machine {os.uname().nodename}"
        if self._version != _version():
            raise IdeficsError(f"version {_version()} is installed {where}, and {self._version} here: install one")
        output = self._job.options.output
        if UnitFolder(output).header is None:
            raise IdeficsError(f"{output} is not there {where}: name a folder that all machines share, or a remote one")


class _Pickled:
    """What goes to a further process as it has come."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self._data,)


def _own_share(job: Job) -> Job:
    """Of the machine's processors, among the actors of its GPUs."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    gpus = next(int(each["Resources"].get("GPU", 1)) for each in ray.nodes() if each["NodeID"] == node)
    images = job.options.images
    images = replace(images, workers=images.workers or max(1, images.num_workers // gpus))
    return replace(job, options=replace(job.options, images=images))
