"""Several processes that work on one model together, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

SECONDS = 240  # on a busy machine; what hangs, hangs for ever


@cache
def forks() -> ForkServerContext:
    """Whose server has imported what a process needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["idefics_cli.loaded_model", "transformers.distributed", "idefics_cli.tasks.caption_vqa"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        forkserver.ensure_running()
    return context


def start(size: int, work: Callable[..., None], *arguments: Any) -> list[BaseProcess]:
    """`work(*arguments)` in each of `size` processes, which know each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(size):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        process = forks().Process(target=_work, args=(variables, port, work, arguments))
        process.start()
        started.append(process)
    return started


def _work(variables: dict[str, int], port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(*arguments)


def codes_of(processes: list[BaseProcess]) -> list[int | None]:
    """How they have ended."""
    for process in processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def first_result(size: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work(ranks, *arguments)` gives in the first process; in the others it does not come back."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    processes = start(size, _first_result, sending, work, arguments)
    sending.close()
    try:
        found = receiving.recv()
    finally:
        codes = codes_of(processes)
    assert codes == [0] * size
    return found


def _first_result(sending: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from idefics_cli.ranks import join

    ranks = join()
    sending.send(work(ranks, *arguments))
    ranks.end(0)
