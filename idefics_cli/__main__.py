"""The console script, also run by `python -m idefics_cli`. Nothing slow is imported before signals are handled."""

from __future__ import annotations

import os
import signal


def end_at_once_when_stopped() -> None:
    """A signal before a command has begun ends the process without Python's traceback: nothing has been done yet.

    By a handler, as the first process of a container ignores signals that have none.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: os._exit(128 + number))


def main() -> None:
    """The command line."""
    end_at_once_when_stopped()
    from idefics_cli.cli import app as cli

    cli.main()


if __name__ == "__main__":
    main()
