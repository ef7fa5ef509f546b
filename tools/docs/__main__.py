"""Write what docs/ has from the code: `python -m tools.docs [PAGE...]`.

After a change of options, docstrings, messages or the demo's weights. With names of pages, only these. The commands of
`console` blocks are run with the demo model, and what they print takes the place of what is shown.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from tools.docs import errors, options, reference
from tools.docs.shown import PAGES, ROOT, Shell, bucket, renewed

OUTSIDE = re.compile(r"\[([^]]+)\]\((?!https:|(?!CONTRIBUTING)[\w-]+\.(?:md|svg|webp)\b)[^)]*\)")


def index() -> str:
    """The README as the first page of the site: links lead to its pages, and to nothing outside of it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    return OUTSIDE.sub(r"\1", text)


MADE = {
    "docs/options.md": options.page,
    "docs/python-reference.md": reference.page,
    "docs/troubleshooting.md": errors.page,
    "docs/index.md": index,
}


def main(names: list[str]) -> None:
    wanted = {str(Path(name)) for name in names} or {*MADE, *PAGES}
    for name in sorted(wanted & {*PAGES} - {*MADE}):
        with tempfile.TemporaryDirectory() as folder, bucket() as environment:
            text = renewed((ROOT / name).read_text(encoding="utf-8"), Shell.of_examples(Path(folder), environment))
        (ROOT / name).write_text(text, encoding="utf-8")
    for name, page in MADE.items():
        if name in wanted:
            (ROOT / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
