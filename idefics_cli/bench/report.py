"""The benchmark from options to a report: plain numbers, JSON as they stand, and tables for people."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from idefics_cli.bench.compare import Bench, EngineFactory, Floors, Measured, Phased, Run, make_engine, measure, warm_up
from idefics_cli.bench.floor import Counts, copy_bandwidth, floor_seconds, work_of
from idefics_cli.bench.subjects import FIRST_CALL, BenchOptions, checkpoint_subject, random_subject, require_room
from idefics_cli.checkpoint import resolve_device, resolve_dtype

if TYPE_CHECKING:
    from rich.table import Table

PHASES = ("vision", "prefill", "decode")


def run(
    options: BenchOptions, say: Callable[[str], None] = lambda line: None, factory: EngineFactory = make_engine
) -> dict[str, Any]:
    """The whole benchmark. `say` is told what is under way."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.request.device)
    dtype = resolve_dtype(options.request.dtype, device)
    prepare = checkpoint_subject if options.random is None else random_subject
    subject = prepare(options, device, dtype)
    require_room(subject, options)
    bench = Bench(subject, options, factory)
    bandwidth = copy_bandwidth(bench.device)
    warm = warm_up(bench, say)

    def time_floors(run: Run) -> Floors:
        say("the bare matrix products")
        return phase_floors(bench, run, bandwidth)

    measured = measure(bench, warm, time_floors, say)
    return report(bench, measured, phase_report(measured.phased, bandwidth))


def phase_floors(bench: Bench, run: Run, bandwidth: float | None) -> Floors:
    """The floor of each phase's work in the run, timed now."""
    work = work_of(bench.theirs, counts_of(bench, run))
    return {name: floor_seconds(work[name], bandwidth) for name in PHASES}


def phase_report(phased: Sequence[Phased], bandwidth: float | None) -> dict[str, Any]:
    """For each phase: seconds, its floor, and how far above its own floor each run stands. Medians count."""
    phases: dict[str, Any] = {
        name: one_phase([each.run.times[name] for each in phased], [each.floors[name] for each in phased])
        for name in PHASES
    }
    inside = sum(phase["seconds"] for phase in phases.values())
    phases["other"] = {"seconds": statistics.median(each.run.seconds for each in phased) - inside}
    if bandwidth is not None:
        phases["copy_bandwidth_bytes_per_second"] = bandwidth
    return phases


def one_phase(seconds: Sequence[float], floors: Sequence[dict[str, float]]) -> dict[str, Any]:
    """`seconds` of the phase in each run, beside the parts of that run's floor."""
    products = [max(floor["products"], floor.get("bytes", 0.0)) for floor in floors]
    whole = [max(floor["products"] + floor["attention"], floor.get("bytes", 0.0)) for floor in floors]
    above = ratios(seconds, whole)
    return {
        "seconds": statistics.median(seconds),
        "floor_seconds": statistics.median(whole),
        "floor": {part: statistics.median(floor[part] for floor in floors) for part in floors[0]},
        "above_floor": statistics.median(above) if above else None,
        "all_above_floor": above,
        "above_products": statistics.median(ratios(seconds, products)) if above else None,
    }


def ratios(seconds: Sequence[float], floors: Sequence[float]) -> list[float]:
    """Empty where a phase has nothing to do."""
    return [one / floor for one, floor in zip(seconds, floors, strict=True) if floor]


def counts_of(bench: Bench, run: Run) -> Counts:
    options = bench.options
    done = {name: round(run.times[name]) for name in ("images", "prompt_tokens", "steps")}
    prompts = bench.subject.prompts.draw(FIRST_CALL)
    lengths = [len(token_ids) for token_ids, _ in run.texts]
    return Counts(
        **done,
        prompts=options.num_rows,
        rows=min(options.batch_size, options.num_rows),
        beams=options.decoding.num_beams,
        prompt_length=statistics.fmean(len(prompt.input_ids) for prompt in prompts),
        text_length=statistics.fmean(lengths),
    )


def report(bench: Bench, measured: Measured, phases: dict[str, Any]) -> dict[str, Any]:
    before = {
        "first_call_seconds": measured.first.ours.seconds,
        "layout_seconds": bench.layout_seconds,
        "layout_bytes": bench.layout_bytes,
    }
    return {
        "machine": machine(bench.device),
        "versions": versions(),
        "settings": settings(bench),
        "ours": {**side(bench.options, measured.ours, measured.our_peak), **before},
        "transformers": side(bench.options, measured.theirs, measured.their_peak),
        "ratio": statistics.median(measured.ratios),
        "ratios": measured.ratios,
        "agreement": measured.agreement,
        "phases": phases,
        "work": {name: measured.phased[-1].run.times[name] for name in ("images", "prompt_tokens", "steps")},
    }


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
        "model": f"random {options.random}" if options.random else options.request.model,
        "parameters": sum(parameter.numel() for parameter in bench.theirs.parameters()),
        "dtype": str(bench.theirs.dtype).removeprefix("torch."),
        "rows": options.num_rows,
        "shots": options.shots,
        "questions_per_image": options.questions_per_image,
        "batch_size": options.batch_size,
        "length": "fixed" if options.fixed_length else "varied",
        "embeddings": options.embeddings,
        "decoding": asdict(options.texts),
        "repeats": options.repeats,
        "seed": options.seed,
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """The report for people."""
    return [comparison_table(found), phase_table(found["phases"])]


def comparison_table(found: dict[str, Any]) -> Table:
    from rich.table import Table

    ours, theirs, same = found["ours"], found["transformers"], found["agreement"]
    told = found["settings"]
    title = f"{told['model']}, {told['dtype']}, {told['rows']} rows, {told['shots']} shots"
    table = Table("", "idefics", "transformers", title=title, title_justify="left")
    for name, label in (("seconds", "seconds"), ("rows_per_second", "rows/s"), ("images_per_second", "images/s")):
        table.add_row(label, f"{ours[name]:.2f}", f"{theirs[name]:.2f}")
    table.add_row("first call, s", f"{ours['first_call_seconds']:.2f}", "")
    table.add_row("images encoded", str(found["work"]["images"]), "")
    table.add_row("peak memory over weights, MB", megabytes(ours["peak_bytes"]), megabytes(theirs["peak_bytes"]))
    table.add_row("times faster", f"{found['ratio']:.2f}", "1")
    table.add_row("identical tokens", f"{same['identical']:.2%} of {same['rows']} rows", "")
    if same["differing_rows"]:
        examined = f"{same['differing_ties']} of {same['differing_examined']} examined are ties"
        table.add_row("differing rows", f"{same['differing_rows']}; {examined}", "")
    if same["max_score_difference"] is not None:
        table.add_row("largest difference of scores", f"{same['max_score_difference']:.1e}", "")
    return table


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def phase_table(phases: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("phase", "seconds", "products", "attention", "bytes", "above floor", title="Where our time goes")
    for name in PHASES:
        phase = phases[name]
        floor = phase["floor"]
        shown = [f"{floor[part]:.3f}" if part in floor else "" for part in ("products", "attention", "bytes")]
        above = f"{phase['above_floor']:.2f}×" if phase["above_floor"] is not None else ""
        table.add_row(name, f"{phase['seconds']:.3f}", *shown, above)
    table.add_row("other", f"{phases['other']['seconds']:.3f}")
    return table
