"""The console script, which `python -m idefics_cli` is too. Imports what Python has imported already, until Ctrl-C is
looked after."""

from __future__ import annotations

import signal


def end_at_once_when_interrupted() -> None:
    """Ctrl-C before a command has begun: nothing has been done, and Python's traceback would say nothing of use."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """The command line."""
    end_at_once_when_interrupted()
    from idefics_cli.cli import app as cli

    cli.main()


if __name__ == "__main__":
    main()
