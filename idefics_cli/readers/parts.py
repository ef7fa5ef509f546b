"""The manifests of a folder, or of a pattern, that are read as one: those of one kind, in the order of their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from idefics_cli.errors import InputError
from idefics_cli.readers.manifest import is_manifest, manifest_kind
from idefics_cli.storage.files import File, walk


def folder_parts(folder: File, recursive: bool, say: Callable[[str], object]) -> list[File]:
    """Empty where there are none. What begins with `_` is Spark's own, as are its files that are being written."""
    names = sorted(name for name, _ in walk(folder, recursive) if is_manifest(name))
    files = [folder.child(name) for name in names if not any(part.startswith("_") for part in name.split("/"))]
    return parts_of_one_kind(folder.name, files, say)


def parts_of_one_kind(place: str, files: Sequence[File], say: Callable[[str], object]) -> list[File]:
    """Archives go before the tables that img2dataset writes beside them, and `.json` files after all others.

    Raises InputError where it is open which kind is meant.
    """
    counts = Counter(manifest_kind(file.name) for file in files)
    kinds = ["tar"] if "tar" in counts else [kind for kind in counts if kind != "json"] or list(counts)
    if len(kinds) > 1:
        raise InputError(f"{place} holds manifests of several kinds: name those of one, as '{place}/*.{min(kinds)}'")
    if len(counts) > 1:
        others = ", ".join(f"{number} .{kind}" for kind, number in sorted(counts.items()) if kind not in kinds)
        say(f"{place}: {counts[kinds[0]]} .{kinds[0]} files are read, and {others} beside them are not.")
    return [file for file in files if manifest_kind(file.name) in kinds]
