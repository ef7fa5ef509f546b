"""The images of `idefics report` in docs/: `python -m tools.screenshots [FOLDER]`.

Runs the demo model over scenes that it has not seen, makes pages of the results, and takes each view of them in
Chromium: light and dark, wide and as a phone. Those that docs/ shows are put there, all of them into FOLDER.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from idefics_cli.demo.manifest import write_manifests
from idefics_cli.demo.scene import EVALUATION_SEEDS, scene

DOCS = Path(__file__).parents[1] / "docs"
IN_DOCS = {
    "gallery-light-wide": "report-gallery",
    "detail-dark-wide": "report-detail",
    "compare-light-wide": "report-compare",
    "gallery-dark-phone": "report-phone",
}
SIZES = {"wide": (1280, 800), "phone": (390, 844)}
SCENES = 24


def idefics(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "idefics_cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(DOCS.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, check=False)
    assert done.returncode in (0, 3), (arguments, done.returncode)  # 3: rows with errors are meant


def make_pages(folder: Path) -> dict[str, Path]:
    """A run over a folder with a broken image, and two over a manifest: by beams, and by chance."""
    (folder / "scenes").mkdir(parents=True, exist_ok=True)
    for number in range(SCENES):
        scene(EVALUATION_SEEDS + number).image.save(folder / "scenes" / f"scene-{number:03}.png")
    (folder / "scenes" / "scene-003.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    write_manifests(folder / "set", SCENES, 1)
    model = "--model", "demo"
    idefics(folder, "caption", "scenes", *model, "--num-return-sequences", "3", "-o", "captions.jsonl")
    kept = "set/scenes.parquet", *model, "--keep", "kind,captions", "--num-return-sequences", "3"
    idefics(folder, "caption", *kept, "-o", "beams.jsonl")
    idefics(folder, "caption", *kept, "--do-sample", "--temperature", "2.5", "-o", "sampled.jsonl")
    idefics(folder, "report", "captions.jsonl", "-o", "captions.html", "--overwrite")
    references = "--images", "set/scenes.parquet", "--answers-column", "captions"
    idefics(
        folder, "report", "beams.jsonl", "--compare", "sampled.jsonl", *references, "-o", "compare.html", "--overwrite"
    )
    return {"captions": folder / "captions.html", "compare": folder / "compare.html"}


def opened(browser: Browser, path: Path, scheme: str, size: str) -> Page:
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    tab = context.new_page()
    tab.goto(path.as_uri())
    tab.wait_for_selector("html[data-ready]", state="attached")
    tab.wait_for_timeout(500)
    return tab


def views(tab: Page, kind: str) -> dict[str, bytes]:
    tab.focus("#view")
    tab.mouse.move(0, 0)
    if kind == "compare":
        shots = {"compare": tab.screenshot()}
        tab.keyboard.press("Enter")
        tab.wait_for_timeout(300)
        return shots | {"compare-detail": tab.screenshot()}
    shots = {"gallery": tab.screenshot()}
    tab.keyboard.press("v")
    tab.wait_for_timeout(300)
    shots["table"] = tab.screenshot()
    tab.keyboard.press("v")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    tab.wait_for_timeout(300)
    return shots | {"detail": tab.screenshot()}


def save(shot: bytes, path: Path) -> None:
    Image.open(io.BytesIO(shot)).save(path.with_suffix(".webp"), quality=80, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where all of them go")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--runs", type=Path, help="a folder that keeps the runs, which another call then continues")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        pages = make_pages(options.runs or Path(name))
        browser = playwright.chromium.launch(executable_path=options.chromium, chromium_sandbox=os.getuid() != 0)
        for kind, path in pages.items():
            for scheme in ("light", "dark"):
                for size in SIZES:
                    for view, shot in views(opened(browser, path, scheme, size), kind).items():
                        name = f"{view}-{scheme}-{size}"
                        if name in IN_DOCS:
                            save(shot, DOCS / IN_DOCS[name])
                        if options.folder:
                            options.folder.mkdir(parents=True, exist_ok=True)
                            save(shot, options.folder / name)
        browser.close()


if __name__ == "__main__":
    main()
