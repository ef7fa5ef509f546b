"""A CUDA device in software, for tests on machines without one.

Tensors on it are a wrapper subclass: they report that device, their numbers lie in a CPU tensor that nobody else sees,
and each operation on them is queued and runs only when the host waits for it. So what a GPU does to careless code
happens here too: tensors of two devices raise, fresh memory holds NaN, a pinned buffer that is read or rewritten too
early holds wrong numbers, each wait of the host is counted with the line that caused it, and a CUDA graph replays what
was captured at the addresses it was captured with. Numbers are those of the CPU's kernels, and there is one stream:
this tests logic, neither rounding nor speed.

    with SoftwareCuda() as gpu:
        network = network.to(gpu.device)
        gpu.waits      # [Wait("item", "scheduler.py:12 evict"), ...]
        gpu.launches   # Counter of operations that would be kernels

`shapes_only`: nothing is computed, so that a model may have any size; what the host reads is `answer(shape, dtype)`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from plain_attention import plain_tree_attention
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch as python_dispatch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from idefics_cli.engine import tree_attention
from idefics_cli.model import fused

aten = torch.ops.aten
NAME = "a GPU in software"
TOTAL_BYTES, FREE_BYTES = 80 << 30, 64 << 30
Answer = Callable[[tuple[int, ...], torch.dtype], Tensor]


class Wait(NamedTuple):
    kind: str
    line: str


class CaptureError(RuntimeError):
    """A stream that is captured was made to wait."""


class Cell:
    """Where a tensor's numbers are, once they are computed."""

    __slots__ = ("value",)

    def __init__(self, value: Tensor | None = None):
        self.value = value


class Allocation:
    """Bytes on the device, until no tensor needs them. Operations in the queue do not count, as on a stream."""

    def __init__(self, gpu: SoftwareCuda, num_bytes: int):
        self.gpu, self.num_bytes = gpu, num_bytes
        gpu.allocated += num_bytes
        gpu.peak = max(gpu.peak, gpu.allocated)

    def __del__(self) -> None:
        self.gpu.allocated -= self.num_bytes


class DeviceTensor(Tensor):
    """`shape_of` is a tensor without numbers that has its shape, strides and dtype."""

    shape_of: Tensor
    cell: Cell
    allocation: Allocation
    gpu: SoftwareCuda

    @staticmethod
    def __new__(cls, shape_of: Tensor, cell: Cell, gpu: SoftwareCuda, allocation: Allocation | None = None):
        with torch.inference_mode(False):  # a view of a parameter is not an inference tensor
            made = Tensor._make_wrapper_subclass(
                cls,
                shape_of.size(),
                strides=shape_of.stride(),
                storage_offset=shape_of.storage_offset(),
                dtype=shape_of.dtype,
                device=gpu.device,
            )
        made.shape_of, made.cell, made.gpu = shape_of, cell, gpu
        made.allocation = allocation or Allocation(gpu, shape_of.nbytes)
        return made

    def __repr__(self) -> str:
        return f"DeviceTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    __str__ = __repr__

    def record_stream(self, stream: Stream) -> None:
        """Memory here is kept by whoever needs it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in ONE_KERNEL:
            return ONE_KERNEL[func](*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        gpu = next(each.gpu for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, DeviceTensor))
        return gpu.dispatch(func, args, kwargs or {})


@dataclass
class Operation:
    """To be run on cells. `results` are (place in the result, its cell, whether it is a view)."""

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    results: list[tuple[int, Cell, bool]] = field(default_factory=list)

    def __call__(self, is_first: bool = True) -> None:
        args, kwargs = pytree.tree_map(filled, self.args), pytree.tree_map(filled, self.kwargs)
        found = pytree.tree_leaves(self.run(*args, **kwargs))
        for place, cell, is_view in self.results:
            if cell.value is None or is_first:
                cell.value = found[place]
            elif not is_view:
                cell.value.copy_(found[place])  # a graph's results stay where they were when it was captured


VIEWS = {aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten._unsafe_view.default}
SIZED_BY_CONTENT = {
    *(aten.nonzero.default, aten.masked_select.default, aten.unique_dim.default, aten._unique2.default),
    *(aten.unique_consecutive.default, aten.repeat_interleave.Tensor),
}
INDEXING = {
    *(aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default),
    aten._unsafe_index.Tensor,
}
IN_PLACE_INDEXING = {aten.index_put_.default, aten._index_put_impl_.default}
ONE_PRODUCT = {aten.linear.default, aten.matmul.default}  # whatever views they are made of
CPU_KERNELS = ("mkldnn", "_for_cpu", "onednn", "quantized")
HOST_READS = {aten.equal.default, aten.is_nonzero.default}


def is_view(func: Any) -> bool:
    aliases = [each.alias_info for each in func._schema.returns]
    return func in VIEWS or (bool(aliases) and all(each is not None and not each.is_write for each in aliases))


class SoftwareCuda(TorchDispatchMode):
    """The device, while it is entered. `index` is its number, of as many devices as that needs."""

    def __init__(self, index: int = 0, shapes_only: bool = False, answer: Answer = torch.zeros):
        super().__init__()
        self.device = torch.device("cuda", index)
        self.shapes_only, self.answer = shapes_only, answer
        self.waits: list[Wait] = []
        self.copies: list[tuple[str, int, str]] = []  # (direction, bytes, line)
        self.launches: Counter[str] = Counter()
        self.launched_at: Counter[str] = Counter()
        self.results: Counter[tuple[int, ...]] = Counter()  # shapes
        self.current = 0  # the current device
        self.allocated = self.peak = 0
        self.captures = 0
        self.capture_modes: set[str] = set()
        self.captured = 0  # launches of the last graph
        self.capturing: Graph | None = None
        self._queue: list[Callable[[], None]] = []
        self._pinned: set[int] = set()
        self._undo = contextlib.ExitStack()

    def clear(self) -> None:
        """Count from here on."""
        for each in (self.waits, self.copies, self.launches, self.launched_at, self.results):
            each.clear()

    # ---- life

    def __enter__(self) -> SoftwareCuda:
        require_device_guard()
        undo = self._undo
        torch._C._set_only_lift_cpu_tensors(True)
        undo.callback(torch._C._set_only_lift_cpu_tensors, False)
        for name, value in self._torch_cuda().items():
            undo.enter_context(replaced(torch.cuda, name, value))
        undo.enter_context(replaced(torch, "Generator", HostGenerator))
        undo.enter_context(patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))  # a mode is that of one thread
        new_parameters = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `module.to` makes new parameters
        undo.callback(torch.__future__.set_overwrite_module_params_on_conversion, new_parameters)
        for module in (fused, tree_attention):  # the operators are run in plain torch
            undo.enter_context(replaced(module, "has_triton", lambda: True))
        undo.enter_context(CudaWithIndex())
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        try:
            self.drain()
        finally:
            super().__exit__(*exception)
            self._undo.close()

    def _torch_cuda(self) -> dict[str, Any]:
        """What stands in torch.cuda meanwhile. Device 0 is the current one, until another is entered."""

        gpu = self

        def synchronize(device: Any = None) -> None:
            if self._is_this(device):
                self.wait("synchronize")

        def ours(value: Callable[[], Any], other: Any = 0) -> Callable[[Any], Any]:
            return lambda device=None: value() if self._is_this(device) else other

        def reset_peak(device: Any = None) -> None:
            self.peak = self.allocated

        class CurrentDevice:
            def __init__(self, device: Any):
                self.idx = gpu._index(device)

            def __enter__(self) -> None:
                self.before, gpu.current = gpu.current, self.idx

            def __exit__(self, *exception: Any) -> None:
                gpu.current = self.before

        return {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: self.device.index + 1,
            "current_device": lambda: self.current,
            "synchronize": synchronize,
            "empty_cache": lambda: None,
            "mem_get_info": lambda device=None: (FREE_BYTES - self.allocated, TOTAL_BYTES),
            "memory_allocated": ours(lambda: self.allocated),
            "max_memory_allocated": ours(lambda: self.peak),
            "reset_peak_memory_stats": reset_peak,
            "get_device_properties": lambda device=None: SimpleNamespace(name=NAME, total_memory=TOTAL_BYTES),
            "set_per_process_memory_fraction": lambda fraction, device=None: None,
            "get_device_name": lambda device=None: NAME,
            "get_device_capability": lambda device=None: (9, 0),
            "is_bf16_supported": lambda *args, **kwargs: True,
            "CUDAGraph": lambda: Graph(self),
            "graph": self._graph,
            "Stream": lambda device=None, **kwargs: Stream(self, self._index(device)),
            "Event": lambda *args, **kwargs: Event(self),
            "device": CurrentDevice,
            "stream": lambda stream: CurrentDevice(stream.index),
            "current_stream": lambda device=None: Stream(self, self._index(device)),
            "is_current_stream_capturing": lambda: self.capturing is not None,
        }

    def _index(self, device: Any) -> int:
        index = device if device is None or isinstance(device, int) else torch.device(device).index
        return self.current if index is None else index

    def _is_this(self, device: Any) -> bool:
        return self._index(device) == self.device.index

    def _graph(
        self, graph: Graph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> contextlib.AbstractContextManager[Any]:
        """A stream captures what is computed on its own device, and in "global" mode forbids other threads to wait."""
        stream = stream or Stream(self, 0)
        if stream.index != self.device.index:
            raise CaptureError("the CUDA graph is empty: it was captured on a stream of another device")
        self.capture_modes.add(capture_error_mode)
        return graph.capture()

    # ---- the queue, and the host that waits for it

    def wait(self, kind: str) -> None:
        if self.capturing is not None:
            raise CaptureError(f"operation not permitted when stream is capturing: {kind} at {line_of_caller()}")
        self.waits.append(Wait(kind, line_of_caller()))
        self.drain()

    def drain(self) -> None:
        queue, self._queue = self._queue, []
        with without_modes():
            for job in queue:
                job()

    def enqueue(self, operation: Operation) -> None:
        if self.capturing is not None:
            self.capturing.operations.append(operation)
        elif not self.shapes_only:
            self._queue.append(operation)

    def count(self, name: str, results: list[Any]) -> None:
        self.launches[name] += 1
        self.launched_at[line_of_caller()] += 1
        self.results.update(tuple(each.shape) for each in results if isinstance(each, Tensor))

    # ---- operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_compound = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        if is_compound and func not in ONE_PRODUCT:
            with self._switched_on():  # inference mode does not take compound operations apart
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if self._is_of_the_host(func, args, kwargs):
            with without_modes(inference=False):
                return func(*args, **kwargs)
        with without_modes():
            result = self._run(func, args, kwargs)
        is_plain = isinstance(result, Tensor) and not isinstance(result, DeviceTensor)
        is_foreign = is_plain and result.is_inference() and not torch.is_inference_mode_enabled()
        return result.clone() if is_foreign else result

    def _switched_on(self) -> contextlib.AbstractContextManager[Any]:
        is_on = self in python_dispatch._get_current_dispatch_mode_stack()
        return contextlib.nullcontext() if is_on else pushed(self)

    @staticmethod
    def _is_of_the_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if goes_to_device(kwargs) or kwargs.get("pin_memory"):
            return False
        if func in (aten._pin_memory.default, aten.is_pinned.default):
            return False
        return not any(isinstance(each, DeviceTensor) for each in pytree.tree_leaves((args, kwargs)))

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if goes_to_device(kwargs) and not self._is_this(kwargs["device"]):
            raise RuntimeError(f"tensors on two devices: {kwargs['device']} and {self.device} ({line_of_caller()})")
        special = self._special(func, args, kwargs)
        if special is not None:
            return special()
        if any(word in str(func) for word in CPU_KERNELS):
            raise NotImplementedError(f"{func} is not a kernel of the CUDA backend ({line_of_caller()})")
        self._require_one_device(func, args, kwargs)
        masks = func in INDEXING and any(each.dtype in (torch.bool, torch.uint8) for each in tensors_of(args[1]))
        if func in SIZED_BY_CONTENT or masks:
            return self._run_now(func, args, kwargs)
        if func in INDEXING:
            args = (args[0], pytree.tree_map(self._sent, args[1]), *args[2:])
        if "empty" in func._opname:
            return self._launch(lambda *args, **kwargs: poisoned(func(*args, **kwargs)), args, kwargs, func._opname)
        return self._launch(EMULATED.get(func, func), args, kwargs, func._opname, is_view(func))

    def _special(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
        """What is not an operation on numbers of the device alone."""
        if func is aten._to_copy.default:
            return lambda: self._to_copy(args[0], kwargs)
        if func is aten.copy_.default:
            return lambda: self._copy(*args, **kwargs)
        if func is aten._pin_memory.default:
            return lambda: self._pin(on_host(torch.clone, args[0]))
        if func is aten.is_pinned.default:
            return lambda: self._is_pinned(args[0])
        if func is aten._local_scalar_dense.default:
            return lambda: self.read(args[0], "item").item()
        if func in HOST_READS:
            return lambda: func(*(self.read(each, func._opname) for each in args))
        if any(isinstance(each, DeviceTensor) for each in pytree.tree_leaves((args, kwargs))):
            return None
        if goes_to_device(kwargs):
            return lambda: self._fresh_tensor(func, args, kwargs)
        return lambda: self._pin(on_host(func, *args, **{**kwargs, "pin_memory": False}))

    def _launch(
        self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, view: bool = False, like: Any = None
    ) -> Any:
        """Queue an operation. `like` is its result without numbers where torch cannot tell it."""
        if like is None:
            like = run(*pytree.tree_map(shape_of, args), **pytree.tree_map(shape_of, placed(kwargs, "meta")))
        shapes, structure = pytree.tree_flatten(like)
        inputs = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, DeviceTensor)]
        changed = {id(each.shape_of): each for each in inputs}
        results, cells = [], []
        for place, shape in enumerate(shapes):
            if not isinstance(shape, Tensor):
                results.append(shape)
            elif id(shape) in changed and not view:
                results.append(changed[id(shape)])
            else:
                cells.append((place, Cell(), view))
                results.append(DeviceTensor(shape, cells[-1][1], self, inputs[0].allocation if view else None))
        if not view:
            self.count(name, results)
        kwargs = pytree.tree_map(cell_of, placed(kwargs, "cpu"))
        self.enqueue(Operation(run, pytree.tree_map(cell_of, args), kwargs, cells))
        return pytree.tree_unflatten(results, structure)

    def _run_now(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The shape of the result depends on numbers, which the host waits for."""
        self.wait(func._opname)
        found = func(*pytree.tree_map(self._value, args), **pytree.tree_map(self._value, kwargs))
        self.count(func._opname, [found])
        if func in IN_PLACE_INDEXING:
            return args[0]
        return pytree.tree_map(lambda each: self.put(each) if isinstance(each, Tensor) else each, found)

    def _fresh_tensor(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DeviceTensor:
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        like = func(*args, **{**kwargs, "device": torch.device("meta")})
        made = DeviceTensor(like, Cell(), self)
        on_host = {**kwargs, "device": torch.device("cpu"), "dtype": like.dtype}  # the default may change until then
        create = Operation(func, args, on_host, [(0, made.cell, False)])
        if not func._opname.startswith("empty"):
            self.count(func._opname, [like])
            self.enqueue(create)
        elif not self.shapes_only:
            made.cell.value = poisoned(create.run(*create.args, **create.kwargs))
        return made

    # ---- copies

    def put(self, value: Tensor) -> DeviceTensor:
        """Numbers that are there already."""
        return DeviceTensor(without_numbers(value), Cell(None if self.shapes_only else value), self)

    def _to_copy(self, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
        device, non_blocking = kwargs.get("device"), kwargs.get("non_blocking", False)
        rest = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking", "pin_memory")}
        if not isinstance(source, DeviceTensor):
            made = DeviceTensor(aten._to_copy.default(without_numbers(source), **rest), Cell(), self)
            like, cell = made.shape_of, made.cell
            self._send(source, lambda value: setattr(cell, "value", laid_out(value.to(like.dtype), like)), non_blocking)
            return made
        if device is None or torch.device(device).type == "cuda":
            like = aten._to_copy.default(source.shape_of, **rest)
            return self._launch(aten._to_copy.default, (source,), rest, "_to_copy", like=like)
        assert torch.device(device).type == "cpu", device
        target = on_host(torch.empty, source.shape, dtype=rest.get("dtype") or source.dtype)
        return self._copy(target, source, non_blocking)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not isinstance(target, DeviceTensor):
            return self._receive(target, source, non_blocking)
        if isinstance(source, DeviceTensor):
            return self._launch(aten.copy_.default, (target, source), {}, "copy_", like=target.shape_of)
        if source.numel() == 1 and source.dim() == 0 and not self._is_pinned(source):
            return self._launch(aten.fill_.Scalar, (target, source.item()), {}, "fill_", like=target.shape_of)
        cell = target.cell
        self._send(source, lambda value: cell.value.copy_(value), non_blocking)
        return target

    def _send(self, source: Tensor, receive: Callable[[Tensor], Any], non_blocking: bool) -> None:
        """From pageable memory the host waits until it is sent, unless told not to; pinned memory is read late."""
        self.copies.append(("to device", source.nbytes, line_of_caller()))
        is_late = non_blocking and self._is_pinned(source)
        if self.capturing is not None and not is_late:
            raise CaptureError(f"a copy from pageable memory while a stream is captured: {line_of_caller()}")
        if not non_blocking:
            self.wait("copy to device")
        sent = source if is_late or self.shapes_only else source.detach().clone()
        self.enqueue(Operation(lambda: receive(sent.clone()), ()))

    def _receive(self, target: Tensor, source: DeviceTensor, non_blocking: bool) -> Tensor:
        self.copies.append(("to host", source.nbytes, line_of_caller()))
        if not non_blocking:
            return target.copy_(self.read(source, "copy to host"))
        if self.capturing is None:
            poisoned(target)
        self.enqueue(Operation(aten.copy_.default, (Cell(target), source.cell)))
        return target

    def _sent(self, index: Any) -> Any:
        """Indices on the host are sent first, which waits."""
        is_of_the_host = isinstance(index, Tensor) and not isinstance(index, DeviceTensor)
        return self._to_copy(index, {"device": self.device}) if is_of_the_host else index

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def read(self, tensor: Any, kind: str) -> Any:
        """The host wants to know, and waits."""
        self.wait(kind)
        return self._value(tensor)

    def _value(self, tensor: Any) -> Any:
        if not isinstance(tensor, DeviceTensor):
            return tensor
        if self.shapes_only:
            return self.answer(tuple(tensor.shape), dtype=tensor.dtype)
        if tensor.cell.value is None:
            self.drain()
        return tensor.cell.value

    def _require_one_device(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if goes_to_host(kwargs):
            raise NotImplementedError(f"{func} of a device's tensor with device={kwargs['device']}")
        others = [each for each in tensors_of((args, kwargs)) if not isinstance(each, DeviceTensor)]
        if func in INDEXING:
            indices = {id(each) for each in tensors_of(args[1])}
            others = [each for each in others if id(each) not in indices]
        wrong = [tuple(each.shape) for each in others if each.dim() > 0]
        if wrong:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{self.device} and cpu! ({func}, shapes {wrong}, {line_of_caller()})"
            )


class HostGenerator(torch.Generator):
    """Of the device too: its operations run here."""

    def __new__(cls, device: Any = None) -> HostGenerator:
        return super().__new__(cls)


# ---- graphs, streams, events


class Graph:
    """torch.cuda.CUDAGraph: captures without running, and replays on the tensors that it was captured with."""

    def __init__(self, gpu: SoftwareCuda):
        self.gpu, self.operations, self._has_run = gpu, [], False

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        self.gpu.wait("capture begins")
        self.gpu.captures += 1
        self.gpu.capturing = self
        before = self.gpu.launches.total()
        try:
            yield self
        finally:
            self.gpu.capturing = None
            self.gpu.captured = self.gpu.launches.total() - before

    def replay(self) -> None:
        if self.gpu.capturing is not None:
            raise CaptureError("a replay while a stream is captured")
        self.gpu.launches["graph replay"] += 1
        is_first, self._has_run = not self._has_run, True

        def replayed() -> None:
            for operation in self.operations:
                operation(is_first)

        self.gpu.enqueue(Operation(replayed, ()))

    def pool(self) -> None:
        return None

    def reset(self) -> None:
        self.operations.clear()


class Stream:
    def __init__(self, gpu: SoftwareCuda, index: int):
        self.gpu, self.index = gpu, index

    def synchronize(self) -> None:
        self.gpu.wait("stream.synchronize")

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.gpu)
        event.record()
        return event


class Event:
    """Recorded in the one queue: `query` never finds it done by itself, `synchronize` waits for all before it."""

    def __init__(self, gpu: SoftwareCuda):
        self.gpu, self._is_done = gpu, True

    def record(self, stream: Stream | None = None) -> None:
        if self.gpu.capturing is None:
            self._is_done = False
            self.gpu.enqueue(Operation(lambda: setattr(self, "_is_done", True), ()))

    def query(self) -> bool:
        return self._is_done

    def synchronize(self) -> None:
        if not self._is_done:
            self.gpu.wait("event.synchronize")

    def elapsed_time(self, other: Event) -> float:
        return 1.0


# ---- what is one kernel on CUDA


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Laid out as the fused kernels do it: (rows, queries, heads, head_dim), seen transposed."""
    tensors = [each for each in (query, key, value, attn_mask) if each is not None]
    if not all(isinstance(each, DeviceTensor) for each in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device: attention ({line_of_caller()})")
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        raise RuntimeError(f"Expected attn_mask dtype to be bool or to match query dtype, got {attn_mask.dtype}")
    gpu, (rows, heads, queries, _) = query.gpu, query.shape

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        found = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale
        )
        return laid_out(found, like)

    with without_modes():
        shape = (rows, queries, heads, value.shape[-1])
        like = torch.empty(shape, dtype=query.dtype, device="meta").transpose(1, 2)
        return gpu._launch(attend, tuple(tensors), {}, "attention", like=like)


def fused_rms_norm(input, normalized_shape, weight=None, eps=None):
    with without_modes():
        args = (input, normalized_shape, weight, eps)
        like = torch.empty_like(input.shape_of)
        return input.gpu._launch(torch.nn.functional.rms_norm, args, {}, "rms_norm", like=like)


def attention_with_log_sum(query, key, value, attn_bias, scale, is_causal) -> tuple[Tensor, Tensor]:
    """What the fused kernels give: output and log-sum-exp, from scores in fp32."""
    scores = query.float() @ key.float().transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if attn_bias is not None:
        scores = scores + attn_bias.float()
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    log_sum = scores.logsumexp(dim=-1)
    weights = (scores - log_sum[..., None]).exp()
    return (weights @ value.float()).to(query.dtype), log_sum


def efficient_attention(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None
):
    """Its log-sum is padded to a multiple of 32 queries, and it reads masks eight keys at a time."""
    if attn_bias is not None and (attn_bias.dtype != query.dtype or attn_bias.stride(-2) % 8):
        raise RuntimeError(f"attn_bias is not correctly aligned or typed: {attn_bias.stride()}, {attn_bias.dtype}")
    if attn_bias is not None and attn_bias.shape != (*query.shape[:3], key.shape[2]):
        raise RuntimeError(f"attn_bias has the wrong shape: {attn_bias.shape}")
    output, log_sum = attention_with_log_sum(query, key, value, attn_bias, scale, is_causal)
    padded = torch.nn.functional.pad(log_sum, (0, -log_sum.shape[-1] % 32), value=torch.inf)
    return output, padded, log_sum.new_empty(0), log_sum.new_empty(0)


def log_softmax(values: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """CUDA's takes fp16 to fp32 in one launch, the CPU's does not."""
    return aten._log_softmax.default(values.float() if half_to_float else values, dim, False)


EMULATED = {
    aten._log_softmax.default: log_softmax,
    aten._scaled_dot_product_efficient_attention.default: efficient_attention,
    torch.ops.idefics.tree_attention.default: plain_tree_attention,
}


def read_list(tensor: DeviceTensor) -> Any:
    with without_modes():
        tensor.gpu.copies.append(("to host", tensor.nbytes, line_of_caller()))
        return tensor.gpu.read(tensor, "tolist").tolist()


def no_numpy(tensor: DeviceTensor, *args: Any, **kwargs: Any) -> Any:
    raise TypeError(f"can't convert {tensor.device} device type tensor to numpy. Use Tensor.cpu() first")


ONE_KERNEL = {
    torch.nn.functional.scaled_dot_product_attention: fused_attention,
    torch.nn.functional.rms_norm: fused_rms_norm,
    Tensor.tolist: read_list,
    Tensor.numpy: no_numpy,
    Tensor.__array__: no_numpy,
}


# ---- small things


def goes_to_device(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"


def goes_to_host(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "cuda"


def placed(kwargs: dict[str, Any], device: str) -> dict[str, Any]:
    return {**kwargs, "device": torch.device(device)} if kwargs.get("device") is not None else kwargs


def on_host(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Memory of the host that copies go to or come from later: a tensor like any other."""
    with torch.inference_mode(False):
        return func(*args, **kwargs)


def tensors_of(tree: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(tree) if isinstance(each, Tensor)]


def without_numbers(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def shape_of(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.shape_of
    return without_numbers(value) if isinstance(value, Tensor) and value.dim() else value


def cell_of(value: Any) -> Any:
    return value.cell if isinstance(value, DeviceTensor) else value


def filled(value: Any) -> Any:
    if not isinstance(value, Cell):
        return value
    assert value.value is not None, "read before it was computed: a graph's tensor, before a replay?"
    return value.value


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """The same numbers with the strides of `like`."""
    if value.stride() == like.stride():
        return value
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(value)


def poisoned(value: Tensor) -> Tensor:
    """Memory that was never written holds anything: NaN, or the largest number."""
    if value.numel() and value.dtype.is_floating_point:
        value.fill_(torch.nan)
    elif value.numel() and value.dtype != torch.bool:
        value.fill_(torch.iinfo(value.dtype).max)
    return value


def line_of_caller() -> str:
    """The nearest line outside torch and this module."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and name != __file__ and "contextlib" not in name:
            return f"{os.path.basename(name)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class CudaWithIndex(TorchFunctionMode):
    """`cuda` means `cuda:0`, which a build without CUDA cannot tell."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: self._indexed(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._indexed, args), **kwargs)

    @staticmethod
    def _indexed(value: Any) -> Any:
        is_bare = value == "cuda" if isinstance(value, str) else value == torch.device("cuda")
        return torch.device("cuda", 0) if isinstance(value, str | torch.device) and is_bare else value


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    has_one, old = hasattr(owner, name), getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if has_one:
            setattr(owner, name, old)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def pushed(mode: TorchDispatchMode) -> Iterator[None]:
    python_dispatch._push_mode(mode)
    try:
        yield
    finally:
        python_dispatch._pop_mode()


@contextlib.contextmanager
def without_modes(inference: bool = True) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(python_dispatch._disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunctionSubclass())
        if inference:
            stack.enter_context(torch.inference_mode())
        yield


def require_device_guard() -> None:
    """A CPU build of torch has no guard for CUDA devices, which Python's bindings ask for (`a[:, 0]`, `a.to("cuda")`).

    The one of `meta` does nothing, which is right here: it is entered in c10's table of guards in CUDA's place.
    """
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so"))
    table = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14
    if not table[cuda]:
        table[cuda] = table[meta]
    torch._C._ensureCUDADeviceGuardSet()  # a CUDA build without devices puts its own idle guard there
