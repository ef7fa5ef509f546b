"""What is handed out: the wheel, the source distribution, the image for docker, the citation and the changelog."""

from __future__ import annotations

import email
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import idefics_cli

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
IMAGE = ROOT / "examples/images/scene-1900000000.png"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution of this tree."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)])
    return folder


def run(command: list[str], cwd: Path = ROOT, **variables: str) -> str:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | variables
    done = subprocess.run(command, cwd=cwd, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_says_what_it_is(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        (info,) = [name for name in names if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(wheel.read(info))
        scripts = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert {name.split("/")[0] for name in names} == {"idefics_cli", info.split("/")[0]}
    assert {"idefics_cli/py.typed", "idefics_cli/demo/checkpoint/model.safetensors"} <= set(names)
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.11"} <= set(metadata.get_all("Classifier", []))
    assert all("https://" in url for url in metadata.get_all("Project-URL", [])) and metadata.get_all("Project-URL")
    assert re.findall(r"^([\w-]+) = idefics_cli.__main__:main$", scripts, re.MULTILINE) == ["idefics", "idefics-cli"]


def test_the_source_distribution_holds_docs_and_tests(built: Path) -> None:
    """All that git knows: who has the archive can run the tests and build the image."""
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames()}
    if not (ROOT / ".git").exists():
        pytest.skip("no git here to say which files there are")
    known = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"]).splitlines()
    assert {"README.md", "docs/python.md", "tests/test_packaging.py", "LICENSE"} <= held
    assert {name for name in known if (ROOT / name).exists()} <= held


def test_the_wheel_runs_the_demo_in_an_environment_of_its_own(built: Path, tmp_path: Path) -> None:
    """By the script of the package's name, as `uvx` and `pipx run` do; only what it depends on is lent to it."""
    (path,) = built.glob("*.whl")
    builder = venv.EnvBuilder(with_pip=False)
    builder.create(tmp_path / "env")
    python = tmp_path / "env/bin/python"
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "-q",
            "--no-compile",
            "--no-deps",
            "--no-index",
            str(path),
        ]
    )
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    found = run([str(python), "-c", "import idefics_cli; print(idefics_cli.__file__)"], tmp_path)
    assert Path(found.strip()).is_relative_to(tmp_path / "env")
    said = run([str(python.with_name("idefics-cli")), "caption", str(IMAGE), "--model", "demo"], tmp_path)
    assert json.loads(said)["caption"] == "a large purple cross"


def test_uvx_finds_its_script_by_the_package_s_name(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an index that is a folder; what it depends on is lent to it again."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    names = [re.match(r"[\w-]+", dependency)[0] for dependency in PROJECT["dependencies"]]
    (tmp_path / "none.txt").write_text("".join(f"{name}; sys_platform == 'none'\n" for name in names))
    index = ["--offline", "--no-index", "--find-links", str(built), "--overrides", str(tmp_path / "none.txt")]
    command = ["tool", "run", *index, "--python", sys.executable, "idefics-cli", "--version"]
    said = run([sys.executable, "-m", "uv", *command], PYTHONPATH=sysconfig.get_path("purelib"))
    assert said.strip() == f"idefics {idefics_cli.__version__}"


def test_every_extra_is_in_the_readme() -> None:
    table = re.findall(r"^\| `([a-z]+)` \| ", (ROOT / "docs/install.md").read_text(), re.MULTILINE)
    assert set(PROJECT["optional-dependencies"]) <= set(table)


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0].split()[0] in ("Unreleased", idefics_cli.__version__)


def test_the_citation_is_whole() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == idefics_cli.__version__ and citation["license"] == PROJECT["license"]
    assert all({"name"} <= set(author) or {"family-names"} <= set(author) for author in citation["authors"])


def test_the_image_is_made_of_what_is_there() -> None:
    """Pinned bases, files that exist and are not left out of what docker sees, another user than root, our script."""
    bases = re.findall(r"BASE=(\S+)", DOCKERFILE)
    assert len(bases) == 2 and all(re.search(r":\d+\.\d+\.\d+-", base) for base in bases)
    copied = [
        name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()
    ]
    seen = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied) == sorted(seen) and all((ROOT / name).exists() for name in copied)
    instructions = dict(re.findall(r"^([A-Z]+) (.+)$", DOCKERFILE, re.MULTILINE))  # of several, the last
    assert int(instructions["USER"]) > 0 and json.loads(instructions["ENTRYPOINT"])[0] in PROJECT["scripts"]
    extras = re.findall(r"EXTRAS=(\S+)", DOCKERFILE)[0].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])


def test_the_dockerfile_passes_its_linter() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("no hadolint for this platform")
    run([linter, str(ROOT / "Dockerfile")])


@pytest.mark.slow
def test_the_tested_versions_can_be_installed_together() -> None:
    """With torch's default build, for CUDA: only that names the version of Triton that it goes with."""
    platform = ["--python-platform", "linux", "--python-version", "3.12"]
    constrained = ["-c", "constraints.txt", "--all-extras", "pyproject.toml"]
    run([sys.executable, "-m", "uv", "pip", "compile", "--quiet", *platform, *constrained])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_image_is_built_and_runs() -> None:
    """`BUILD_OPTIONS` are more options of the build: another base, say, where docker's is not reached."""
    builder = next((name for name in ("docker", "podman", "buildah") if answers(name)), None)
    if builder is None:
        pytest.skip("neither docker nor podman nor buildah answers here")
    run([builder, "build", "-t", "idefics-test", *shlex.split(os.environ.get("BUILD_OPTIONS", "")), "."])
    image, command = ["--rm", "idefics-test"], ["caption", IMAGE.name, "--model", "demo"]
    if builder == "buildah":  # it runs containers alone, and without the entry point
        image, command = [run([builder, "from", "idefics-test"]).strip()], ["idefics", *command]
    said = run([builder, "run", "-v", f"{IMAGE.parent}:/work:ro", *image, *command])
    if builder == "buildah":
        run([builder, "rm", *image])
    assert json.loads(said)["caption"] == "a large purple cross"


def answers(builder: str) -> bool:
    command = shutil.which(builder)
    return command is not None and not subprocess.run([command, "info"], capture_output=True, check=False).returncode
