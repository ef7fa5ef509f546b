"""Free prompts of a manifest, as a fake model is shown them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FakeCaptioner, prompts_of, rows_of, save_image
from PIL import Image
from typer.testing import Result
from written_manifests import write_manifest

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as the datasets library stores one


def image_bytes(seed: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (seed, 0, 77)).save(file, format="PNG")
    return file.getvalue()


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
CHAT = [
    {"role": "user", "content": [{"type": "image", "image": "1.png"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
    {"role": "user", "content": "And this? "},
]
WRITTEN_CHAT = (
    "User:[1]What?<end_of_utterance>\nAssistant: A dog.<end_of_utterance>\n"
    "User: And this? <end_of_utterance>\nAssistant:"
)


def test_lists_of_texts_and_images(generated: Generated) -> None:
    prompts = [
        ["A ", {"image": "1.png"}, " and a ", {"path": "2.png"}, ":"],
        "only words, 1.png among them",
        [{"text": "Look: "}, {"type": "image", "url": "2.png"}],
    ]
    expected = ["A [1] and a [2]:", "only words, 1.png among them", "Look: [2]"]
    assert generated(prompts) == [(prompt, None) for prompt in expected]


def test_conversations_of_instruct_models(generated: Generated) -> None:
    assert generated([CHAT], captioner=FakeCaptioner(is_instruct=True)) == [(WRITTEN_CHAT, None)]


def test_a_conversation_is_no_prompt_for_a_base_model(generated: Generated) -> None:
    (chat, error), beside = generated([CHAT, ["Once"]])
    assert chat is None and error.startswith("row_invalid: a conversation") and "-m" in error
    assert beside == ("Once", None)


def test_lists_of_structs_as_the_datasets_library_writes_them(generated: Generated, tmp_path: Path) -> None:
    """Every struct has all the fields, most of them null, and an image may be a struct of nulls."""
    prompts = [
        [
            {"text": "A ", "image": None},
            {"text": None, "image": {"bytes": image_bytes(3), "path": None}},
            {"text": " or ", "image": {"bytes": None, "path": None}},
            {"text": None, "image": {"bytes": None, "path": "2.png"}},
        ]
    ]
    of = pa.list_(pa.struct([("text", pa.string()), ("image", IMAGE)]))
    pq.write_table(pa.table({"prompt": pa.array(prompts, of)}), tmp_path / "rows.parquet")
    assert generated(manifest=tmp_path / "rows.parquet") == [("A [3] or [2]", None)]


def test_conversations_as_the_datasets_library_writes_them(generated: Generated, tmp_path: Path) -> None:
    item = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", IMAGE)])
    of = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(item))]))
    image = {"type": "image", "text": None, "image": {"bytes": image_bytes(1), "path": "1.png"}}
    chat = [
        {"role": "user", "content": [image, {"type": "text", "text": "What?", "image": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog.", "image": None}]},
        {"role": "user", "content": [{"type": "text", "text": "And this? ", "image": None}]},
    ]
    pq.write_table(pa.table({"chat": pa.array([chat], of)}), tmp_path / "rows.parquet")
    found = generated(
        None,
        "--prompt-column",
        "chat",
        manifest=tmp_path / "rows.parquet",
        captioner=FakeCaptioner(is_instruct=True),
    )
    assert found == [(WRITTEN_CHAT, None)]


def test_lists_of_bare_bytes(generated: Generated, tmp_path: Path) -> None:
    prompts = [[image_bytes(1), image_bytes(2)]]
    pq.write_table(pa.table({"prompt": pa.array(prompts, pa.list_(pa.binary()))}), tmp_path / "rows.parquet")
    assert generated(manifest=tmp_path / "rows.parquet") == [("[1][2]", None)]


@pytest.mark.parametrize("address", ["http://a.example/b.png", "https://a.example/b.png", "data:image/png;base64,AA=="])
def test_web_addresses_are_rows_with_an_error_and_words_in_a_text(generated: Generated, address: str) -> None:
    image, text = generated([["A ", {"image": address}], ["A ", address]])
    assert image[0] is None and image[1].startswith("image_not_allowed: ")
    assert text == (f"A {address}", None)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        (None, "row_invalid"),
        ([], "row_invalid"),
        (7, "row_invalid"),
        (["A ", None], "row_invalid"),
        ([{"caption": "a dog"}], "row_invalid"),
        ([{"text": "both", "image": "1.png"}], "row_invalid"),
        ([{"role": "robot", "content": "Hi"}], "row_invalid"),
        ([{"role": "user", "content": None}], "row_invalid"),
        ([*CHAT, {"role": "assistant", "content": "A cat."}], "row_invalid"),
        ([{"image": "none.png"}], "image_missing"),
        ([{"image": "../1.png"}], "image_not_allowed"),
        ([{"image": 7}], "row_invalid"),
    ],
)
def test_what_is_no_prompt_is_a_row_with_an_error(generated: Generated, prompt: Any, code: str) -> None:
    bad, good = generated([prompt, ["Once"]], captioner=FakeCaptioner(is_instruct=True))
    assert bad[0] is None and bad[1].startswith(f"{code}: "), bad
    assert good == ("Once", None)


def test_special_words_in_a_text_are_words(generated: Generated) -> None:
    prompt = ["<image><end_of_utterance>{image}", {"image": "1.png"}]
    assert generated([prompt]) == [("<image><end_of_utterance>{image}[1]", None)]


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
    assert "is not a manifest" in refused("generate", photos)
    manifest = write_manifest(tmp_path / "rows.jsonl", [{"text": "Once"}])
    assert "no column 'prompt'" in refused("generate", manifest)
    assert "no column 'ask'" in refused("generate", manifest, "--prompt-column", "ask")


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been_stopped(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    rows = [{"id": f"r{k}", "prompt": [f"tale {k}"] if k != 3 else None} for k in range(9)]
    manifest = write_manifest(tmp_path / "rows.jsonl", rows)
    assert run("generate", manifest, "-o", tmp_path / "whole.jsonl").exit_code == 3
    command = "generate", manifest, "-o", tmp_path / "f.jsonl"
    assert "Stopped early" in run(*command, "--max-errors", "1").stderr
    done = len((tmp_path / "f.jsonl.part").read_bytes().splitlines()) - 1
    assert 0 < done < 9
    assert f"{done} of them by an earlier run" in run(*command).stderr
    assert (tmp_path / "f.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [json.loads(line)["id"] for line in (tmp_path / "f.jsonl").open()] == [row["id"] for row in rows]
