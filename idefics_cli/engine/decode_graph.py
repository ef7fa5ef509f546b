"""The decode step as CUDA graphs: one launch for each step, over tensors that stay where they are.

A graph is captured for each rung of a ladder of rows, when that many rows are first stepped; spare rows up to the rung
compute nothing that is used. Knows where a step's state lies, and nothing of what the step computes.
"""

from __future__ import annotations

import operator
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields
from functools import cache

import torch
from torch import Tensor

from idefics_cli.engine.beam_search import BeamState
from idefics_cli.engine.kv_cache import KVStore, Prefix

LADDER = (1, 2, 4, *range(8, 1025, 8))
CAPTURING = threading.Lock()  # torch captures one graph at a time in a process
Compute = Callable[[BeamState, Tensor], BeamState]  # state and context of some rows -> their next state


def rung_of(num_rows: int) -> int:
    """The number of rows that a step over so many is captured for."""
    return next((rung for rung in LADDER if rung >= num_rows), num_rows)


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Torch's own one is of the device that was current when something was first captured: on another, nothing is."""
    return torch.cuda.Stream(device)


class DecodeGraphs:
    """`compute` must work on the device alone, and in place on all but what it returns."""

    def __init__(self, store: KVStore, compute: Compute) -> None:
        self._store, self._compute = store, compute
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._storage: tuple[object, ...] = ()
        self._given: BeamState | None = None

    def step(self, state: BeamState, context: Tensor, prefix: Prefix) -> BeamState:
        """The next state of all rows. It stays valid until the next step."""
        num_rows, rung = len(state.done), rung_of(len(state.done))
        self._store.reserve(rung)
        if not self._holds(rung, context, prefix):
            self._start_over(rung, state, context, prefix)
        if state is not self._given:
            copy_rows(first_rows(self._state, num_rows), state)
            self._context[:num_rows].copy_(context)
            self._store.fill_spare(slice(num_rows, rung))
        if rung in self._graphs:
            self._graphs[rung].replay()
        else:  # this step for itself, which also loads what the libraries need, and then for the next ones
            self._run(rung)
            self._graphs[rung] = self._captured(rung)
        self._given = first_rows(self._state, num_rows)
        return self._given

    def _storage_of(self, prefix: Prefix) -> tuple[object, ...]:
        """What else a step reads and writes: while it is the same objects, what was captured holds."""
        return *self._store.key_values, *self._store.image_key_values, self._store.ancestors, prefix

    def _holds(self, rung: int, context: Tensor, prefix: Prefix) -> bool:
        storage = self._storage_of(prefix)
        is_same = len(storage) == len(self._storage) and all(map(operator.is_, storage, self._storage))
        return is_same and rung <= len(self._context) and context.shape[1] == self._context.shape[1]

    def _start_over(self, rung: int, state: BeamState, context: Tensor, prefix: Prefix) -> None:
        """Where the new tensors lie is part of what will be captured. Spare rows hold a text of one token."""
        self._graphs.clear()
        self._storage, self._given = self._storage_of(prefix), None
        tensors = {each.name: getattr(state, each.name) for each in fields(BeamState)}
        self._state = BeamState(**{name: each.new_zeros(rung, *each.shape[1:]) for name, each in tensors.items()})
        self._state.length.fill_(1)
        self._context = context.new_full((rung, context.shape[1]), -1)

    def _run(self, rung: int) -> None:
        state = first_rows(self._state, rung)
        copy_rows(state, self._compute(state, self._context[:rung]))
        self._state.length.clamp_(max=self._state.tokens.shape[2])  # a spare row's text never ends

    def _captured(self, rung: int) -> torch.cuda.CUDAGraph:
        pool = next((graph.pool() for graph in self._graphs.values()), None)
        graph, device = torch.cuda.CUDAGraph(), self._context.device
        capture = torch.cuda.graph(
            graph,
            pool=pool,
            stream=capture_stream(device),
            capture_error_mode="thread_local",  # other threads may use the device meanwhile
        )
        with CAPTURING, torch.cuda.device(device), capture:
            self._run(rung)
        return graph


def first_rows(state: BeamState, count: int) -> BeamState:
    """Views of the first rows."""
    return BeamState(**{each.name: getattr(state, each.name)[:count] for each in fields(BeamState)})


def copy_rows(target: BeamState, source: BeamState) -> None:
    """All of `source` into `target`, of as many rows: one copy for all tensors of one type that are not the same."""
    by_type = defaultdict(list)
    for each in fields(BeamState):
        place, rows = getattr(target, each.name), getattr(source, each.name)
        if rows is not place:
            by_type[rows.dtype].append((place, rows))
    for pairs in by_type.values():
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
