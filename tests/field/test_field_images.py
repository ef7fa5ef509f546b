"""Images as cameras, scanners, browsers and painting programs write them."""

from __future__ import annotations

import io
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FakeCaptioner, prompt_text, rows_of
from PIL import Image, PngImagePlugin

from idefics_cli.errors import RowError
from idefics_cli.images import decode
from idefics_cli.images.decode import load_image
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.images.worker_pool import WorkerPool
from idefics_cli.rows import ImageOptions

PROCESSOR = ImageProcessor(image_size=32)


def photo(width: int = 64, height: int = 48) -> Image.Image:
    """Smooth, and different in all channels and corners."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.rint(np.stack([x, y, 255 - x], axis=-1)).astype(np.uint8))


def saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def distance(found: Image.Image | RowError, expected: Image.Image) -> int:
    """The most that one of their values differs."""
    assert isinstance(found, Image.Image), str(found)
    assert found.mode == "RGB" and found.size == expected.size
    return int(abs(np.asarray(found).astype(int) - np.asarray(expected.convert("RGB"))).max())


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerPool]:
    with WorkerPool(PROCESSOR, ImageOptions(workers=1, max_pixels=200_000_000)) as opened:
        yield opened


# PNG


def long_texts() -> dict[str, dict[str, Any]]:
    megabytes, info = "long text " * 300_000, {name: PngImagePlugin.PngInfo() for name in ("zTXt", "iTXt", "before")}
    info["zTXt"].add_text("Workflow", megabytes, zip=True)
    info["iTXt"].add_itxt("Workflow", megabytes + "é", zip=True)
    for _ in range(30):
        info["before"].add_text("Comment", megabytes, zip=True)
    profile = np.random.default_rng(0).bytes(3_000_000)
    return {"icc": {"icc_profile": profile}} | {name: {"pnginfo": texts} for name, texts in info.items()}


@pytest.mark.parametrize(("name", "options"), long_texts().items())
def test_a_png_with_megabytes_of_profile_or_text_has_the_pixels_of_one_without(
    workers: WorkerPool, name: str, options: dict[str, Any]
) -> None:
    long, short = (workers.prepare(saved(photo(), "PNG", **each)) for each in (options, {}))
    assert isinstance(long, torch.Tensor), str(long)
    assert (long - short).abs().max() == 0.0


def test_a_png_of_more_text_than_a_file_may_have_is_an_error_row(workers: WorkerPool) -> None:
    bomb = zlib.compress(bytes(300_000_000), 1)
    body = b"zTXtbomb\0\0" + bomb
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    png = saved(photo(), "PNG")
    answer = workers.prepare(png[:33] + chunk + png[33:])
    assert isinstance(answer, RowError) and answer.code == "image_unreadable"


# Files that end early


def test_a_file_that_ends_early_names_the_option_that_takes_it(run: Callable[..., Any], tmp_path: Path) -> None:
    whole, cut = saved(photo(), "JPEG", quality=95), saved(photo(), "JPEG", quality=95)[:-20]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/cut.jpg").write_bytes(cut)
    (tmp_path / "in/whole.jpg").write_bytes(whole)
    command = "caption", tmp_path / "in", "-o", tmp_path / "out.jsonl"
    assert run(*command).exit_code == 3
    bad, good = rows_of((tmp_path / "out.jsonl").read_text())
    assert bad["caption"] is None and bad["error"].endswith("--allow-truncated takes what there is of it")
    assert good["error"] is None

    again = run(*command, "--retry-errors", "--allow-truncated")
    assert again.exit_code == 0, again.output
    assert [row["error"] for row in rows_of((tmp_path / "out.jsonl").read_text())] == [None, None]
    for length, rows in ((-20, 30), (-2, 48), (-1, 48), (None, 48)):
        there = load_image(whole[:length], ImageOptions(allow_truncated=True))
        assert distance(there.crop((0, 0, 64, rows)), load_image(whole).crop((0, 0, 64, rows))) == 0, length


def test_half_a_jpeg_2000_is_refused_for_nothing_of_it_would_be_there() -> None:
    half = saved(photo(200, 150), "JPEG2000")[:-400]
    assert isinstance(load_image(half, ImageOptions(allow_truncated=True)), RowError)


# Many pixels


@pytest.mark.parametrize("size", [(9_500, 9_500), pytest.param((19_000, 9_500), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("image_format", "options"),
    [("TIFF", {"compression": "group4"}), ("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True, "quality": 0})],
)
def test_more_pixels_than_pillow_would_take(
    workers: WorkerPool, image_format: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    """It warns above 89 million and raises above twice as many."""
    size = (13_600, 13_600) if image_format == "WEBP" and size[0] == 19_000 else size  # its sides end at 16,383
    data = saved(Image.new("1" if image_format == "TIFF" else "P", size), image_format, **options)
    assert isinstance(workers.prepare(data), torch.Tensor)


# Formats


def suffixed() -> dict[str, tuple[bytes, int]]:
    """A file of each name, and how far its pixels may be from the photo's."""
    return {
        "a.ppm": (saved(photo(), "PPM"), 0),
        "b.tga": (saved(photo(), "TGA"), 0),
        "c.tga": (saved(photo(), "TGA", compression="tga_rle")[:-26], 0),  # without the mark at its end
        "d.jp2": (saved(photo(), "JPEG2000"), 0),
        "e.j2k": (saved(photo(), "JPEG2000", no_jp2=True), 0),
        "f.avif": (saved(photo(), "AVIF", quality=95), 9),
    }


@pytest.mark.parametrize("name", suffixed())
def test_formats_by_name_and_by_content(name: str, tmp_path: Path) -> None:
    data, tolerance = suffixed()[name]
    (tmp_path / name).write_bytes(data)
    assert distance(load_image(tmp_path / name), photo()) <= tolerance
    if name != "c.tga":
        assert distance(load_image(data), photo()) <= tolerance
    (tmp_path / f"{name}.png").write_bytes(data)  # a name says nothing
    assert isinstance(load_image(tmp_path / f"{name}.png"), RowError) == (name == "c.tga")


def test_a_folder_of_them(run: Callable[..., Any], tmp_path: Path) -> None:
    for name, (data, _) in suffixed().items():
        (tmp_path / name).write_bytes(data)
        if not name.endswith(".tga"):
            (tmp_path / Path(name).stem).write_bytes(data)
    (tmp_path / "notes.txt").write_text("P6 is what the file begins with")
    (tmp_path / "readme").write_text("P1 and P2 are priorities")
    rows = rows_of(run("caption", tmp_path).stdout)
    assert [row["id"] for row in rows] == ["a", "a.ppm", "b.tga", "c.tga", "d", "d.jp2", "e", "e.j2k", "f", "f.avif"]
    assert {row["error"] for row in rows} == {None}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"P1 2 1\n1 0", [0, 255]),
        (b"P2 # a comment\n2 1 15\n15 0", [255, 0]),
        (b"P4\n8 1\n\xf0", [0] * 4 + [255] * 4),
        (b"P5 2 1 65535\n\xff\xff\x80\x80", [255, 128]),
        (b"P5 2 1 4095\n\x0f\xff\x08\x00", [255, 128]),
        (b"P3 1 1 255 7 7 7", [7]),
        (b"Pf 2 1 -1\n" + struct.pack("<ff", 0, 1), [0, 255]),
    ],
)
def test_portable_maps(data: bytes, expected: list[int]) -> None:
    assert np.asarray(load_image(data))[0, :, 0].tolist() == pytest.approx(expected, abs=1)


def test_a_tga_whose_fourth_byte_nobody_set_is_not_empty(tmp_path: Path) -> None:
    image = photo().convert("RGBA")
    image.putalpha(0)
    (tmp_path / "a.tga").write_bytes(saved(image, "TGA"))
    assert distance(load_image(tmp_path / "a.tga"), photo()) == 0
    image.putalpha(128)
    (tmp_path / "a.tga").write_bytes(saved(image, "TGA"))
    assert distance(load_image(tmp_path / "a.tga"), photo()) > 50


@pytest.mark.parametrize("content", [b"text", b"<html>", saved(photo(), "PNG")[:40], bytes(100), b"\xff\xd8\xff\xe0"])
def test_what_is_called_tga_and_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tga").write_bytes(content)
    assert isinstance(load_image(tmp_path / "a.tga"), RowError)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "I;16", "P"])
def test_jpeg_2000_of_other_modes(mode: str) -> None:
    image = Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)) if mode == "I;16" else photo()
    image = image if mode == "I;16" else image.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(200)
    data = saved(image.convert("RGB") if mode == "P" else image, "JPEG2000")
    assert distance(load_image(data), load_image(image)) <= 1


def jxl(image: Image.Image, **options: Any) -> bytes:
    pytest.importorskip("pillow_jxl")
    return saved(image, "JXL", **options)


def test_jpeg_xl(workers: WorkerPool, run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a.jxl").write_bytes(jxl(photo(), lossless=True))
    (tmp_path / "b").write_bytes(jxl(photo(), lossless=True, use_container=True))
    for path in tmp_path.iterdir():
        assert distance(load_image(path), photo()) == 0
        assert decode._jxl_size(path.read_bytes()) == (64, 48)
        assert isinstance(workers.prepare(path), torch.Tensor)
    assert [row["error"] for row in rows_of(run("caption", tmp_path).stdout)] == [None, None]


@pytest.mark.parametrize("size", [(8, 8), (256, 256), (64, 48), (300, 200), (7, 3000), (640, 360), (2048, 1024)])
def test_pixels_of_a_jpeg_xl_are_counted_before_it_is_decoded(size: tuple[int, int]) -> None:
    data = jxl(Image.new("RGB", size, (9, 99, 199)), effort=1)
    assert decode._jxl_size(data) == size
    found = load_image(data, ImageOptions(max_pixels=size[0] * size[1] - 1))
    assert found == RowError(
        "image_too_large", f"{size[0]} x {size[1]} pixels, over the limit of {size[0] * size[1] - 1:,} pixels"
    )


def test_a_jpeg_xl_is_turned_once(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(jxl(photo(), exif=exif.tobytes())).size == (64, 48), "what its codestream says, and not its Exif"
    (tmp_path / "a.jpg").write_bytes(saved(photo(), "JPEG", exif=exif))
    with Image.open(tmp_path / "a.jpg") as jpeg, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = jxl(jpeg)
    assert distance(load_image(packed), load_image(tmp_path / "a.jpg")) <= 1, "a JPEG in another wrapping"


def test_a_jpeg_xl_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    decode._has_reader.cache_clear()
    expected = "image_unreadable: JXL images need an extra: pip install 'idefics-cli[jxl]'"
    assert str(load_image(b"\xff\x0a" + bytes(60))) == expected
    decode._has_reader.cache_clear()


# Frames

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
SAVED = {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}, "TIFF": {}, "AVIF": {"quality": 95}}


def animated(image_format: str) -> bytes:
    frames = [Image.new("RGB", (16, 16), colour) for colour in COLOURS]
    return saved(frames[0], image_format, save_all=True, append_images=frames[1:], **SAVED[image_format])


@pytest.mark.parametrize("image_format", SAVED)
@pytest.mark.parametrize(("typed", "number"), [(None, 0), ("first", 0), ("middle", 2), ("1", 0), ("4", 3), ("5", 4)])
def test_a_frame(run: Callable[..., Any], tmp_path: Path, image_format: str, typed: str | None, number: int) -> None:
    (tmp_path / "a").write_bytes(animated(image_format))
    captioner = FakeCaptioner()
    chosen = () if typed is None else ("--frame", typed)
    result = run("caption", tmp_path / "a", "--bare", *chosen, captioner=captioner)
    assert result.exit_code == 0, result.output
    (prompt,) = captioner.prompts.values()
    (pixels,) = [item for item in prompt if isinstance(item, bytes)]
    assert np.abs(np.frombuffer(pixels[:3], np.uint8) - np.array(COLOURS[number], int)).max() <= 6
    assert rows_of(result.stdout)[0]["caption"] == prompt_text(prompt)


@pytest.mark.parametrize("image_format", [*SAVED, "JPEG"])
def test_a_frame_beyond_the_end_says_how_many_there_are(
    run: Callable[..., Any], tmp_path: Path, image_format: str
) -> None:
    count = 1 if image_format == "JPEG" else 5
    (tmp_path / "a.bin").write_bytes(saved(photo(), "JPEG") if count == 1 else animated(image_format))
    result = run("caption", tmp_path / "a.bin", "--frame", 6)
    assert rows_of(result.stdout)[0]["error"] == (
        f"image_unreadable: --frame 6 is beyond the end: the image has {count}"
    )


@pytest.mark.parametrize("typed", ["0", "-1", "last", "1.5", "", "²", "9" * 30])
def test_what_is_no_frame(refused: Callable[..., str], tmp_path: Path, typed: str) -> None:
    (tmp_path / "a.gif").write_bytes(animated("GIF"))
    assert "expected first, middle or a number from 1 on" in refused("caption", tmp_path / "a.gif", f"--frame={typed}")


def test_another_frame_is_another_run(run: Callable[..., Any], refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(animated("GIF"))
    command = "caption", tmp_path / "a.gif", "-o", tmp_path / "out.jsonl"
    assert run(*command, "--frame", "2").exit_code == 0
    assert run(*command, "--frame", "2").exit_code == 0
    assert "--frame" in refused(*command)
    assert run(*command, "--overwrite").exit_code == 0


def test_a_page_larger_than_the_first_is_counted_too() -> None:
    data = saved(photo(), "TIFF", save_all=True, append_images=[photo(300, 200)])
    assert load_image(data, ImageOptions(frame=2)).size == (300, 200)
    assert load_image(data, ImageOptions(frame=2, max_pixels=59_999)).code == "image_too_large"


def hostile_gif(frames: int, side: int) -> bytes:
    """Each frame repaints the whole screen, in a few bytes."""
    first, second = (Image.new("P", (side, side), colour) for colour in (0, 1))
    one, two = (saved(image, "GIF") for image in (first, second))
    start = two.index(b",")
    block = b"!\xf9\x04\x08\0\0\0\0" + two[start:-1]
    return one[:-1] + block * frames + b";"


def test_the_way_to_a_frame_takes_no_longer_than_an_image_may() -> None:
    data = hostile_gif(1000, 2000)
    with WorkerPool(PROCESSOR, ImageOptions(workers=1, decode_timeout=0.5)) as workers:
        assert isinstance(workers.prepare(data), torch.Tensor)
    with WorkerPool(PROCESSOR, ImageOptions(workers=1, decode_timeout=0.5, frame=1001)) as workers:
        expected = RowError("image_unreadable", "decoding took longer than 0.5 s")
        assert workers.prepare(data) == expected
        assert isinstance(workers.prepare(hostile_gif(1000, 10)), torch.Tensor), "the next image pays nothing"


# Memory that is short


def test_decoders_are_what_the_kernel_ends_first(workers: WorkerPool) -> None:
    workers.prepare(saved(photo(), "PNG"))
    (worker,) = workers._running
    path = Path(f"/proc/{worker.process.pid}/oom_score_adj")
    if not path.exists():
        pytest.skip("another kernel")
    assert path.read_text() == "1000\n"
    assert int(Path("/proc/self/oom_score_adj").read_text()) < 1000


@pytest.mark.parametrize("number", [1, 2])
def test_decoders_that_are_killed_as_they_start_are_started_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    """Four times, as the kernel does where memory is short."""
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\necho >> {tmp_path}/starts\n"
        f'[ $(wc -l < {tmp_path}/starts) -gt 4 ] || kill -9 $$\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr("idefics_cli.images.worker_pool.WAITS", (0.05, 0.1))
    with WorkerPool(PROCESSOR, ImageOptions(workers=number)) as workers:
        assert isinstance(workers.prepare(saved(photo(), "PNG")), torch.Tensor)
    assert (tmp_path / "starts").read_text().count("\n") == 5


def test_a_run_that_waits_for_a_decoder_can_be_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import threading
    import time
    from concurrent.futures import CancelledError, ThreadPoolExecutor

    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho >> {tmp_path}/starts\nkill -9 $$\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with ThreadPoolExecutor(1) as pool, WorkerPool(PROCESSOR, ImageOptions(workers=1)) as workers:
        waiting = pool.submit(workers.prepare, saved(photo(), "PNG"))
        while not os.path.exists(tmp_path / "starts"):
            time.sleep(0.01)
        assert not waiting.done() and threading.active_count() > 1
        workers.close()
        with pytest.raises(CancelledError):
            waiting.result(timeout=5)
