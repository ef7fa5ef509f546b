"""Any image -> an upright RGB image on white, or a `RowError` that says why not.

The same rules for a path, for the bytes of a file and for a Pillow image:

- Only regular files are opened, and nothing is fetched. The format is read from the bytes, not from the name.
- Bytes are counted before a file is read, pixels before anything is decoded.
- An image that fails while it is decoded is dropped: asked again, Pillow would return the part it has.
- The first frame counts. The EXIF orientation is applied; where it cannot be read the image is taken as upright.
- Samples of 16 bits are scaled by their full range. Integers of 32 bits are taken as 8 or 16 bits where all of them
  fit, floats as 0..1 or 0..255; anything wider is stretched from its least to its greatest value.
- Colour profiles are not applied: the models were trained without.

Safe to call from many threads; changes no setting of Pillow, so Pillow's own limit on pixels holds, too. Knows no
models, rows or output files.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from idefics_cli.errors import RowError
from idefics_cli.rows import ImageOptions
from idefics_cli.storage.filenames import ADDRESS, shown
from idefics_cli.storage.regular_file import IrregularFile, lfs_pointer, open_regular

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# A file's first box lists what the file is compatible with.
HEIF = re.compile(rb".{4}ftyp(?:.{4}){,12}?he[iv][cxms]", re.DOTALL)
DRAFT_SIDES = 4  # docs/benchmarks.md says what other numbers save and cost
WHITE = (255, 255, 255, 255)
DEFAULT_OPTIONS = ImageOptions()


def load_image(
    source: str | os.PathLike | bytes | Image.Image, options: ImageOptions = DEFAULT_OPTIONS, side: int | None = None
) -> Image.Image | RowError:
    """The image as a new RGB image, upright, on white; or why there is none. A bad image never raises.

    `source` is a path, the bytes of a file, or a Pillow image (its current frame; it is left as it was). `side` is that
    of the square the image will be resized to: with `options.draft`, no side is decoded to less than four times it.
    """
    try:
        if isinstance(source, Image.Image):
            return _refuse_size(source.size, options) or _to_rgb(_upright(source.copy()))
        data = _read(source, options)
        return data if isinstance(data, RowError) else _decode(data, options, side)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"\((\d+) pixels\)", str(error))  # refused before its sides were known here
        number = f"{int(found[1]):,}" if found else "too many"
        return RowError("image_too_large", f"{number} pixels, over the limit of {options.max_pixels:,} pixels")
    except UnidentifiedImageError:
        return RowError("image_unreadable", f"not an image in a known format ({', '.join((*FORMATS, 'HEIF'))})")
    except Exception as error:  # Pillow's decoders raise nearly anything at bytes that were made to break them
        return RowError("image_unreadable", f"{type(error).__name__}: {error}")


def _refuse_size(size: tuple[int, int], options: ImageOptions) -> RowError | None:
    width, height = size
    if 0 in size:
        return RowError("image_unreadable", f"the image is empty: {width} x {height} pixels")
    if width * height <= options.max_pixels:
        return None
    return RowError("image_too_large", f"{width} x {height} pixels, over the limit of {options.max_pixels:,} pixels")


# Bytes


def _read(source: object, options: ImageOptions) -> bytes | RowError:
    if isinstance(source, bytes | bytearray | memoryview):
        return _refuse_bytes(memoryview(source).nbytes, options) or bytes(source)
    if not isinstance(source, str | os.PathLike):
        remedies = {"__array_interface__": ": use PIL.Image.fromarray()", "read": ": use its read()"}
        remedy = next((remedies[name] for name in remedies if hasattr(source, name)), "")
        found = f"{type(source).__name__}{remedy}"
        return RowError("row_invalid", f"an image is a path, bytes or a Pillow image, not {found}")
    path = os.fsdecode(source)
    if ADDRESS.match(path) and not (isinstance(source, os.PathLike) and os.path.lexists(path)):
        remedy = "download it first, for example with img2dataset"
        return RowError("image_not_allowed", f"{shown(path)} is an address, not a file: {remedy}")
    return _read_file(path, options)


def _read_file(path: str, options: ImageOptions) -> bytes | RowError:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            return _refuse_bytes(size, options) or file.read(size)
    except IrregularFile as error:
        return RowError("image_not_allowed", f"{shown(path)} {error}")
    except (FileNotFoundError, NotADirectoryError):
        return RowError("image_missing", f"file not found: {shown(path)}")
    except ValueError as error:
        return RowError("image_missing", f"no file can have this name: {shown(path)} ({error})")
    except OSError as error:
        code = "image_missing" if error.errno == errno.ENAMETOOLONG else "image_unreadable"
        return RowError(code, f"{type(error).__name__}: {error.strerror}: {shown(path)}")


def _refuse_bytes(num_bytes: int, options: ImageOptions) -> RowError | None:
    if num_bytes <= options.max_bytes:
        return None
    return RowError("image_too_large", f"{num_bytes:,} bytes, over the limit of {options.max_bytes:,}")


# Decoding


def _decode(data: bytes, options: ImageOptions, side: int | None) -> Image.Image | RowError:
    if not data:
        return RowError("image_unreadable", "the file is empty")
    if pointer := lfs_pointer(data):
        return RowError("image_unreadable", pointer)
    is_heif = HEIF.match(data) is not None
    if is_heif and not _has_heif():
        return RowError("image_unreadable", "HEIF images need an extra: pip install 'idefics-cli[heif]'")
    with Image.open(BytesIO(data), formats=("HEIF",) if is_heif else FORMATS) as image:
        if refusal := _refuse_size(image.size, options):
            return refusal
        if options.draft and side is not None and image.format in ("JPEG", "MPO"):
            image.draft(image.mode, (DRAFT_SIDES * side, DRAFT_SIDES * side))
        raw_mode = image.tile[0].args if image.tile else None
        _load(image, options)
        _fit_transparency(image, raw_mode)
        return _to_rgb(_upright(image))


@cache
def _has_heif() -> bool:
    """Whether the `heif` extra is installed, whose reader is added to Pillow's."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener(decode_threads=1)
    return True


def _load(image: Image.Image, options: ImageOptions) -> None:
    try:
        image.load()
    except OSError:
        if not options.allow_truncated:
            raise
        image.tile = []  # nothing more to decode: what has arrived is the image, if there is memory for it at all
        image.load()


def _fit_transparency(image: Image.Image, raw_mode: object) -> None:
    """Bring PNG's transparent colour to the depth Pillow has brought the pixels to."""
    transparent = image.info.get("transparency")
    if raw_mode == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    elif raw_mode in ("L;2", "L;4") and isinstance(transparent, int):
        image.info["transparency"] = transparent * {"L;2": 85, "L;4": 17}[raw_mode]


# Colours


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # whatever a broken EXIF block raises, the pixels are good
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image that carries nothing but pixels, so that it is not turned or blended a second time."""
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bits(image)
    elif image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    rgb = image.convert("RGB")
    rgb.info.clear()
    return rgb


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits -> L, or LA where one value is declared transparent. NaN and Inf are black."""
    values = np.asarray(image)  # (height, width)
    known = np.isfinite(values)
    low, high = _range(values[known], image.mode)
    scaled = np.subtract(values, low, dtype=np.float64)  # one such array at a time: an image may be large
    scaled *= 255 / (high - low)
    scaled[~known] = 0
    grey = Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))


def _range(values: np.ndarray, mode: str) -> tuple[float, float]:
    """The values that become black and white."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    for limit in {"I": (255.0, 65535.0), "F": (1.0, 255.0)}.get(mode, (65535.0,)):
        if low >= 0 and high <= limit:
            return 0.0, limit
    return (low, high) if high > low else (low - 1, high)
