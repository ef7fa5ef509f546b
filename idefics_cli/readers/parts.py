"""The manifests of a folder, or of a pattern, that are read as one: those of one kind, in the order of their names."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Sequence

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.jsonl import parse_object
from idefics_cli.readers.manifest import is_manifest, manifest_kind
from idefics_cli.readers.table import Record
from idefics_cli.storage.filenames import listed
from idefics_cli.storage.files import File, walk
from idefics_cli.storage.unit_folder import UnitFolder, unfinished

MAX_STATE_BYTES = 16 << 20


def folder_parts(folder: File, recursive: bool, say: Callable[[str], object]) -> list[File]:
    """Empty where there are none. What begins with `_` is Spark's own, as are its files that are being written.

    Raises InputError for a folder of a run's parts where some are missing.
    """
    if missing := unfinished(UnitFolder(folder)):
        raise InputError(missing)
    names = sorted(name for name, _ in walk(folder, recursive) if is_manifest(name))
    files = [folder.child(name) for name in names if not any(part.startswith("_") for part in name.split("/"))]
    return parts_of_one_kind(folder.name, files, say)


def saved_dataset(folder: File, names: Sequence[str]) -> list[File]:
    """The files of a folder that the datasets library has saved; empty where it is none. `names` are what lies in it.

    Raises InputError where it has splits, or is not whole.
    """
    if "dataset_dict.json" in names:
        splits = _read_json(folder, "dataset_dict.json").get("splits")
        named = listed(posixpath.join(folder.name, str(split)) for split in splits) if isinstance(splits, list) else ""
        raise InputError(f"{folder.name} holds the splits of a dataset: name one of them: {named}")
    if "state.json" not in names or "dataset_info.json" not in names:
        return []
    files = _read_json(folder, "state.json").get("_data_files")
    found = [str(file.get("filename")) for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    if not found or not set(found) <= set(names):
        raise InputError(f"{folder.name} is not a whole dataset: a file that its state.json names is not in it")
    return [folder.child(name) for name in found]


def _read_json(folder: File, name: str) -> Record:
    with folder.child(name).open() as file:
        found = parse_object(file.read(MAX_STATE_BYTES), name)
    if isinstance(found, RowError):
        raise InputError(f"{folder.name} cannot be read: {found.message}; save the dataset again")
    return found


def parts_of_one_kind(place: str, files: Sequence[File], say: Callable[[str], object]) -> list[File]:
    """Archives go before the tables that img2dataset writes beside them, and `.json` files after all others.

    Raises InputError where it is open which kind is meant.
    """
    counts = Counter(manifest_kind(file.name) for file in files)
    kinds = ["tar"] if "tar" in counts else [kind for kind in counts if kind != "json"] or list(counts)
    if len(kinds) > 1:
        example = posixpath.join(posixpath.dirname(files[0].name), f"*.{min(kinds)}")
        raise InputError(f"{place} holds manifests of several kinds: name those of one, as '{example}'")
    if len(counts) > 1:
        others = ", ".join(f"{number} .{kind}" for kind, number in sorted(counts.items()) if kind not in kinds)
        say(f"{place}: {counts[kinds[0]]} .{kinds[0]} files are read, and {others} beside them are not.")
    return [file for file in files if manifest_kind(file.name) in kinds]
