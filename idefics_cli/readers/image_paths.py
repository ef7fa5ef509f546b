"""Image values of rows -> what opens them: paths that stay below one folder, or bytes.

A value is a path, bytes, or a mapping with `bytes` (base64 where they are text) or `path`, as the datasets library
writes its images. Nothing is opened here, so a missing file is found by whoever opens it. Links are resolved: none
leads out of the folder.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from idefics_cli.errors import InputError, RowError
from idefics_cli.rows import ImageSource, RemoteFile
from idefics_cli.storage.filenames import REMOTE_ADDRESS, WEB_ADDRESS, escape_name, is_utf8, shown, shown_address
from idefics_cli.storage.files import RemoteFolder, is_remote, open_remote

FOLDERS_REMEMBERED = 4096


class Root(Protocol):
    """The folder that image paths are relative to and stay below."""

    def resolve(self, path: str) -> ImageSource | RowError: ...


def open_root(folder: str | RemoteFolder, image_root: str | None) -> Root:
    """`image_root` where one was named, else the `folder` of the manifest."""
    if image_root is not None:
        folder = open_remote(image_root) if is_remote(image_root) else image_root
        if isinstance(folder, str) and not os.path.isdir(folder):
            raise InputError(f"the image root {escape_name(folder)} is no folder: name one that is")
    return RemoteRoot(folder) if isinstance(folder, RemoteFolder) else LocalRoot(folder)


class LocalRoot:
    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._real = os.path.realpath(folder)
        self._below = self._real.rstrip("/") + "/"
        self._real_folder = lru_cache(FOLDERS_REMEMBERED)(os.path.realpath)

    def resolve(self, path: str) -> ImageSource | RowError:
        refusal = _refuse_path(path)
        if refusal:
            return refusal
        source = Path(self._folder, path)
        if self._leaves(str(source)):
            return RowError(
                "image_not_allowed", f"{shown(path)} leads out of the image root {shown(self._folder or '.')}"
            )
        return source

    def _leaves(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if name == "." or ".." in path or os.path.islink(path):
            real = os.path.realpath(path)
        else:
            real = f"{self._real_folder(folder)}/{name}"
        return real != self._real and not real.startswith(self._below)


class RemoteRoot:
    """On a file system without links, which resolves no `..` either: a path that holds one is refused."""

    def __init__(self, folder: RemoteFolder) -> None:
        self._folder = folder

    def resolve(self, path: str) -> ImageSource | RowError:
        below = self._folder.name.rstrip("/") + "/"
        relative = path.removeprefix(below)
        refusal = _refuse_path(relative)
        if refusal:
            return refusal
        if relative.startswith("/") or ".." in relative.split("/"):
            return RowError("image_not_allowed", f"{shown(path)} leads out of the image root {self._folder.name}")
        key, name = self._folder.child(relative)
        return RemoteFile(name, self._folder.filesystem, key)


class AnyPlace:
    """No root at all: for paths that the user names one by one."""

    def resolve(self, path: str) -> ImageSource | RowError:
        return _refuse_path(path) or Path(path)


def _refuse_path(path: str) -> RowError | None:
    if not path or "\0" in path:
        return RowError("row_invalid", "the path is empty" if not path else "the path holds a NUL byte")
    if ":" in path and (WEB_ADDRESS.match(path) or REMOTE_ADDRESS.match(path)):
        return _refuse_address(path)
    if not path.isascii() and not _is_name(path):
        return RowError("row_invalid", f"no file can have this name: {shown(path)}")
    return None


def _refuse_address(address: str) -> RowError:
    if WEB_ADDRESS.match(address):
        return RowError(
            "image_not_allowed", f"{shown(address)} is an address, and none is fetched: download it with img2dataset"
        )
    place = shown(shown_address(address))
    return RowError("image_not_allowed", f"{place} lies outside the image root: name the folder with --image-root")


def _is_name(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


# Values


def read_images(value: object, root: Root) -> tuple[ImageSource, ...] | RowError:
    """What an image column holds in one row -> what opens it. A list is several images."""
    if not _is_list(value):
        source = read_image(value, root)
        return source if isinstance(source, RowError) else (source,)
    sources = []
    for item in value:
        source = read_image(item, root)
        if isinstance(source, RowError):
            return source
        sources.append(source)
    return tuple(sources) or RowError("row_invalid", "no image: the list is empty")


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def read_image(value: object, root: Root) -> ImageSource | RowError:
    """One image value -> what opens it."""
    if isinstance(value, str):
        return root.resolve(value)
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, Mapping):
        return _read_struct(value, root)
    if value is None or value == b"":
        return RowError("row_invalid", "no image: the value is empty")
    return RowError("row_invalid", f"an image is a path or bytes, not {type(value).__name__}")


def _read_struct(value: Mapping, root: Root) -> ImageSource | RowError:
    data = value.get("bytes")
    if data is None:
        path = value.get("path")
        return read_image(path if isinstance(path, str) else None, root)
    if isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            return RowError("row_invalid", f"the image's bytes are not base64: {error}")
    return read_image(data if isinstance(data, bytes) else None, root)


def shown_images(value: object) -> str | None:
    """What people are shown of an image column: the path; of several images, a JSON list of them."""
    if not _is_list(value):
        return _shown_image(value)
    names = [_shown_image(item) for item in value]
    return names[0] if len(names) == 1 else json.dumps(names, ensure_ascii=False)


def _shown_image(value: object) -> str | None:
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str):
        return None
    name = escape_name(path)
    return name if is_utf8(name) else shown(name)
