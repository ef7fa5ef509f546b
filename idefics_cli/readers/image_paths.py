"""Image values of rows -> what opens them: paths that stay below one folder, or bytes.

A value is a path, bytes, an image in base64 or a `data:` URI, or a mapping with `bytes` (base64 where they are text) or
`path`, as the datasets library writes its images. Nothing is opened here, so a missing file is found by whoever opens
it. Links are resolved: none leads out of the folder, unless that was asked for.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote_to_bytes

from idefics_cli.columns import MAX_IMAGES
from idefics_cli.errors import InputError, RowError
from idefics_cli.rows import BoundPath, ImageSource, ReadOptions, RemoteFile
from idefics_cli.storage.filenames import (
    ADDRESS,
    DATA_ADDRESS,
    address_refusal,
    escape_name,
    is_utf8,
    shown,
    shown_address,
    unescape_name,
)
from idefics_cli.storage.files import MAX_PIECE_BYTES, File, place
from idefics_cli.storage.regular_file import real_folder

FOLDERS_REMEMBERED = 4096
LONGEST_PATH = 4096  # bytes, and no character has less than one
DATA_URI = re.compile(r"\s*data:([^,]{,1000}),", re.IGNORECASE)
# How JPEG, PNG, GIF, WebP, BMP, TIFF, AVIF, HEIC, JPEG 2000 and JPEG XL begin in base64.
BASE64_IMAGE = re.compile(
    r"\s*(?:[/_]9j[/_][2-7w]|iVBORw0KGgo|R0lGOD[dl]h|UklGR.{6}XRUJQ|Qk.{6}AAAA|SUkqA|TU0AK|AAAA.[GWm2]Z0eX"
    r"|AAAADGpQICANCocK|AAAADEpYTCANCocK)"
)
BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+={,2}\s*")
URL_SAFE = str.maketrans("-_", "+/")
LEAST_TEXT = 40  # a GIF of one pixel is longer
LONGEST_TEXT = MAX_PIECE_BYTES  # as of a line of JSON
WINDOWS_ROOT = re.compile(r"[A-Za-z]:[\\/]|\\\\")

Resolve: TypeAlias = Callable[[str], "ImageSource | RowError"]
Say: TypeAlias = Callable[[str], object]


def said_once(say: Say) -> Say:
    """Says the first of all that it is told."""
    unused = [say]
    return lambda message: unused.pop()(message) if unused else None


def open_root(folder: File | None, options: ReadOptions, say: Say) -> Resolve:
    """How paths lead to images below `--image-root` where one was named, else below `folder`; None: anywhere.

    `say` is told once where paths are read in another spelling.
    """
    if options.image_root is not None:
        folder = place(options.image_root)
        if folder.is_local and not os.path.isdir(options.image_root):
            raise InputError(f"--image-root {folder.name} is not a folder: name one that exists")
    if folder is None:
        return any_place
    root = LocalRoot(folder.path, options.follow_links, say) if folder.is_local else None
    return root.resolve if root else partial(_resolve_remote, folder)


class LocalRoot:
    """With `follow_links` links may lead out of the folder; paths may not."""

    def __init__(self, folder: str, follow_links: bool = False, say: Say = str) -> None:
        self._folder, self._follow_links, self._say = folder, follow_links, say
        self._real = self._when_opened = os.path.realpath(folder)
        self._below = self._real.rstrip("/") + "/"
        self._real_folder = lru_cache(FOLDERS_REMEMBERED)(os.path.realpath)
        with suppress(OSError):
            self._when_opened = real_folder(folder)

    def __reduce__(self) -> tuple[Any, ...]:  # to another process, which says nothing
        return LocalRoot, (self._folder, self._follow_links)

    def resolve(self, path: str) -> ImageSource | RowError:
        refusal = _refuse_path(path)
        if refusal:
            return refusal
        if (not path.isascii() or "\\" in path or path[1:3] == ":/") and not self._is_there(path):
            name = unescape_name(path)  # as our own rows have one that is not UTF-8
            path = name if self._is_there(name) else self._spelled_as_here(path) or path
            if WINDOWS_ROOT.match(path):
                return RowError(
                    "image_missing", f"{shown(path)} is a path of Windows: write it relative to --image-root"
                )
        return self.locate(path) or self._outside(path)

    def locate(self, path: str) -> Path | None:
        """What opens the file at this path in the folder; None: it leads out."""
        source = BoundPath.within(self._when_opened, self._folder, path)
        if not self._leads_out(str(source)):
            return source
        return Path(os.path.normpath(source)) if self._follow_links and self._is_named_inside(path) else None

    def _leads_out(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if name == "." or ".." in path or os.path.islink(path):
            real = os.path.realpath(path)
        else:
            real = f"{self._real_folder(folder)}/{name}"
        return real != self._real and not real.startswith(self._below)

    def _is_named_inside(self, path: str) -> bool:
        folder = os.path.abspath(self._folder)
        return os.path.abspath(os.path.join(folder, path)).startswith(f"{folder.rstrip('/')}/")

    def _is_there(self, path: str) -> bool:
        return os.path.lexists(os.path.join(self._folder, path))

    def _outside(self, path: str) -> RowError:
        remedy = "name a folder that holds all images with --image-root"
        if os.path.isabs(path):
            remedy += ", as / for any absolute path"
        elif self._is_named_inside(path):
            remedy = "--follow-links reads such links"
        return _outside(path, shown(self._folder or "."), remedy)

    def _spelled_as_here(self, path: str) -> str | None:
        """The one file that this is where backslashes separate folders and accents are written in either way."""
        plain = path.replace("\\", "/")
        found = {"/" if plain.startswith("/") else ""}
        for part in filter(None, plain.split("/")):
            forms = {part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part)}
            found = {os.path.join(start, form) for start in found for form in forms}
            found = {each for each in found if self._is_there(each)}
        if self._is_there(plain):
            found = {plain}
        if len(found) != 1:
            return None
        (spelled,) = found
        say, self._say = self._say, str  # once
        say(f"{shown(path)} is read as {shown(spelled)}, the one file here that it can mean; so are others like it.")
        return spelled


def _resolve_remote(folder: File, path: str) -> ImageSource | RowError:
    """There are no links and nothing resolves `..`: a path that holds one is refused."""
    relative = path.removeprefix(folder.name.rstrip("/") + "/")
    refusal = _refuse_path(relative)
    if refusal:
        return refusal
    if relative.startswith("/") or ".." in relative.split("/"):
        return _outside(path, folder.name, "name a folder that holds all images with --image-root")
    return remote_image(folder.child(relative))


def remote_image(file: File) -> RemoteFile:
    return RemoteFile(file.name, file.filesystem, file.path)


def _outside(path: str, root: str, remedy: str) -> RowError:
    return RowError("image_not_allowed", f"{shown(path)} leads out of the image root {root}: {remedy}")


def any_place(path: str) -> ImageSource | RowError:
    """For paths that the user names one by one: they may lead anywhere."""
    return _refuse_path(path) or Path(path)


def _refuse_path(path: str) -> RowError | None:
    if not path or "\0" in path:
        return RowError("row_invalid", "the path holds a NUL byte" if path else "the path is empty")
    if ":" in path and ADDRESS.match(path):
        return _refuse_address(path)
    if not path.isascii() and not is_utf8(escape_name(path)):
        return RowError("row_invalid", f"no file can have this name: {shown(path)}")
    return None


def _refuse_address(address: str) -> RowError:
    outside = f"{shown(shown_address(address))} lies outside the image root: name its folder with --image-root"
    return RowError("image_not_allowed", address_refusal(address) or outside)


# ---- values


def read_images(value: object, resolve: Resolve) -> tuple[ImageSource, ...] | RowError:
    """What an image column holds in one row -> what opens it. A list is several images."""
    if not isinstance(value, list | tuple):
        source = read_image(value, resolve)
        return source if isinstance(source, RowError) else (source,)
    if len(value) > MAX_IMAGES:
        return RowError("row_invalid", f"{len(value):,} images, more than the {MAX_IMAGES:,} that a row may have")
    sources = [read_image(item, resolve) for item in value]
    refused = next((source for source in sources if isinstance(source, RowError)), None)
    return refused or tuple(sources) or RowError("row_invalid", "no image: the list is empty")


def read_image(value: object, resolve: Resolve) -> ImageSource | RowError:
    """One image value -> what opens it."""
    if isinstance(value, str):
        found = _image_in_text(value)
        return resolve(value) if found is None else found
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
        data = _image_in_text(data) if DATA_ADDRESS.match(data) else _decoded(data)
    return data if isinstance(data, RowError) else read_image(data if isinstance(data, bytes) else None, resolve)


def _image_in_text(text: str) -> bytes | RowError | None:
    """The image that a text holds itself; None: it may be a path."""
    if DATA_ADDRESS.match(text):
        uri = DATA_URI.match(text)
        if uri is None:
            return RowError("row_invalid", f"{shown(text)} is not a whole data: URI")
        if len(text) > LONGEST_TEXT:
            return _too_large(len(text))
        data = unquote_to_bytes(text[uri.end() :])
        return _decoded(data.decode("ascii", "replace")) if uri[1].strip().lower().endswith(";base64") else data
    if holds_image(text):
        return _decoded(text)
    if len(text) <= LONGEST_PATH:
        return None
    return RowError("image_missing", f"{len(text):,} letters are neither a path nor an image in base64: {shown(text)}")


def holds_image(text: str) -> bool:
    """Whether the text is an image itself, as a `data:` URI or in base64."""
    if len(text) < LEAST_TEXT or not BASE64_IMAGE.match(text):
        return DATA_URI.match(text) is not None
    return BASE64.fullmatch(text) is not None


def _decoded(text: str) -> bytes | RowError:
    """Base64, as MIME or addresses have it too, with or without the padding."""
    if len(text) > LONGEST_TEXT:
        return _too_large(len(text))
    text = "".join(text.split()).rstrip("=").translate(URL_SAFE)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        return RowError("row_invalid", f"the image's bytes are not base64: {error}")


def _too_large(length: int) -> RowError:
    return RowError("image_too_large", f"{length:,} letters of base64, over the limit of {LONGEST_TEXT:,}")


def shown_images(value: object) -> str | None:
    """What people are shown of an image column: the path; of several images, a JSON list, unless too many."""
    if not isinstance(value, list | tuple):
        return _shown_image(value)
    if len(value) > MAX_IMAGES:
        return None
    names = [_shown_image(item) for item in value]
    return names[0] if len(names) == 1 else json.dumps(names, ensure_ascii=False)


def _shown_image(value: object) -> str | None:
    """Of an image in a text its digest and size."""
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str):
        return None
    data = _image_in_text(path)
    if isinstance(data, bytes):
        return f"sha256:{hashlib.sha256(data).hexdigest()} ({len(data):,} bytes)"
    name = escape_name(path) if data is None else shown(path)
    return name if is_utf8(name) else shown(name)
