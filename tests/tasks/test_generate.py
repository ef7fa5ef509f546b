"""Free prompts of a manifest, as a fake model is shown them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FakeCaptioner, prompts_of, rows_of, save_image
from typer.testing import Result
from written_manifests import write_manifest


@pytest.fixture
def generated(run: Callable[..., Result], tmp_path: Path) -> Callable[..., list[tuple[str | None, str | None]]]:
    """`generated(prompts)`: for each row of `rows.jsonl` with these prompts what was asked, and the error."""
    for seed in (1, 2):
        save_image(tmp_path / f"{seed}.png", seed)

    def invoke(
        prompts: list[Any] | None = None,
        *options: str,
        manifest: Path | None = None,
        captioner: FakeCaptioner | None = None,
    ) -> list[tuple[str | None, str | None]]:
        captioner = captioner or FakeCaptioner()
        rows = [{"prompt": prompt} for prompt in prompts or []]
        manifest = manifest or write_manifest(tmp_path / "rows.jsonl", rows)
        result = run("generate", manifest, *options, captioner=captioner)
        found = rows_of(result.stdout)
        assert result.exit_code == (3 if any(row["error"] for row in found) else 0), result.output
        return list(zip(prompts_of(captioner, found), [row["error"] for row in found], strict=True))

    return invoke


Generated = Callable[..., list[tuple[str | None, str | None]]]


def test_lists_of_texts_and_images(generated: Generated) -> None:
    prompts = [
        ["A ", {"image": "1.png"}, " and a ", {"path": "2.png"}, ":"],
        "only words, 1.png among them",
        [{"text": "Look: "}, {"type": "image", "url": "2.png"}],
    ]
    expected = ["A [1] and a [2]:", "only words, 1.png among them", "Look: [2]"]
    assert generated(prompts) == [(prompt, None) for prompt in expected]


def test_conversations_are_for_instruct_models(generated: Generated) -> None:
    chat = [
        {"role": "user", "content": [{"type": "image", "image": "1.png"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "And this? "},
    ]
    asked = "User:[1]What?<end_of_utterance>\nAssistant: A dog.<end_of_utterance>\n"
    asked += "User: And this? <end_of_utterance>\nAssistant:"
    assert generated([chat], captioner=FakeCaptioner(is_instruct=True)) == [(asked, None)]
    (of_base, error), beside = generated([chat, ["Once"]])
    assert of_base is None and error.startswith("row_invalid: a conversation") and "idefics-9b-instruct" in error
    assert beside == ("Once", None)


def test_lists_of_structs_as_the_datasets_library_writes_them(generated: Generated, tmp_path: Path) -> None:
    """Every struct has all the fields, most of them null, and an image may be a struct of nulls."""
    data = save_image(tmp_path / "3.png", 3).read_bytes()
    prompt = [
        {"text": "A ", "image": None},
        {"text": None, "image": {"bytes": data, "path": None}},
        {"text": " or ", "image": {"bytes": None, "path": None}},
        {"text": None, "image": {"bytes": None, "path": "2.png"}},
    ]
    pq.write_table(pa.table({"prompt": [prompt]}), tmp_path / "rows.parquet")
    assert generated(manifest=tmp_path / "rows.parquet") == [("A [3] or [2]", None)]


def test_what_cannot_be_shown_is_a_row_with_an_error(generated: Generated) -> None:
    """What is not a prompt at all is tested where prompts are read."""
    address = "https://a.example/b.png"
    codes = ["row_invalid", "image_missing", "image_not_allowed", "image_not_allowed"]
    found = generated([None, [{"image": "none.png"}], [{"image": "../1.png"}], [{"image": address}], ["A ", address]])
    assert [error.split(":")[0] for _, error in found[:4]] == codes
    assert found[4] == (f"A {address}", None)


def test_images_stand_in_their_own_manifests_folder(run: Callable[..., Result], tmp_path: Path) -> None:
    manifests = []
    for seed in (1, 2):
        save_image(tmp_path / str(seed) / "a.png", seed)
        rows = [{"id": f"{seed}", "prompt": [{"image": "a.png"}, "!"]}]
        manifests.append(write_manifest(tmp_path / str(seed) / "rows.jsonl", rows))
    captioner = FakeCaptioner()
    rows = rows_of(run("generate", *manifests, captioner=captioner).stdout)
    assert prompts_of(captioner, rows) == ["[1]!", "[2]!"]


def test_rows_of_a_result(run: Callable[..., Result], tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "rows.jsonl", [{"id": "a", "prompt": ["Once"], "of": "tales"}])
    captioner = FakeCaptioner(answer=lambda text: " upon a time.\nThe end User: no")
    (row,) = rows_of(run("generate", manifest, "--keep", "of", captioner=captioner).stdout)
    assert list(row) == ["id", "image", "text", "score", "tokens", "error", "of"]
    assert (row["text"], row["image"], row["of"]) == ("upon a time.\nThe end User: no", None, "tales")
    assert captioner.decoding["max_new_tokens"] == 100 and not captioner.decoding.get("banned_words")
    framed = "--stop-words", "User", "--prefix", "Once ", "--suffix", "!"
    assert rows_of(run("generate", manifest, *framed, captioner=captioner).stdout)[0]["text"] == (
        "Once upon a time.\nThe end!"
    )


def test_inputs_without_prompts_are_refused(refused: Callable[..., str], photos: Path, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "rows.jsonl", [{"text": "Once"}])
    assert "is not a manifest" in refused("generate", photos)
    assert "no column 'ask'" in refused("generate", manifest, "--prompt-column", "ask")
