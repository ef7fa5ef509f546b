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
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeAlias

from idefics_cli.errors import InputError, RowError
from idefics_cli.rows import ImageSource, RemoteFile
from idefics_cli.storage.filenames import ADDRESS, WEB_ADDRESS, escape_name, is_utf8, shown, shown_address
from idefics_cli.storage.files import File, place

FOLDERS_REMEMBERED = 4096

Resolve: TypeAlias = Callable[[str], "ImageSource | RowError"]


def open_root(folder: File | None, image_root: str | None) -> Resolve:
    """How paths lead to images below `image_root` where one was named, else below `folder`; None: anywhere."""
    if image_root is not None:
        folder = place(image_root)
        if folder.is_local and not os.path.isdir(image_root):
            raise InputError(f"--image-root {folder.name} is not a folder: name one that exists")
    if folder is None:
        return any_place
    return LocalRoot(folder.path).resolve if folder.is_local else partial(_resolve_remote, folder)


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
        return _outside(path, shown(self._folder or ".")) if self._leaves(str(source)) else source

    def _leaves(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if name == "." or ".." in path or os.path.islink(path):
            real = os.path.realpath(path)
        else:
            real = f"{self._real_folder(folder)}/{name}"
        return real != self._real and not real.startswith(self._below)


def _resolve_remote(folder: File, path: str) -> ImageSource | RowError:
    """There are no links and nothing resolves `..`: a path that holds one is refused."""
    relative = path.removeprefix(folder.name.rstrip("/") + "/")
    refusal = _refuse_path(relative)
    if refusal:
        return refusal
    if relative.startswith("/") or ".." in relative.split("/"):
        return _outside(path, folder.name)
    return remote_image(folder.child(relative))


def remote_image(file: File) -> RemoteFile:
    return RemoteFile(file.name, file.filesystem, file.path)


def _outside(path: str, root: str) -> RowError:
    return RowError("image_not_allowed", f"{shown(path)} leads out of the image root {root}")


def any_place(path: str) -> ImageSource | RowError:
    """For paths that the user names one by one: they may lead anywhere."""
    return _refuse_path(path) or Path(path)


def _refuse_path(path: str) -> RowError | None:
    if not path or "\0" in path:
        return RowError("row_invalid", "the path holds a NUL byte" if path else "the path is empty")
    if ":" in path and ADDRESS.match(path):
        return _refuse_address(path)
    if not is_utf8(escape_name(path)):
        return RowError("row_invalid", f"no file can have this name: {shown(path)}")
    return None


def _refuse_address(address: str) -> RowError:
    if WEB_ADDRESS.match(address):
        return RowError("image_not_allowed", f"{shown(address)} is a web address: download it first with img2dataset")
    name = shown(shown_address(address))
    return RowError("image_not_allowed", f"{name} lies outside the image root: name its folder with --image-root")


# ---- values


def read_images(value: object, resolve: Resolve) -> tuple[ImageSource, ...] | RowError:
    """What an image column holds in one row -> what opens it. A list is several images."""
    sources = [read_image(item, resolve) for item in (value if isinstance(value, list | tuple) else [value])]
    refused = next((source for source in sources if isinstance(source, RowError)), None)
    return refused or tuple(sources) or RowError("row_invalid", "no image: the list is empty")


def read_image(value: object, resolve: Resolve) -> ImageSource | RowError:
    """One image value -> what opens it."""
    if isinstance(value, str):
        return resolve(value)
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, Mapping):
        return _read_struct(value, resolve)
    if value is None or value == b"":
        return RowError("row_invalid", "no image: the value is empty")
    return RowError("row_invalid", f"an image is a path or bytes, not {type(value).__name__}")


def _read_struct(value: Mapping, resolve: Resolve) -> ImageSource | RowError:
    data = value.get("bytes")
    if data is None:
        path = value.get("path")
        return read_image(path if isinstance(path, str) else None, resolve)
    if isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            return RowError("row_invalid", f"the image's bytes are not base64: {error}")
    return read_image(data if isinstance(data, bytes) else None, resolve)


def shown_images(value: object) -> str | None:
    """What people are shown of an image column: the path; of several images, a JSON list of them."""
    names = [_shown_image(item) for item in (value if isinstance(value, list | tuple) else [value])]
    return names[0] if len(names) == 1 else json.dumps(names, ensure_ascii=False)


def _shown_image(value: object) -> str | None:
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str):
        return None
    name = escape_name(path)
    return name if is_utf8(name) else shown(name)
