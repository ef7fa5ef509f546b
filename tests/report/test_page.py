"""What the page does in a browser: Debian's Chromium, without a window, through Playwright, from the disk."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import rows_of, save_image

from idefics_cli.report.options import ReportOptions
from idefics_cli.report.page import write_report

CHROMIUM = shutil.which("chromium")
if not os.environ.get("REQUIRE_CHROMIUM"):  # .ci/run sets it where it has one
    pytest.importorskip("playwright", reason="needs playwright: pip install -e '.[test]'")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium", allow_module_level=True)

from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

HACK = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'><b>bold</b>"
RIGHT_TO_LEFT = "\u202eقطة على سجادة\u202e and a cat"
CONTROL = "a\0b\x1b[31m\x85c"
LONG = "word " * 2_000_000  # 10 MB
ROWS = [
    {"id": f"{n:03}.png", "image": f"imgs/{n % 6}.png", "caption": f"a {colour} thing number {n}", "score": -n / 100}
    | {"tokens": 4 + n % 9, "error": None, "colour": colour}
    for n in range(300)
    for colour in [("red", "green", "blue")[n % 3]]
]
for number, text in enumerate((HACK, RIGHT_TO_LEFT, CONTROL, LONG), start=10):
    ROWS[number]["caption"] = text
ROWS[5] |= {"caption": None, "score": None, "tokens": None, "error": "image_unreadable: broken"}
ROWS[6]["candidates"] = [{"text": "best", "score": -0.1, "tokens": 2}, {"text": "second", "score": -0.9, "tokens": 3}]
ANSWERS = [
    {
        "id": str(n),
        "image": "imgs/0.png",
        "question": f"what is {n}?",
        "answer": f"{n % 2}",
        "score": -1.0,
        "error": None,
    }
    | {"answers": ["0"] * 3 + ["zero"]}
    for n in range(20)
]
OTHER = [row | {"answer": "1 of them" if n in (12, 13) else row["answer"]} for n, row in enumerate(ANSWERS)]
OTHER[15]["answer"] = "0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for number in range(5):
        save_image(folder / "imgs" / f"{number}.png", number)  # the sixth is missing
    for name, rows in ("captions", ROWS), ("answers", ANSWERS), ("other", OTHER):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(str(folder / "captions.jsonl"), ReportOptions(output=str(folder / "captions.html")))
    compare = {"compare": str(folder / "other.jsonl"), "link": True}
    write_report(str(folder / "answers.jsonl"), ReportOptions(output=str(folder / "answers.html"), **compare))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=os.getuid() != 0)
        yield found
        found.close()


def opened(browser: Browser, path: Path, **context: Any) -> Iterator[Page]:
    """The page, which must raise and say nothing, and reach for nothing but files."""
    tab = browser.new_context(viewport={"width": 1200, "height": 800}, **context).new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else said.append(request.url),
    )
    tab.goto(path.as_uri())
    tab.wait_for_selector("html[data-ready]", state="attached")
    yield tab
    assert not [each for each in said if "ERR_FILE_NOT_FOUND" not in each] and tab.evaluate("window.hacked") is None
    tab.context.close()


@pytest.fixture
def captions(browser: Browser, folder: Path) -> Iterator[Page]:
    yield from opened(browser, folder / "captions.html")


@pytest.fixture
def answers(browser: Browser, folder: Path) -> Iterator[Page]:
    yield from opened(browser, folder / "answers.html")


def ids(page: Page) -> list[str]:
    """Those in view, by their places."""
    found = page.eval_on_selector_all(
        "#pad > *", "all => all.sort((a, b) => a.place - b.place).map(each => D.id[each.row])"
    )
    return list(found)


def count(page: Page) -> str:
    return page.inner_text("#count")


def cards(page: Page, row: str) -> Any:
    return page.locator("#pad > *", has=page.locator(f"text={row}")).first


def test_it_loads_with_only_what_is_in_view(captions):
    assert count(captions) == "300 rows" and captions.title().startswith(str(captions.inner_text("h1")))
    assert ids(captions)[:3] == ["000.png", "001.png", "002.png"] and len(ids(captions)) < 100
    image = captions.locator("#pad img").first
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 8
    assert "image_missing" in captions.locator(".card").nth(5).inner_text()
    captions.evaluate("document.getElementById('view').scrollTop = 1e9")
    for _ in range(100):  # Playwright's own waiting evaluates texts, which the page's policy forbids
        if captions.evaluate("inView.has(299)"):
            break
        captions.wait_for_timeout(50)
    assert len(ids(captions)) < 100


def test_search_filter_sort_and_clear(captions):
    captions.fill("#search", "NUMBER 12")
    assert count(captions) == "10 of 300 rows" and ids(captions)[0] == "120.png"  # 12 is a hostile one
    captions.click("text=red >> nth=0")
    captions.get_by_role("button", name="green", exact=False).first.click()
    assert len(captions.locator(".chip").all()) == 2
    captions.keyboard.press("Escape")
    captions.click("#chips .chip >> nth=0")
    captions.evaluate("clear()")
    assert count(captions) == "300 rows"
    captions.get_by_role("group", name="error").get_by_role("button", name="image_unreadable").click()
    assert ids(captions) == ["005.png"]
    captions.evaluate("clear()")
    captions.select_option("#sort", "score-")
    assert ids(captions)[0] == "299.png"
    captions.fill("#search", "nothing like it")
    assert captions.is_visible("#empty")
    captions.click("#clear")
    assert count(captions) == "300 rows"


def test_brushing_a_histogram_filters(captions):
    plot = captions.locator(".plot[data-name=score]")
    box = plot.bounding_box()
    captions.mouse.move(box["x"] + 2, box["y"] + 30)
    captions.mouse.down()
    captions.mouse.move(box["x"] + box["width"] / 2, box["y"] + 30, steps=4)
    captions.mouse.up()
    some = int(count(captions).split()[0])
    assert 100 < some < 200 and all(int(each[:3]) > 100 for each in ids(captions))
    handle = captions.get_by_role("slider", name="greatest score")
    handle.focus()
    handle.press("ArrowLeft")
    assert int(count(captions).split()[0]) < some
    handle.press("Escape")
    assert count(captions) == "300 rows"


def test_everything_by_keyboard(captions):
    captions.keyboard.press("/")
    assert captions.evaluate("document.activeElement.id") == "search"
    captions.keyboard.type("thing")
    captions.keyboard.press("Enter")
    captions.keyboard.press("End")
    assert captions.get_attribute("#view", "aria-activedescendant") == "r299"
    captions.keyboard.press("Home")
    captions.keyboard.press("ArrowRight")
    captions.keyboard.press("Space")
    assert captions.get_attribute("#r1", "aria-selected") == "true"
    captions.keyboard.press("Enter")
    assert captions.inner_text("#detail-id") == "001.png" and captions.inner_text("#mark") == "Marked"
    captions.keyboard.press("ArrowRight")
    assert captions.inner_text("#detail-id") == "002.png"
    captions.keyboard.press("Escape")
    assert not captions.is_visible("#detail")
    captions.keyboard.press("v")
    assert captions.get_attribute("#view", "role") == "grid"
    assert captions.locator("#pad .line").first.get_by_role("gridcell").count() >= 4
    captions.keyboard.press("?")
    assert captions.is_visible("#help")
    captions.keyboard.press("Escape")
    captions.keyboard.press("d")
    assert captions.get_attribute("html", "data-theme") == "dark"


def test_a_row_opens_with_its_whole_image_and_candidates(captions):
    captions.fill("#search", "006.png")
    captions.click(".card")
    captions.wait_for_selector("figure.whole")  # the file itself, from beside the page
    assert captions.locator(".candidates li").all_inner_texts()[1].split("\n")[0] == "second"
    assert "colour" in captions.inner_text(".facts-of-row")


def test_hostile_texts_stay_text(captions):
    for text, seen in (HACK, HACK), (RIGHT_TO_LEFT, RIGHT_TO_LEFT), (CONTROL, "a␀b␛[31m\\x85c"):
        captions.evaluate("clear()")
        captions.fill("#search", text[:20].lower())
        captions.locator(".card").first.click()
        assert captions.text_content("#said .text") == seen
        assert captions.locator("#detail .text *").count() == 0
        captions.keyboard.press("Escape")
    captions.fill("#search", "013.png")
    captions.locator(".card").first.click()
    assert len(captions.text_content("#said .text")) == 20_001
    assert "Show all 10,000,000 characters" in captions.inner_text("#said")


def test_marks_and_edits_are_kept_and_exported(captions, tmp_path):
    def saved(name: str) -> Path:
        with captions.expect_download() as download:
            captions.click(f"[data-export='{name}']")
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        return path

    captions.focus("#view")
    captions.keyboard.press("m")
    captions.keyboard.press("ArrowRight")
    captions.keyboard.press("e")
    captions.fill("textarea", "corrected <b>text</b>\nö")
    captions.keyboard.press("Control+Enter")
    assert captions.text_content("#said .text") == "corrected <b>text</b>\nö"
    captions.reload()
    captions.wait_for_selector("html[data-ready]", state="attached")
    captions.keyboard.press("x")
    assert saved("ids .txt").read_text() == "000.png\n"
    assert rows_of(saved("manifest .jsonl").read_text()) == [{"id": "000.png", "image": "imgs/0.png"}]
    assert len(saved("other ids .txt").read_text().splitlines()) == 299
    edited = {"id": "001.png", "image": "imgs/1.png", "caption": "corrected <b>text</b>\nö"}
    assert rows_of(saved("edited .jsonl").read_text()) == [edited]
    with zipfile.ZipFile(saved("edited .txt files")) as archive:
        assert archive.testzip() is None and archive.namelist() == ["imgs/1.txt"]
        assert archive.read("imgs/1.txt").decode() == f"{edited['caption']}\n"
    captions.on("dialog", lambda dialog: dialog.accept())
    captions.click("text=Remove all marks and edits")
    assert captions.evaluate("marks.size + edits.size") == 0


def test_exported_texts_lie_beside_their_images_and_nowhere_else(browser, tmp_path):
    """As --sidecar writes them, below the folder that was captioned; failed rows have none."""
    beside = {
        "10_cat/a.png": ("set/10_cat/a.png", "10_cat/a.txt"),
        "5_dog/a.png": ("set/5_dog/a.png", "5_dog/a.txt"),
        "5_dog/b.png": ("set/5_dog/b.png", "5_dog/b.png.txt"),
        "5_dog/b.jpg": ("set/5_dog/b.jpg", "5_dog/b.jpg.txt"),
        "5_dog/c.png": ("set/5_dog/c.png", "5_dog/c.txt"),
        "5_dog/c.png.jpg": ("set/5_dog/c.png.jpg", "5_dog/c.png.jpg.txt"),
        "1": ("imgs/v1.2/d", "imgs/v1.2/d.txt"),
        "2": ("../../up/./e.png", "up/e.txt"),
        "3": ("/root/f.png", "root/f.txt"),
        "4": ("C:\\g\0.png", "C__g_.txt"),
        "5": ("imgs/v1.2/d", "imgs/v1.2/d-2.txt"),
        "6": ("..", "row.txt"),
        "7": ("imgs/.png", "imgs/.png.txt"),
    }
    rows = [{"id": name, "image": image, "caption": name, "error": None} for name, (image, _) in beside.items()]
    rows.append({"id": "h.png", "image": "set/h.png", "caption": None, "error": "image_unreadable: broken"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(str(tmp_path / "a.jsonl"), ReportOptions(output=str(tmp_path / "a.html"), link=True))
    for page in opened(browser, tmp_path / "a.html"):
        texts = {name: f"{row}\n" for row, (_, name) in beside.items()}
        assert dict(page.evaluate("sidecars(state.shown)")) == texts
        assert page.evaluate("sidecars([3])") == [["5_dog/b.jpg.txt", "5_dog/b.jpg\n"]]  # whatever else is exported


def test_two_runs(answers):
    """Ten of twenty are right; where one answers otherwise, the other side may win."""
    assert ids(answers)[:3] == ["12", "13", "15"]
    summary = answers.inner_text("#summary")
    assert "3 differ" in summary and "A wins 1" in summary and "B wins 1" in summary
    answers.get_by_role("group", name="wins").get_by_role("button", name="B wins").click()
    assert ids(answers) == ["15"]
    card = answers.locator(".card")
    assert card.locator("mark").all_inner_texts() == ["1", "0"]
    card.click()
    assert "what is 15?" in answers.inner_text("#content")
    references = answers.locator(".references li")
    assert references.count() == 2 and references.first.get_attribute("class") == "wrong"
    assert answers.locator("#content img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 8


def test_the_policy_holds(browser, folder):
    """Nothing that came into the page by other ways would run or reach out."""
    page = browser.new_page()
    page.goto((folder / "captions.html").as_uri())
    blocked = page.evaluate(
        """async () => {
            const seen = [];
            document.addEventListener("securitypolicyviolation", (event) => seen.push(event.effectiveDirective));
            try { document.body.innerHTML += "<b>x</b>"; } catch { seen.push("trusted types"); }
            const image = new Image(); image.src = "https://example.org/a.png";
            await fetch("https://example.org/").catch(() => {});
            await new Promise((done) => setTimeout(done, 300));
            return seen;
        }"""
    )
    assert {"trusted types", "connect-src", "img-src"} <= set(blocked)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_the_system(browser, folder, scheme):
    for page in opened(browser, folder / "captions.html", color_scheme=scheme):
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate("getComputedStyle(document.body).colorScheme") in ("light dark", scheme)
        red = page.evaluate("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0]
        assert (int(red) > 200) == (scheme == "light")
        page.click("#open-filters")
        assert page.get_by_role("slider", name="least score").is_visible()


def test_printing_shows_the_rows_that_pass(captions):
    captions.fill("#search", "number 29")
    captions.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert captions.locator("#print .card").count() == 11
    assert captions.pdf().startswith(b"%PDF-")
