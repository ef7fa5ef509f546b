"""Image files and folders of them, here or on a file system of pyarrow's -> entries.

Folders are walked without following links to folders: what such a link leads to inside the folder is listed under its
own path anyway, and what lies outside has not been asked for. A link to a file is a row like any other while it stays
inside the folder, and an `image_not_allowed` row when it leads out.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.image_paths import AnyPlace, read_image
from idefics_cli.rows import NO_VALUES, Entry, ImageSource, RemoteFile
from idefics_cli.storage.filenames import IMAGE_SUFFIX, escape_name, is_hidden
from idefics_cli.storage.files import RemoteFolder, cannot_read

IMAGE_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM.{4}\0\0\0\0|II\*\0|MM\0\*|RIFF.{4}WEBP|.{4}ftyp(avif|heic|mif1)", re.DOTALL
)
SIGNATURE_BYTES = 16


class FileListing:
    """Images whose names are at hand: the names are the ids, and each comes once."""

    distinct = True
    listed = True
    is_streaming = False
    kept: Mapping[str, Any] = NO_VALUES

    def __init__(self, kind: str, name: str, names: Sequence[str], entry: Callable[[int, str], Entry]) -> None:
        self.size = len(names)
        self._kind = kind
        self._name = name
        self._names = names
        self._entry = entry

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        digest = hashlib.sha256()
        for name in self._names:
            digest.update(os.fsencode(name) + b"\0")
        return {"kind": self._kind, "name": self._name, "files": self.size, "digest": digest.hexdigest()}

    def entries(self, start: int, step: int) -> Iterator[Entry]:
        for number in range(start, self.size, step):
            yield self._entry(number, self._names[number])

    def names(self, start: int, step: int) -> Iterator[tuple[int, str]]:
        for number in range(start, self.size, step):
            yield number, escape_name(self._names[number])

    def fallback_name(self, number: int) -> str:
        raise AssertionError(f"row {number} of a listing has a name")

    def resolve(self, value: object) -> ImageSource | RowError:
        return read_image(value, AnyPlace())


def list_file(path: str) -> FileListing:
    """One image here: its id is the path as given."""
    name = escape_name(path)
    if not os.access(path, os.R_OK):
        raise InputError(f"cannot read {name}: permission denied; change its permissions or leave it out")
    return FileListing("file", name, [path], lambda number, path: Entry(number, name, name, (Path(path),)))


def list_remote_file(place: RemoteFolder) -> FileListing:
    """One image elsewhere: its id is its address."""
    source = RemoteFile(place.name, place.filesystem, place.key)
    return FileListing("file", place.name, [place.name], lambda number, name: Entry(number, name, name, (source,)))


def list_folder(folder: str, recursive: bool) -> FileListing:
    """Every image below a folder here, sorted by POSIX path relative to it, which is the id."""
    names = sorted(_walk(folder, recursive))
    _refuse_empty(escape_name(folder), names, recursive)
    root = os.path.realpath(folder)
    return FileListing("folder", escape_name(folder), names, lambda number, name: _entry(number, folder, root, name))


def list_remote_folder(place: RemoteFolder, recursive: bool) -> FileListing:
    """Every file below a folder elsewhere whose name is an image's."""
    names = sorted(_walk_remote(place, recursive))
    _refuse_empty(place.name, names, recursive)
    return FileListing("folder", place.name, names, lambda number, name: _remote_entry(number, place, name))


def _refuse_empty(folder: str, names: Sequence[str], recursive: bool) -> None:
    if not names:
        hint = "" if recursive else " (its sub-folders are left out by --no-recursive)"
        raise InputError(f"no images in {folder}{hint}: name a folder that holds some")


def _entry(number: int, folder: str, root: str, name: str) -> Entry:
    path = os.path.join(folder, name)
    return Entry(number, escape_name(name), escape_name(path), (Path(path),), error=_link_error(path, root))


def _link_error(path: str, root: str) -> RowError | None:
    if not os.path.islink(path):
        return None
    target = os.path.realpath(path)
    if os.path.commonpath([root, target]) == root:
        return None
    return RowError("image_not_allowed", "a link that leads out of the folder; name its target as an INPUT of its own")


def _remote_entry(number: int, place: RemoteFolder, path: str) -> Entry:
    key, name = place.child(path)
    return Entry(number, escape_name(path), name, (RemoteFile(name, place.filesystem, key),))


# Walking


def _walk(folder: str, recursive: bool) -> Iterator[str]:
    """POSIX paths, relative to `folder`, of the images in it, in no order. Hidden and system files are passed over."""
    waiting = [""]
    while waiting:
        below = waiting.pop()
        for entry in _scan(os.path.join(folder, below)):
            if is_hidden(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                if recursive:
                    waiting.append(f"{below}{entry.name}/")
            elif _looks_like_image(entry):
                yield below + entry.name


def _scan(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        remedy = "make it readable, or name the folders beside it one by one"
        raise cannot_read(escape_name(folder), error, remedy) from error


def _looks_like_image(entry: os.DirEntry[str]) -> bool:
    """By its name; where the name says nothing, a regular file's first bytes decide."""
    if IMAGE_SUFFIX.search(entry.name):
        return True
    if not entry.is_file(follow_symlinks=False):
        return False
    try:
        with open(entry.path, "rb", buffering=0) as file:
            return IMAGE_SIGNATURE.match(file.read(SIGNATURE_BYTES)) is not None
    except OSError:
        return False  # neither its name nor its bytes speak for an image


def _walk_remote(place: RemoteFolder, recursive: bool) -> Iterator[str]:
    """The same elsewhere, by name alone: to look inside would cost a request for each file."""
    from pyarrow.fs import FileSelector, FileType

    below = place.key.rstrip("/") + "/"
    try:
        found = place.filesystem.get_file_info(FileSelector(place.key, recursive=recursive))
    except OSError as error:
        raise cannot_read(place.name, error, "check the address and your access to it") from error
    for info in found:
        path = info.path.removeprefix(below)
        if info.type == FileType.File and IMAGE_SUFFIX.search(path) and not any(map(is_hidden, path.split("/"))):
            yield path
