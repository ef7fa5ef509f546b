"""What `--dry-run` shows: how many rows there are, which columns are read, the first prompt, what memory and disk a run
needs. Checks all that a run checks before it loads a model, and loads none.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from idefics_cli.cli.info import model_facts
from idefics_cli.pipeline.options import STDIN, STDOUT
from idefics_cli.pipeline.prefetch import RunStats
from idefics_cli.pipeline.run import Run
from idefics_cli.pipeline.task import Observer
from idefics_cli.storage.filenames import counted, listed
from idefics_cli.storage.unit_folder import UnitFolder
from idefics_cli.tasks.shown_prompts import FORM, NeedsWeights, prompts_alone, weightless_viewer

if TYPE_CHECKING:
    from idefics_cli.pipeline.task import Task

COMPARED, REPLACED = "which is there: it is compared, and not replaced", "which is there: --overwrite replaces it"
TEXT_BYTES = 300  # of a row of JSON lines, about: one text, its path and its numbers


def dry_run_facts(run: Run) -> Iterator[tuple[str, str]]:
    """Raises what the run would."""
    options, task = run.options, run.task
    task.check(options.request)
    run.check_model(options.request)
    total = run.inputs.total
    number = task.rows_each * (sum(1 for _ in run.inputs.restarted()) if total is None else total)
    yield "rows", f"{number:,}"
    for role, names in run.inputs.chosen.items():
        yield f"column of {role}", listed(names)
    output, overwrite = options.output, options.overwrite
    yield "output", _parts(UnitFolder(output), overwrite) if options.has_parts else _output(output, overwrite)
    yield from _disk(run, number)
    yield from model_facts(options.request, as_run=True).items()
    if run.form.text_column is not None:
        yield "first prompt", _first_prompt(run, task)


def _output(output: str, overwrite: bool) -> str:
    if output == STDOUT:
        return "JSON lines on stdout"
    is_begun = os.path.exists(f"{output}.part")
    if not is_begun and not os.path.exists(output):
        return f"{output}, new"
    if overwrite:
        return f"{output}, {REPLACED}"
    return f"{output}, {'of which a stopped run has left rows: the same command resumes' if is_begun else COMPARED}"


def _parts(folder: UnitFolder, overwrite: bool) -> str:
    if folder.header is None:
        return f"{folder.name}/, new"
    if overwrite:
        return f"{folder.name}/, {REPLACED}"
    done, parts = folder.done().count(1), counted(folder.num_units, "part")
    if done == folder.num_units:
        return f"{folder.name}/, {COMPARED}"
    return f"{folder.name}/, where {done} of {parts} are: the same command makes the others"


def _disk(run: Run, num_rows: int) -> Iterator[tuple[str, str]]:
    output = run.options.output
    folder = os.path.dirname(os.path.abspath(output.rstrip("/")))
    if output == STDOUT or not os.path.isdir(folder):
        return
    needed = num_rows * (_latent_bytes(run) or TEXT_BYTES)
    yield "disk", f"about {needed / 1e6:,.1f} MB of the {shutil.disk_usage(folder).free / 1e6:,.1f} MB free"


def _latent_bytes(run: Run) -> int | None:
    """Of one image, where these are what is written."""
    if run.form.text_column is not None:
        return None
    length, width = weightless_viewer(run.options.request).latents_shape
    return length * width * 2


def _first_prompt(run: Run, task: Task) -> str:
    if STDIN in run.options.inputs:
        return "that of a row on stdin, which is read once: --show-prompt 1 shows it"
    page = io.BytesIO()
    alone = prompts_alone(replace(run.options, show_prompt=1))
    viewed = Run(alone, task, lambda request: None, weightless_viewer, RunStats(), Observer())
    viewed.form = FORM
    try:
        viewed.run(page)
    except NeedsWeights as error:
        return f"{error}"
    row = json.loads(page.getvalue().splitlines()[0])  # of several questions the first
    if row["error"]:
        return f"none: {row['error']}"
    return f"{json.dumps(row['prompt'], ensure_ascii=False)} ({counted(len(row['token_ids']), 'token')})"
