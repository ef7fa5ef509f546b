"""Linear layers: the head's two-part one, several layers over the same inputs, and weights packed for CPU inference.

A packed weight lies in oneDNN's blocked layout and replaces the plain one, unless the plain product is measured to be
faster: in memory twice are only one layer of each shape, while they are measured, and one that is being packed.
`state_dict` still gives plain weights under the checkpoints' names. A packed network cannot be trained, moved or
converted. This module knows no layers but linear ones, and no decoding.
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from idefics_cli.storage.once_per_machine import once_per_machine

# Each call costs some 10 µs beside the product itself; a matrix with a shorter side does not earn that back.
SHORTEST_SIDE = 128
# oneDNN is told for how many rows to lay a weight out. Measured from 8 to 2,056, all hints serve all sizes alike.
ROWS_HINT = 64
SMALLEST_SCALE = 1e-30
LARGEST_KERNEL = 512  # rows; larger inputs are multiplied in pieces

# What is measured: rows of a decode step, of a prefill, of an image; and how many steps a prefill is followed by.
DECODE_ROWS, PREFILL_ROWS, IMAGE_ROWS, STEPS = 32, 256, 257, 16
# Plain weights have to be as much faster: the choice rounds differently, so noise must not make it.
CLEARLY_FASTER = 0.85
MEASURED_BYTES = 1 << 20  # for smaller matrices a call counts, not the product
ROUNDS, MEASURING_SECONDS = 5, 0.25

Way = Callable[[], object]
Group = tuple[nn.Module, list[str], bool]  # the parent, names of linear layers in it, and whether their sizes recur


class IdeficsDecoupledLinear(nn.Linear):
    """A linear layer in two parts, `weight` and `additional_fc`, with outputs joined: (..., in) -> (..., out)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        out_additional_features: int = 0,
        bias: bool = True,
        partially_freeze: bool = True,
    ):
        super().__init__(in_features, out_features, bias)
        self.out_additional_features = out_additional_features
        if partially_freeze:
            self.requires_grad_(False)
        if out_additional_features > 0:
            self.additional_fc = nn.Linear(in_features, out_additional_features, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output = nn.functional.linear(hidden_states, self.weight, self.bias)
        if self.out_additional_features == 0:
            return output
        return torch.cat([output, self.additional_fc(hidden_states)], dim=-1)


def project(inputs: Tensor, *linears: nn.Module) -> Sequence[Tensor]:
    """Each layer's output: (..., in) -> (..., out). One product where all the layers are part of one matrix."""
    joint = getattr(linears[0], "joint", None)
    if joint is None or not joint.serves(linears):
        return [linear(inputs) for linear in linears]
    return joint(inputs).split([linear.joint_features for linear in linears], dim=-1)


def project_heads(inputs: Tensor, head_dim: int, *linears: nn.Module) -> list[Tensor]:
    """`project` for attention: (rows, tokens, in) -> (rows, heads, tokens, head_dim) of each layer."""
    return [output.unflatten(-1, (-1, head_dim)).transpose(1, 2) for output in project(inputs, *linears)]


def kernel_rows(rows: int) -> int:
    """How many of `rows` the next product takes: at most 512, perhaps up to 15 more than there are.

    oneDNN compiles and keeps half a megabyte of kernels for each number of rows it meets: prompts of all lengths would
    fill gigabytes. There are 54 sizes here; small ones, where decoding spends its time, are exact.
    """
    if rows <= 16:
        return rows
    step = 8 if rows <= 128 else 16
    return min(-(-rows // step) * step, LARGEST_KERNEL)


class PackedMatrix:
    """The weights of layers that read the same inputs, stacked: (..., in) -> (..., all out), contiguous.

    Not a module, because a blocked tensor has no strides and cannot be saved as it is. `sizes_recur` says that inputs
    come in few sizes, so that each gets a kernel of its own.
    """

    def __init__(self, linears: Sequence[nn.Linear], sizes_recur: bool = False):
        self.sizes_recur = sizes_recur
        parts = [part for linear in linears for part in parts_of(linear)]
        weights, biases = [part.weight.detach() for part in parts], [part.bias for part in parts]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)

    def plain(self) -> Tensor:
        """(all out, in)."""
        return self.packed.to_dense()

    def serves(self, linears: Sequence[nn.Module]) -> bool:
        return all(getattr(linear, "joint", None) is self for linear in linears)

    def __call__(self, inputs: Tensor) -> Tensor:
        # Without this the product would pass a wrong gradient on, and only warn.
        if inputs.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a packed layer has no gradient: use torch.no_grad(), or a network that is not packed")
        assert inputs.dtype == self.dtype, (inputs.dtype, self.dtype)
        rows = inputs.numel() // self.in_features
        if self.sizes_recur or kernel_rows(rows) == rows:
            return self._multiply(inputs)
        output = self._multiply_pieces(inputs.reshape(rows, self.in_features))
        return output.view(*inputs.shape[:-1], self.out_features)

    def padded_rows(self, rows: int) -> int:
        """The least number of rows, `rows` or a few more, that is multiplied without padding it to a kernel's size."""
        if self.sizes_recur:
            return rows
        pieces, rest = divmod(rows, LARGEST_KERNEL)
        return pieces * LARGEST_KERNEL + kernel_rows(rest)

    def _multiply(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")

    def _multiply_pieces(self, inputs: Tensor) -> Tensor:
        """(rows, in) -> (rows, out)."""
        if len(inputs) <= LARGEST_KERNEL:
            return self._multiply_padded(inputs)
        output = inputs.new_empty(len(inputs), self.out_features)
        for piece, place in zip(inputs.split(LARGEST_KERNEL), output.split(LARGEST_KERNEL), strict=True):
            place.copy_(self._multiply_padded(piece))
        return output

    def _multiply_padded(self, inputs: Tensor) -> Tensor:
        missing = kernel_rows(len(inputs)) - len(inputs)
        if missing == 0:  # padding with nothing would copy
            return self._multiply(inputs)
        return self._multiply(nn.functional.pad(inputs, (0, 0, 0, missing)))[: len(inputs)]


class PackedInt8Matrix(PackedMatrix):
    """The same for weights in int8 with a scale for each output; inputs become int8 too, each row by its own scale.

    Without VNNI oneDNN adds two products in 16 bits, which hold 7 bits of the inputs.
    """

    def __init__(self, linears: Sequence[nn.Linear], sizes_recur: bool = False):
        self.sizes_recur = sizes_recur
        parts = [part for linear in linears for part in parts_of(linear)]
        weights, biases = [part.weight for part in parts], [part.bias for part in parts]
        values = torch.cat([weight.qdata for weight in weights])
        for linear in linears:  # so that no more than two copies are there
            linear.weight.qdata = values[:0].clone()
        self.out_features, self.in_features = values.shape
        self.dtype = weights[0].dtype
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self.packed = torch.ops.onednn.qlinear_prepack(values, [ROWS_HINT, self.in_features])
        self.scales = torch.cat([weight.scale.flatten() for weight in weights]).float()
        self.zeros = torch.zeros(self.out_features, dtype=torch.int32)
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63

    def plain(self) -> Tensor:
        return self.packed.to_dense().t() * self.scales[:, None]

    def _multiply(self, inputs: Tensor) -> Tensor:
        scale = inputs.abs().amax(dim=-1, keepdim=True).div_(self.levels).clamp_(min=SMALLEST_SCALE)
        zero = self.levels + 1
        values = (inputs / scale).round_().add_(zero).to(torch.uint8).view(-1, self.in_features)
        weights = self.packed, self.scales, self.zeros
        output = torch.ops.onednn.qlinear_pointwise(
            values, 1.0, zero, *weights, None, 1.0, 0, torch.float32, "none", [], ""
        )
        output = output.view(*inputs.shape[:-1], -1).mul_(scale)
        return output if self.bias is None else output.add_(self.bias)


def parts_of(linear: nn.Module) -> list[nn.Module]:
    """The layer itself, and the `additional_fc` that a decoupled one may have."""
    return [linear, *linear.children()]


class PackedLinear(nn.Module):
    """An `nn.Linear` or `IdeficsDecoupledLinear` for inference on the CPU: (..., in) -> (..., out).

    Its weight lies in `joint` from row `start` on, alone or with those of layers that read the same inputs, whose
    outputs `project` computes at once. The few rows of an `additional_fc` are kept plain too. The results are those of
    the plain layer but for rounding (relative 1e-6 in fp32). Raises RuntimeError where a gradient is asked for, and
    where the layer is to leave the CPU or its type.
    """

    def __init__(self, linear: nn.Linear, joint: PackedMatrix | None = None, start: int = 0):
        super().__init__()
        self.out_features, self.dtype = linear.out_features, linear.weight.dtype
        self.joint_features = sum(part.out_features for part in parts_of(linear))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        for name, part in linear.named_children():
            self.add_module(name, part.requires_grad_(False))
        self.joint, self.start = joint or PackedMatrix([linear]), start
        self.train(linear.training)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.joint(inputs)[..., self.start : self.start + self.joint_features]

    def plain_weight(self) -> Tensor:
        """A copy of the weight, (out, in)."""
        return self.joint.plain()[self.start : self.start + self.out_features].clone()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.plain_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        moved = fn(torch.empty(0, dtype=self.dtype))
        if moved.device.type != "cpu" or moved.dtype != self.dtype:
            raise RuntimeError(
                f"a packed layer cannot become {moved.dtype} on {moved.device}: load the network again for that"
            )
        return super()._apply(fn, recurse)


def pack_linears(model: nn.Module) -> None:
    """Replace the linear layers below `model`, one by one, by packed ones, and freeze what they keep plain.

    Those that a module names in `joint_linears` read the same inputs and become one matrix; below a module that says
    `sizes_recur` each number of rows has its own kernel. Left alone: layers of shapes whose plain product is measured
    to be clearly faster, layers on another device than the CPU or of a type that oneDNN does not multiply on this
    machine, small ones, those that share a weight with another module (a tied head would need a second copy), and
    other subclasses of `nn.Linear`. Without oneDNN on an AVX2 or AVX-512 processor nothing changes.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    dtypes = packable_dtypes()
    packable = {
        id(module.weight) for module in model.modules() if _is_packable(module, dtypes) and uses[id(module.weight)] == 1
    }
    groups = list(_groups(model, packable))
    plain = _known_faster_plain({_shapes(group): group for group in groups})
    packed = [group for group in groups if _shapes(group) not in plain]
    if packed:
        taken = {id(parent.get_submodule(name).weight) for parent, names, _ in packed for name in names}
        _leave_mapped_files(parameter for parameter in model.parameters() if id(parameter) not in taken)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what int8 weights leave free
    for group in packed:
        is_quantized = is_int8(_linears(group)[0].weight)
        _pack(*group)
        if is_quantized and trim is not None:
            trim(0)


def packable_dtypes() -> frozenset[torch.dtype]:
    """The types in which oneDNN multiplies packed weights on this machine."""
    operators = torch.ops.mkldnn
    has_oneDNN = torch.backends.mkldnn.is_available() and hasattr(operators, "_reorder_linear_weight")
    if not has_oneDNN or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return frozenset()
    supported = {
        torch.float32: True,
        torch.bfloat16: operators._is_mkldnn_bf16_supported(),
        torch.float16: operators._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, is_supported in supported.items() if is_supported)


def _is_packable(module: nn.Module, dtypes: frozenset[torch.dtype]) -> bool:
    if type(module) not in (nn.Linear, IdeficsDecoupledLinear):
        return False
    weight, kinds = module.weight, {is_int8(part.weight) for part in parts_of(module)}
    if len(kinds) > 1 or (type(weight) is not nn.Parameter and not is_int8(weight)):
        return False
    return weight.device.type == "cpu" and weight.dtype in dtypes and min(weight.shape) >= SHORTEST_SIDE


def is_int8(weight: Tensor) -> bool:
    """Whether it is torchao's, for inputs in int8 too, with zero in the middle."""
    if type(weight).__name__ != "Int8Tensor" or weight.act_quant_kwargs is None:
        return False
    return weight.zero_point is None or not weight.zero_point.any()


def _leave_mapped_files(parameters: Iterable[nn.Parameter]) -> None:
    """Copy parameters that lie in a mapped checkpoint file.

    The file is mapped as a whole: one plain tensor left in it would keep all that is packed in memory. Storages that
    torch allocated itself can be resized, mapped ones cannot.
    """
    for parameter in parameters:
        if parameter.device.type == "cpu" and not parameter.untyped_storage().resizable():
            parameter.data = parameter.data.clone()


def _groups(module: nn.Module, packable: Collection[int], sizes_recur: bool = False) -> Iterator[Group]:
    """By name: a reference to a replaced layer would keep its weight in memory."""
    sizes_recur = getattr(module, "sizes_recur", sizes_recur)
    names = [
        name for name, child in module.named_children() if isinstance(child, nn.Linear) and id(child.weight) in packable
    ]
    joint = [name for name in getattr(module, "joint_linears", ()) if name in names]
    if len({is_int8(module.get_submodule(name).weight) for name in joint}) > 1:
        joint = []
    for group in filter(None, [joint, *([name] for name in names if name not in joint)]):
        yield module, group, sizes_recur
    for child in module.children():
        yield from _groups(child, packable, sizes_recur)


def _linears(group: Group) -> list[nn.Linear]:
    parent, names, _ = group
    return [parent.get_submodule(name) for name in names]


def _shapes(group: Group) -> Hashable:
    """What decides how fast a group is."""
    return group[2], *((linear.weight.shape, linear.weight.dtype) for linear in _linears(group))


def _pack(parent: nn.Module, names: Sequence[str], sizes_recur: bool) -> None:
    linears = [parent.get_submodule(name) for name in names]
    joint = (PackedInt8Matrix if is_int8(linears[0].weight) else PackedMatrix)(linears, sizes_recur)
    start = 0
    for name, linear in zip(names, linears, strict=True):
        packed = PackedLinear(linear, joint, start)
        linear.__dict__.pop("extra_repr", None)  # torchao's, bound to the layer itself: it would keep the weight
        setattr(parent, name, packed)
        start += packed.joint_features


# ---- which is faster


def _known_faster_plain(groups: Mapping[Hashable, Group]) -> set[Hashable]:
    """`_faster_plain`, as it was once found on this machine."""
    shapes = list(groups)
    measured = f"plain {shapes} {torch.__version__} {torch.get_num_threads()}"

    def measure() -> list[int]:
        found = _faster_plain(groups)
        return [place for place, shape in enumerate(shapes) if shape in found]

    return {shapes[place] for place in once_per_machine(measured, measure)}


def _faster_plain(groups: Mapping[Hashable, Group]) -> set[Hashable]:
    """The keys of groups whose plain products take clearly less time than the packed one, in a run's proportions."""
    matrices = {
        key: PackedMatrix(_linears(group), group[2])
        for key, group in groups.items()
        if sum(_measured_bytes(linear.weight) for linear in _linears(group)) >= MEASURED_BYTES
    }
    found = set(matrices)
    for passes in ({DECODE_ROWS: 1}, {DECODE_ROWS: STEPS, PREFILL_ROWS: 1}):  # noise alone is not found twice
        times = {key: {IMAGE_ROWS: 1} if groups[key][2] else passes for key in found}
        ways = {
            (key, rows): both_ways(_linears(groups[key]), matrices[key], rows) for key in found for rows in times[key]
        }
        seconds = least_seconds(ways)
        for key in times:
            plain, packed = (sum(n * seconds[key, rows][way] for rows, n in times[key].items()) for way in (0, 1))
            if plain >= CLEARLY_FASTER * packed:
                found.remove(key)
    return found


def _measured_bytes(weight: Tensor) -> int:
    return 0 if is_int8(weight) else weight.nbytes  # plain, int8 is far slower where there is no VNNI


def both_ways(linears: Sequence[nn.Linear], matrix: PackedMatrix, rows: int) -> tuple[Way, Way]:
    """Plain and packed."""
    inputs = torch.ones(rows, matrix.in_features, dtype=matrix.dtype)
    return lambda: [linear(inputs) for linear in linears], lambda: matrix(inputs)


@torch.inference_mode()
def least_seconds(ways: Mapping[Hashable, Sequence[Way]]) -> dict[Hashable, list[float]]:
    """Of each of the ways the least time it took. All take turns, so that the caches hold what they would in a run."""
    seconds = {key: [float("inf")] * len(calls) for key, calls in ways.items()}
    until = time.perf_counter() + MEASURING_SECONDS
    for done in range(1 + ROUNDS):  # the first compiles kernels
        if done > 2 and time.perf_counter() > until:
            break
        for key, calls in ways.items():
            for place, call in enumerate(calls):
                started = time.perf_counter()
                call()
                if done:
                    seconds[key][place] = min(seconds[key][place], time.perf_counter() - started)
    return seconds


def seconds_of_layer(hidden: int, intermediate: int, rows: int, dtype: torch.dtype) -> float:
    """What the products of a layer of this width take, each in the faster of the ways there are."""
    shapes = (3 * hidden, hidden), (hidden, hidden), (2 * intermediate, hidden), (hidden, intermediate)
    linears = [nn.Linear(columns, out, bias=False, dtype=dtype).requires_grad_(False) for out, columns in shapes]
    if dtype in packable_dtypes():
        ways = [both_ways([linear], PackedMatrix([linear]), rows) for linear in linears]
    else:
        ways = [(partial(linear, torch.ones(rows, linear.in_features, dtype=dtype)),) for linear in linears]
    return sum(map(min, least_seconds(dict(enumerate(ways))).values()))
