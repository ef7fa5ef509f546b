"""`--dry-run`: what it shows, that it loads and writes nothing, and that it refuses what the run would refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import save_image
from typer.testing import CliRunner, Result
from written_manifests import write_manifest

from idefics_cli.cli import app as cli
from idefics_cli.storage.unit_folder import UnitFolder


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **named: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(cli, "load_model", never)
    monkeypatch.setattr("idefics_cli.loaded_model.load_network", never)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rows = [{"name": f"r{seed}", "photo": f"{seed}.png", "question": f"Q{seed}?", "kind": "a"} for seed in range(3)]
    for seed in range(3):
        save_image(tmp_path / f"{seed}.png", seed)
    return write_manifest(tmp_path / "rows.jsonl", rows)


def dry_run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [*map(str, arguments), "-m", "demo", "--device", "cpu", "--dry-run"])


def facts_of(result: Result) -> dict[str, str]:
    assert result.exit_code == 0 and not result.stderr, result.output
    return dict(line.split(": ", 1) for line in result.stdout.splitlines())


def test_all_that_a_run_needs_is_shown(manifest: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    columns = "--id-column", "name", "--keep", "kind", "--dtype", "fp32"
    facts = facts_of(dry_run("vqa", manifest, *columns, "-o", tmp_path / "out.jsonl"))
    assert facts["rows"] == "3" and facts["output"] == f"{tmp_path / 'out.jsonl'}, new"
    chosen = {name: fact for name, fact in facts.items() if name.startswith("column")}
    assert chosen == {
        "column of images": "'photo'",
        "column of ids": "'name'",
        "column of prompts": "'question'",
        "column of kept": "'kind'",
    }
    assert "Q0?" in facts["first prompt"] and facts["first prompt"].endswith(" tokens)")
    assert facts["disk"].endswith("MB free") and "rows at a time" in facts["memory plan in fp32"]
    assert [name for name in facts if name.startswith("memory plan")] == ["memory plan in fp32"]
    assert "11.9 MB in fp32" in facts["model"]
    assert sorted(tmp_path.iterdir()) == before


def test_rows_of_a_folder_and_of_many_questions(tmp_path: Path) -> None:
    for seed in range(3):
        save_image(tmp_path / f"{seed}.png", seed)
    assert facts_of(dry_run("vqa", tmp_path, "-q", "A?", "-q", "B?", "--limit", "2"))["rows"] == "4"
    latents = facts_of(dry_run("embed", tmp_path, "-o", tmp_path / "e.parquet"))
    assert "first prompt" not in latents and "disk" in latents


def test_a_folder_of_parts_is_looked_into(tmp_path: Path) -> None:
    for seed in range(3):
        save_image(tmp_path / f"{seed}.png", seed)
    command = "caption", tmp_path, "-o", f"{tmp_path / 'parts'}/"
    assert facts_of(dry_run(*command))["output"] == f"{tmp_path}/parts/, new" and not (tmp_path / "parts").exists()
    folder = UnitFolder(f"{tmp_path}/parts/")
    folder.make()
    folder.begin({"format": "jsonl"}, iter([(0,), (1,), (2,), (3,)]))
    (tmp_path / "parts" / folder.part_name(1)).write_text("")
    said = f"{tmp_path}/parts/, where 1 of 3 parts are: the same command makes the others"
    assert facts_of(dry_run(*command))["output"] == said
    for number in 0, 2:
        (tmp_path / "parts" / folder.part_name(number)).write_text("")
    said = f"{tmp_path}/parts/, which is there: it is compared, and not replaced"
    assert facts_of(dry_run(*command))["output"] == said
    said = f"{tmp_path}/parts/, which is there: --overwrite replaces it"
    assert facts_of(dry_run(*command, "--overwrite"))["output"] == said
    assert facts_of(dry_run("caption", tmp_path, "-o", f"{tmp_path}/new/", "--overwrite"))["output"].endswith(", new")


def test_similar_shots_are_not_known_without_weights(manifest: Path, tmp_path: Path) -> None:
    shots = write_manifest(tmp_path / "shots.jsonl", [{"photo": "1.png", "question": "Q?", "answer": "red"}])
    facts = facts_of(dry_run("vqa", manifest, "--shots", shots, "--shot-selection", "similar", "--num-shots", "1"))
    assert facts["first prompt"].startswith("known to the model alone")


def test_mistakes_are_those_of_the_run(manifest: Path, tmp_path: Path) -> None:
    for arguments, said in [
        (("vqa", tmp_path / "none.jsonl"), "No such file"),
        (("vqa", manifest, "--keep", "colour"), "no column 'colour'"),
        (("vqa", manifest, "--retry-errors"), "--retry-errors needs the finished output"),
        (("vqa", manifest, "-m", tmp_path / "nothing"), "no model"),
    ]:
        result = CliRunner().invoke(cli.app, [*map(str, arguments), "--dry-run"])
        assert result.exit_code == 2 and said in result.stderr and not result.stdout
