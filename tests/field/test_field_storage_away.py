"""A storage that goes away in mid-run: waited for, then a stop that resumes; a file that it does not give: a row."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeCaptioner, expected_text, rows_of, save_image
from pyarrow.fs import S3FileSystem
from typer.testing import Result

from idefics_cli.errors import InputError, RowError
from idefics_cli.images import remote
from idefics_cli.images.decode import load_image
from idefics_cli.images.remote import RemoteReader
from idefics_cli.rows import ImageOptions, RemoteFile

server = pytest.importorskip("moto.server")


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited, which pass at once."""
    seconds: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", seconds.append)
    return seconds


class Storage:
    """A file system that does what `answers` says, in turn: bytes, or an error for a file and one for its folder."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def open(self, key: str, mode: str, seekable: bool) -> AbstractContextManager[Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, bytes):
            return nullcontext(type("File", (), {"read": lambda self, size: answer[:size]})())
        raise answer

    def info(self, key: str) -> dict[str, Any]:
        assert key == "bucket/folder"
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return {"name": key}

    def read(self) -> bytes | RowError:
        return RemoteReader().read(RemoteFile("s3://bucket/folder/a.png", self, "bucket/folder/a.png"), 100)


AWAY = OSError("AWS Error NETWORK_CONNECTION"), OSError("AWS Error NETWORK_CONNECTION")
REFUSED = OSError("AWS INVALID_OBJECT_STATE"), {}


@pytest.mark.parametrize(
    ("answers", "waits"),
    [([b"image"], 0), ([*AWAY, b"image"], 1), ([*AWAY * 6, b"image"], 6), ([*REFUSED, *AWAY, *REFUSED, b"image"], 3)],
)
def test_a_storage_that_comes_back_costs_nothing_but_time(answers: list, waits: int, slept: list[float]) -> None:
    assert Storage(*answers).read() == b"image" and len(slept) == waits and sum(slept) <= 60


def test_a_file_that_is_not_given_is_a_row_and_no_stop(slept: list[float]) -> None:
    assert Storage(*REFUSED, *REFUSED).read() == RowError("storage_unavailable", "OSError: AWS INVALID_OBJECT_STATE")
    denied = PermissionError("denied"), FileNotFoundError("no folder")
    assert Storage(*denied, *denied).read() == RowError("storage_unavailable", "PermissionError: denied")
    assert sum(slept) < 5
    assert Storage(FileNotFoundError("gone")).read() == RowError(
        "image_missing", "file not found: 's3://bucket/folder/a.png'"
    )


def test_a_storage_that_stays_away_is_a_mistake_of_one_line(slept: list[float]) -> None:
    with pytest.raises(InputError, match=r"'s3://bucket/folder/a.png' cannot be read .*check the storage"):
        Storage(*AWAY * 7).read()
    assert 30 < sum(slept) < 120


class Bucket:
    """Gives what is in it to a key that may read and not list: of all else it says no, also of what is not there."""

    def __init__(self, *keys: str) -> None:
        self.keys = set(keys)

    def open(self, key: str, mode: str, seekable: bool) -> AbstractContextManager[Any]:
        self.info(key)
        return nullcontext(io.BytesIO(b"image"))

    def info(self, key: str) -> dict[str, Any]:
        if key not in self.keys:
            raise OSError(f"When getting information for key '{key}': AWS Error ACCESS_DENIED: No response body.")
        return {"name": key}


def test_of_what_may_be_read_and_not_listed_a_missing_file_is_a_row(slept: list[float]) -> None:
    bucket, reader = Bucket("bucket/a.png", "bucket/c.png"), RemoteReader()
    a, b, c = (RemoteFile(f"s3://bucket/{name}.png", bucket, f"bucket/{name}.png") for name in "abc")
    assert reader.read(a, 100) == b"image"
    denied = reader.read(b, 100)
    assert isinstance(denied, RowError) and denied.code == "storage_unavailable" and sum(slept) < 5
    assert reader.read(c, 100) == b"image"
    bucket.keys.clear()  # as when credentials are taken back
    with pytest.raises(InputError, match=r"ACCESS_DENIED.*check the storage, the credentials"):
        reader.read(b, 100)
    other = RemoteFile("s3://other/b.png", Bucket(), "other/b.png")
    with pytest.raises(InputError, match="s3://other"):
        reader.read(other, 100)


def test_credentials_that_read_nothing_are_not_waited_for_long(slept: list[float]) -> None:
    with pytest.raises(InputError, match=r"'s3://bucket/a.png' cannot be read .*check the storage, the credentials"):
        RemoteReader().read(RemoteFile("s3://bucket/a.png", Bucket(), "bucket/a.png"), 100)
    assert sum(slept) < 10


class RemoteCaptioner(FakeCaptioner):
    """Reads from the storage as the pool of processes does."""

    def image_workers(self, options: ImageOptions) -> Any:
        reader = RemoteReader()

        def prepare(source: Any) -> bytes | RowError:
            data = reader.read(source, options.max_bytes) if isinstance(source, RemoteFile) else source
            image = data if isinstance(data, RowError) else load_image(data, options)
            return image if isinstance(image, RowError) else image.tobytes()

        return nullcontext(type("Opener", (), {"prepare": staticmethod(prepare)}))


def test_a_run_whose_storage_goes_away_stops_and_resumes(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [save_image(tmp_path / f"{i}.png", i) for i in range(60)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"image": image.name}) + "\n" for image in images))
    is_there = True

    def read(file: RemoteFile, size: int) -> bytes:
        if is_there:
            return (tmp_path / file.key.removeprefix("bucket/")).read_bytes()
        raise OSError("AWS Error NETWORK_CONNECTION")

    def leave(prompts: Sequence[Any]) -> None:
        nonlocal is_there
        is_there = is_there and len(captioner.calls) < 3

    monkeypatch.setattr(RemoteFile, "read", read)
    monkeypatch.setattr(RemoteFile, "identity", lambda file: file.key.encode())  # asked for over the network, slowly
    monkeypatch.setattr(remote, "_is_told", lambda file, key: is_there)
    root = "s3://bucket?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    command = "caption", rows, "--image-root", root, "-o", tmp_path / "out.jsonl", "--workers", "2"
    captioner = RemoteCaptioner(2, before_call=leave)
    stopped = run(*command, captioner=captioner)
    assert stopped.exit_code == 2 and "The same command continues from there once that is fixed" in stopped.stderr
    part = (tmp_path / "out.jsonl.part").read_text().split("\n", 1)[1]
    assert part.count('"error": null') >= 2 and '"error": "' not in part
    is_there = True
    assert run(*command, captioner=RemoteCaptioner(2)).exit_code == 0
    found = rows_of((tmp_path / "out.jsonl").read_text())
    assert [row["caption"] for row in found] == [expected_text(image) for image in images]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    running = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    for name, value in [("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("EC2_METADATA_DISABLED", "1")]:
        monkeypatch.setenv(f"AWS_{name}", value)
    yield running
    running.stop()


@pytest.mark.slow
def test_s3_that_goes_away_in_mid_run_is_a_stop_that_resumes(
    run: Callable[..., Result], tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", ())  # the library itself tries three times, and waits
    endpoint = f"127.0.0.1:{s3.get_host_and_port()[1]}"
    bucket = S3FileSystem(endpoint_override=endpoint, scheme="http", region="us-east-1", allow_bucket_creation=True)
    images = [save_image(tmp_path / f"{i}.png", i) for i in range(60)]
    bucket.create_dir("bucket")
    for image in images:
        with bucket.open_output_stream(f"bucket/{image.name}", compression=None) as file:
            file.write(image.read_bytes())
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"image": image.name}) + "\n" for image in images))
    root = f"s3://bucket?endpoint_override={endpoint}&scheme=http&region=us-east-1"
    command = "caption", rows, "--image-root", root, "-o", tmp_path / "out.jsonl", "--workers", "2"
    host, port = s3.get_host_and_port()

    def stop_the_server(prompts: Sequence[Any]) -> None:
        if len(captioner.calls) == 3:
            s3.stop()

    captioner = RemoteCaptioner(2, before_call=stop_the_server)
    stopped = run(*command, captioner=captioner)
    assert stopped.exit_code == 2 and "The same command continues from there once that is fixed" in stopped.stderr
    assert "secret" not in stopped.stderr and "image_unreadable" not in stopped.stderr
    part = (tmp_path / "out.jsonl.part").read_text().split("\n", 1)[1]
    assert part.count('"error": null') >= 4 and '"error": "' not in part
    again = server.ThreadedMotoServer(host, port=port, verbose=False)
    again.start()
    try:
        resumed = run(*command, captioner=RemoteCaptioner(2))
        assert resumed.exit_code == 0, resumed.stderr
    finally:
        again.stop()
    found = rows_of((tmp_path / "out.jsonl").read_text())
    assert [row["caption"] for row in found] == [expected_text(image) for image in images]
