"""Images through worker processes: the same pixels as without them, and a fault costs one image only."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import breaking_decoders
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from idefics_cli.errors import IdeficsError, RowError
from idefics_cli.images.preprocess import ImageProcessor
from idefics_cli.images.thumbnail import Thumbnails
from idefics_cli.images.worker_pool import WorkerPool
from idefics_cli.rows import ImageOptions, RemoteFile

PROCESSOR = ImageProcessor(image_size=16, image_mean=(0.1, 0.2, 0.3))
BREAKING = breaking_decoders.Breaking(image_size=16, image_mean=(0.1, 0.2, 0.3))
LIMITS = ImageOptions(max_pixels=100_000, max_bytes=1_000_000, workers=2)
FAST = replace(LIMITS, decode_timeout=2.0)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def image(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def saved(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=image_format, **options)
    return stream.getvalue()


def same(found: torch.Tensor | RowError, expected: torch.Tensor | RowError) -> bool:
    if isinstance(expected, RowError) or isinstance(found, RowError):
        return found == expected
    return found.dtype == expected.dtype and torch.equal(found, expected)


def pids(workers: WorkerPool) -> list[int]:
    return [worker.process.pid for worker in workers._running]


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerPool]:
    with WorkerPool(PROCESSOR, LIMITS) as opened:
        yield opened


@pytest.fixture
def breaking() -> Iterator[WorkerPool]:
    with WorkerPool(BREAKING, FAST) as opened:
        yield opened


# ---- the same as without


def stored(content: bytes | Exception) -> RemoteFile:
    """The one file of a remote file system, or what is raised instead."""
    storage = Mock()
    storage.open.side_effect = content if isinstance(content, Exception) else lambda *_, **__: io.BytesIO(content)
    return RemoteFile("s3://bucket/cat.jpg", storage, "cat.jpg")


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else []))


@pytest.mark.parametrize("image_format", FORMATS)
def test_pixels_are_those_of_the_processor(workers, image_format, tmp_path):
    data = saved(image(), image_format)
    path = tmp_path / "bräunlich \udcff\n"
    path.write_bytes(data)
    expected = PROCESSOR.prepare(data, LIMITS)
    assert expected.shape == (3, 16, 16)
    for source in (data, bytearray(data), memoryview(data), path, str(path), stored(data), Image.open(path)):
        assert same(workers.prepare(source), expected), source


def test_thumbnails(tmp_path):
    with WorkerPool(Thumbnails(image_size=20), LIMITS) as workers:
        for source in (saved(image()), Image.open(io.BytesIO(saved(image()))), stored(saved(image()))):
            made = Image.open(io.BytesIO(workers.made(source)))
            assert (made.format, made.mode, made.size) == ("WEBP", "RGB", (20, 15))
        assert Image.open(io.BytesIO(workers.made(saved(Image.new("L", (3, 2)))))).size == (3, 2)
        assert workers.made(b"text").code == "image_unreadable"


def test_nothing_but_what_was_asked_for(workers, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo(tmp_path / "fifo")
    sources = [
        *(tmp_path, tmp_path / "none", tmp_path / "fifo", tmp_path / "text.png", "", "\0", "\ud800", "x" * 5000),
        *("https://example.org/cat.jpg", None, 3, b"", b"text", saved(Image.new("RGB", (400, 400))), bytes(1_000_001)),
    ]
    for source in sources:
        expected = PROCESSOR.prepare(source, LIMITS)
        assert isinstance(expected, RowError)
        assert workers.prepare(source) == expected


@settings(max_examples=100, deadline=None)
@given(
    image_format=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF"]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=5),
    kept=st.floats(0, 1),
)
def test_broken_images_have_the_same_messages(workers, image_format, changes, kept):
    data = bytearray(saved(image(), image_format))
    for place, value in changes:
        data[int(place * len(data))] = value
    data = bytes(data[: round(kept * len(data))])
    assert same(workers.prepare(data), PROCESSOR.prepare(data, LIMITS))


def test_more_pixels_than_pillow_takes_by_itself():
    """A warning from 90 million on and an error from 179 million on; it would be for the whole process to decide."""
    large = saved(Image.new("1", (19_000, 10_000)))
    with WorkerPool(PROCESSOR, ImageOptions(max_pixels=200_000_000, workers=1)) as workers:
        assert isinstance(workers.prepare(large), torch.Tensor)


def test_remote_files_that_cannot_be_read(workers):
    missing = workers.prepare(stored(FileNotFoundError("bucket/cat.jpg")))
    assert missing == RowError("image_missing", "file not found: 's3://bucket/cat.jpg'")
    refused = workers.prepare(stored(PermissionError("forbidden")))
    assert refused == RowError("storage_unavailable", "PermissionError: forbidden")
    assert workers.prepare(stored(bytes(2_000_000))).code == "image_too_large"


# ---- what breaks


ENDS = {
    b"segmentation fault": "the worker process died (signal SIGSEGV)",
    b"abort": "the worker process died (signal SIGABRT)",
    b"exit": "the worker process died (exit status 4)",
    b"nonsense": "the worker process died (incomplete or invalid answer)",
    b"longest nonsense": "the worker process died (incomplete or invalid answer)",
    b"sleep": "decoding took longer than 2 s",
    b"spin": "decoding took longer than 2 s",
    b"out of memory": "decoding needs more memory than a worker may use",
    b"bomb": "decoding needs more memory than a worker may use",
}


@pytest.mark.parametrize(("fault", "message"), ENDS.items(), ids=lambda value: str(value))
def test_a_fault_costs_its_image_and_no_other(breaking, fault, message):
    expected = PROCESSOR.prepare(image())
    assert same(breaking.prepare(saved(image())), expected)
    assert breaking.prepare(fault) == RowError("image_unreadable", message)
    assert same(breaking.prepare(saved(image())), expected)


def test_an_image_does_not_pay_for_the_one_before(breaking):
    breaking.prepare(b"poison")
    assert same(breaking.prepare(saved(image())), PROCESSOR.prepare(image()))


def test_what_a_library_says_on_standard_error_holds_nothing_up(breaking, capfd):
    assert isinstance(breaking.prepare(b"complaint"), torch.Tensor)
    assert capfd.readouterr().err == ""


def test_a_bug_is_not_a_bad_image(breaking):
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        breaking.prepare(b"bug")
    assert same(breaking.prepare(saved(image())), PROCESSOR.prepare(image()))


@on_linux
def test_faults_among_many_threads_leave_nothing_behind():
    good = {saved(image(seed)): PROCESSOR.prepare(image(seed)) for seed in range(8)}
    faults = [b"abort", b"exit", b"out of memory", b"nonsense", b"sleep"]
    sources = [*good, *faults] * 2
    before = os.listdir("/proc/self/fd")
    with WorkerPool(BREAKING, replace(FAST, workers=3)) as workers:
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(workers.prepare, sources))
        children = pids(workers)
    assert len(children) <= 3
    for source, result in zip(sources, results, strict=True):
        assert same(result, good[source]) if source in good else result.code == "image_unreadable"
    assert os.listdir("/proc/self/fd") == before
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


@on_linux
def test_decoder_processes_are_light_and_start_as_they_are_needed():
    with WorkerPool(breaking_decoders.Describing(), replace(LIMITS, workers=5)) as workers:
        data = saved(image(), "AVIF" if features.check("avif") else "PNG")
        for _ in range(5):
            assert workers.prepare(data).message == "heavy [], threads 1"
        assert len(pids(workers)) == 1


# ---- the end


def test_close_does_not_wait_for_a_decoder():
    workers = WorkerPool(BREAKING, replace(LIMITS, decode_timeout=1000))
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(workers.prepare, source) for source in [b"sleep", b"spin"] * 2]
        wait_until(lambda: len(pids(workers)) == 2)
        time.sleep(0.3)
        children = pids(workers)
        workers.close()
        assert all(isinstance(future.exception(timeout=10), CancelledError) for future in waiting)
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(CancelledError):
        workers.prepare(saved(image()))
    workers.close()


def run_script(body: str, folder: Path) -> subprocess.Popen:
    """A script in `folder`, in a process group of its own, that has what it needs to open workers."""
    head = """
        import os, signal, sys, threading, time
        import breaking_decoders
        from idefics_cli.images.worker_pool import WorkerPool
        from idefics_cli.rows import ImageOptions
        from idefics_cli.images.preprocess import ImageProcessor
    """
    script = folder / "script.py"
    script.write_text(textwrap.dedent(head) + textwrap.dedent(body))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, script], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_until(happens: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert happens()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@on_linux
def test_no_process_outlives_a_parent_that_is_killed(tmp_path):
    body = """
        options = ImageOptions(decode_timeout=1000, workers=3)
        workers = WorkerPool(breaking_decoders.Breaking(), options)
        for fault in (b"sleep", b"spin"):
            threading.Thread(target=workers.prepare, args=(fault,), daemon=True).start()
        while len(workers._running) < 2 or not all(worker.process.stderr.closed for worker in workers._running):
            time.sleep(0.01)
        print(*(worker.process.pid for worker in workers._running), flush=True)
        time.sleep(1000)
    """
    with run_script(body, tmp_path) as parent:
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) == 2
        assert all(map(is_running, children))
        parent.kill()
    wait_until(lambda: not any(map(is_running, children)), 5)


@on_linux
def test_a_fork_has_workers_of_its_own(tmp_path):
    """Of two processes that ask one worker, each would get images of the other's."""
    body = """
        with WorkerPool(ImageProcessor(), ImageOptions(workers=2)) as workers:
            workers.prepare(b"")
            before = [worker.process.pid for worker in workers._running]
            forked = os.fork()
            print(workers.prepare(b""), *(worker.process.pid for worker in workers._running), flush=True)
            if forked:
                os.waitpid(forked, 0)
                print(workers.prepare(b""), *before)
    """
    with run_script(body, tmp_path) as parent:
        lines = parent.communicate(timeout=60)[0].splitlines()
    assert len(lines) == 3 and all(line.startswith("image_unreadable: the file is empty ") for line in lines), lines
    first, second, after = (line.split()[5:] for line in lines)
    assert first != second and after in (first, second) and len(first) == len(second) == 1


SLEEPER = """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    options = ImageOptions(decode_timeout=2.0, workers=1)
    with WorkerPool(breaking_decoders.Sleeping(), options) as workers:
        print(workers.prepare("."))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGSTOP])
def test_a_signal_to_the_whole_group_is_for_the_parent(number, tmp_path):
    """And an image does not pay for a run that was suspended."""
    with run_script(SLEEPER, tmp_path) as parent:
        wait_until((tmp_path / "decoding").exists)
        os.killpg(parent.pid, number)
        if number == signal.SIGSTOP:
            time.sleep(3)
            os.killpg(parent.pid, signal.SIGCONT)
        assert parent.communicate(timeout=60)[0] == "image_missing: it slept\n"
    assert (tmp_path / "decoding").read_text() == "once "


# ---- the start


def test_neither_the_script_nor_the_working_folder_is_run_again(tmp_path):
    """The standard library's processes run the script once more, and `python -c` looks for modules where it is."""
    (tmp_path / "work").mkdir()
    for name in ("numpy", "json", "PIL", "idefics_cli"):
        (tmp_path / "work" / f"{name}.py").write_text("raise SystemExit('from the working folder')")
    body = """
        os.chdir("work")
        print("once", flush=True)
        with WorkerPool(ImageProcessor(), ImageOptions(workers=1)) as workers:
            print(workers.prepare(b""))
    """
    with run_script(body, tmp_path) as parent:
        assert parent.communicate(timeout=60)[0] == "once\nimage_unreadable: the file is empty\n"


def test_no_process_can_be_started(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with WorkerPool(PROCESSOR, LIMITS) as workers, ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(workers.prepare, saved(image())) for _ in range(4)]
        for future in waiting:
            with pytest.raises(IdeficsError, match=r"cannot start a process .*no-python.*ulimit"):
                future.result(timeout=30)


def test_no_process_comes_to_its_feet(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho ImportError: no numpy >&2\nexit 1\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    message = r"\(exit status 1: ImportError: no numpy\)"
    with WorkerPool(PROCESSOR, LIMITS) as workers, pytest.raises(IdeficsError, match=message):
        workers.prepare(saved(image()))


def test_fewer_processes_than_asked_for(monkeypatch):
    start, attempts = subprocess.Popen, []

    def start_one(*args: Any, **options: Any) -> subprocess.Popen:
        attempts.append(args)
        if len(attempts) > 1:
            raise BlockingIOError("no more processes")
        return start(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", start_one)
    with WorkerPool(PROCESSOR, replace(LIMITS, workers=4)) as workers, ThreadPoolExecutor(4) as pool:
        sources = [saved(image(seed)) for seed in range(8)]
        assert all(map(same, pool.map(workers.prepare, sources), map(PROCESSOR.prepare, sources)))
    assert len(attempts) <= 4
