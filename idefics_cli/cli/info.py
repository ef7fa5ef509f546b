"""What `idefics info` finds: versions, devices and missing extras, and of a model whether and how it would run here."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from idefics_cli import __version__
from idefics_cli.checkpoint import quantize

if TYPE_CHECKING:
    import torch

    from idefics_cli.checkpoint.request import ModelRequest
    from idefics_cli.engine.memory_budget import MemoryPlan

EXTRAS = {  # and the module by which each is known, and what for
    "heif": ("pillow_heif", "HEIC images"),
    "jxl": ("pillow_jxl", "JPEG XL images"),
    "peft": ("peft", "--adapter"),
    "quantize": ("torchao", "--quantize"),
    "ray": ("ray", "--ray"),
    "score": ("pycocoevalcap", "CIDEr"),
}


def machine_facts(request: ModelRequest) -> dict[str, str]:
    import platform
    from importlib import metadata

    import torch

    from idefics_cli.checkpoint.devices import resolve_device, resolve_dtype

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ("torch", "transformers", "pillow", "pyarrow")
    device = resolve_device(request.device)
    return {
        "idefics": __version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "cuda": ", ".join(cuda) or "none",
        "threads": str(torch.get_num_threads()),
        "device": str(device),
        "dtype": str(resolve_dtype(request.dtype, device)).removeprefix("torch."),
        "missing": _missing_extras(),
    }


def _missing_extras() -> str:
    missing = {extra: use for extra, (module, use) in EXTRAS.items() if find_spec(module) is None}
    if not missing:
        return "nothing"
    named = ", ".join(f"{extra} ({use})" for extra, use in missing.items())
    return f"{named}: pip install 'idefics-cli[{','.join(missing)}]'"


def model_facts(request: ModelRequest, as_run: bool = False) -> dict[str, str]:
    """Raises what a run with the model would. With `as_run` the memory plan is that of the run's own dtype alone."""
    import torch

    from idefics_cli.checkpoint.devices import DTYPES, dtype_name, resolve_device, resolve_dtype
    from idefics_cli.checkpoint.find import bytes_to_fetch, check_model_request, find_checkpoint
    from idefics_cli.checkpoint.load import meta_network, require_memory, side_files
    from idefics_cli.engine.memory_budget import MemoryPlan, free_bytes

    check_model_request(request)
    if (size := bytes_to_fetch(request)) is not None:
        return {"model": f"{request.model}, not cached: {size / 1e6:,.1f} MB of weights are fetched when it is used"}
    device = resolve_device(request.device)
    checkpoint = find_checkpoint(request)
    config, *_ = side_files(checkpoint)
    stored = sum(file.stat().st_size for file in checkpoint.weight_files)
    expected = meta_network(checkpoint, config)
    dtype = resolve_dtype(request.dtype, device, None if request.quantize else config)
    kind = quantize.kind_of(config, request.quantize)
    needed = require_memory(expected, device, dtype, kind=request.quantize)
    held = kind or dtype_name(dtype)
    adapter = "" if request.adapter is None else f", with the adapter {request.adapter}"
    free = free_bytes(device)
    fact = (
        f"{checkpoint.folder}, {stored / 1e6:,.1f} MB of weights{adapter}; takes {needed / 1e6:,.1f} MB in "
        f"{held} of the {free / 1e6:,.1f} MB free on {device}"
    )
    if kind:
        return {"model": fact}
    plans = {
        f"memory plan in {name}": MemoryPlan.of(config, needed // dtype.itemsize, getattr(torch, full).itemsize)
        for name, full in DTYPES.items()
        if not as_run or name == held
    }
    return {**{name: _shown_plan(plan, free, device) for name, plan in plans.items()}, "model": fact}


def fit_facts(request: ModelRequest, number: int, gigabytes: float | None) -> dict[str, str]:
    """Of a model that need not be on this machine; of one on the hub only its configuration is fetched."""
    import torch

    from idefics_cli.checkpoint.devices import resolve_device
    from idefics_cli.checkpoint.find import find_checkpoint
    from idefics_cli.checkpoint.fit import on_devices
    from idefics_cli.checkpoint.load import load_config
    from idefics_cli.engine.memory_budget import free_bytes
    from idefics_cli.model.modeling import IdeficsForVisionText2Text

    device = resolve_device(request.device)
    config = load_config(find_checkpoint(request, with_weights=False))
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(config)
    shared = 1 if device.type == "cuda" else number  # processes on CPUs have one memory
    memory = free_bytes(device) // shared if gigabytes is None else int(gigabytes * 1e9)
    return on_devices(model, number, memory, is_cuda=gigabytes is not None or device.type == "cuda")


def _shown_plan(plan: MemoryPlan, free: int, device: torch.device) -> str:
    rows = [plan.rows(free - plan.weights, device.type == "cuda", beams) for beams in (1, 3)]
    parts = {
        "of weights": plan.weights,
        "for a token of a row": plan.slot,
        "while that is read": plan.token,
        "for a row's image": plan.image,
        "for a beam": plan.query,
        "in the vision tower": plan.vision,
        "in caches at most": plan.caches,
    }
    shown = ", ".join(f"{size / 1e6:,.2f} MB {name}" for name, size in parts.items())
    fits = f"{rows[0]} rows at a time, {rows[1]} with 3 beams" if free > plan.weights else f"does not fit on {device}"
    return f"{shown}; {fits}"
