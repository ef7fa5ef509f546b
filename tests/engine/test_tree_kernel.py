"""The kernels written for Triton: interpreted beside plain torch, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

from idefics_cli.engine import tree_kernel  # noqa: E402
from idefics_cli.model import triton_kernels  # noqa: E402

HERE = Path(__file__).parent
LARGEST_PROGRAM = 128  # registers of a thread


def test_kernels_interpreted_are_plain_torch() -> None:
    """1 to 16 beams, heads of 64, 96 and 128, with and without a prefix and rotation, NaN in slots not in use."""
    run = [sys.executable, str(HERE / "interpreted_kernels.py")]
    done = subprocess.run(run, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def resources(kernel: Any, constants: dict[str, Any], arch: int, path: Path, num_warps: int = 4) -> tuple[int, int]:
    """Registers and bytes of spilled ones of a bf16 kernel, compiled for a compute capability."""
    types = {"newest_ptr": "*i64", "widths_ptr": "*i64", "lengths_ptr": "*i64", "position_ptr": "*i64"}
    types |= {"ancestors_ptr": "*u8", "inv_freq_ptr": "*fp32"}
    types |= dict.fromkeys(("start_ptr", "start_log_sum_ptr", "log_sum_ptr"), "*fp32")
    types |= {"out_ptr": "*fp32"} if kernel is tree_kernel.part_attention_kernel else {}
    types |= dict.fromkeys(("scale", "eps", "scaling"), "fp32")
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name.endswith("stride"))
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    path.write_bytes(triton.compile(source, target=target, options={"num_warps": num_warps}).asm["cubin"])
    dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    said = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"(\w+):(\d+)", said))
    return int(used["REG"]), int(used["LOCAL"]) + int(used["STACK"])


def no(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("has_start", [False, True])
def test_tree_attention_compiles_without_spilling(arch: int, has_start: bool, tmp_path: Path) -> None:
    shape = {"HEADS": 32, "BEAMS": 3, "DIM": 128, "BEAM_BLOCK": 16, "DIM_BLOCK": 128, "SLOT_BLOCK": 32}
    constants = {**shape, "ROTATES": not has_start, "HAS_START": has_start, "PRECISION": "tf32"}
    constants |= no("cos_ptr", "sin_ptr") if has_start else no("start_ptr", "start_log_sum_ptr")
    registers, spilled = resources(tree_kernel.tree_attention_kernel, constants, arch, tmp_path / "kernel")
    assert registers <= LARGEST_PROGRAM and spilled == 0, (registers, spilled)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("queries", "is_causal", "has_mask"), [(16, False, False), (32, True, False), (32, False, True)]
)
def test_attention_over_a_part_compiles(
    arch: int, queries: int, is_causal: bool, has_mask: bool, tmp_path: Path
) -> None:
    shape = {"DIM": 128, "QUERY_BLOCK": queries, "DIM_BLOCK": 128, "SLOT_BLOCK": 32, "PRECISION": "tf32"}
    constants = {**shape, "IS_CAUSAL": is_causal, "HAS_MASK": has_mask} | ({} if has_mask else no("mask_ptr"))
    registers, spilled = resources(
        tree_kernel.part_attention_kernel, constants, arch, tmp_path / "kernel", num_warps=queries // 4
    )
    most = 8 if arch == 100 else 0  # two registers, by Triton 3.7; none by 3.9
    assert registers <= LARGEST_PROGRAM and spilled <= most, (registers, spilled)


LAYERS = [
    (triton_kernels.add_norm_kernel, {"GATES": 1, "NORMS": True, "BLOCK": 4096}, 8),
    (triton_kernels.silu_mul_kernel, {"BLOCK": 1024}, 4),
    (triton_kernels.angles_kernel, {"DIM": 128, "BLOCK": 128}, 1),
    (triton_kernels.rotate_kernel, {"HEADS": 32, "DIM": 128, "BLOCK": 4096}, 8),
]


@pytest.mark.parametrize(("kernel", "constants", "num_warps"), LAYERS, ids=lambda each: getattr(each, "__name__", ""))
def test_kernels_of_the_layers_compile(kernel: Any, constants: dict[str, Any], num_warps: int, tmp_path: Path) -> None:
    registers, spilled = resources(kernel, constants, 90, tmp_path / "kernel", num_warps)
    assert registers <= LARGEST_PROGRAM and spilled <= (40 if kernel is triton_kernels.angles_kernel else 0)
