"""README and docs/ are true: their commands run, what they show is printed, and what is made from the code is current.

`python -m tools.docs` writes what is out of date.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import test_field_layouts
from conftest import FakeCaptioner, save_image

from idefics_cli.checkpoint import find
from idefics_cli.cli import app as cli
from idefics_cli.columns import arrow_type
from idefics_cli.errors import ROW_ERROR_CODES
from idefics_cli.prompts.postprocess import PostProcess
from idefics_cli.tasks.embed import Embed
from idefics_cli.tasks.result_rows import text_form
from tools.docs import __main__ as docs
from tools.docs import errors, options, shown
from tools.docs.shown import PAGES, ROOT, Shell

TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
SCRIPT = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Other programs, more processes than this one, and what is not on a test machine: only their options are looked at.
ELSEWHERE = re.compile(
    r"^(python3? |pip |pipx |uv |ray |torchrun |sbatch |export |source |zensical |idefics merge )|-o [^ ]+/( |$)|"
    r"--(ray|processes|shard|adapter|device-count)\b|tuned\.jsonl|gs://|minio|s3://bucket/captions"
)
TESTED = {*docs.MADE, "docs/formats.md"}  # the latter by tests/field/test_field_layouts.py
needs_jq = pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")


# ---- what is made from the code


@pytest.mark.parametrize("page", docs.MADE)
def test_a_page_made_from_the_code_is_current(page: str) -> None:
    assert (ROOT / page).read_text(encoding="utf-8") == docs.MADE[page](), f"run python -m tools.docs {page}"


def test_the_options_page_has_the_options_of_each_command_and_no_others() -> None:
    described = {
        name: {flag for each in options.all_options() if name in each.defaults for flag in flags(each.flags)}
        for name in options.commands()
    }
    assert described == {
        name: {flag for each in options.options_of(command) for flag in (*each.opts, *each.secondary_opts)}
        for name, command in options.commands().items()
    }
    listed = re.findall(r"^\| (`-.+?) \| ", TEXTS["docs/options.md"], re.MULTILINE)
    assert {flag for each in listed for flag in flags(each)} == set().union(*described.values())


def flags(cell: str) -> list[str]:
    return re.findall(r"`(--?[\w-]+)`", cell)


def test_every_message_says_what_to_do() -> None:
    found = [site for site in errors.catalogue() if not site.is_row]
    assert len(found) > 200
    assert {site.group for site in found} == {*errors.GROUPS}
    assert not {site.message for site in found if not re.search(r"[:;.] |…$", site.message)}


def test_the_rows_page_has_the_columns_and_codes_of_the_code() -> None:
    columns_part, codes_part = TEXTS["docs/rows.md"].split("## Error codes")
    types = dict(re.findall(r"^\| `(\w+)` \| ([\w ]+?) \| ", columns_part, re.MULTILINE))
    texts = ("caption", "answer", "text")
    forms = [text_form(each, PostProcess(), lambda row: row, has_candidates=True) for each in texts]
    columns = [column for form in (*forms, Embed.form) for column in form.columns]
    assert types.keys() == {column.name for column in columns}
    for column in columns:
        assert types[column.name].split()[0] in str(arrow_type(column)), column
    assert re.findall(r"^\| `(\w+)` \|", codes_part, re.MULTILINE) == list(ROW_ERROR_CODES)


# ---- what is shown is printed


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with shown.bucket() as found:
        yield found


@needs_jq
@pytest.mark.parametrize("page", [page for page in PAGES if any(shown.sessions(TEXTS[page])) and page not in docs.MADE])
def test_what_a_page_shows_is_printed(page: str, tmp_path: Path, environment: dict[str, str]) -> None:
    shell = Shell.of_examples(tmp_path, environment)
    for session in shown.sessions(TEXTS[page]):
        printed = "".join(shown.as_typed(each) + shell.run(each)[1] for each in shown.commands_of(session))
        assert shown.steady(printed) == shown.steady(session), f"run python -m tools.docs {page}"


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    command = [sys.executable, "-c", block]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 10


# ---- what is only typed runs, with a fake model and small data


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_accepted(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their options, the options' values, and how many inputs there are; and the file that `--config` names."""
    monkeypatch.chdir(tmp_path)
    for name, found in re.findall(r"^```toml\n# (\S+)\n(.*?)^```", TEXTS[page], re.MULTILINE | re.DOTALL):
        Path(name).write_text(found)
    for name, *arguments in typed(TEXTS[page]):
        if name == "help":
            assert {*arguments} <= options.commands().keys()
        elif not name.isupper() and not name.startswith("-"):  # COMMAND
            options.commands()[name].make_context(name, arguments)


def typed(text: str) -> Iterator[list[str]]:
    """The words after `idefics`, of commands in blocks, in indented lines and, with options, between backticks."""
    named = re.findall(r"(?:`|^    )(idefics (?:[^`\n]* )?-[^`\n]*)", text, re.MULTILINE)
    lines = [*"".join(SCRIPT.findall(text)).replace("\\\n", " ").splitlines(), *named]
    for line in lines:
        lexer = shlex.shlex(line.replace("\\|", "|"), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for place, word in enumerate(words, start=1):
            if re.fullmatch(r"(.*/)?idefics|idefics_cli", word):
                ends = [i for i, each in enumerate(words) if i >= place and not set(each) - set("();<>|&")]
                end = min(ends, default=len(words))
                yield words[place : end - (end < len(words) and words[end - 1].isdigit())]  # as in 2>&1


@needs_jq
@pytest.mark.parametrize("page", [page for page in PAGES if SCRIPT.search(TEXTS[page]) and page not in TESTED])
def test_the_commands_of_a_page_run(
    page: str, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_what_pages_name(tmp_path)
    monkeypatch.setattr(cli, "check_model", lambda request: None)
    monkeypatch.setattr(find, "known_positions", lambda request: None)
    shell = Shell(tmp_path, environment, lambda request, batch_size: FakeCaptioner())
    for block in SCRIPT.findall(TEXTS[page]):
        lines = block.replace("\\\n", " ").splitlines()
        for line in lines:
            if not ELSEWHERE.search(line):
                code, said = shell.run(line)
                assert code == 0, (line, said)


def make_what_pages_name(folder: Path) -> None:
    """The examples, and small stand-ins under the names that the pages use."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    for name in "imgs", "images", "photos", "dataset":
        for number in range(3):
            save_image(folder / name / f"{number}.jpg", number)
    questions = shown.questions()
    for name in "manifest", "rows", "scenes", "test", "train":
        pq.write_table(questions, folder / f"{name}.parquet")
    captions = [["a small star"]] * len(questions)
    pq.write_table(questions.append_column("captions", [captions]), folder / "scenes.parquet")
    rows = [{"id": f"{n}.jpg", "image": f"imgs/{n}.jpg", "question": "What?", "answer": "a", "answers": ["a"] * 3,
             "captions": ["a", "b"], "caption": "a"} for n in range(3)]  # fmt: skip
    for name in "test", "train", "new", "old", "captions-marked":
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "mine.jsonl").write_text("".join(f"{json.dumps({**row, 'id': k})}\n" for k, row in enumerate(rows * 2)))
    v2 = "v2_OpenEnded_mscoco_{}2014_questions.json", "v2_mscoco_{}2014_annotations.json"
    for part, image in ("val", 42), ("train", 43):
        test_field_layouts.vqa_files(folder, *(name.format(part) for name in v2), image)
    pool = json.loads((folder / v2[0].format("train")).read_text())
    (folder / v2[0].format("train")).write_text(json.dumps({**pool, "questions": pool["questions"] * 2}))
    (folder / "train2014").mkdir()
    (folder / "val2014/COCO_val2014_000000000043.jpg").rename(folder / "train2014/COCO_train2014_000000000043.jpg")
    test_field_layouts.LAYOUTS["TextVQA"](folder)


# ---- the site


@pytest.mark.skipif(find_spec("zensical") is None, reason="zensical is not installed: the extra `docs` brings it")
def test_the_site_builds_and_no_link_is_broken(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    command = [str(Path(sys.executable).with_name("zensical")), "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)[-3000:]
    pages = {str(page.relative_to(ROOT / "docs").with_suffix(".html")) for page in ROOT.glob("docs/*.md")}
    assert pages <= {str(path.relative_to(tmp_path / "site")) for path in tmp_path.glob("site/*.html")}
    named = set(re.findall(r'= "([\w-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8")))
    assert named == {page.name for page in ROOT.glob("docs/*.md")}
    for page in ROOT.glob("docs/*.md"):
        linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
        assert all((page.parent / link).exists() for link in linked), (page, linked)


def test_images_of_the_docs_are_small() -> None:
    size: Any = sum(path.stat().st_size for path in ROOT.glob("docs/*") if path.suffix in (".webp", ".svg"))
    assert 0 < size < 1_500_000
