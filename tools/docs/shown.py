"""The commands of README and docs/, run by bash as they stand, and what they print.

A block of `console` shows a session: lines that begin with `$ ` are commands (`> ` continues one), and what follows is
what they print, stdout and stderr together. `idefics` is a function of that bash, which asks this process: here the
demo model is loaded once for all commands.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any
from unittest.mock import patch

from typer.testing import CliRunner

from idefics_cli.checkpoint.quantize import silence
from idefics_cli.cli import app as cli

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")))
SESSION = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
VARYING = re.compile(  # scores, seconds, shares; of runs in processes of their own also what suits the machine
    r"-?\d+\.\d+(?:e-?\d+)?|-?\d+e-\d+|\d+(?=%)|(?<=parameters=)[\d,]+|\d+(?= rows? at a time)"
    r"|(?<= on cpu in )(?:fp32|bf16 \(--dtype fp32 is exact\))"
)
CLIENT = """
import sys, os
from multiprocessing.connection import Client
with Client(sys.argv[1], "AF_UNIX") as server:
    server.send((sys.argv[2:], os.getcwd(), sys.stdin.buffer.read()))
    code, out, err, both = server.recv()
if os.path.sameopenfile(1, 2):
    out, err = both, ""
sys.stdout.buffer.write(out)
sys.stdout.flush()
sys.stderr.write(err)
os._exit(code)
"""
FUNCTION = 'set -o pipefail; shopt -s expand_aliases; idefics() { "$PYTHON" -I -c "$CLIENT" "$SERVER" "$@"; }\n'


silence()  # as the command line does


@dataclass
class Shell:
    """Runs commands in `folder`. `load` is what `idefics` loads a model by: by default the demo, whatever is named."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    load: Callable[[Any, int | None], Any] | None = None

    def __post_init__(self) -> None:
        model = None if self.load else loaded_demo()  # before anything is captured
        self._load = self.load or (lambda request, batch_size: model)

    @classmethod
    def of_examples(cls, folder: Path, environment: Mapping[str, str]) -> Shell:
        """In a folder with the examples."""
        shutil.copytree(ROOT / "examples", folder / "examples")
        quiet = {"IDEFICS_STATUS_EVERY": "0"}  # a slow machine would have lines that others do not
        return cls(folder, {**environment, **quiet})

    def run(self, command: str) -> tuple[int, str]:
        """The exit code, and what is printed."""
        address = os.path.join(tempfile.mkdtemp(prefix="idefics-"), "server")  # a short name: sockets' have a limit
        environment = {**os.environ, **self.environment, "PYTHON": sys.executable, "CLIENT": CLIENT, "SERVER": address}
        with Listener(address, "AF_UNIX", backlog=8) as listener:
            listener._listener._socket.settimeout(0.05)  # type: ignore[attr-defined]
            bash = subprocess.Popen(
                ["bash", "-c", FUNCTION + command], cwd=self.folder, env=environment, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            while bash.poll() is None:
                self._serve(listener)
        return bash.returncode, bash.communicate()[0]

    def _serve(self, listener: Listener) -> None:
        try:
            asked = listener.accept()
        except TimeoutError:
            return
        with asked, patch.dict(os.environ, self.environment):
            arguments, folder, data = asked.recv()
            has_parts = any(each.endswith("/") for each in arguments[1:][-1:])  # its processes load models of their own
            with nullcontext() if has_parts else patch.object(cli, "load_model", self._load):
                asked.send(answered(arguments, folder, data))


def answered(arguments: Sequence[str], folder: str, data: bytes) -> tuple[int, bytes, str, bytes]:
    """The exit code and the two streams of the command, and both as one, in the order of writing."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        found = CliRunner().invoke(cli.app, arguments, input=data, prog_name="idefics")
    finally:
        os.chdir(before)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.stdout_bytes, found.stderr, found.output_bytes


@cache
def loaded_demo() -> Any:
    from idefics_cli.loaded_model import LoadedModel

    return LoadedModel.from_pretrained("demo", dtype="fp32")  # the same scores on every machine


# ---- S3


@contextmanager
def bucket() -> Iterator[dict[str, str]]:
    """A server of S3 with the example questions in a bucket, as Parquet; the environment that leads there."""
    import pyarrow.parquet as pq
    from moto.server import ThreadedMotoServer
    from pyarrow.fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    place = "{}:{}".format(*server.get_host_and_port())
    of_keys = {"access_key": "key", "secret_key": "secret", "region": "us-east-1", "scheme": "http"}
    remote = S3FileSystem(**of_keys, endpoint_override=place, allow_bucket_creation=True)
    remote.create_dir("bucket")
    for name in "questions.parquet", "table/part-0.parquet":
        pq.write_table(questions(), f"bucket/{name}", filesystem=remote)
    yield {
        **{"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"},
        **{"AWS_ENDPOINT_URL": f"http://{place}", "AWS_EC2_METADATA_DISABLED": "true"},
    }
    server.stop()


def questions() -> Any:
    """The example questions, with their images' bytes."""
    import pyarrow as pa

    rows = [json.loads(line) for line in (ROOT / "examples/questions.jsonl").read_text(encoding="utf-8").splitlines()]
    return pa.Table.from_pylist(
        [
            {**row, "image": {"bytes": (ROOT / "examples" / row["image"]).read_bytes(), "path": row["image"]}}
            for row in rows
        ]
    )


# ---- pages


def sessions(text: str) -> Iterator[str]:
    yield from SESSION.findall(text)


def commands_of(session: str) -> list[str]:
    """Each with the lines that continue it."""
    return [
        "\n".join(line[2:] for line in found.splitlines())
        for found in re.findall(r"^\$ .*\n(?:> .*\n)*", session, re.MULTILINE)
    ]


def renewed(text: str, shell: Shell) -> str:
    """The page with what its sessions print now; what varies from run to run stays where nothing else has changed."""

    def session(found: re.Match[str]) -> str:
        shown = "".join(f"{as_typed(each)}{shell.run(each)[1]}" for each in commands_of(found[1]))
        return found[0] if steady(shown) == steady(found[1]) else f"```console\n{shown}```"

    return SESSION.sub(session, text)


def as_typed(command: str) -> str:
    first, *further = command.splitlines()
    return "".join([f"$ {first}\n", *(f"> {line}\n" for line in further)])


def steady(text: str) -> str:
    """Without what varies between runs and machines."""
    return VARYING.sub("#", text)
