"""How quick `idefics report`'s page is in a browser: `python -m benchmarks.report`.

Results are made up, the command line makes the pages, and Chromium opens them without a window: 5,000 rows with
thumbnails, 100,000 without images. Reported are the milliseconds from navigation until the rows are there, those of a
frame while the rows are scrolled through (median, and the slowest in a hundred), and of a search, from the key to the
rows; and of each, what the page's own thread took of a processor (`_cpu`), which other programs do not change. Repeats
take turns. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from idefics_cli.report.options import ReportOptions
from idefics_cli.report.page import write_report

WORDS = ["a", "small", "large", "red", "green", "circle", "square", "cross", "and", "on", "the", "left", "of", "purple"]
QUERIES = ("red", "large red", "circle and", "00123", "no such text")
IMAGES = 200  # different ones
FRAMES = 150
SCROLL = """async (frames) => {
    const view = document.getElementById("view"), gaps = [];
    let before = await new Promise(requestAnimationFrame);
    for (let frame = 0; frame < frames; frame++) {
        view.scrollTop += 400;
        const now = await new Promise(requestAnimationFrame);
        gaps.push(now - before);
        before = now;
    }
    return gaps;
}"""
SEARCH = """async (query) => {
    const search = document.getElementById("search");
    search.value = query;
    const started = performance.now();
    search.dispatchEvent(new Event("input"));
    document.getElementById("view").getBoundingClientRect();
    return performance.now() - started;
}"""


def make_page(folder: Path, num_rows: int, with_images: bool) -> Path:
    draw = random.Random(num_rows)
    results, page = folder / f"{num_rows}.jsonl", folder / f"{num_rows}.html"
    names = [_make_image(folder / f"{number}.png", number) for number in range(IMAGES if with_images else 0)]
    with open(results, "w") as file:
        for number in range(num_rows):
            row = {
                "id": f"{number:07}.png",
                "image": names[number % len(names)] if names else None,
                "caption": " ".join(draw.choices(WORDS, k=9)),
                "score": -draw.expovariate(1),
                "tokens": draw.randint(4, 20),
                "error": None,
                "kind": draw.choice(WORDS),
            }
            file.write(json.dumps(row) + "\n")
    write_report(str(results), ReportOptions(output=str(page)))
    return page


def _make_image(path: Path, seed: int) -> str:
    """A soft gradient with some noise, as a photograph has."""
    noise = Image.effect_noise((640, 480), 24 + seed % 40)
    image = Image.merge("RGB", [Image.linear_gradient("L").resize((640, 480)).rotate(90 * (seed % 4)), noise, noise])
    image.resize((640, 480)).save(path)
    return path.name


def measure(page: Page, path: Path) -> dict[str, Any]:
    tab = page.context.new_cdp_session(page)
    tab.send("Performance.enable", {"timeDomain": "threadTicks"})

    def cpu_ms() -> float:
        found = {each["name"]: each["value"] for each in tab.send("Performance.getMetrics")["metrics"]}
        return 1000 * found["TaskDuration"]

    before = cpu_ms()
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached", timeout=120_000)
    found: dict[str, Any] = {"load": float(page.evaluate("document.documentElement.dataset.ready"))}
    found["load_cpu"] = cpu_ms() - before
    page.wait_for_timeout(1500)  # what it does when nothing is asked of it
    before = cpu_ms()
    found["frames"] = page.evaluate(SCROLL, FRAMES)
    found["frame_cpu"] = (cpu_ms() - before) / FRAMES
    before = cpu_ms()
    found["searches"] = [page.evaluate(SEARCH, query) for query in QUERIES]
    found["search_cpu"] = (cpu_ms() - before) / len(QUERIES)
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of all repeats, in milliseconds: medians, the frames together, and the slowest search."""
    frames = sorted(each for run in runs for each in run["frames"])
    medians = {
        name: statistics.median(run[name] for run in runs) for name in ("load", "load_cpu", "frame_cpu", "search_cpu")
    }
    search = statistics.median(max(run["searches"]) for run in runs)
    found = medians | {
        "frame": statistics.median(frames),
        "frame_99": frames[int(0.99 * len(frames))],
        "search": search,
    }
    return {name: round(value, 1) for name, value in sorted(found.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5_000, help="rows of the page with thumbnails")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the page without")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        pages = {"thumbnails": make_page(folder, options.images, True), "texts": make_page(folder, options.rows, False)}
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in pages}
        for _ in range(options.repeats):
            for kind, path in pages.items():
                tab = browser.new_page(viewport={"width": 1440, "height": 900})
                runs[kind].append(measure(tab, path))
                tab.close()
                print(f"{kind}: {summary(runs[kind][-1:])}", file=sys.stderr)
        browser.close()
        sizes = {f"{kind}_mb": path.stat().st_size / 1e6 for kind, path in pages.items()}
        print(json.dumps({kind: summary(each) for kind, each in runs.items()} | sizes))


if __name__ == "__main__":
    main()
