"""Passwords in addresses stand in nothing that a run writes or says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeCaptioner, FakeOpener, save_image
from pyarrow.fs import S3FileSystem
from typer.testing import Result
from written_manifests import write_manifest

from idefics_cli.errors import RowError
from idefics_cli.rows import ImageOptions, RemoteFile

KEY, SECRET = "AKIAKEYKEYKEY", "s3cr3ts3cr3t"
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An address with a password in it, of a folder of images and shots; `{}` stands for what is in the folder."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    options = {"endpoint_override": f"127.0.0.1:{server.get_host_and_port()[1]}", "scheme": "http"}
    remote = S3FileSystem(access_key=KEY, secret_key=SECRET, region="us-east-1", allow_bucket_creation=True, **options)
    remote.create_dir("bucket")
    folder = tmp_path_factory.mktemp("uploaded")
    for number in range(4):
        save_image(folder / f"{number}.png", number)
    write_manifest(folder / "shots.jsonl", [{"image": f"{number}.png", "answer": "a dog"} for number in range(4)])
    for path in folder.iterdir():
        with remote.open_output_stream(f"bucket/{path.name}", compression=None) as file:
            file.write(path.read_bytes())
    query = "&".join(f"{name}={value}" for name, value in {**options, "region": "us-east-1"}.items())
    yield f"s3://{KEY}:{SECRET}@bucket{{}}?{query}"
    server.stop()


class Opener(FakeOpener):
    """Reads remote files, too."""

    def prepare(self, source: Any) -> bytes | RowError:
        try:
            return super().prepare(source.read(1 << 20) if isinstance(source, RemoteFile) else source)
        except FileNotFoundError:
            return RowError("image_missing", str(source.path))


class Captioner(FakeCaptioner):
    def image_workers(self, options: ImageOptions) -> Any:
        return nullcontext(Opener(options))


def assert_no_secrets(folder: Path, *ended: Result) -> None:
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    texts += [part.encode() for each in ended for part in (each.stdout, each.stderr)]
    assert texts
    for secret in KEY, SECRET, "endpoint_override":
        assert not [text for text in texts if secret.encode() in text]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize("selection", ["first", "similar"])
def test_no_output_holds_a_password(
    tmp_path: Path, root: str, run: Run, monkeypatch: pytest.MonkeyPatch, suffix: str, selection: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [{"image": f"{number}.png", "image2": "none.png"} for number in range(4)]
    rows.append({"image": "none.png", "image2": None})
    manifest = write_manifest(tmp_path / "rows.jsonl", rows)
    shots = ["--shots", root.format("/shots.jsonl"), "--num-shots", "1", "--shot-selection", selection]
    command = ["caption", manifest, "--image-root", root.format(""), *shots, "--keep", "all"]
    command += ["--image-column", "image", "-o", tmp_path / f"f{suffix}"]

    def crash(prompts: object) -> None:
        raise RuntimeError("a bug")

    stopped = run(*command, captioner=Captioner(before_call=crash))
    assert stopped.exit_code == 1, stopped.stderr
    assert_no_secrets(tmp_path, stopped)
    ended = run(*command, captioner=Captioner())
    assert ended.exit_code == 3, ended.stderr
    other = run(*command, "--prefix", "a ")
    assert other.exit_code == 2
    assert_no_secrets(tmp_path, ended, other)


def test_no_message_holds_a_password(tmp_path: Path, root: str, run: Run) -> None:
    manifest = write_manifest(tmp_path / "rows.jsonl", [{"image": "0.png"}])
    images, wrong = root.format(""), root.format("/none.jsonl")
    commands = [
        ["caption", wrong],
        ["caption", manifest, "--image-root", root.format("/none")],
        ["caption", manifest, "--image-root", images, "--shots", wrong],
        ["caption", manifest, "--image-root", images, "--shots", root.format("/0.png")],
        ["caption", manifest, "--image-root", images, "--shots", root.format("/shots.jsonl"), "--num-shots", "9"],
        ["vqa", root.format("/0.png")],
        ["caption", root.format("/0.png"), "--keep", "a"],
        ["caption", images, images],
        ["caption", manifest, "--image-root", images, "-o", root.format("/f.jsonl")],
        ["caption", root.format("/0.png"), "--sidecar"],
        ["caption", root.replace("endpoint_override", "mistake").format("/0.png")],
    ]
    for command in commands:
        ended = run(*command)
        assert ended.exit_code in (2, 3), (command, ended.output)
        assert_no_secrets(tmp_path, ended)
