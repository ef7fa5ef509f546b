"""Imported once, in the process that runs are forked from: what each of them would otherwise spend its time importing."""

import pyarrow.parquet  # noqa: F401 (imported, and not used before the fork)
import tqdm  # noqa: F401
from faulty_run import cli
from typer.testing import CliRunner

CliRunner().invoke(cli.app, ["caption", "there-is-no-such-file.png"])
