"""Damaged images of every format, by seed: pixels or an error row, in bounded time and memory; never the run's end."""

from __future__ import annotations

import io
import random
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from mistakes import damaged, peak
from PIL import Image

from idefics_cli.errors import RowError
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.images.worker_pool import WorkerPool
from idefics_cli.rows import ImageOptions

MOST_MEMORY, MOST_SECONDS = 2e9, 30.0
WAYS = {"as usual": ImageOptions(workers=1), "all": ImageOptions(workers=1, allow_truncated=True, frame="middle")}


def small_files() -> dict[str, bytes]:
    x, y = np.meshgrid(np.linspace(0, 255, 24), np.linspace(0, 255, 16))
    rgb = Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6

    def saved(image_format: str, image: Image.Image = rgb, **options: Any) -> bytes:
        stream = io.BytesIO()
        image.save(stream, image_format, **options)
        return stream.getvalue()

    def tiff(dtype: str, **options: Any) -> bytes:
        stream = io.BytesIO()
        array = np.asarray(rgb).astype(dtype)
        array = np.moveaxis(array, -1, 0).copy() if options.get("planarconfig") == "separate" else array
        tifffile.imwrite(stream, array, metadata=None, **options)
        return stream.getvalue()

    import pillow_heif  # both are in the extra for tests
    import pillow_jxl  # noqa: F401

    pillow_heif.register_heif_opener()
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    return {
        "JPEG": saved("JPEG", exif=exif),
        "progressive JPEG": saved("JPEG", progressive=True),
        "CMYK JPEG": saved("JPEG", rgb.convert("CMYK")),
        "MPO": saved("MPO", **frames),
        "PNG": saved("PNG", exif=exif, icc_profile=bytes(500)),
        "palette PNG": saved("PNG", rgb.convert("P"), transparency=3),
        "APNG": saved("PNG", **frames),
        "GIF": saved("GIF", **frames),
        "WebP": saved("WEBP", exif=exif),
        "lossless WebP": saved("WEBP", rgb.convert("RGBA"), lossless=True),
        "animated WebP": saved("WEBP", **frames),
        "BMP": saved("BMP"),
        "packed BMP": b"BM" + (60).to_bytes(4, "little") + saved("BMP", rgb.convert("P"))[6:],
        "TIFF": tiff("u1", photometric="rgb", byteorder=">"),
        "planar TIFF": tiff("u2", photometric="rgb", planarconfig="separate", tile=(16, 16)),
        "zlib TIFF": tiff("u2", photometric="rgb", compression="zlib", predictor=2),
        "LZW TIFF": saved("TIFF", compression="tiff_lzw"),
        "JPEG TIFF": saved("TIFF", compression="jpeg"),
        "G4 TIFF": saved("TIFF", rgb.convert("1"), compression="group4"),
        "TIFF of pages": saved("TIFF", save_all=True, append_images=[rgb.copy()]),
        "palette TIFF": saved("TIFF", rgb.convert("P")),
        "AVIF": saved("AVIF"),
        "AVIF sequence": saved("AVIF", **frames),
        "HEIC": saved("HEIF"),
        "JPEG 2000": saved("JPEG2000"),
        "JPEG 2000 codestream": saved("JPEG2000", no_jp2=True),
        "JPEG XL": saved("JXL"),
        "JPEG XL box": saved("JXL", use_container=True, lossless=True),
        "PPM": saved("PPM"),
        "plain PGM": b"P2 4 4 255\n" + b"7 " * 16,
        "PFM": b"Pf 4 4 -1.0\n" + bytes(64),
        "TGA": saved("TGA", rgb.convert("RGBA")),
        "packed TGA": saved("TGA", compression="tga_rle"),
    }


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damage_of_any_kind_is_pixels_or_an_error_row(count: int, way: str) -> None:
    files, chance, codes = list(small_files().items()), random.Random(f"{way} {count}"), Counter()
    with WorkerPool(ImageProcessor(image_size=16), WAYS[way]) as workers:
        for number in range(count):
            name, data = files[number % len(files)]
            data, started = damaged(data, chance), time.monotonic()
            answer = workers.prepare(data)
            assert isinstance(answer, RowError | torch.Tensor), (name, data)
            assert time.monotonic() - started < MOST_SECONDS, (name, data)
            codes[answer.code if isinstance(answer, RowError) else "pixels"] += 1
            assert all(peak(worker.process.pid) < MOST_MEMORY for worker in workers._running), (name, data)
        assert isinstance(workers.prepare(dict(files)["PNG"]), torch.Tensor), "the image after all these"
    assert codes.keys() <= {"pixels", "image_unreadable", "image_too_large", "image_not_allowed"}
    assert min(codes["pixels"], codes["image_unreadable"]) > count / 10, codes
