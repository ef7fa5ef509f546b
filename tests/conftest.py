"""What all tests share: no network, and a captioner that needs no model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from produced_errors import pytest_configure, pytest_sessionfinish, pytest_testnodedown  # noqa: F401
from real_llama import RealLlama, fetch_real_llama
from typer.testing import CliRunner, Result

from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.cli import app as cli
from idefics_cli.errors import RowError
from idefics_cli.images.decode import load_image
from idefics_cli.prompts.templates import Prompt, PromptOptions, SpecialToken, build_prompt, leading_shots
from idefics_cli.rows import ImageOptions

if TYPE_CHECKING:
    from torch import Tensor

# Read when huggingface_hub is imported, by the processes too that tests start.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Read when torch is imported. Tiny networks gain nothing by threads, and lose much where other work needs the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when Ray begins a cluster, which would write a token into the home folder.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of the tests" * 4}


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Sockets to other machines are closed for the whole suite; those between processes of this one stay."""

    def refusing(connect: Callable[[socket.socket, Any], Any]) -> Callable[[socket.socket, Any], Any]:
        def connect_here(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
                raise AssertionError(f"a test reached for the network: {address}")
            return connect(self, address)

        return connect_here

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refusing(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", refusing(socket.socket.connect_ex))
        yield


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the package remembers of a machine or of shots is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@dataclass(frozen=True)
class FakeCandidate:
    text: str
    score: float
    tokens: int


@dataclass(frozen=True)
class FakeResult:
    """The fields of `idefics.Result` that a row is made from."""

    text: str | None
    score: float | None = None
    tokens: int | None = None
    candidates: tuple[FakeCandidate, ...] = ()
    error: RowError | None = None


class FakeImage(bytes):
    """Like EncodedImage, of one pixel row for all that anyone asks."""

    @property
    def image_keys(self) -> tuple[bytes]:
        return (bytes(self),)

    @property
    def pixels(self) -> tuple[Any]:
        import torch

        return (torch.zeros(3, 1, 1),)


@dataclass
class FakeCaptioner:
    """Its text is a hash of the prompt, or what `answer` makes of that. `before_call` may wait or raise.

    `room` is how many letters a prompt may have. What it was told stays in `calls` (batch sizes), `looks` (images
    whose vectors were asked for), `prompts` (by their hash) and `decoding`.
    """

    batch_size: int = 4
    is_instruct: bool = False
    delay: float = 0.0
    room: int = 100_000
    place: tuple[str, str] | None = None
    fingerprint: str = "fake"
    before_call: Callable[[Sequence[Any]], None] = lambda prompts: None
    answer: Callable[[str], str] = str
    calls: list[int] = field(default_factory=list)
    looks: list[int] = field(default_factory=list)
    prompts: dict[str, Prompt] = field(default_factory=dict)
    decoding: dict[str, Any] = field(default_factory=dict)

    def image_workers(self, options: ImageOptions) -> Any:
        return nullcontext(FakeOpener(options))

    def encode(self, prompt: Prompt, max_new_tokens: int, start: Prompt = ()) -> str | RowError:
        if sum(len(item) for item in prompt if isinstance(item, str)) > self.room:
            return RowError("prompt_too_long", f"more than {self.room} letters")
        text = prompt_text(prompt)
        self.prompts[text] = prompt
        return text

    def encode_image(self, image: Any) -> Any:
        return FakeImage(image) if isinstance(image, bytes) else image

    def image_vectors(self, images: Sequence[bytes]) -> Tensor:
        """(images, 3): the colour of each image's first pixel."""
        import torch

        self.looks.append(len(images))
        return torch.tensor([list(image[:3]) for image in images], dtype=torch.float32)

    def embed_stream(self, source: Any) -> Iterator[tuple[int, Tensor]]:
        """(1, 3) for each image: its vector."""
        number = 0
        while images := source.take(self.batch_size, True):
            time.sleep(self.delay)
            for vector in self.image_vectors(images):
                yield number, vector.unsqueeze(0)
                number += 1

    def stream(self, source: Any, **decoding: Any) -> Iterator[tuple[int, FakeResult]]:
        number = 0
        self.decoding = decoding
        while prompts := source.take(self.batch_size, True):
            self.calls.append(len(prompts))
            self.before_call(prompts)
            time.sleep(self.delay)
            for prompt in prompts:
                yield number, self._describe(prompt, decoding.get("num_return_sequences", 1))
                number += 1

    def _describe(self, text: str, num_texts: int) -> FakeResult:
        text = self.answer(text)
        candidates = tuple(FakeCandidate(f"{text} {i}", -0.5 - i, 2) for i in range(num_texts))
        return FakeResult(text, -0.5, 2, candidates)


@dataclass(frozen=True)
class FakeOpener:
    """Opens images in the thread that asks; an image is its bytes."""

    options: ImageOptions

    def prepare(self, source: Any) -> bytes | RowError:
        image = load_image(source, self.options)
        return image if isinstance(image, RowError) else image.tobytes()


def prompt_text(prompt: Sequence[Any]) -> str:
    data = b"".join(item if isinstance(item, bytes) else str(item).encode() for item in prompt)
    return "image " + hashlib.sha256(data).hexdigest()[:12]


def written(prompt: Prompt) -> str:
    """For reading: an image of `save_image` as [seed], a special token by its name."""
    return "".join(
        item if isinstance(item, str) else item.name if isinstance(item, SpecialToken) else f"[{item[0]}]"
        for item in prompt
    )


def prompts_of(captioner: FakeCaptioner, rows: Sequence[dict[str, Any]]) -> list[str | None]:
    """What each row of a result was asked, None where nothing was."""
    texts = [row.get("answer") or row.get("caption") or row.get("text") for row in rows]
    return [text and written(captioner.prompts[text]) for text in texts]


def save_image(path: Path, seed: int = 0) -> Path:
    """A small image that differs from those of other seeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (seed % 256, seed // 256 % 256, 77)).save(path, format="PNG")
    return path


def expected_text(path: Path) -> str:
    """What FakeCaptioner captions the image with."""
    prompts = PromptOptions("caption")
    shots = leading_shots(prompts, (), instruct=False)
    return prompt_text(build_prompt(prompts, {}, [load_image(path).tobytes()], shots, instruct=False))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of six good images, one in a sub-folder, and a broken one."""
    folder = tmp_path / "photos"
    for i, name in enumerate(["b.png", "a.jpg", "z.webp", "c.png", "sub/a.png", "m.gif"]):
        save_image(folder / name, i)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    return folder


@pytest.fixture(scope="session")
def real_llama(tmp_path_factory: pytest.TempPathFactory) -> RealLlama:
    """LLaMA's own vocabulary; tests that ask for it are skipped where it cannot be had."""
    return fetch_real_llama(tmp_path_factory.mktemp("npm"))


@pytest.fixture
def put_into_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a checkpoint into a hub cache of the test's own as some/model, without the files that `ignore` matches."""

    def put(folder: Path, ignore: str = "") -> Path:
        commit = "0123456789abcdef0123456789abcdef01234567"
        cache = tmp_path / "hub" / "models--some--model"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text(commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        return shutil.copytree(folder, cache / "snapshots" / commit, ignore=shutil.ignore_patterns(ignore))

    return put


def rows_of(text: str | bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`run(*arguments, captioner=..., input=...)`: the command line in this process, with a fake model."""
    monkeypatch.delenv("IDEFICS_MODEL", raising=False)

    def invoke(*arguments: str | Path, captioner: FakeCaptioner | None = None, input: bytes | None = None) -> Result:
        def load(request: ModelRequest, batch_size: int | None) -> FakeCaptioner:
            return captioner or FakeCaptioner(batch_size or 4)

        monkeypatch.setattr(cli, "check_model", lambda request: None)
        monkeypatch.setattr(cli, "load_model", load)
        return CliRunner().invoke(cli.app, [str(a) for a in arguments], input=input)

    return invoke


@pytest.fixture
def refused(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The one line on stderr of a command that must end with 2 before a model is loaded."""

    def invoke(*arguments: str | Path, input: bytes | None = None) -> str:
        def never(*arguments: Any) -> None:
            raise AssertionError("the model was loaded")

        runner = CliRunner()
        monkeypatch.setattr(cli, "load_model", never)
        result = runner.invoke(cli.app, [str(a) for a in arguments], input=input)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        last = result.stderr.splitlines()[-1]
        assert last.startswith("Error: ") and "Traceback" not in result.stderr
        return last

    return invoke
