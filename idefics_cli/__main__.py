"""`python -m idefics_cli` is `idefics`."""

from __future__ import annotations

from idefics_cli.cli import main

if __name__ == "__main__":
    main()
