"""An image from anywhere on this machine -> an upright RGB image, or a `RowError` that says why not.

The rules, the same for a path, for bytes and for a Pillow image:

- Only regular files are opened, and never waited for. No address is ever fetched.
- The format is read from the bytes, among a short list; a file's name says nothing.
- Bytes are counted before the file is read, pixels before anything is decoded.
- An image is decoded once. One that fails half-way is dropped: asked again, Pillow would return the half as if it were
  the whole.
- The first frame counts. EXIF orientation is applied; an EXIF block that cannot be read means "upright".
- Transparency (an alpha channel, a palette's, or PNG's one transparent colour) lies on white.
- Samples of 16 bits are scaled by their full range. Whole numbers of 32 bits are taken as 8 or 16 bits where all of
  them fit, floats as 0..1 or 0..255; anything wider is stretched from its least to its greatest value.
- Colour profiles are not applied: the models were trained without.

Everything here is safe to call from many threads and changes no setting of Pillow. This module knows no models, rows or
output files.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from io import BytesIO

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from idefics_cli.errors import RowError
from idefics_cli.rows import ImageOptions

PLUGINS = (
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
    GifImagePlugin,
    BmpImagePlugin,
    TiffImagePlugin,
    AvifImagePlugin,
)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
MAX_BRAND_BYTES = 1024
SELF_LIMITING_FORMATS = ("WEBP", "GIF", "TIFF")
ADDRESS = re.compile(r"\s*(?:(?:https?|ftps?|data|file):|[a-z][a-z0-9+.-]+://)", re.IGNORECASE)
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION_TAG = 0x0112
DRAFT_SIDES = 4  # docs/benchmarks.md has what other numbers save and cost
WHITE = (255, 255, 255, 255)


DEFAULT_OPTIONS = ImageOptions()


def load_image(
    source: str | os.PathLike | bytes | Image.Image, limits: ImageOptions = DEFAULT_OPTIONS, side: int | None = None
) -> Image.Image | RowError:
    """The image as a new RGB image, upright, on white; or why there is none. A bad image never raises.

    `source` is a path, the bytes of a file, or a Pillow image (its current frame; it is left as it was). `side` is that
    of the square the image will be resized to: with `limits.draft`, no side is decoded to less than four times it.
    """
    try:
        if isinstance(source, Image.Image):
            return _wrong_size(source.size, limits) or _to_rgb(_to_upright(source.copy()))
        data = _read(source, limits)
        return data if isinstance(data, RowError) else _decode(data, limits, side)
    except Image.DecompressionBombError as error:
        return RowError("image_too_large", str(error))
    except Exception as error:  # Pillow's decoders raise nearly anything at bytes that were made to break them
        return RowError("image_unreadable", f"{type(error).__name__}: {error}")


# ---- bytes


def _read(source: object, limits: ImageOptions) -> bytes | RowError:
    if isinstance(source, bytes | bytearray | memoryview):
        return _too_many_bytes(memoryview(source).nbytes, limits) or bytes(source)
    if not isinstance(source, str | os.PathLike):
        return RowError("row_invalid", f"an image is a path, bytes or a Pillow image, not {_kind(source)}")
    path = path_of(source)
    if ADDRESS.match(path):
        return RowError(
            "image_not_allowed",
            f"{_shown(path)} is an address, and none is fetched: download it with img2dataset",
        )
    return _read_file(path, limits)


def _kind(source: object) -> str:
    """What it is, and what makes an image of it."""
    if hasattr(source, "__array_interface__"):
        return f"{type(source).__name__}: make one with PIL.Image.fromarray()"
    return f"{type(source).__name__}: give what its read() gives" if hasattr(source, "read") else type(source).__name__


def path_of(source: str | os.PathLike[str]) -> str:
    """The path as text. A file that `./data:1.png` names is none the less one when a Path has left the `./` out."""
    path = os.fsdecode(source)
    looks_remote = ADDRESS.match(path) is not None
    return os.path.join(os.curdir, path) if looks_remote and _is_there(source) else path


def _is_there(source: str | os.PathLike[str]) -> bool:
    return isinstance(source, os.PathLike) and os.path.lexists(source)


def _read_file(path: str, limits: ImageOptions) -> bytes | RowError:
    try:
        # Looked at before it is opened, since opening a FIFO or a device already does something to it; and again
        # afterwards, since the name may have come to mean another file.
        refusal = _not_regular(path, os.stat(path).st_mode)
        if refusal:
            return refusal
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            refusal = _not_regular(path, status.st_mode) or _too_many_bytes(status.st_size, limits)
            return refusal or file.read(status.st_size)
    except (FileNotFoundError, NotADirectoryError):
        return RowError("image_missing", f"no such file: {_shown(path)}")
    except ValueError as error:
        return RowError("image_missing", f"no file can have this name: {_shown(path)} ({error})")
    except OSError as error:
        code = "image_missing" if error.errno == errno.ENAMETOOLONG else "image_unreadable"
        return RowError(code, f"{type(error).__name__}: {error.strerror}: {_shown(path)}")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _not_regular(path: str, mode: int) -> RowError | None:
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    kind = kinds.get(stat.S_IFMT(mode), "device")
    return RowError("image_not_allowed", f"{_shown(path)} is a {kind}: only regular files are opened")


def _shown(path: str) -> str:
    """`path` quoted for a message: no line breaks, no characters that cannot be written, and not endless."""
    return repr(path if len(path) <= 200 else f"{path[:197]}...")


# ---- limits


def _too_many_bytes(num_bytes: int, limits: ImageOptions) -> RowError | None:
    if num_bytes <= limits.max_bytes:
        return None
    return RowError("image_too_large", f"{num_bytes:,} bytes, over the limit of {limits.max_bytes:,}")


def _wrong_size(size: tuple[int, int], limits: ImageOptions) -> RowError | None:
    if 0 in size:
        return RowError("image_unreadable", f"{size[0]} x {size[1]} pixels are no image")
    return _too_many_pixels(size, limits)


def _too_many_pixels(size: tuple[int, int], limits: ImageOptions) -> RowError | None:
    width, height = size
    if width * height <= limits.max_pixels:
        return None
    return RowError("image_too_large", f"{width} x {height} pixels, over the limit of {limits.max_pixels:,} pixels")


def _limits_for(image_format: str, limits: ImageOptions) -> ImageOptions:
    """Some of Pillow's readers warn about large images, or refuse them, by its own limit: there it is ours too."""
    if image_format not in SELF_LIMITING_FORMATS or Image.MAX_IMAGE_PIXELS is None:
        return limits
    return replace(limits, max_pixels=min(limits.max_pixels, Image.MAX_IMAGE_PIXELS))


# ---- decoding


def _decode(data: bytes, limits: ImageOptions, side: int | None) -> Image.Image | RowError:
    image = _open(data, limits)
    if isinstance(image, RowError):
        return image
    with image:
        if limits.draft and side is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            image.draft(image.mode, (DRAFT_SIDES * side, DRAFT_SIDES * side))
        raw_mode = image.tile[0].args if image.tile else None
        _load(image, limits)
        _fit_transparency(image, raw_mode)
        return _to_rgb(_to_upright(image))


@cache
def _readers() -> tuple[tuple[str, Callable, Callable], ...]:
    """Pillow's readers of the allowed formats: (format, open, accept), in the order they are tried."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass  # the `heif` extra is not installed; _open says so when it matters
    else:
        register_heif_opener(decode_threads=1)  # who wants more work done at once gives us more images
    return tuple((name, *Image.OPEN[name]) for name in FORMATS if name in Image.OPEN)


def _open(data: bytes, limits: ImageOptions) -> ImageFile.ImageFile | RowError:
    """The image with its header read and nothing decoded.

    `Image.open` does the same, but warns about a large image before our limit can be asked; this way no warning is
    made.
    """
    if _is_heif(data) and "HEIF" not in _formats():
        return RowError("image_unreadable", "HEIF images need the extra: pip install 'idefics-cli[heif]'")
    failure = None
    for image_format, open_image, accept in _readers():
        if accept(data[:16]) is not True:
            continue
        own_limits = _limits_for(image_format, limits)
        try:
            refusal = image_format == "GIF" and _too_many_pixels(_gif_size(data), own_limits)
            if refusal:
                return refusal
            image = open_image(BytesIO(data), "")
        except Exception as error:  # kept, and reported unless another format takes the file
            failure = error
            continue
        return _too_many_pixels(image.size, own_limits) or image
    if failure is None:
        return RowError("image_unreadable", _unknown_format(data))
    raise failure


def _formats() -> list[str]:
    return [image_format for image_format, *_ in _readers()]


def _unknown_format(data: bytes) -> str:
    return f"not an image of a known format ({', '.join(_formats())})" if data else "the file is empty"


def _is_heif(data: bytes) -> bool:
    """Whether the file says that it holds an image coded in HEVC: its first box lists what it is compatible with."""
    brands = data[8 : min(int.from_bytes(data[:4], "big"), MAX_BRAND_BYTES)]
    return data[4:8] == b"ftyp" and any(brands[i : i + 4] in HEIF_BRANDS for i in range(0, len(brands), 4))


def _gif_size(data: bytes) -> tuple[int, int]:
    """Width and height that Pillow will give a GIF: its screen, widened where the first frame reaches beyond."""
    if len(data) < 13:
        return 0, 0  # too short for a header; the reader will say so
    width, height, flags = *(int.from_bytes(data[i : i + 2], "little") for i in (6, 8)), data[10]
    position = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    while data[position : position + 1] not in (b",", b";", b""):
        is_extension = data[position : position + 1] == b"!"
        position = _after_gif_blocks(data, position + 2) if is_extension else position + 1
    frame = [int.from_bytes(data[position + i : position + i + 2], "little") for i in (1, 3, 5, 7)]
    return max(width, frame[0] + frame[2]), max(height, frame[1] + frame[3])


def _after_gif_blocks(data: bytes, position: int) -> int:
    while position < len(data) and data[position]:
        position += data[position] + 1
    return position + 1


def _load(image: ImageFile.ImageFile, limits: ImageOptions) -> None:
    try:
        image.load()
    except OSError:
        if not limits.allow_truncated:
            raise
        image.tile = []  # nothing more to decode: what has arrived is the image, if memory was made for it at all
        image.load()


# ---- colours


def _to_upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # whatever a broken EXIF block raises, the pixels are good: the tag counts as absent
        orientation = None
    method = UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image that carries nothing but pixels, so that no one turns or blends it a second time."""
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
    """Grey of 16 or 32 bits -> L, or LA where one value is declared transparent."""
    values = np.asarray(image)  # (height, width)
    grey = Image.fromarray(_scale(values, image.mode))
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))


def _scale(values: np.ndarray, mode: str) -> np.ndarray:
    """Samples (height, width) of Pillow's `mode` -> 0..255, uint8. What is no number is black."""
    if mode.startswith("I;16"):
        table = np.rint(np.arange(65536) / 257).astype(np.uint8)
        return table[values]
    known = np.isfinite(values)
    low, high = _range(values if known.all() else values[known], mode)
    scaled = np.subtract(values, low, dtype=np.float64)  # one such array at a time: an image may be large
    scaled *= 255 / (high - low)
    scaled[~known] = 0
    np.rint(scaled, out=scaled)
    return np.clip(scaled, 0, 255, out=scaled).astype(np.uint8)


def _range(values: np.ndarray, mode: str) -> tuple[float, float]:
    """The values that become black and white in an image of 32 bits, whose file does not say."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    for limit in (1.0, 255.0) if mode == "F" else (255.0, 65535.0):
        if low >= 0 and high <= limit:
            return 0.0, limit
    return (low, high) if high > low else (low - 1, high)


def _fit_transparency(image: Image.Image, raw_mode: object) -> None:
    """Bring PNG's transparent colour to the depth Pillow has brought the pixels to."""
    transparent = image.info.get("transparency")
    if raw_mode == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    elif raw_mode in ("L;2", "L;4") and isinstance(transparent, int):
        image.info["transparency"] = transparent * {"L;2": 85, "L;4": 17}[raw_mode]
