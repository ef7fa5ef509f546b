"""The benchmark from options to a report: plain numbers that JSON takes as they are, and tables for people."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from idefics_cli.bench.compare import Bench, Pair, Run, agreement, timed_runs, warm_up
from idefics_cli.bench.options import BenchOptions
from idefics_cli.bench.subjects import checkpoint_subject, random_subject, require_space
from idefics_cli.checkpoint.devices import resolve_device

if TYPE_CHECKING:
    from rich.table import Table

PHASES = ("vision", "prefill", "decode")
WORK = ("images", "prompt_tokens", "steps")


def run(options: BenchOptions, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The whole benchmark. `say` is told what is being measured."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.request.device)
    prepare = checkpoint_subject if options.random is None else random_subject
    subject = prepare(options, device)
    require_space(subject, options)
    bench = Bench(subject, options)
    warm = warm_up(bench, say)
    return report(bench, warm, *timed_runs(bench, say))


def report(bench: Bench, warm: tuple[Pair, Pair], pairs: Sequence[Pair], phased: Sequence[Run]) -> dict[str, Any]:
    (first, _), (metered, their_metered) = warm
    ours, theirs = zip(*pairs, strict=True)
    ratios = quotients((run.seconds for run in theirs), (run.seconds for run in ours))
    kept, rise = first.memory.kept, metered.memory.rise
    return {
        "machine": machine(bench.device),
        "versions": versions(),
        "settings": settings(bench),
        "ours": {
            # What our first call keeps counts as ours: caches are part of how it works.
            **side(bench.options, ours, None if kept is None or rise is None else kept + rise),
            "first_call_seconds": first.seconds,
            "layout_seconds": bench.layout_seconds,
            "layout_bytes": bench.layout_bytes,
        },
        "transformers": side(bench.options, theirs, their_metered.memory.rise),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "agreement": agreement(bench, [*warm, *pairs]),
        "phases": phase_report(phased, bench.bandwidth),
        "work": {name: getattr(phased[-1].times, name) for name in WORK},
    }


def phase_report(phased: Sequence[Run], bandwidth: float | None) -> dict[str, Any]:
    """For each phase: seconds, its floor, and how far above its own floor each run stands. Medians count."""
    phases: dict[str, Any] = {
        name: one_phase([getattr(run.times, name) for run in phased], [run.floors[name] for run in phased])
        for name in PHASES
    }
    inside = sum(phase["seconds"] for phase in phases.values())
    phases["other"] = {"seconds": statistics.median(run.seconds for run in phased) - inside}
    if bandwidth is not None:
        phases["copy_bandwidth_bytes_per_second"] = bandwidth
        phases["share_in_phases"] = inside / (inside + phases["other"]["seconds"])
    return phases


def one_phase(seconds: Sequence[float], floors: Sequence[dict[str, float]]) -> dict[str, Any]:
    """`seconds` of the phase in each run, with the parts of that run's floor."""
    products = [max(floor["products"], floor.get("bytes", 0.0)) for floor in floors]
    whole = [max(floor["products"] + floor["attention"], floor.get("bytes", 0.0)) for floor in floors]
    above = quotients(seconds, whole)
    read = quotients((floor.get("bytes", 0.0) for floor in floors), seconds)
    return {
        "seconds": statistics.median(seconds),
        "floor_seconds": statistics.median(whole),
        "floor": {part: statistics.median(floor[part] for floor in floors) for part in floors[0]},
        "above_floor": statistics.median(above) if above else None,
        "all_above_floor": above,
        "above_products": statistics.median(quotients(seconds, products)) if above else None,
        "of_copy_bandwidth": statistics.median(read) if read and "bytes" in floors[0] else None,
    }


def quotients(seconds: Iterable[float], others: Iterable[float]) -> list[float]:
    """Without those where there was nothing to do."""
    return [one / other for one, other in zip(seconds, others, strict=True) if other]


def side(options: BenchOptions, runs: Sequence[Run], peak: int | None) -> dict[str, Any]:
    seconds = statistics.median(run.seconds for run in runs)
    return {
        "seconds": seconds,
        "all_seconds": [run.seconds for run in runs],
        "rows_per_second": options.num_rows / seconds,
        "images_per_second": options.num_images / seconds,
        "tokens": statistics.median(sum(len(token_ids) for token_ids, _ in run.texts) for run in runs),
        "peak_bytes": peak,
    }


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "processor": processor_name(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (FileNotFoundError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    installed = {package: metadata.version(package) for package in ("torch", "transformers")}
    return {"python": platform.python_version(), **installed}


def settings(bench: Bench) -> dict[str, Any]:
    options = bench.options
    return {
        **asdict(replace(options, decoding=options.texts)),
        "model": f"random {options.random}" if options.random else options.request.model,
        "parameters": sum(parameter.numel() for parameter in bench.theirs.parameters()),
        "dtype": str(bench.theirs.dtype).removeprefix("torch."),
        "rows": options.num_rows,
        "length": "fixed" if options.fixed_length else "varied",
    }


# ---- tables for people


def comparison_table(found: dict[str, Any]) -> Table:
    from rich.table import Table

    ours, theirs, chosen = found["ours"], found["transformers"], found["settings"]
    title = f"{chosen['model']}, {chosen['dtype']}, {chosen['rows']} rows, {chosen['shots']} shots"
    table = Table("", "idefics", "transformers", title=title, title_justify="left")
    for name, label in (("seconds", "seconds"), ("rows_per_second", "rows/s"), ("images_per_second", "images/s")):
        table.add_row(label, f"{ours[name]:.2f}", f"{theirs[name]:.2f}")
    table.add_row("first call, s", f"{ours['first_call_seconds']:.2f}", "")
    table.add_row("images encoded", str(found["work"]["images"]), "")
    table.add_row("peak memory over weights, MB", megabytes(ours["peak_bytes"]), megabytes(theirs["peak_bytes"]))
    table.add_row("times faster", f"{found['ratio']:.2f}", "1")
    same = found["agreement"]
    table.add_row("identical tokens", f"{same['identical']:.2%} of {same['rows']} rows")
    if same["differing_rows"]:
        examined = f"{same['differing_ties']} of {same['differing_examined']} examined are ties"
        table.add_row("differing rows", f"{same['differing_rows']}; {examined}")
    if same["max_score_difference"] is not None:
        table.add_row("largest score difference", f"{same['max_score_difference']:.1e}")
    return table


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def phase_table(phases: dict[str, Any]) -> Table:
    from rich.table import Table

    heads = ("phase", "seconds", "products", "attention", "bytes", "above floor", "GB/s of weights, of a copy's")
    table = Table(*heads, title="Our time by phase")
    for name in PHASES:
        phase, floor = phases[name], phases[name]["floor"]
        shown = [f"{floor[part]:.3f}" if part in floor else "" for part in ("products", "attention", "bytes")]
        above = f"{phase['above_floor']:.2f}×" if phase["above_floor"] is not None else ""
        share = phase["of_copy_bandwidth"]
        rate = "" if share is None else f"{share * phases['copy_bandwidth_bytes_per_second'] / 1e9:.0f}, {share:.0%}"
        table.add_row(name, f"{phase['seconds']:.3f}", *shown, above, rate)
    table.add_row("other", f"{phases['other']['seconds']:.3f}")
    if "share_in_phases" in phases:
        table.add_row("share in phases", f"{phases['share_in_phases']:.1%}")
    return table
