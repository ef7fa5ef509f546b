"""The units of a folder on a Ray cluster: one bar and one summary, as of one process. The only module that imports ray.

An actor has a GPU, or a machine without, and there a `Crew` of one process with one model: a row that ends the process
costs the actor nothing. An actor or a machine that is lost costs its unit another try, on whatever is left; where that
does not help, halves of it are tried, until the rows are found that end their actor.
Only counts come back, and a unit is sent when an actor is there for it: the driver's memory does not grow with them.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain, islice
from socket import create_connection, gaierror
from typing import Any, TypeAlias

from idefics_cli.errors import IdeficsError
from idefics_cli.pipeline.options import RunOptions
from idefics_cli.pipeline.task import Observer, Relay, told
from idefics_cli.readers.inputs import Inputs
from idefics_cli.scale.processes import Crew
from idefics_cli.scale.units import Done, Job, Tries, Unit, Units, attempts
from idefics_cli.storage.unit_folder import UnitFolder

Ended: TypeAlias = tuple[Done, set[tuple[str, Any]]]  # and what has been said

TRIES = 4  # of a unit, and of an actor as it begins
CPUS = 0.5  # of an actor: its processes are those of --workers
ANSWER_SECONDS = 10.0
PATIENCE_SECONDS = 60.0  # for the first actor, some of them for its imports
SETTINGS = {  # of what a run begins; its processes are to be no less urgent than those of the machine's other work
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_worker_niceness": "0",
}


def require_ray(options: RunOptions) -> None:
    """Raise what can be known to be wrong before anything is begun."""
    if find_spec("ray") is None:
        raise IdeficsError("--ray needs an extra: pip install 'idefics-cli[ray]'")
    if options.request.device.startswith("cuda:"):
        raise IdeficsError(f"--ray chooses the GPUs: --device cuda in place of {options.request.device}")


def do_on_cluster(job: Job, observer: Observer, units: Units) -> Iterator[Done]:
    """In the order of finishing. Raises what a worker raises."""
    said = set[tuple[str, Any]]()
    with _connected(job.options.ray), closing(_ends(job, units, observer)) as ends:
        observer.on_loading(f"{job.options.request.model}")
        for done, words in ends:
            for kind, value in sorted(words - said, key=str):
                told(observer, kind, value)
            said |= words
            observer.on_row(done.rows)
            yield done


def _ends(job: Job, units: Units, observer: Observer) -> Iterator[Ended]:
    missing = units.missing()
    first = list(islice(missing, _most_actors(job.options)))
    with _Actors(job, units.part, len(first)) as actors:
        if first and not actors.wait(PATIENCE_SECONDS):
            observer.say("No actor has begun on the cluster yet: where others use it all, the run waits for a place.")
        yield from actors.do(chain(first, missing))


def _num_gpus(options: RunOptions) -> int:
    import ray

    wants_gpu = options.request.device in ("auto", "cuda")
    return int(ray.cluster_resources().get("GPU", 0)) if wants_gpu else 0


def _most_actors(options: RunOptions) -> int:
    import ray

    return options.processes or _num_gpus(options) or sum(node["Alive"] for node in ray.nodes())


def _share_of_gpu(options: RunOptions, num_actors: int) -> float:
    gpus = _num_gpus(options)
    return min(1, gpus / num_actors) if gpus and num_actors else float(options.request.device == "cuda")


def _tries(unit: Unit) -> Tries:
    """What is to be tried until the part of the unit is there; is sent whether its actor has survived each try."""
    for _ in range(TRIES):
        if (yield unit):
            return
    for _ in range(TRIES):
        if (yield replace(unit, only=(unit.begin.index, unit.begin.index))):
            break
    else:
        raise IdeficsError(
            f"the cluster has lost unit {unit.number} {TRIES} times, and loses its actors without any row, too: look at"
            " the memory of its machines"
        )
    yield from attempts(unit)


class _Actors:
    """Those of this run. In place of one that is lost, alone or with its machine, another begins. A context.

    A unit goes to an actor that is there, never to one that waits for a place on the cluster. Ray itself is to try
    nothing again: it would wait until the very actor that is lost has a place.
    """

    def __init__(self, job: Job, part: Callable[[Unit], Inputs], number: int) -> None:
        import ray

        gpus = _share_of_gpu(job.options, number)
        self._kind = ray.remote(num_cpus=CPUS, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD")(Actor)
        self._about = job, os.getcwd(), os.environ.get("OMP_NUM_THREADS"), _version()
        self._part, self._idle = part, list[Any]()
        self._beginning: dict[Any, tuple[Any, int]] = {}  # by what tells of it: the actor, and how many were lost
        self._at_work: dict[Any, tuple[Any, Tries]] = {}
        self._again: list[tuple[Tries, Unit]] = []
        for _ in range(number):
            self._begin()

    def __enter__(self) -> _Actors:
        return self

    def __exit__(self, *exception: object) -> None:
        import ray

        others = *self._beginning.values(), *self._at_work.values()
        for actor in *self._idle, *(actor for actor, _ in others):
            ray.kill(actor)

    def wait(self, seconds: float) -> bool:
        """Whether one of them has begun by then."""
        import ray

        ready, _ = ray.wait([*self._beginning], timeout=seconds)
        return bool(ready)

    def do(self, units: Iterator[Unit]) -> Iterator[Ended]:
        """In the order of finishing. Raises what an actor has raised."""
        import ray

        while True:
            while self._idle and (found := self._next_try(units)) is not None:
                self._give(*found)
            if not self._at_work and (self._idle or not self._beginning):
                return
            (told,), _ = ray.wait([*self._at_work, *self._beginning])
            if told in self._beginning:
                self._has_begun(told)
            elif (ended := self._has_ended(told)) is not None:
                yield ended

    def _begin(self, num_lost: int = 0) -> None:
        actor = self._kind.remote(*self._about)
        self._beginning[actor.is_there.remote()] = actor, num_lost

    def _has_begun(self, told: Any) -> None:
        """One that is lost each time it begins is given up, and the run with the last of them."""
        actor, num_lost = self._beginning.pop(told)
        _, lost = _outcome(told)
        if lost is None:
            self._idle.append(actor)
        elif num_lost + 1 < TRIES:
            self._begin(num_lost + 1)
        elif not (self._idle or self._at_work or self._beginning):
            reason = str(lost).strip().splitlines()[-1].strip()
            raise IdeficsError(
                f"no actor can begin on the cluster ({reason}): look at its machines, and whether they have"
                " idefics-cli[ray]"
            ) from lost

    def _next_try(self, units: Iterator[Unit]) -> tuple[Tries, Unit] | None:
        if self._again:
            return self._again.pop()
        unit = next(units, None)
        if unit is None:
            return None
        tries = _tries(unit)
        return tries, next(tries)

    def _give(self, tries: Tries, unit: Unit) -> None:
        actor = self._idle.pop(0)
        told = actor.do.remote(pickle.dumps((unit, pickle.dumps(self._part(unit)))))
        self._at_work[told] = actor, tries

    def _has_ended(self, told: Any) -> Ended | None:
        """Nothing where there is more to be tried."""
        actor, tries = self._at_work.pop(told)
        data, lost = _outcome(told)
        if lost is not None:
            self._begin()
            self._again.append((tries, tries.send(False)))
            return None
        self._idle.append(actor)
        ended, words = pickle.loads(data)
        if isinstance(ended, Exception):
            raise ended
        try:
            self._again.append((tries, tries.send(True)))
        except StopIteration:
            return ended, words
        return None


def _outcome(told: Any) -> tuple[Any, Exception | None]:
    """What an actor has said, or why it is lost."""
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(told), None
    except RayError as lost:
        return None, lost


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """To the cluster at the address; without one, to that which runs here, else to one of this machine alone."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    logging.getLogger("ray").setLevel(logging.CRITICAL)
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

    def is_there(self) -> None:
        """Answers once the actor has a place and has begun."""

    def do(self, item: bytes) -> bytes:
        try:
            self._require_place()
            unit, part = pickle.loads(item)
            (ended,) = self._crew.do(iter([unit]), lambda _: _Pickled(part))
        except Exception as error:
            ended = error
        return pickle.dumps((ended, self._said))

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
