"""TIFFs as microscopes, scanners and satellites write them: the right pixels or an error row, never silently others."""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import rows_of
from PIL import Image

from idefics_cli.errors import RowError
from idefics_cli.images.decode import load_image
from idefics_cli.rows import ImageOptions

pytestmark = pytest.mark.filterwarnings("ignore")  # tifffile and Pillow tell of odd files
HEIGHT, WIDTH = 40, 64
X, Y = np.meshgrid(np.linspace(0, 1, WIDTH), np.linspace(0, 1, HEIGHT))
SAMPLES = {"minisblack": 1, "miniswhite": 1, "rgb": 3, "separated": 4}


def values(dtype: str, samples: int, extra: tuple[str, ...]) -> np.ndarray:
    """(height, width, samples) over the whole range of the type, floats over 0..1; premultiplied as `extra` says."""
    shares = np.stack([X, Y, 1 - X, (X + Y) / 3, 0.5 + Y / 2][:samples] + [0.4 + 0.6 * X] * len(extra), axis=-1)
    if extra == ("assocalpha",):
        shares[..., :-1] *= shares[..., -1:]
    if np.dtype(dtype).kind == "f":
        return shares.astype(dtype)
    low, high = (float(getattr(np.iinfo(dtype), end)) for end in ("min", "max"))
    return np.rint(low + shares * (high - low)).clip(low, high).astype(dtype)


def seen(data: bytes) -> np.ndarray:
    """(height, width, 3) in 0..255: the first page as tifffile reads it and as its photometry is meant, on white."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        stored, kind = page.asarray(), page.photometric.name
        extra = [each.name for each in page.extrasamples]
        if page.samplesperpixel > 1 and page.planarconfig.name == "SEPARATE":
            stored = np.moveaxis(stored, 0, -1)
        high = float((1 << page.bitspersample) - 1)
        shares = stored.reshape(*stored.shape[:2], -1).astype(float)
    if np.dtype(stored.dtype).kind == "u":
        shares /= high
    elif np.dtype(stored.dtype).kind == "i":
        shares = (shares + (high + 1) / 2) / high
    count = 4 if kind == "SEPARATED" else 3 if kind == "RGB" else 1
    colours = shares[..., :count]
    if kind == "SEPARATED":
        colours = (1 - colours[..., :3]) * (1 - colours[..., 3:])
    elif count == 1:
        colours = np.repeat(1 - colours if kind == "MINISWHITE" else colours, 3, axis=-1)
    alpha = shares[..., count : count + 1]
    if extra[:1] == ["UNASSALPHA"]:
        colours = colours * alpha + 1 - alpha
    elif extra[:1] == ["ASSOCALPHA"]:
        colours = colours + 1 - alpha
    return 255 * colours


def written(photometric: str, dtype: str, extra: tuple[str, ...], planar: bool, **options: Any) -> bytes:
    array = values(dtype, SAMPLES[photometric], extra)
    if planar:
        array = np.moveaxis(array, -1, 0)
    config = {} if array.shape[-1] == 1 else {"planarconfig": "separate" if planar else "contig"}
    array = np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array)
    stream = io.BytesIO()
    options |= config | ({"extrasamples": extra} if extra else {})
    tifffile.imwrite(stream, array, photometric=photometric, metadata=None, **options)
    return stream.getvalue()


def error(data: bytes, expected: np.ndarray) -> float | None:
    """How far the worst value is off; None for an error row."""
    found = load_image(data)
    if isinstance(found, RowError):
        assert found.code == "image_unreadable"
        return None
    assert found.size == expected.shape[1::-1]
    return float(abs(np.asarray(found, float) - expected).max())


# Half a level is the rounding to bytes, half a level Pillow's cut of 16 bits to 8. Where two samples are multiplied, as
# a colour and its alpha or black are, both have been rounded before, and what was multiplied is divided first.
EXACT, MULTIPLIED, DIVIDED = 1.0, 2.0, 3.0
EXTRA = ((), ("unassalpha",), ("assocalpha",), ("unspecified",), ("unspecified",) * 2)
TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"rowsperstrip": 7},
    {"tile": (16, 32)},
    {"compression": "zlib", "rowsperstrip": 7},
    {"compression": "zlib", "tile": (16, 32)},
    {"compression": "zlib", "predictor": 2},
)
# Of each kind of samples: what is read, for all layouts. The rest may be error rows.
READ = {
    *itertools.product(("minisblack",), ("u1", "i1", "u2", "i2", "i4", "f4"), [()], [False], "<>"),
    *itertools.product(("minisblack",), ("u4",), [()], [False], "<"),
    *itertools.product(("miniswhite",), ("u1", "f4"), [()], [False], "<>"),
    *itertools.product(("miniswhite",), ("u2",), [()], [False], "<"),
    *itertools.product(("rgb",), ("u1", "u2"), [(), ("unassalpha",)], [False, True], "<>"),
    *itertools.product(("rgb",), ("u1", "u2"), [("assocalpha",), ("unspecified",)], [False], "<>"),
    *itertools.product(("separated",), ("u1", "u2"), [()], [False, True], "<>"),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("photometric", SAMPLES)
def test_samples_of_every_kind_are_right_or_refused(photometric: str, layout: dict[str, Any]) -> None:
    read = set()
    for dtype, extra, planar, order in itertools.product(TYPES, EXTRA, [False, True], "<>"):
        try:
            data = written(photometric, dtype, extra, planar, byteorder=order, **layout)
        except (ValueError, TypeError, KeyError):
            continue  # no predictor for floats, say
        off = error(data, seen(data))
        limit = MULTIPLIED if photometric == "separated" or extra == ("unassalpha",) else EXACT
        limit = DIVIDED if extra == ("assocalpha",) else limit
        assert off is None or off <= limit, (dtype, extra, planar, order, off)
        if off is not None:
            read.add((photometric, dtype, extra, planar, order))
    ours = {kind for kind in READ if kind[0] == photometric and not (kind[1] == "f4" and "predictor" in layout)}
    assert ours <= read, sorted(ours - read)


def packed(grey: np.ndarray, bits: int, photometric: int, order: str) -> bytes:
    """Samples without a gap, which tifffile writes with a package of its own."""
    places = (grey[..., None] >> np.arange(bits - 1, -1, -1)) & 1  # (height, width, bits)
    rows = np.packbits(places.reshape(HEIGHT, -1).astype(bool), axis=-1).tobytes()
    if bits == 16:
        rows = grey.astype(f"{order}u2").tobytes()
    tags = ((256, WIDTH), (257, HEIGHT), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, HEIGHT))
    entries = [(tag, 4, 1, value) for tag, value in (*tags, (279, len(rows)))]
    entries[2] = (258, 3, 1, bits if order == "<" else bits << 16)
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(rows))
    directory = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    return head + rows + struct.pack(f"{order}H", len(entries)) + directory + bytes(4)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 14, 16])
def test_bits_of_grey(bits: int, photometric: str, order: str) -> None:
    whole = np.rint(X * ((1 << bits) - 1)).astype("u2")
    data = packed(whole, bits, 1 if photometric == "minisblack" else 0, order)
    shares = whole / ((1 << bits) - 1)
    expected = 255 * np.repeat((shares if photometric == "minisblack" else 1 - shares)[..., None], 3, axis=-1)
    off = error(data, expected)
    must_be_read = bits in (1, 2, 4, 8) or (photometric == "minisblack" and (bits == 16 or (bits, order) == (12, "<")))
    assert off <= EXACT if off is not None else not must_be_read


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("scale", [1, 256, 257])
@pytest.mark.parametrize("order", "<>")
def test_palettes_of_8_and_of_16_bits(order: str, scale: int, compression: str | None) -> None:
    index, ramp = np.rint(X * 255).astype("u1"), np.arange(256)
    colours = np.stack([ramp, 255 - ramp, ramp * 7 % 256]).astype("u2")
    stream = io.BytesIO()
    tifffile.imwrite(
        stream, index, photometric="palette", colormap=colours * scale, byteorder=order, compression=compression
    )
    assert error(stream.getvalue(), np.moveaxis(colours, 0, -1)[index]) == 0


def test_a_palette_that_is_nearly_black_is_not_made_bright() -> None:
    """Below 256 of 65,535 is taken for 8 bits only where no colour is above."""
    index = np.rint(X * 255).astype("u1")
    colours = np.zeros((3, 256), "u2")
    colours[:, 200] = 256
    stream = io.BytesIO()
    tifffile.imwrite(stream, index, photometric="palette", colormap=colours)
    assert np.asarray(load_image(stream.getvalue())).max() <= 1


def by_pillow(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "TIFF", **options)
    return stream.getvalue()


RGB = Image.fromarray(values("u1", 3, ()))
PILLOWS = [("tiff_lzw", 0), ("tiff_adobe_deflate", 0), ("packbits", 0), ("zstd", 0), ("lzma", 0), ("jpeg", 12)]


@pytest.mark.parametrize(("compression", "tolerance"), PILLOWS)
@pytest.mark.parametrize("mode", ["L", "RGB", "YCbCr", "CMYK", "RGBA", "LA", "LAB", "P", "1"])
def test_compressions_of_libtiff(mode: str, compression: str, tolerance: int) -> None:
    image = Image.merge("LAB", RGB.split()) if mode == "LAB" else RGB.convert(mode)
    try:
        data = by_pillow(image, compression=compression)
    except OSError:
        assert mode in ("P", "1") and compression == "jpeg"
        return
    assert error(data, np.asarray(load_image(image), float)) <= (20 if mode in ("LAB", "CMYK") else 1) * tolerance + 1


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_fax(compression: str) -> None:
    image = RGB.convert("1")
    assert error(by_pillow(image, compression=compression), np.asarray(image.convert("RGB"))) == 0


def test_the_predictor_of_floats() -> None:
    image = Image.fromarray(X.astype("f4"))
    plain, predicted = (by_pillow(image, compression="tiff_adobe_deflate", tiffinfo={317: kind}) for kind in (1, 3))
    assert plain != predicted
    assert error(predicted, 255 * np.repeat(X[..., None], 3, axis=-1)) <= EXACT


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("planar", [False, True])
def test_pages_and_their_orientation(big: bool, planar: bool) -> None:
    array = values("u2", 3, ())
    array = np.ascontiguousarray(np.moveaxis(array, -1, 0)) if planar else array
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream, bigtiff=big) as file:
        for page in (array, 65535 - array):
            file.write(page, photometric="rgb", planarconfig="separate" if planar else "contig", metadata=None,
                       extratags=[(274, "H", 1, 6, True)])  # fmt: skip
    upright = np.rot90(values("u2", 3, ()) / 257, -1)
    for number, expected in ((1, upright), (2, 255 - upright)):
        found = load_image(stream.getvalue(), ImageOptions(frame=number))
        assert abs(np.asarray(found) - expected).max() <= EXACT


def test_one_sample_in_a_plane_of_its_own() -> None:
    """Which is the same as without planes, and what some scanners write."""
    for dtype in ("u1", "u2", "f4"):
        stream = io.BytesIO()
        array = values(dtype, 1, ())[..., 0]
        tifffile.imwrite(stream, array, photometric="minisblack", metadata=None, extratags=[(284, "H", 1, 2, True)])
        assert error(stream.getvalue(), seen(stream.getvalue())) <= EXACT


def test_a_tiff_that_is_refused_says_what_would_be_read(run: Callable[..., Any], tmp_path: Any) -> None:
    (tmp_path / "a.tif").write_bytes(written("rgb", "f4", (), False))
    assert rows_of(run("caption", tmp_path).stdout)[0]["error"] == (
        "image_unreadable: a TIFF that is broken, or of samples that are not read: save it again, as RGB or grey of 8"
        " or 16 bits"
    )
    (tmp_path / "a.tif").write_bytes(written("rgb", "u2", (), True))
    assert rows_of(run("caption", tmp_path).stdout)[0]["error"] is None
