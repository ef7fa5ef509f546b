"""Any image -> an upright RGB image on white, or a `RowError` that says why not.

The same rules for a path, for the bytes of a file and for a Pillow image:

- Only regular files are opened, and nothing is fetched. The format is read from the bytes, not from the name; only a
  TGA that lacks the mark at its end is known by its suffix, where its head may be one's.
- Bytes are counted before a file is read, pixels before anything is decoded.
- An image that fails while it is decoded is dropped: asked again, Pillow would return the part it has.
- One frame counts, by default the first. The EXIF orientation is applied; where it cannot be read the image is taken as
  upright.
- Samples of 16 bits are scaled by their full range. Integers of 32 bits are taken as 8 or 16 bits where all of them
  fit, floats as 0..1 or 0..255; anything wider is stretched from its least to its greatest value.
- What a TIFF says of its samples is followed, also where Pillow alone would take them for others.
- Colour profiles are not applied: the models were trained without.

Safe to call from many threads; changes no setting of Pillow, so Pillow's own limit on pixels holds, too. Knows no
models, rows or output files.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImagePalette, UnidentifiedImageError
from PIL import TiffImagePlugin as tiff

from idefics_cli.errors import RowError
from idefics_cli.rows import BoundPath, ImageOptions
from idefics_cli.storage.filenames import ADDRESS, address_refusal, shown
from idefics_cli.storage.regular_file import IrregularFile, lfs_pointer, open_regular

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")
PLANAR_MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")
ANIMATED = ("PNG", "WEBP", "GIF", "TIFF", "AVIF")  # of others further images are thumbnails, depths or gains
TGA = re.compile(r"\.(tga|icb|vda|vst)$", re.IGNORECASE)
TGA_END = b"TRUEVISION-XFILE.\0"
JXL = re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n.*?(?:jxlc|jxlp.{4})\xff\x0a", re.DOTALL)
JXL_LENGTHS, JXL_RATIOS = (9, 13, 18, 30), ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
# A file's first box lists what the file is compatible with.
HEIF = re.compile(rb".{4}ftyp(?:.{4}){,12}?he[iv][cxms]", re.DOTALL)
EXTRAS = {"HEIF": HEIF, "JXL": JXL}  # by the head of a file
GREY_LIMITS = {"L": (255.0,), "I": (255.0, 65535.0), "F": (1.0, 255.0), "I;12": (4095.0,), "I;16S": (255.0, 32767.0)}
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
        if isinstance(data, RowError):
            return data
        return _decode(data, options, side, os.fsdecode(source) if isinstance(source, str | os.PathLike) else "")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"\((\d+) pixels\)", str(error))  # refused before its sides were known here
        number = f"{int(found[1]):,}" if found else "too many"
        limit = min(options.max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or options.max_pixels))
        return RowError("image_too_large", f"{number} pixels, over the limit of {limit:,} pixels")
    except UnidentifiedImageError:
        if data.startswith(tuple(tiff.PREFIXES)):
            remedy = "save it again, as RGB or grey of 8 or 16 bits"
            return RowError("image_unreadable", f"a TIFF that is broken, or of samples that are not read: {remedy}")
        known = ", ".join((*FORMATS, "TGA", *EXTRAS))
        return RowError("image_unreadable", f"not an image in a known format ({known})")
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
        remedy = "is an address, not a file: download it first, for example with img2dataset"
        return RowError("image_not_allowed", address_refusal(path) or f"{shown(path)} {remedy}")
    return _read_file(path, options, source.below if isinstance(source, BoundPath) else None)


def _read_file(path: str, options: ImageOptions, below: str | None) -> bytes | RowError:
    try:
        with open_regular(path, below) as file:
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


def _decode(data: bytes, options: ImageOptions, side: int | None, name: str) -> Image.Image | RowError:
    if not data:
        return RowError("image_unreadable", "the file is empty")
    if pointer := lfs_pointer(data):
        return RowError("image_unreadable", pointer)
    formats = _formats(data, name, options)
    if isinstance(formats, RowError):
        return formats
    if options.allow_truncated and data.startswith(b"\xff\xd8"):
        data += b"\xff\xd9"  # the end of a JPEG: without it, Pillow drops its last rows of blocks, whole ones too
    with Image.open(BytesIO(data), formats=formats) as image:
        refusal = _refuse_size(image.size, options) or _to_frame(image, options)
        if refusal := refusal or (_fit_tiff(image) if image.format == "TIFF" else None):
            return refusal
        if options.draft and side is not None and image.format in ("JPEG", "MPO"):
            image.draft(image.mode, (DRAFT_SIDES * side, DRAFT_SIDES * side))
        if image.format == "JXL" and not image.jpeg:
            image.info.pop("exif", None)  # its orientation has been applied
        raw_mode = image.tile[0].args if image.tile else None
        _load(image, options)
        _fit_transparency(image, raw_mode)
        if image.format == "TGA" and image.mode == "RGBA" and not image.getchannel("A").getbbox():
            image.putalpha(255)  # many writers leave the fourth byte of a colour unset
        return _to_rgb(_upright(image))


def _formats(data: bytes, name: str, options: ImageOptions) -> tuple[str, ...] | RowError:
    """What these bytes may be: nothing else is tried."""
    for kind, head in EXTRAS.items():
        if head.match(data):
            if not _has_reader(kind):
                extra = f"pip install 'idefics-cli[{kind.lower()}]'"
                return RowError("image_unreadable", f"{kind} images need an extra: {extra}")
            return (kind,) if kind != "JXL" else _refuse_size(_jxl_size(data), options) or (kind,)
    return (*FORMATS, "TGA") if TGA.search(name) or data.endswith(TGA_END) else FORMATS


@cache
def _has_reader(kind: str) -> bool:
    """Whether the extra of this kind is installed, whose reader is added to Pillow's."""
    try:
        if kind == "HEIF":
            from pillow_heif import register_heif_opener

            register_heif_opener(decode_threads=1)
        else:
            from pillow_jxl import JpegXLImagePlugin

            JpegXLImagePlugin.DECODE_THREADS = 0
    except ImportError:
        return False
    return True


def _jxl_size(data: bytes) -> tuple[int, int]:
    """From its head, as ISO/IEC 18181-1 has it: the reader decodes as it opens."""
    bits = int.from_bytes(data[JXL.match(data).end() :][:12], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    is_small = take(1)

    def length() -> int:
        return 8 * (take(5) + 1) if is_small else take(JXL_LENGTHS[take(2)]) + 1

    height = length()
    ratio = take(3)
    if ratio == 0:
        return length(), height
    across, down = JXL_RATIOS[ratio - 1]
    return height * across // down, height


def _to_frame(image: Image.Image, options: ImageOptions) -> RowError | None:
    """Turn to the frame that is asked for. Frames count from 1."""
    if options.frame == 1:
        return None
    count = image.n_frames if image.format in ANIMATED else 1
    number = (count + 1) // 2 if options.frame == "middle" else options.frame
    if number > count:
        return RowError("image_unreadable", f"--frame {number} is beyond the end: the image has {count}")
    image.seek(number - 1)
    return _refuse_size(image.size, options)


def _load(image: Image.Image, options: ImageOptions) -> None:
    try:
        image.load()
    except OSError as error:
        if not options.allow_truncated and "truncated" in str(error):
            raise OSError(f"{error}: --allow-truncated takes what there is of it") from error
        if not options.allow_truncated or image.format == "JPEG2000":  # of which nothing would be there
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


# TIFF


def _fit_tiff(image: Image.Image) -> RowError | None:
    """Have Pillow read what it would take for something else."""
    tags, is_planar = image.tag_v2, image.tag_v2.get(tiff.PLANAR_CONFIGURATION) == 2
    if is_planar and tags.get(tiff.SAMPLESPERPIXEL, 1) == 1:
        tags[tiff.PLANAR_CONFIGURATION] = 1  # of one sample both are the same
        image._setup()
    elif is_planar and image.mode not in PLANAR_MODES:
        return RowError("image_unreadable", "a TIFF with planes of grey and of more: save it with samples interleaved")
    elif is_planar and not image.use_load_libtiff and max(tags[tiff.BITSPERSAMPLE]) == 16:
        image.use_load_libtiff = True
        args = f"{image.mode};16N", False, tags.offset
        image.tile = [image.tile[0]._replace(codec_name="libtiff", extents=(0, 0, *image._tile_size), args=args)]
    raw_mode, *others = image.tile[0].args
    if image.use_load_libtiff and raw_mode in ("I;16BS", "I;32BS", "F;32BF"):  # libtiff has turned the bytes round
        image.tile = [image.tile[0]._replace(args=(raw_mode.replace("B", "N"), *others))]
    colours = tags.get(tiff.COLORMAP, ())
    if image.mode in ("P", "PA") and max(colours) < 256:
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))
    return None


def _grey_type(tags: Mapping[int, Any]) -> type[np.integer] | None:
    """The type of samples that Pillow has put into another one of their size."""
    kind = max(tags.get(tiff.BITSPERSAMPLE, (1,))), max(tags.get(tiff.SAMPLEFORMAT, (1,)))
    return {(8, 2): np.int8, (32, 1): np.uint32}.get(kind)


# Colours


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # whatever a broken EXIF block raises, the pixels are good
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image that carries nothing but pixels, so that it is not turned or blended a second time."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode.startswith(("I", "F")) or _grey_type(tags):
        image = _to_eight_bits(image, tags)
    elif image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("LA", "PA", "RGBA") or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    rgb = image.convert("RGB")
    rgb.info.clear()
    return rgb


def _to_eight_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Grey of 16 or 32 bits -> L, or LA where one value is declared transparent. NaN and Inf are black."""
    values = np.asarray(image)  # (height, width)
    values = values.view(_grey_type(tags) or values.dtype)
    known = np.isfinite(values)
    bits = {(12,): "I;12", (16,): "I;16"}.get(tags.get(tiff.BITSPERSAMPLE))
    low, high = _range(values[known], f"{bits}S" if bits and image.mode == "I" else bits or image.mode)
    if tags and tags.get(tiff.PHOTOMETRIC_INTERPRETATION, 0) == 0:  # the least value is white
        low, high = high, low
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
    for limit in GREY_LIMITS.get(mode, (65535.0,)):
        if low >= 0 and high <= limit:
            return 0.0, limit
    return (low, high) if high > low else (low - 1, high)
