"""Linear layers whose weights lie in oneDNN's blocked layout, for networks that only run inference on the CPU.

The blocked weight replaces the plain one: there are never two copies, but of the layers being packed into one matrix.
One packing serves any number of rows. `state_dict` still gives plain weights under the checkpoints' names, copied for
the purpose; to load, move, convert or train a packed network, call `unpack_linears` first.

This module knows no layers but linear ones, and no decoding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from idefics_cli.model.decoder import IdeficsDecoupledLinear

# Each call costs some 10 µs beside the product itself; a matrix with a shorter side does not earn that back.
SHORTEST_SIDE = 128
# oneDNN is told for how many rows to lay a weight out. Measured from 8 to 2,056, all hints serve all sizes alike.
ROWS_HINT = 64
LARGEST_KERNEL = 512  # rows; what is beyond goes in pieces


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
    """The weights of layers that read the same inputs, one below the other: (..., in) -> (..., all out), contiguous.

    No module: a blocked tensor has no strides, and cannot be saved as it is. `sizes_recur` says that the numbers of
    rows are few, so that each gets a kernel of its own.
    """

    def __init__(self, linears: Sequence[nn.Linear], sizes_recur: bool = False):
        self.sizes_recur = sizes_recur
        parts = [part for linear in linears for part in parts_of(linear)]
        weights, biases = [part.weight.detach() for part in parts], [part.bias for part in parts]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)

    def __call__(self, inputs: Tensor) -> Tensor:
        # Without this the product would pass a wrong gradient on, and only warn.
        if inputs.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a packed layer has no gradient: run under torch.no_grad(), or unpack_linears first")
        assert inputs.dtype == self.dtype, (inputs.dtype, self.dtype)
        rows = inputs.numel() // self.in_features
        if self.sizes_recur or kernel_rows(rows) == rows:
            return self._multiply(inputs)
        output = self._multiply_pieces(inputs.reshape(rows, self.in_features))
        return output.view(*inputs.shape[:-1], self.out_features)

    def rows_taken(self, rows: int) -> int:
        """The least number of rows, `rows` or a few more, that is multiplied without padding it to a kernel's size."""
        if self.sizes_recur:
            return rows
        pieces, rest = divmod(rows, LARGEST_KERNEL)
        return pieces * LARGEST_KERNEL + kernel_rows(rest)

    def _multiply(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, "none", [], "")

    def _multiply_pieces(self, inputs: Tensor) -> Tensor:
        """(rows, in) -> (rows, out), with a few zero rows behind the last piece where its size has no kernel."""
        rows = inputs.shape[0]
        if kernel_rows(rows) >= rows:
            return self._multiply_padded(inputs)
        output = inputs.new_empty(rows, self.out_features)
        start = 0
        while start < rows:
            piece = inputs[start : start + kernel_rows(rows - start)]
            output[start : start + piece.shape[0]] = self._multiply_padded(piece)
            start += piece.shape[0]
        return output

    def _multiply_padded(self, inputs: Tensor) -> Tensor:
        rows = inputs.shape[0]
        missing = kernel_rows(rows) - rows
        if missing == 0:  # padding with nothing would copy
            return self._multiply(inputs)
        return self._multiply(nn.functional.pad(inputs, (0, 0, 0, missing)))[:rows]

    def plain_weight(self) -> Tensor:
        """A copy, (out, in)."""
        return self._packed.to_dense()


def parts_of(linear: nn.Linear) -> list[nn.Linear]:
    """The layer itself, and the few rows that a decoupled one has besides."""
    is_in_two = isinstance(linear, IdeficsDecoupledLinear) and linear.out_additional_features > 0
    return [linear, linear.additional_fc] if is_in_two else [linear]


class PackedLinear(nn.Module):
    """An `nn.Linear` for inference on the CPU: (..., in) -> (..., out).

    Its weight lies in `joint` from row `start` on, alone or with those of layers that read the same inputs, whose
    outputs `project` asks for at once. The results are those of the plain layer but for rounding (relative 1e-6 in
    fp32). Raises RuntimeError where a gradient is asked for, and where the layer is to leave the CPU or its type.
    """

    def __init__(self, linear: nn.Linear, joint: PackedMatrix | None = None, start: int = 0):
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.joint, self.start = joint or PackedMatrix([linear]), start
        self.train(linear.training)

    @property
    def joint_features(self) -> int:
        """How many of the joint matrix's outputs are this layer's."""
        return self.out_features

    def forward(self, inputs: Tensor) -> Tensor:
        return self.joint(inputs)[..., self.start : self.start + self.joint_features]

    def plain_weight(self) -> Tensor:
        """A copy of the weight, (out, in)."""
        return self.joint.plain_weight()[self.start : self.start + self.out_features].clone()

    def unpacked(self) -> nn.Linear:
        """The plain layer again, frozen."""
        return self._restore(nn.Linear(self.in_features, self.out_features, device="meta"))

    def _restore(self, linear: nn.Linear) -> nn.Linear:
        linear.weight = nn.Parameter(self.plain_weight(), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, dtype={self.dtype}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.plain_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        moved = fn(torch.empty(0, dtype=self.dtype))
        if moved.device.type != "cpu" or moved.dtype != self.dtype:
            raise RuntimeError(
                f"a packed layer cannot become {moved.dtype} on {moved.device}: call unpack_linears first"
            )
        return super()._apply(fn, recurse)


class PackedDecoupledLinear(PackedLinear):
    """An `IdeficsDecoupledLinear`: the few rows of `additional_fc` are kept plain too, and multiplied with the rest."""

    def __init__(self, linear: IdeficsDecoupledLinear, joint: PackedMatrix | None = None, start: int = 0):
        super().__init__(linear, joint, start)
        self.out_additional_features = linear.out_additional_features
        self.partially_freeze = linear.partially_freeze
        if self.out_additional_features > 0:
            self.additional_fc = linear.additional_fc.requires_grad_(False)

    @property
    def joint_features(self) -> int:
        return self.out_features + self.out_additional_features

    def unpacked(self) -> IdeficsDecoupledLinear:
        with torch.device("meta"):
            linear = IdeficsDecoupledLinear(
                self.in_features,
                self.out_features,
                self.out_additional_features,
                bias=self.bias is not None,
                partially_freeze=self.partially_freeze,
            )
        if self.out_additional_features > 0:
            linear.additional_fc = self.additional_fc
        return self._restore(linear)


PACKED_FORMS: dict[type[nn.Linear], type[PackedLinear]] = {
    nn.Linear: PackedLinear,
    IdeficsDecoupledLinear: PackedDecoupledLinear,
}


def pack_linears(model: nn.Module) -> None:
    """Replace the linear layers below `model`, one by one, by packed ones, and freeze what they keep plain.

    Those that a module names in `joint_linears` read the same inputs and become one matrix; below one that says
    `sizes_recur` each number of rows has its own kernel. Left alone: layers on another device than the CPU or of a type
    that oneDNN does not multiply here, small ones, those that share a weight with another module (a tied head would
    need a second copy), and subclasses of `nn.Linear` that are not this package's. Without oneDNN on an AVX2 or AVX-512
    processor nothing changes.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    dtypes = packable_dtypes()
    packable = {
        id(module.weight) for module in model.modules() if _is_packable(module, dtypes) and uses[id(module.weight)] == 1
    }
    if packable:
        _leave_mapped_files(parameter for parameter in model.parameters() if id(parameter) not in packable)
        for parent, names, sizes_recur in list(_groups(model, packable, sizes_recur=False)):
            _pack(parent, names, sizes_recur)


def _groups(
    module: nn.Module, packable: Collection[int], sizes_recur: bool
) -> Iterator[tuple[nn.Module, list[str], bool]]:
    """Which children of which module are to be one matrix. Names only: a reference would keep a weight in memory."""
    sizes_recur = getattr(module, "sizes_recur", sizes_recur)
    names = [
        name for name, child in module._modules.items() if isinstance(child, nn.Linear) and id(child.weight) in packable
    ]
    joint = [name for name in getattr(module, "joint_linears", ()) if name in names]
    if joint:
        yield module, joint, sizes_recur
    for name, child in module._modules.items():
        if name in names and name not in joint:
            yield module, [name], sizes_recur
        elif child is not None and name not in names:
            yield from _groups(child, packable, sizes_recur)


def _pack(parent: nn.Module, names: Sequence[str], sizes_recur: bool) -> None:
    linears = [parent._modules[name] for name in names]
    joint = PackedMatrix(linears, sizes_recur)
    start = 0
    for name, linear in zip(names, linears, strict=True):
        packed = PACKED_FORMS[type(linear)](linear, joint, start)
        setattr(parent, name, packed)
        start += packed.joint_features


def unpack_linears(model: nn.Module) -> None:
    """Undo `pack_linears`, one by one; weights come back bit by bit as they were, frozen."""
    _unpack(model)


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
    if type(module) not in PACKED_FORMS:
        return False
    weight = module.weight
    return weight.device.type == "cpu" and weight.dtype in dtypes and min(weight.shape) >= SHORTEST_SIDE


def _leave_mapped_files(parameters: Iterable[nn.Parameter]) -> None:
    """Copy parameters that lie in a mapped checkpoint file.

    The file is mapped as a whole: one plain tensor left in it would keep all that is packed in memory. Storages that
    torch allocated itself can be resized, mapped ones cannot.
    """
    for parameter in parameters:
        if parameter.device.type == "cpu" and not parameter.untyped_storage().resizable():
            parameter.data = parameter.data.clone()


def _unpack(module: nn.Module) -> None:
    """Only names are held while walking: a reference to a replaced layer would keep its weight in memory."""
    for name in list(module._modules):
        child = module._modules[name]
        if isinstance(child, PackedLinear):
            setattr(module, name, child.unpacked())
        elif child is not None:
            _unpack(child)
