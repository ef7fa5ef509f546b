"""Every kind of image, every kind of damage: an upright RGB image on white, or a reason; never an exception."""

from __future__ import annotations

import io
import os
import random
import socket
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features
from sdist import sdist

from idefics_cli.errors import RowError
from idefics_cli.images import decode as images
from idefics_cli.images.decode import load_image
from idefics_cli.rows import ImageOptions

WHITE, RED, BLACK = (255, 255, 255), (255, 0, 0), (0, 0, 0)


@pytest.fixture(autouse=True)
def nothing_escapes():
    """No test here may let a warning out, and none may leave Pillow changed."""
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert before == (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)


@pytest.fixture
def may_warn(nothing_escapes):
    """But where Pillow warns of damage."""
    warnings.simplefilter("ignore")


def saved(image: Image.Image, image_format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=image_format, **options)
    return stream.getvalue()


def photo(width: int = 40, height: int = 30) -> Image.Image:
    """Something smooth, so that lossy formats come close to it."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def plain(image: Image.Image) -> Image.Image:
    copy = image.copy()
    copy.info.clear()
    return copy


def difference(result: Image.Image | RowError, expected: Image.Image) -> float:
    """The mean one of their pixels."""
    assert isinstance(result, Image.Image), str(result)
    assert result.size == expected.size
    return abs(np.asarray(result).astype(int) - np.asarray(expected)).mean()


def pixel(result: Image.Image | RowError, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert isinstance(result, Image.Image), str(result)
    assert result.mode == "RGB"
    return result.getpixel((x, y))


def refusal(source, limits: ImageOptions = images.DEFAULT_OPTIONS) -> RowError:
    result = load_image(source, limits)
    assert isinstance(result, RowError), result
    assert "\n" not in str(result)
    return result


def png(width: int, height: int, depth: int, colour_type: int, row: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of equal rows, written out by hand for what Pillow does not save."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = zlib.compress((b"\x00" + row) * height)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, body) for name, body in parts)


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


# ---- formats and kinds of input


def heif(image: Image.Image) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    pillow_heif.from_pillow(image).save(stream, quality=95)
    return stream.getvalue()


LOSSLESS = [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("TIFF", {"compression": "tiff_lzw"})]
LOSSY = [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95}), ("AVIF", {"quality": 95}), ("HEIF", {})]


@pytest.mark.parametrize(("image_format", "options"), [*LOSSLESS, *LOSSY])
def test_formats(image_format, options):
    if image_format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    data = heif(photo()) if image_format == "HEIF" else saved(photo(), image_format, **options)
    lossy = (image_format, options) in LOSSY
    assert difference(load_image(data), photo()) <= (4 if lossy else 0)
    assert refusal(data, ImageOptions(max_pixels=1199)).code == "image_too_large"


@pytest.fixture
def no_heif(monkeypatch):
    """As if the extra were not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    images._has_reader.cache_clear()
    yield
    images._has_reader.cache_clear()


# Major brand, version, and what the file is compatible with: as iPhones, cameras and libheif write them.
HEIF_HEADS = {
    "iPhone": b"ftypheic\0\0\0\0mif1heic",
    "ten bits": b"ftypheix\0\0\0\0mif1MiHBheix",
    "a collection": b"ftypmif1\0\0\0\0mif1miafheic",
    "a sequence": b"ftypmsf1\0\0\0\0msf1hevc",
}


@pytest.mark.parametrize("head", HEIF_HEADS.values(), ids=HEIF_HEADS)
def test_heif_without_its_extra(no_heif, head):
    data = (len(head) + 4).to_bytes(4, "big") + head + b"\0\0\0\x08mdat"
    expected = "image_unreadable: HEIF images need an extra: pip install 'idefics-cli[heif]'"
    assert str(refusal(data)) == expected


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif_needs_no_extra(no_heif):
    assert load_image(saved(photo(), "AVIF")).size == (40, 30)
    assert "extra" not in str(refusal(saved(photo(), "AVIF")[:60]))


def test_paths_bytes_and_pillow_images_give_the_same(tmp_path):
    data = saved(photo(), "PNG")
    path = tmp_path / "image.jpg"  # the name says nothing
    path.write_bytes(data)
    with Image.open(path) as opened:
        sources = (path, str(path), data, bytearray(data), memoryview(data), opened, photo())
        results = [load_image(source) for source in sources]
    assert all(result == plain(photo()) for result in results)


def test_the_first_frame_counts():
    frames = [Image.new("RGB", (6, 6), colour) for colour in (RED, BLACK, WHITE)]
    for image_format in ("GIF", "PNG", "TIFF", "WEBP", "MPO"):
        data = saved(frames[0], image_format, save_all=True, append_images=frames[1:], lossless=True)
        assert max(abs(a - b) for a, b in zip(pixel(load_image(data)), RED, strict=True)) <= 2, image_format


@pytest.mark.parametrize("source", [None, 3, 1.5, [b"x"], object(), np.zeros((2, 2, 3))])
def test_what_is_no_image_at_all(source):
    assert refusal(source).code == "row_invalid"


# ---- colours


def flat(mode: str, colour) -> Image.Image:
    return Image.new(mode, (4, 3), colour)


def palette_with_alpha() -> Image.Image:
    image = Image.new("P", (4, 3), 1)
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    return image


def half_red_on_white(alpha: int) -> tuple[int, int, int]:
    return (255, *([round(255 - alpha)] * 2))


RGB16_ROW = struct.pack(">HHH", 0x12FF, 0x3400, 0x5600) + struct.pack(">HHH", 0xFF00, 0, 0)
COLOURS: dict[str, tuple[Callable[[], object], tuple[int, int, int]]] = {
    "grey": (lambda: saved(flat("L", 77), "PNG"), (77, 77, 77)),
    "one bit": (lambda: saved(flat("1", 1), "PNG"), WHITE),
    "grey of 2 bits": (lambda: png(4, 3, 2, 0, b"\x55"), (85, 85, 85)),
    "palette": (lambda: saved(palette_with_alpha(), "PNG"), RED),
    "palette, GIF": (lambda: saved(palette_with_alpha(), "GIF"), RED),
    "CMYK, TIFF": (lambda: saved(flat("CMYK", (0, 255, 255, 0)), "TIFF"), RED),
    "CMYK, black": (lambda: flat("CMYK", (0, 0, 0, 255)), BLACK),
    "YCbCr": (lambda: flat("RGB", (200, 200, 200)).convert("YCbCr"), (200, 200, 200)),
    "HSV": (lambda: flat("HSV", (0, 255, 255)), RED),
    "LAB": (lambda: flat("LAB", (255, 128, 128)), WHITE),
    "RGBX": (lambda: flat("RGBX", (1, 2, 3, 0)), (1, 2, 3)),
    "alpha 100": (lambda: saved(flat("RGBA", (255, 0, 0, 100)), "PNG"), half_red_on_white(100)),
    "alpha, WebP": (lambda: saved(flat("RGBA", (255, 0, 0, 0)), "WEBP", lossless=True), WHITE),
    "palette, one transparent": (lambda: saved(palette_with_alpha(), "PNG", transparency=1), WHITE),
    "palette, one transparent, GIF": (lambda: saved(palette_with_alpha(), "GIF", transparency=1), WHITE),
    "palette, alpha for each": (
        lambda: saved(palette_with_alpha(), "PNG", transparency=b"\xff\x64"),
        half_red_on_white(100),
    ),
    "one transparent grey": (lambda: saved(flat("L", 7), "PNG", transparency=7), WHITE),
    "another transparent grey": (lambda: saved(flat("L", 7), "PNG", transparency=8), (7, 7, 7)),
    "one transparent colour": (lambda: saved(flat("RGB", (1, 2, 3)), "PNG", transparency=(1, 2, 3)), WHITE),
    "one transparent bit": (lambda: png(4, 3, 1, 0, b"\x00", (b"tRNS", b"\x00\x00")), WHITE),
    "one transparent grey of 2 bits": (lambda: png(4, 3, 2, 0, b"\x55", (b"tRNS", b"\x00\x01")), WHITE),
    "one transparent grey of 4 bits": (lambda: png(4, 3, 4, 0, b"\x77\x77", (b"tRNS", b"\x00\x07")), WHITE),
    "grey of 16 bits": (lambda: png(2, 3, 16, 0, b"\x80\x80" * 2), (128, 128, 128)),
    "one transparent grey of 16 bits": (lambda: png(2, 3, 16, 0, b"\x80\x81" * 2, (b"tRNS", b"\x80\x81")), WHITE),
    "another transparent grey of 16 bits": (
        lambda: png(2, 3, 16, 0, b"\x80\x81" * 2, (b"tRNS", b"\x80\x80")),
        (128, 128, 128),
    ),
    "RGB of 16 bits": (lambda: png(2, 3, 16, 2, RGB16_ROW), (0x12, 0x34, 0x56)),
    "one transparent colour of 16 bits": (lambda: png(2, 3, 16, 2, RGB16_ROW, (b"tRNS", RGB16_ROW[:6])), WHITE),
    "RGBA of 16 bits": (lambda: png(1, 3, 16, 6, b"\xff\xff\x00\x00\x00\x00\x00\x00"), WHITE),
    "grey of 16 bits, TIFF": (
        lambda: saved(Image.fromarray(np.full((3, 4), 0x8080, np.uint16)), "TIFF"),
        (128, 128, 128),
    ),
    "big-endian, Pillow": (lambda: Image.frombytes("I;16B", (2, 1), b"\x80\x80\x00\x00"), (128, 128, 128)),
    "floats to 1, TIFF": (lambda: saved(Image.fromarray(np.full((3, 4), 0.4, np.float32)), "TIFF"), (102, 102, 102)),
}


@pytest.mark.parametrize(("make", "colour"), COLOURS.values(), ids=COLOURS)
def test_colours(make, colour):
    found = pixel(load_image(make()))
    assert max(abs(a - b) for a, b in zip(found, colour, strict=True)) <= 1


def test_16_bits_keep_their_whole_range():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    grey = np.asarray(load_image(saved(Image.fromarray(values), "PNG")))[..., 0]
    assert np.array_equal(grey, np.rint(values / 257))


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.int32, [0, 7, 255], [0, 7, 255]),
        (np.int32, [0, 257, 65535], [0, 1, 255]),
        (np.int32, [-100, 0, 100], [0, 128, 255]),
        (np.int32, [0, 2**30, 2**31 - 1], [0, 128, 255]),
        (np.int32, [-5, -5, -5], [255, 255, 255]),
        (np.int32, [0, 0, 0], [0, 0, 0]),
        (np.float32, [0, 0.5, 1], [0, 128, 255]),
        (np.float32, [0, 3, 255], [0, 3, 255]),
        (np.float32, [-1, 0, 1], [0, 128, 255]),
        (np.float32, [0, 500, 1000], [0, 128, 255]),
        (np.float32, [np.nan, 1, np.inf], [0, 255, 0]),
        (np.float32, [np.nan] * 3, [0, 0, 0]),
        (np.float32, [-3e38, 0, 3e38], [0, 128, 255]),
    ],
)
def test_32_bits_are_scaled_by_what_they_hold(dtype, values, expected):
    image = Image.fromarray(np.array([values], dtype))
    assert np.asarray(load_image(image))[0, :, 0].tolist() == pytest.approx(expected, abs=1)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["RGBA", "LA", "PA", "La", "RGBa"]), st.binary(min_size=4, max_size=4))
def test_transparency_is_what_lies_on_white(mode, colour):
    image = Image.frombytes("RGBA", (1, 1), colour)
    image = image.convert({"RGBa": "RGBA", "La": "LA"}.get(mode, mode))
    expected = np.asarray(image.convert("RGBA"), float)[0, 0]
    opacity = expected[3] / 255
    on_white = expected[:3] * opacity + 255 * (1 - opacity)
    result = load_image(image.convert(mode))
    # Premultiplied colours have lost what little a faint pixel had of them.
    assert np.abs(np.asarray(result, float)[0, 0] - on_white).max() <= (2 if mode.endswith("a") else 1)


# ---- orientation


TURN = Image.Transpose
UNDO = {
    **{1: None, 2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM},
    **{5: TURN.TRANSPOSE, 6: TURN.ROTATE_90, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_270, 77: None},
}


def turned(orientation: int) -> tuple[Image.Image, Image.Exif]:
    """The photo as a camera held that way stores it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photo(48, 32)
    return image if UNDO[orientation] is None else image.transpose(UNDO[orientation]), exif


@pytest.mark.parametrize("orientation", UNDO)
@pytest.mark.parametrize(("image_format", "options"), [*LOSSLESS[:1], *LOSSLESS[2:4], *LOSSY[:1]])
def test_orientation(image_format, options, orientation):
    """Of files, and of Pillow's images of them."""
    image, exif = turned(orientation)
    data = saved(image, image_format, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as opened:
        for source in data, opened:
            assert difference(load_image(source), photo(48, 32)) <= (4 if image_format == "JPEG" else 0)


def test_an_upright_image_is_not_turned_twice():
    image, exif = turned(6)
    once = load_image(saved(image, "JPEG", exif=exif))
    assert load_image(once) == once
    assert not once.info
    assert not once.getexif()


@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff", b"Exif\x00\x00nonsense", b"Exif\x00\x00"]
)
def test_a_broken_exif_block_is_not_a_broken_image(may_warn, exif):
    assert load_image(saved(photo(), "JPEG", exif=exif)).size == (40, 30)


# ---- the caller's own images


def test_a_pillow_image_is_left_as_it_was():
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(saved(palette_with_alpha(), "PNG", transparency=b"\xff\x64", exif=exif))) as image:
        image.load()
        before = (image.mode, image.size, image.tobytes(), dict(image.info), image.getpalette("RGBA"))
        result = load_image(image)
        assert (image.mode, image.size, image.tobytes(), dict(image.info), image.getpalette("RGBA")) == before
    assert result.size == (3, 4)
    assert pixel(result) == half_red_on_white(100)


def test_the_result_shares_no_pixels_with_the_callers_image():
    image = photo()
    load_image(image).paste((0, 0, 0), (0, 0, 40, 30))
    assert image == photo()


def test_the_current_frame_of_an_opened_image_until_it_is_closed():
    frames = [Image.new("RGB", (6, 6), colour) for colour in (RED, BLACK)]
    image = Image.open(io.BytesIO(saved(frames[0], "TIFF", save_all=True, append_images=frames[1:])))
    image.seek(1)
    assert pixel(load_image(image)) == BLACK
    image.close()
    assert refusal(image).code == "image_unreadable"


# ---- damage


SMALL = {name: saved(photo(), name) for name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")}
SMALL["TIFF, LZW"] = saved(photo(), "TIFF", compression="tiff_lzw")


@pytest.mark.parametrize("name", SMALL)
def test_cut_off_anywhere(may_warn, name):
    data = SMALL[name]
    results = [load_image(data[:length]) for length in range(0, len(data), 7)]
    assert {type(result) for result in results} <= {RowError, Image.Image}
    assert all(result.code == "image_unreadable" for result in results if isinstance(result, RowError))
    assert isinstance(results[len(results) // 2], RowError)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(SMALL)), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_bytes_changed_anywhere(name, changes):
    data = bytearray(SMALL[name])
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = load_image(bytes(data))
    assert isinstance(result, RowError) or result.mode == "RGB"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "TGA"])
def test_half_an_image_is_refused_again_and_again_unless_it_is_asked_for(image_format, tmp_path):
    path = tmp_path / f"half.{image_format.lower()}"
    whole = saved(photo(200, 150), image_format)
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert [refusal(path).code for _ in range(3)] == ["image_unreadable"] * 3
    result = load_image(path, ImageOptions(allow_truncated=True))
    assert result.size == (200, 150)
    assert np.asarray(result).std() > 0, "the part that has arrived is there"
    assert refusal(path).code == "image_unreadable"
    assert refusal(whole[:8], ImageOptions(allow_truncated=True)).code == "image_unreadable"


FOREIGN = {
    "nothing": b"",
    "text": b"this is not an image",
    "a page": b"<html><body>404 Not Found</body></html>",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "PDF": b"%PDF-1.7\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n",
    "a zip": b"PK\x03\x04" + bytes(60),
    "PAM": b"P7\nWIDTH 2\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nENDHDR\n" + bytes(2),
    "PSD": b"8BPS\0\1" + bytes(60),
    "zeros": bytes(1000),
    "noise": random.Random(0).randbytes(1000),
    "ICO": b"\x00\x00\x01\x00" + bytes(50),
    "a PNG's first bytes": b"\x89PNG\r\n\x1a\n",
    "a JPEG's first bytes": b"\xff\xd8\xff",
    "a GIF's first bytes": b"GIF89a",
    "a TIFF's first bytes": b"II*\x00",
    "a BMP's first bytes": b"BM",
    "a WebP's first bytes": b"RIFF\x00\x00\x00\x00WEBPVP8 ",
    "an AVIF's first bytes": b"\x00\x00\x00\x1cftypavif",
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_image(may_warn, data, tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    assert refusal(path).code == refusal(data).code == "image_unreadable"


def test_reasons_name_the_kinds_that_are_known():
    assert "JPEG, PNG, WEBP" in refusal(b"text").message
    assert refusal(b"").message == "the file is empty"


@pytest.mark.parametrize(
    "error", [RecursionError("deep"), struct.error("bad"), KeyError(3), MemoryError(), OSError(5, "I/O")]
)
def test_class_and_message_of_a_decoders_failure_are_kept(error, monkeypatch):
    def fail(stream, formats):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    result = refusal(b"anything")
    assert result.code == "image_unreadable"
    assert result.message == f"{type(error).__name__}: {error}"


# ---- limits


def bomb(image_format: str, width: int, height: int) -> bytes:
    """A small file that declares a large image."""
    if image_format == "PNG":
        return png(width, height, 8, 0, b"")[:80]
    if image_format == "GIF":  # a screen of one pixel, a first frame that reaches beyond it
        frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0)
        extension = b"!\xf9\x04\x00\x00\x00\x00\x00"
        return (
            b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) + extension + frame + b"\x02\x02L\x01\x00;"
        )
    if image_format == "WEBP":
        body = struct.pack("<I", 0)[:4] + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
        return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + body
    data = saved(flat("L", 0), image_format)
    pack = struct.pack
    declared = {
        "BMP": [(pack("<ii", 4, 3), pack("<ii", width, height))],
        "JPEG": [(pack(">BHH", 8, 3, 4), pack(">BHH", 8, height, width))],
        "TIFF": [
            (pack("<HHII", tag, 4, 1, old), pack("<HHII", tag, 4, 1, new))
            for tag, old, new in [(256, 4, width), (257, 3, height)]
        ],
    }
    for old, new in declared[image_format]:
        assert data.count(old) == 1
        data = data.replace(old, new)
    return data


BOMBS = [(name, side) for name in ("PNG", "GIF", "BMP", "JPEG", "TIFF") for side in (9_000, 10_000, 15_000)]


@pytest.mark.parametrize(("image_format", "side"), [*BOMBS, ("WEBP", 15_000)])
def test_pixels_are_counted_before_anything_is_decoded(image_format, side):
    """81, 100 and 225 million: below the size at which Pillow warns, above it, and above that at which it raises."""
    start = time.monotonic()
    result = refusal(bomb(image_format, side, side))
    assert result.code == "image_too_large", result
    assert f"{side} x {side} pixels" in result.message or f"{side * side:,} pixels" in result.message
    assert time.monotonic() - start < 1


def test_the_limit_is_the_last_size_that_is_taken():
    data = SMALL["PNG"]
    for source in (photo(40, 30), *SMALL.values()):
        assert load_image(source, ImageOptions(max_pixels=1200)).size == (40, 30)
        assert refusal(source, ImageOptions(max_pixels=1199)).code == "image_too_large"
    assert load_image(data, ImageOptions(max_bytes=len(data))).size == (40, 30)
    assert refusal(data, ImageOptions(max_bytes=len(data) - 1)).code == "image_too_large"


def test_a_large_file_is_not_read(tmp_path):
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 40)
    start = time.monotonic()
    assert refusal(tmp_path / "large").code == "image_too_large"
    assert time.monotonic() - start < 1


# ---- names


def test_missing(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    names = ["none.png", "no/such/folder.png", "file/below.png", "nowhere", "nul\x00byte", "lone\ud800half", "x" * 300]
    assert {refusal(f"{tmp_path}/{name}").code for name in names} == {"image_missing"}
    assert refusal("").code == "image_missing"


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    assert "\\udce9" in refusal(name).message
    Path(name).write_bytes(saved(photo(), "PNG"))
    assert load_image(name) == plain(photo())


def test_links_are_followed_unless_they_go_round(tmp_path):
    (tmp_path / "image").write_bytes(saved(photo(), "PNG"))
    for link, target in [("link", "image"), ("a", "b"), ("b", "a")]:
        (tmp_path / link).symlink_to(target)
    assert load_image(tmp_path / "link") == plain(photo())
    assert refusal(tmp_path / "a").code == "image_unreadable"


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket"))
        (tmp_path / "link").symlink_to(tmp_path / "fifo")
        kinds = {tmp_path: "folder", tmp_path / "fifo": "FIFO", tmp_path / "socket": "socket", "/dev/zero": "device"}
        start = time.monotonic()
        for path, kind in (kinds | {tmp_path / "link": "FIFO"}).items():
            result = refusal(path)
            assert result.code == "image_not_allowed"
            assert f"is a {kind}" in result.message
        assert time.monotonic() - start < 1


def test_no_address_is_fetched():
    web = [
        "http://a.b/cat.jpg",
        " HTTPS://A.B/C.JPG",
        "ftp://a.b/cat.jpg",
        "s3://bucket/cat.jpg",
        Path("https://a.b/c"),
    ]
    others = {"file:///etc/passwd": "'/etc/passwd'", "file:cat.jpg": "'cat.jpg'", "DATA:,x": "write it to a file"}
    for address, remedy in (dict.fromkeys(web, "img2dataset") | others).items():
        result = refusal(address)
        assert result.code == "image_not_allowed" and remedy in result.message
    assert len(refusal("data:image/png;base64," + "A" * 100_000).message) < 400


def test_a_file_whose_name_looks_like_an_address_is_a_file(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "data:1.png")
    monkeypatch.chdir(tmp_path)
    assert pixel(load_image(Path("./data:1.png"), images.DEFAULT_OPTIONS)) == (0, 0, 0)


# ---- many at once


def test_many_threads():
    sources = [saved(photo(20 + n, 30), name) for n in range(10) for name in ("PNG", "JPEG", "GIF", "TIFF")]
    sources += [data[: len(data) // 2] for data in sources[:20]]
    expected = list(map(load_image, sources))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(load_image, sources * 8)) == expected * 8


# ---- drafts


@pytest.mark.parametrize(("size", "drawn"), [((1700, 900), (425, 225)), ((900, 500), (450, 250)), ((450, 399), None)])
def test_a_draft_keeps_both_sides_at_four_times_what_is_asked_for(size, drawn):
    data = saved(photo(*size), "JPEG", quality=95)
    assert load_image(data, ImageOptions(draft=True), side=50).size == (drawn or size)


@pytest.mark.parametrize("orientation", UNDO)
def test_a_draft_is_upright(orientation):
    image, exif = turned(orientation)
    large = image.resize((image.width * 20, image.height * 20), Image.Resampling.NEAREST)
    data = saved(large, "JPEG", exif=exif, quality=95)
    whole, draft = (load_image(data, ImageOptions(draft=draft), side=40) for draft in (False, True))
    assert draft.size == (whole.width // 4, whole.height // 4)
    assert difference(whole.resize(draft.size), draft) < 2


def test_no_draft_unless_asked_for_and_none_of_other_formats():
    jpeg, png = (saved(photo(800, 600), image_format) for image_format in ("JPEG", "PNG"))
    assert load_image(jpeg, side=10) == load_image(jpeg) == load_image(jpeg, ImageOptions(draft=True))
    assert load_image(png, ImageOptions(draft=True), side=10) == plain(photo(800, 600))
    assert refusal(jpeg, ImageOptions(max_pixels=479_999, draft=True)).code == "image_too_large", "of the whole image"


def test_a_thumbnail_is_no_draft():
    pillow_heif = pytest.importorskip("pillow_heif")
    with_thumbnail = pillow_heif.from_pillow(photo(800, 600))
    with_thumbnail[0].info["thumbnails"] = [100]
    stream = io.BytesIO()
    with_thumbnail.save(stream)
    assert pillow_heif.open_heif(stream).info["thumbnails"] == [100]
    assert load_image(stream.getvalue(), ImageOptions(draft=True), side=10).size == (800, 600)


# ---- Pillow's own test images: years of reported crashes


LOAD_ALL = """
import sys, time, warnings
from collections import Counter
from pathlib import Path
from PIL import Image
from mistakes import peak
from idefics_cli.images.decode import load_image
from idefics_cli.errors import RowError

warnings.simplefilter("ignore")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
counts, before = Counter(), peak()
for path in sorted(path for path in Path(sys.argv[1]).rglob("*") if path.is_file()):
    start = time.monotonic()
    result = load_image(path)
    assert time.monotonic() - start < 5, path
    assert isinstance(result, RowError) or result.mode == "RGB", path
    assert "Warning" not in str(result), (path, result)
    counts[result.code if isinstance(result, RowError) else "images"] += 1
assert counts.keys() == {"images", "image_unreadable", "image_too_large"}, counts
assert counts.total() > 500 and counts["images"] > 400, counts
assert peak() - before < 500_000_000, "over what the libraries take"
"""


def test_pillows_own_test_images():
    folder = sdist("pillow", PIL.__version__) / "Tests" / "images"
    command = [sys.executable, "-c", LOAD_ALL, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert finished.returncode == 0, finished.stderr[-2000:]
