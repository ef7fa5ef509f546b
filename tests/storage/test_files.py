"""Remote files as local ones: a server of S3 on this machine stands for all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import save_image
from pyarrow.fs import S3FileSystem
from written_manifests import ALL_FORMATS, opened, read, write_manifest

from idefics_cli.errors import InputError
from idefics_cli.rows import InputRow, RemoteFile
from idefics_cli.storage.files import find, place
from idefics_cli.storage.regular_file import IrregularFile, open_regular

server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    running = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in [("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("EC2_METADATA_DISABLED", "1")]:
            patch.setenv(f"AWS_{name}", value)
        yield f"127.0.0.1:{running.get_host_and_port()[1]}"
    running.stop()


@pytest.fixture
def upload(endpoint: str) -> Callable[[str, bytes], str]:
    """Puts an object into the bucket and gives its address."""
    remote = S3FileSystem(endpoint_override=endpoint, scheme="http", region="us-east-1", allow_bucket_creation=True)
    remote.create_dir("bucket")

    def put(key: str, data: bytes) -> str:
        with remote.open_output_stream(f"bucket/{key}", compression=None) as file:
            file.write(data)
        return f"s3://bucket/{key}?endpoint_override={endpoint}&scheme=http&region=us-east-1"

    return put


def content(row: InputRow) -> bytes:
    (source,) = row.sources
    assert isinstance(source, RemoteFile)
    return source.read(1 << 20)


def test_folders_and_files(upload: Callable[[str, bytes], str]) -> None:
    address = upload("photos/b.png", b"b")
    for name in ("a#1.png", "sub/c d.jpg", ".hidden/e.png", "notes.txt", "~f.png"):
        upload(f"photos/{name}", name.encode())
    folder = address.replace("/b.png", "")
    found = read(folder)
    assert [row.id for row in found] == ["a#1.png", "b.png", "sub/c d.jpg", "~f.png"]
    assert [content(row) for row in found] == [b"a#1.png", b"b", b"sub/c d.jpg", b"~f.png"]
    assert found[0].image == "s3://bucket/photos/a#1.png"
    assert [row.id for row in read(folder, recursive=False)] == ["a#1.png", "b.png", "~f.png"]
    (row,) = read(address)
    assert row.id == "s3://bucket/photos/b.png" and content(row) == b"b"


@pytest.mark.parametrize("name", [*ALL_FORMATS, "rows.tgz"])
def test_manifests(upload: Callable[[str, bytes], str], tmp_path: Path, name: str) -> None:
    table = [{"id": str(i), "image": f"sub/{i}.png", "question": str(i)} for i in range(5)]
    data = write_manifest(tmp_path / name, table).read_bytes()
    found = opened(upload(f"tables/{name}", data), keep="all", limit=3)
    upload("tables/sub/1.png", b"image 1")
    rows = list(found.rows)
    assert len(rows) == 3 and "secret" not in str(found.identity)
    assert rows[1].sources == (b"1",) or content(rows[1]) == b"image 1"
    assert pa.Table.from_batches(found.passthrough_batches()).to_pydict() == {"question": ["0", "1", "2"]}
    upload(f"tables/{name}", b"\0" + data)
    with pytest.raises(InputError, match="changed while the run was under way"):
        list(found.passthrough_rows())


def test_what_cannot_be_read_is_named_without_secrets(upload: Callable[[str, bytes], str], tmp_path: Path) -> None:
    address = upload("x.png", b"x")
    for wrong in (address.replace("x.png", "none.png"), address.replace("bucket", "no-bucket")):
        with pytest.raises(InputError, match="s3://") as caught:
            find(wrong.replace("s3://", "s3://key:secret@"))
        assert "secret" not in str(caught.value) and "endpoint" not in str(caught.value)
    with pytest.raises(InputError, match="img2dataset"):
        find("https://user:secret@a.example/b.png")
    lines = write_manifest(tmp_path / "rows.jsonl", [{"image": "x.png"}, {"image": "../x.png"}])
    root = address.replace("/x.png", "")
    good, bad = read(lines, image_root=root)
    assert content(good) == b"x" and bad.error.code == "image_not_allowed"


def test_local_files_are_regular_and_names_are_literal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_image(tmp_path / "~" / "a.png")
    assert [row.id for row in read("~")] == ["a.png"]
    os.mkfifo("fifo")
    for name, kind in [("fifo", "FIFO"), (".", "folder"), ("/dev/null", "device")]:
        with pytest.raises(IrregularFile, match=f"is a {kind}: only regular files"):
            open_regular(name)
    regular = os.stat("~/a.png")
    monkeypatch.setattr(os, "stat", lambda path, **options: regular)  # the name comes to mean another file
    with pytest.raises(IrregularFile, match="is a FIFO"):
        open_regular("fifo")
    assert stat.S_ISREG(regular.st_mode)


@pytest.mark.parametrize(
    ("address", "seconds"),
    [("gs://bucket/a.png", 10), ("gcs://bucket/a?scheme=http", 10), ("gs://bucket/a?retry_limit_seconds=99", 99)],
)
def test_a_call_to_google_does_not_try_for_a_quarter_of_an_hour(address: str, seconds: int) -> None:
    found = place(address)
    (settings,) = found.filesystem.fs.__reduce__()[1]
    assert settings["retry_time_limit"].total_seconds() == seconds
    assert found.path in ("bucket/a.png", "bucket/a") and "retry" not in found.name
