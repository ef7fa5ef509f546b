"""The console script, also run by `python -m idefics_cli`. Nothing slow is imported before Ctrl-C is handled."""

from __future__ import annotations

import signal


def end_at_once_when_interrupted() -> None:
    """Ctrl-C before a command has begun ends the process without Python's traceback: nothing has been done yet."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """The command line."""
    end_at_once_when_interrupted()
    from idefics_cli.cli import app as cli

    cli.main()


if __name__ == "__main__":
    main()
