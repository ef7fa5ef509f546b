"""Image files and folders of them, local or remote -> rows.

A link to a file is a row like any other while it stays inside the folder, and an `image_not_allowed` row when it leads
out. Links to folders are passed over. With `--follow-links` both are read.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.image_paths import LocalRoot, any_place, read_image, remote_image
from idefics_cli.readers.source import Source, Span
from idefics_cli.rows import NO_VALUES, ImageSource, InputRow, ReadOptions
from idefics_cli.storage.filenames import IMAGE_SUFFIX, escape_name
from idefics_cli.storage.files import File, walk
from idefics_cli.storage.regular_file import open_regular

IMAGE_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM.{4}\0\0\0\0|II\*\0|MM\0\*|RIFF.{4}WEBP|.{4}ftyp(avi[fs]|he[iv][cx]|mi[fa]1|msf1)"
    rb"|P[1-6]\s+[\d#]|\0\0\0\x0c(jP  |JXL )\r\n\x87\n|\xff\x4f\xff\x51|\xff\x0a",
    re.DOTALL,
)
SIGNATURE_BYTES = 16
LINK_OUT = RowError("image_not_allowed", "a link that leads out of the folder: --follow-links reads it")


class FileListing(Source):
    """Images whose names are known: the names are the ids, and each comes once. `closed` are folders among them."""

    def __init__(
        self,
        place: File,
        names: Sequence[str],
        follow_links: bool = False,
        closed: Mapping[str, RowError] = NO_VALUES,
    ) -> None:
        self.size, self._first = len(names), 0
        self._place, self._closed = place, closed
        self.names = names
        self._root = LocalRoot(place.path, follow_links) if place.is_local and place.is_folder else None

    @property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(os.fsencode(name) + b"\0")
        kind = "folder" if self._place.is_folder else "file"
        return {"kind": kind, "name": self._place.name, "files": self.size, "digest": digest.hexdigest()}

    def rows(self, span: Span) -> Iterator[InputRow]:
        for number in range(self.size)[span.begin.row : span.most]:
            yield self._row(number, self.names[number - self._first])

    def narrowed(self, span: Span) -> FileListing:
        names = range(self.size)[span.begin.row : span.most]
        narrow = copy(self)
        narrow.names, narrow._first = self.names[names.start : names.stop], names.start
        narrow._closed = {name: self._closed[name] for name in narrow.names if name in self._closed}
        return narrow

    def resolve(self, value: object) -> ImageSource | RowError:
        return read_image(value, any_place)

    def file(self, name: str) -> File:
        return self._place.child(name) if self._place.is_folder else self._place

    def _row(self, number: int, name: str) -> InputRow:
        file = self.file(name)
        source: ImageSource | None = Path(file.path) if file.is_local else remote_image(file)
        if self._root is not None:
            source = self._root.locate(name)
        error = self._closed.get(name) or (LINK_OUT if source is None else None)
        return InputRow(number, escape_name(name), file.name, () if error else (source,), NO_VALUES, error)


def list_file(file: File) -> FileListing:
    """One image: its id is its path or address as given."""
    if file.is_local and not os.access(file.path, os.R_OK):
        raise InputError(f"cannot read {file.name}: permission denied; change its permissions or leave it out")
    return FileListing(file, [file.path if file.is_local else file.name])


def refuse_equal_ids(listings: Sequence[FileListing]) -> None:
    """Raises InputError for two images of one id. Within a listing there are none."""
    known: dict[str, FileListing] = {}
    for listing in listings:
        for name in listing.names:
            first = known.setdefault(name, listing)
            if first is not listing:
                raise InputError(
                    f"{first.file(name).name} and {listing.file(name).name} have the same id, {escape_name(name)}: name"
                    " each image once, and instead of folders with equal names the folder above them, or use a run for"
                    " each"
                )


def list_folder(folder: File, options: ReadOptions) -> FileListing | None:
    """Every image below a folder, sorted by POSIX path relative to it, which is the id; so is `NAME/` of a sub-folder
    that cannot be listed. None where there is none."""
    closed: dict[str, RowError] = {}

    def close(name: str, error: InputError) -> None:
        closed[f"{name}/"] = RowError("folder_unreadable", f"no image of this folder was read: {error}")

    files = walk(folder, options.recursive, options.follow_links, close)
    names = [name for name, is_file in files if _looks_like_image(folder, name, is_file)]
    names = sorted([*names, *closed])
    return FileListing(folder, names, options.follow_links, closed) if names else None


def _looks_like_image(folder: File, name: str, is_file: bool) -> bool:
    """By its name; of other local files the first bytes decide (elsewhere each would cost a request)."""
    if IMAGE_SUFFIX.search(name):
        return True
    if not is_file or not folder.is_local:
        return False
    try:
        with open_regular(folder.child(name).path) as file:
            return IMAGE_SIGNATURE.match(file.read(SIGNATURE_BYTES)) is not None
    except OSError:
        return False
