"""The parts of a folder as one file, as one process would have written it: none missing, no row lost, no id twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from idefics_cli.columns import Column, json_text
from idefics_cli.errors import InputError, OutputError
from idefics_cli.readers.inputs import Inputs, open_inputs
from idefics_cli.rows import ReadOptions
from idefics_cli.scale.units import BOUNDS, Summary, lines_of, read_parts
from idefics_cli.storage.files import open_stream
from idefics_cli.storage.unit_folder import UnitFolder, unfinished
from idefics_cli.writers.formats import DIGEST, FAILED, NUM_ROWS, SETTINGS, Parquet, Passthrough, format_of
from idefics_cli.writers.journal import shown_path
from idefics_cli.writers.output_file import differences, locked, require_free, write_whole


def merge(folder_name: str, target: Path) -> Summary:
    """Raises IdeficsError, and leaves the parts as they are, where they are not those of one finished run."""
    folder = UnitFolder(folder_name)
    if folder.header is None:
        raise InputError(f"{folder.name} is not a folder of parts, as -o DIR/ makes them: name one")
    if missing := unfinished(folder):
        raise InputError(missing)
    require_free(target)
    if folder.place.is_local and os.path.realpath(target).startswith(f"{os.path.realpath(folder.place.path)}/"):
        raise OutputError(
            f"{shown_path(target)} would become a part of {folder.name}: name an output outside that folder"
        )
    with locked(target):
        return _merge(folder, target)


def _merge(folder: UnitFolder, target: Path) -> Summary:
    _require_settings(folder)
    summary = read_parts(folder, folder.header["may_repeat_ids"])
    if summary.repeated:
        raise InputError(
            f"{summary.repeated} rows of {folder.name} have the id of another one ({', '.join(summary.repeated_ids)}):"
            " name a column of unique ids with --id-column in a new run, or read the parts as they are"
        )
    settings = {name: value for name, value in folder.header[SETTINGS].items() if name not in BOUNDS}
    run = {SETTINGS: settings, NUM_ROWS: summary.rows, FAILED: summary.failed}
    columns = [Column(name, kind) for name, kind in folder.header["columns"].items()]
    is_plain = folder.header["format"] == "jsonl" and target.suffix in (".jsonl", ".ndjson")
    passthrough = Passthrough() if is_plain else _passthrough(folder)
    texts = _lines if is_plain else _texts
    write_whole(target, format_of(target), lambda: texts(folder), columns, passthrough, run)
    return summary


def _require_settings(folder: UnitFolder) -> None:
    """Each part of Parquet says of which run it is."""
    if folder.header["format"] != "parquet" or not folder.place.is_local:
        return
    expected = {name: value for name, value in folder.header[SETTINGS].items() if name not in BOUNDS}
    for number in range(folder.num_units):
        part = folder.part(number)
        record = Parquet().run_of(Path(part.path))
        found = ["it is not as it was written"] if record is None else list(differences(expected, record[SETTINGS]))
        if found:
            raise InputError(f"{part.name} is not of this run: {'; '.join(found)}; remove it and run the command again")


def _lines(folder: UnitFolder) -> Iterator[bytes]:
    """As they are, with a digest that is not known."""
    for number in range(folder.num_units):
        with open_stream(folder.part(number), compressed=False) as stream:
            for line in stream:
                yield b'%s, "%s": ""}' % (line.rstrip(b"\n")[:-1], DIGEST.encode())


def _texts(folder: UnitFolder) -> Iterator[bytes]:
    """The run's own columns."""
    names = list(folder.header["columns"])
    for number in range(folder.num_units):
        for row in lines_of(folder.part(number), names):
            yield json_text({**{name: row[name] for name in names}, DIGEST: ""})


def _passthrough(folder: UnitFolder) -> Passthrough:
    kept = folder.header["kept"]
    if not kept:
        return Passthrough()

    def parts() -> Inputs:
        return open_inputs((folder.name,), ReadOptions(keep=tuple(kept), needs_image=False, needs_id=False))

    names = {name: name for name in kept}
    return Passthrough(names, lambda: parts().passthrough_rows(), lambda: parts().passthrough_batches())
