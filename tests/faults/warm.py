"""What every run would spend its time importing: imported once, in the process that runs are forked from."""

import pyarrow.parquet  # noqa: F401 (imported, and not used before the fork)
import torch  # noqa: F401
import tqdm  # noqa: F401
from faulty_run import cli
from typer.testing import CliRunner

CliRunner().invoke(cli.app, ["caption", "there-is-no-such-file.png"])
