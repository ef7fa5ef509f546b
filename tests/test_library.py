"""What callers of the library get, with the demo model: one or many, iterators, options, twins, runs."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from idefics_cli import Idefics, IdeficsError, Result, RowError, Shot, idefics
from idefics_cli.cli.app import app
from idefics_cli.demo.scene import scene
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.pipeline.options import RunOptions
from idefics_cli.pipeline.prefetch import FlowOptions
from idefics_cli.prompts.choices import ChoiceOptions
from idefics_cli.prompts.postprocess import PostProcess
from idefics_cli.prompts.templates import PromptOptions
from idefics_cli.rows import ImageOptions
from idefics_cli.tasks.options import CaptionVqaOptions, GenerateOptions, ShotOptions
from idefics_cli.validation import keywords_of

FOLDER = Path(__file__).parent.parent / "examples" / "images"
IMAGES = sorted(FOLDER.glob("*.png"))[:4]
CAPTIONS = [scene(int(path.stem.removeprefix("scene-"))).caption for path in IMAGES]
HOW_MANY = "How many objects are there?"
COUNTS = [str(len(scene(int(path.stem.removeprefix("scene-"))).objects)) for path in IMAGES]


@pytest.fixture(scope="module")
def model() -> Iterator[Idefics]:
    with Idefics.from_pretrained("demo", batch_size=2) as loaded:
        yield loaded


def texts(results: Any) -> list[str | None]:
    return [result.text for result in results]


# One and many


@pytest.mark.parametrize("kind", [str, Path, Path.read_bytes, Image.open, lambda path: {"image": str(path)}])
def test_one_in_one_out_and_many_in_a_list_out(model: Idefics, kind: Callable[[Path], Any]) -> None:
    one, (first, second) = model.caption(kind(IMAGES[0])), model.caption([kind(path) for path in IMAGES[:2]])
    assert isinstance(one, Result) and one == first and [one.text, second.text] == CAPTIONS[:2]
    assert (one.index, first.index, second.index) == (0, 0, 1) and model.caption([]) == []


def test_results_know_what_they_are_of(model: Idefics) -> None:
    good, bad = model.answer([(IMAGES[0], HOW_MANY), ("gone.png", HOW_MANY)])
    assert good.ok and good.input == (IMAGES[0], HOW_MANY) and good.raise_for_error() is good
    assert not bad.ok and bad.input == ("gone.png", HOW_MANY) and bad.index == 1
    with pytest.raises(IdeficsError, match=r"input 1: image_missing: .*gone\.png"):
        bad.raise_for_error()
    assert good == Result.of(good.candidates) and "input" not in repr(good)


def test_a_question_may_be_asked_about_one_image_or_each(model: Idefics) -> None:
    assert model.answer(IMAGES[0], HOW_MANY).text == COUNTS[0]
    assert model.answer({"image": IMAGES[0], "question": HOW_MANY}).text == COUNTS[0]
    asked = [{"image": IMAGES[0], "question": HOW_MANY}, (IMAGES[1], HOW_MANY)]
    assert texts(model.answer(IMAGES[:2], HOW_MANY)) == texts(model.answer(asked)) == COUNTS[:2]


def test_a_prompt_is_one_and_a_list_of_prompts_many(model: Idefics) -> None:
    prompt = ["Image:", IMAGES[0], "Caption:"]
    one = model.generate(prompt)
    assert one.text is not None and one.text.startswith(CAPTIONS[0].split()[0]) and model.generate([prompt]) == [one]
    assert model.generate(["Image:", {"image": str(IMAGES[0])}, "Caption:"]) == one
    assert isinstance(model.generate("Image:", max_new_tokens=2), Result) and model.generate([]) == []
    with pytest.raises(IdeficsError, match=r"one prompt or several: write \[\[text\], \[text\]\]"):
        model.generate(["one", "two"])
    question = ["Image:", IMAGES[0], f"Question: {HOW_MANY} Answer:"]
    scored = model.score(question, ["1", "2", "3"])
    assert scored.text == COUNTS[0] and model.score([question], ["1", "2", "3"]) == [scored]
    assert model.score([(question, ["1", "2", "3"])]) == [scored]


def test_latents_of_one_and_of_many(model: Idefics) -> None:
    one, many = model.embed(IMAGES[0]), model.embed(iter(IMAGES[:2]))
    assert one.shape == model.latents_shape and torch.equal(one, many[0]) and len(many) == 2
    assert model.caption(one).text == CAPTIONS[0] and texts(model.caption(many)) == CAPTIONS[:2]
    pixels = model.prepare_image(IMAGES[0])
    assert isinstance(pixels, torch.Tensor) and model.caption(pixels).text == CAPTIONS[0]


def test_no_web_address_is_fetched_and_data_addresses_are_decoded(model: Idefics) -> None:
    import base64

    assert model.caption("https://example.com/a.png").error == RowError(
        "image_not_allowed",
        "'https://example.com/a.png' is a web address: download it first, for example with img2dataset",
    )
    address = f"data:image/png;base64,{base64.b64encode(IMAGES[0].read_bytes()).decode()}"
    assert model.caption(address).text == CAPTIONS[0]
    assert model.caption({"bytes": IMAGES[0].read_bytes(), "path": "a.png"}).text == CAPTIONS[0]


# Iterators


def test_iterators_are_lazy_ordered_and_bounded(model: Idefics) -> None:
    """An endless iterable; some of it are errors."""
    read: list[int] = []

    def endless() -> Iterator[Path]:
        while True:
            read.append(len(read))
            yield Path("gone.png") if len(read) % 3 == 0 else IMAGES[len(read) % 4 - 1]

    results = model.caption_iter(endless(), workers=2)
    found = [next(results) for _ in range(9)]
    results.close()
    assert [result.index for result in found] == list(range(9))
    assert [result.text for result in found] == [None if i % 3 == 2 else CAPTIONS[i % 4] for i in range(9)]
    assert len(read) <= 9 + 2 * FlowOptions(model.batch_size, 2).window


def test_iterators_may_feed_each_other(model: Idefics) -> None:
    asked = ((result.input, HOW_MANY) for result in model.caption_iter(IMAGES))
    for result in model.answer_iter(asked):
        assert result.text == COUNTS[result.index]
        assert model.caption(result.input[0]).text == CAPTIONS[result.index]  # while the stream is under way


def test_options_are_looked_at_before_the_first_result_is_taken(model: Idefics) -> None:
    with pytest.raises(IdeficsError, match=r"unknown option nun_beams: use num_beams$"):
        model.caption_iter(IMAGES, nun_beams=2)  # type: ignore[call-arg]
    with pytest.raises(IdeficsError, match=r"caption's images must be a list.*write \[image\]"):
        model.caption_iter("cat.jpg")


def test_what_the_iterable_raises_comes_after_the_results_before_it(model: Idefics) -> None:
    def broken() -> Iterator[Path]:
        yield from IMAGES[:3]
        raise ZeroDivisionError

    results = model.caption_iter(broken())
    assert texts([next(results), next(results), next(results)]) == CAPTIONS[:3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_progress_is_shown_only_where_it_is_asked_for(model: Idefics, capfd: pytest.CaptureFixture[str]) -> None:
    assert texts(model.generate_iter([["Image:"]], max_new_tokens=1)) and capfd.readouterr() == ("", "")
    counted: list[Result] = []
    watch = lambda results: (counted.append(result) or result for result in results)  # noqa: E731
    assert list(model.caption_iter(IMAGES[:2], progress=watch)) == counted
    assert texts(model.caption_iter(IMAGES[:2], progress=True)) == CAPTIONS[:2]
    out, err = capfd.readouterr()
    assert not out and "2/2" in err


def test_many_images_are_decoded_in_worker_processes_and_one_is_not(
    model: Idefics, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    prepare = type(model.images).prepare
    monkeypatch.setattr(
        type(model.images),
        "prepare",
        lambda self, source, options: opened.append(source) or prepare(self, source, options),
    )
    model.caption(IMAGES[0])
    assert len(opened) == 1
    model.caption(IMAGES)
    assert len(opened) == 1
    pools = list(model._pools.values())
    model.caption(IMAGES)
    assert list(model._pools.values()) == pools


# Options


def test_shots_may_be_examples_or_a_file(model: Idefics, tmp_path: Path) -> None:
    shots = [Shot(IMAGES[1], HOW_MANY, COUNTS[1]), Shot(str(IMAGES[2]), HOW_MANY, COUNTS[2])]
    file = tmp_path / "shots.jsonl"
    rows = [{"image": str(shot.image), "question": shot.question, "answer": shot.answer} for shot in shots]
    for row in rows:
        (tmp_path / Path(row["image"]).name).write_bytes(Path(row["image"]).read_bytes())
        row["image"] = Path(row["image"]).name
    file.write_text("".join(map("{}\n".format, map(json.dumps, rows))), encoding="utf-8")
    asked = (IMAGES[0], HOW_MANY)
    given = model.render_prompt("vqa", asked, shots=shots)
    assert given == model.render_prompt("vqa", asked, shots=file, num_shots=2)
    assert given.count("<image>") == 3 and given.count(HOW_MANY) == 3 and f"Answer: {COUNTS[2]}\n" in given
    assert model.render_prompt("vqa", asked, shots=shots, num_shots=1).count("<image>") == 2
    with pytest.raises(IdeficsError, match=r"nothing can be asked \(image_missing"):
        model.render_prompt("caption", "gone.png")
    for options in {}, {"num_shots": 1}, {"shot_selection": "similar"}, {"shot_selection": "random"}:
        assert model.answer(*asked, shots=shots, **options).text == COUNTS[0]
    captioned = [Shot(image=IMAGES[1], answer=CAPTIONS[1])]
    assert CAPTIONS[1] in model.render_prompt("caption", IMAGES[0], shots=captioned)


@pytest.mark.parametrize(
    ("shots", "said"),
    [
        ([("a.png", "b", "c")], "shot 1 is of type tuple: write Shot"),
        ([Shot(IMAGES[0], HOW_MANY, "1"), Shot(IMAGES[0], HOW_MANY)], "shot 2 has no answer"),
        ([Shot(IMAGES[0], answer="1")], "shot 1 has no text in the column 'question'"),
        ([Shot("gone.png", HOW_MANY, "1")], "an image in the list of shots cannot be used as a shot .image_missing"),
    ],
)
def test_bad_shots_are_told(model: Idefics, shots: list[Any], said: str) -> None:
    with pytest.raises(IdeficsError, match=said):
        model.answer(IMAGES[0], HOW_MANY, shots=shots)


def test_everything_else_that_is_asked(model: Idefics) -> None:
    row = {"image": [IMAGES[0], IMAGES[1]], "title": "Two {scenes}", "question": HOW_MANY, "choices": ["1", "2"]}
    told = {"prompt": "{title}: {image}and{image} {question}", "bare": True}
    marks = "<fake_token_around_image><image><fake_token_around_image>"
    assert model.render_prompt("vqa", row, **told) == f"<s>Two {{scenes}}: {marks}and{marks} {HOW_MANY}"
    assert {each.text for each in model.answer(row, **told, choices_column="choices").candidates} == {"1", "2"}
    assert model.answer(IMAGES[0], HOW_MANY, choices=["7", COUNTS[0]]).text == COUNTS[0]
    words = CAPTIONS[0].split()
    assert model.caption(IMAGES[0], stop_words=[words[1]], prefix="<", suffix=">").text == f"<{words[0]}>"
    assert "otherwise say unanswerable" in model.render_prompt("vqa", (IMAGES[0], "a?"), template="vizwiz")
    drawn = [model.caption(IMAGES[0], do_sample=True, temperature=3.0, seed=seed, top_k=0).text for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert "hello" in model.render_prompt("generate", ["hello", IMAGES[0]])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shot_selection": "nearest"}, "invalid shot_selection 'nearest': expected 'first', 'random', 'similar'"),
        ({"prompt": 3}, "invalid prompt 3: expected text"),
        ({"workers": 0}, "invalid workers 0: expected at least 1"),
        ({"stop_words": [1]}, "invalid stop_words"),
        ({"template": "vizwis"}, "unknown template 'vizwis'"),
        ({"bare": "yes"}, "invalid bare 'yes': expected True or False"),
        ({"max_pixels": 10**13}, "invalid max_pixels .* at most 10000000"),
        ({"max_pixels": 1e8}, "invalid max_pixels 100000000.0: expected a whole number"),
        ({"workers": 1.5}, "invalid workers 1.5: expected a whole number or None"),
        ({"decode_timeout": True}, "invalid decode_timeout True: expected a number"),
        ({"choices": np.array(["a", "b"])}, r"invalid choices array.*: expected a list of text"),
        ({"choices": np.array([])}, r"invalid choices array.*: expected a list of text"),
        ({"early_stopping": np.array([1, 2])}, r"invalid early_stopping array.*: expected True or False or 'never'"),
    ],
)
def test_options_of_another_kind_are_told(model: Idefics, options: dict[str, Any], said: str) -> None:
    with pytest.raises(IdeficsError, match=said):
        model.caption(IMAGES[0], **options)


def keys(options: type) -> dict[str, set[str]]:
    """How a TypedDict or a dataclass has them: by name, the types."""
    hints = get_type_hints(options)
    return {name: set(get_args(hint)) or {hint} for name, hint in hints.items()}


def test_typed_keywords_are_those_of_the_dataclasses() -> None:
    """The dataclasses are what is checked and what the command line shows; the TypedDicts are what an editor knows."""
    assert list(idefics.Decoding.__annotations__) == list(DecodingOptions.__dataclass_fields__)
    assert keys(idefics.Decoding) == keys(DecodingOptions)
    images = idefics.Images.__annotations__
    assert images.keys() == keywords_of(ImageOptions).keys()
    asking = {**keywords_of(CaptionVqaOptions), **keywords_of(ImageOptions)}
    of_files = {"question", "question_column", "embeddings"}
    assert idefics.Asking.__annotations__.keys() == asking.keys() - of_files
    continuing = [*keywords_of(DecodingOptions), *images, *keywords_of(PostProcess)]
    assert idefics.Continuing.__annotations__.keys() == set(continuing)
    running = {**asking, **keywords_of(GenerateOptions), **keywords_of(RunOptions)}
    assert idefics.Running.__annotations__.keys() == running.keys() - idefics.NOT_OF_RUNS - {"inputs", "output"}
    for options in PromptOptions, ShotOptions, ChoiceOptions:
        assert keywords_of(options).keys() <= idefics.Asking.__annotations__.keys()


# Chats


def test_chat_messages_are_written_as_the_instruct_models_know_them(tmp_path: Path) -> None:
    from tiny_models import save_checkpoint

    model = Idefics.from_pretrained(save_checkpoint(tmp_path, instruct=True))
    question = {"type": "text", "text": "What is this?"}
    forms = [
        {"type": "image", "image": Image.open(IMAGES[0])},
        {"type": "image", "image": IMAGES[0]},
        {"type": "image_url", "image_url": {"url": str(IMAGES[0])}},
        Image.open(IMAGES[0]),
    ]
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [form, question]}] for form in forms
    ]
    marks = "<fake_token_around_image><image><fake_token_around_image>"
    expected = f"<s>Be brief.\nUser:{marks}What is this?<end_of_utterance>\nAssistant:"
    assert {model.render_prompt("generate", chat) for chat in chats} == {expected}
    one = model.generate(chats[0], max_new_tokens=3)
    assert isinstance(one, Result) and one.ok
    assert [each.token_ids for each in model.generate(chats, max_new_tokens=3)] == [one.token_ids] * 4
    wrong = model.generate([{"role": "assistant", "content": "Hello."}])
    assert wrong.error is not None and "the last one must be the user's" in str(wrong.error)


# Twins, threads and the model itself


def test_twins_for_asyncio(model: Idefics) -> None:
    async def ask() -> list[Any]:
        results = await asyncio.gather(
            model.acaption(IMAGES[0]),
            model.acaption(IMAGES),
            model.aanswer(IMAGES[0], HOW_MANY),
            model.aembed(IMAGES[0]),
        )
        return [*results, [result async for result in model.acaption_iter(IMAGES)]]

    one, many, answer, latents, streamed = asyncio.run(ask())
    assert texts([one, answer]) == [CAPTIONS[0], COUNTS[0]] and texts(many) == texts(streamed) == CAPTIONS
    assert torch.equal(latents, model.embed(IMAGES[0]))


def test_threads_take_turns(model: Idefics) -> None:
    expected = model.caption(IMAGES), model.answer([(path, HOW_MANY) for path in IMAGES])
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        model.engine.clear_caches()
        asked = model.answer([(path, HOW_MANY) for path in IMAGES]) if number % 2 else model.caption(IMAGES)
        found[number] = texts(asked)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: texts(expected[number % 2]) for number in range(6)}


def test_results_that_are_taken_once_the_model_is_closed() -> None:
    with Idefics.from_pretrained("demo") as closed:
        results = closed.caption_iter(IMAGES * 100, num_beams=1)
        assert next(results).ok
    with pytest.raises(IdeficsError, match="this model has been closed: load it again"):
        list(results)


def test_a_model_says_what_it_is_and_can_be_closed() -> None:
    with Idefics.from_pretrained("demo", batch_size=3) as model:
        shown = "Idefics('demo', device=cpu, dtype=float32, parameters=2,964,872, batch_size=3)"
        assert repr(model) == shown and model.caption(IMAGES[:2])[0].ok
        (pool,) = model._pools.values()
        workers = [worker.process for worker in pool._running]
    assert workers and all(process.poll() is not None for process in workers)
    assert repr(model) == "Idefics(closed)"
    model.close()
    for use in (lambda: model.caption(IMAGES[0]), lambda: model.generate("a"), lambda: model.model):
        with pytest.raises(IdeficsError, match="this model has been closed: load it again"):
            use()


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_model_is_not_pickled(model: Idefics, copied: Callable[[Any], Any]) -> None:
    with pytest.raises(IdeficsError, match="load it in each process with Idefics"):
        copied(model)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (
            lambda shape: torch.zeros(shape, dtype=torch.uint8),
            "an image tensor of torch.uint8 is not one of normalised",
        ),
        (lambda shape: torch.full(shape, 255.0), "an image tensor with values up to 255 is not normalised"),
        (lambda shape: torch.zeros(3, 5, 5), r"an image tensor cannot have shape \(3, 5, 5\)"),
        (lambda shape: torch.zeros(5), r"an image tensor cannot have shape \(5,\)"),
    ],
)
def test_tensors_of_other_libraries_are_refused(model: Idefics, tensor: Callable[..., Any], said: str) -> None:
    image = tensor((3, model.images.image_size, model.images.image_size))
    for call in (
        lambda: model.caption(image),
        lambda: model.caption([image, IMAGES[0]]),
        lambda: model.generate([image]),
    ):
        with pytest.raises(IdeficsError, match=said):
            call()


def test_an_array_is_one_image_that_cannot_be_used(model: Idefics) -> None:
    assert "PIL.Image.fromarray()" in str(model.caption(np.zeros((4, 4, 3), np.uint8)).error)  # type: ignore[call-overload]
    assert "PIL.Image.fromarray()" in str(model.caption(np.array("a.png")).error)  # type: ignore[call-overload]
    assert "'image'" in str(model.caption({"picture": "a.png"}).error)


@pytest.mark.parametrize("of", [str, object])
def test_an_array_of_texts_is_a_list_of_images(model: Idefics, of: type) -> None:
    paths = np.array(list(map(str, IMAGES[:2])), of)
    assert [result.text for result in model.caption(paths)] == CAPTIONS[:2]  # type: ignore[call-overload]


def test_nothing_is_printed_and_warnings_are_logged(
    model: Idefics, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "idefics_cli"):
        assert model.caption({"image": None}, max_new_tokens=2).ok
    assert [record.name for record in caplog.records] == ["idefics_cli"]
    assert "no row shows an image" in caplog.text and capfd.readouterr() == ("", "")


# Runs


def test_a_run_is_the_commands(model: Idefics, tmp_path: Path) -> None:
    """Its rows are the command's, and each finishes and resumes what the other began."""
    output, rows = tmp_path / "captions.jsonl", []
    stats = model.run("caption", [FOLDER], output, on_row=rows.append, limit=4)
    assert (stats.rows, stats.num_failed, texts_of(output)) == (4, 0, CAPTIONS)
    assert [row["caption"] for row in rows] == CAPTIONS and list(rows[0]) == list(
        json.loads(output.read_text().split("\n")[0])
    )
    command = ["caption", str(FOLDER), "-m", "demo", "--limit", "4", "-o"]
    done = CliRunner().invoke(app, [*command, str(output)])
    assert done.exit_code == 0 and "is finished: 4 rows" in done.output
    other = tmp_path / "other.jsonl"
    assert CliRunner().invoke(app, [*command, str(other)]).exit_code == 0
    ours, theirs = (list(map(json.loads, path.open())) for path in (output, other))
    # Batches may differ, and with them the last digit.
    assert [{**row, "score": pytest.approx(row["score"], abs=2e-6)} for row in ours] == theirs
    assert model.run("caption", FOLDER, other, on_row=rows.append, limit=4).resumed == 4 and len(rows) == 4


def texts_of(path: Path) -> list[str]:
    return [next(filter(None, map(row.get, ("caption", "answer", "text")))) for row in map(json.loads, open(path))]


def test_a_run_that_is_stopped_resumes(model: Idefics, tmp_path: Path) -> None:
    output, rows = tmp_path / "answers.jsonl", []

    def stop(row: Any) -> None:
        rows.append(row)
        if len(rows) == 3:
            raise KeyboardInterrupt

    asked = {"question": [HOW_MANY], "limit": 4}
    with pytest.raises(KeyboardInterrupt):
        model.run("vqa", FOLDER, output, on_row=stop, **asked)
    assert not output.exists()
    stats = model.run("vqa", FOLDER, output, on_row=rows.append, **asked)
    assert stats.rows == 4 and stats.resumed >= 2 and texts_of(output) == COUNTS
    with pytest.raises(IdeficsError, match="num_beams"):
        model.run("vqa", FOLDER, output, num_beams=1, **asked)


def test_a_run_with_other_shots_is_another(model: Idefics, tmp_path: Path) -> None:
    """Whether the shots' answers, images in files or images in memory differ; the same ones resume."""
    output, asked = tmp_path / "answers.jsonl", {"question": [HOW_MANY], "limit": 1}
    copy = Path(shutil.copy(IMAGES[1], tmp_path / "shot.png"))
    pixels = Image.open(IMAGES[1])
    shots = [Shot(copy, HOW_MANY, COUNTS[1]), Shot(pixels.copy(), HOW_MANY, COUNTS[1])]
    model.run("vqa", FOLDER, output, shots=shots, **asked)
    assert model.run("vqa", FOLDER, output, shots=[replace(shot) for shot in shots], **asked).resumed == 1
    others = replace(shots[0], answer="9"), replace(shots[0], question="?"), replace(shots[0], image=IMAGES[2])
    for other in *others, replace(shots[0], image=pixels.rotate(90)):
        with pytest.raises(IdeficsError, match=r"other settings .shots: was '2 ex"):
            model.run("vqa", FOLDER, output, shots=[other, shots[1]], **asked)
    with pytest.raises(IdeficsError, match="shots: was"):
        model.run("vqa", FOLDER, output, **asked)


def test_other_tasks_run_and_wrong_options_are_told(model: Idefics, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": ["Image:", {"image": IMAGES[0].name}, "Caption:"]}) + "\n")
    stats = model.run("generate", prompts, tmp_path / "texts.jsonl", image_root=FOLDER, max_new_tokens=5)
    assert stats.num_failed == 0 and texts_of(tmp_path / "texts.jsonl")[0].startswith(CAPTIONS[0].split()[0])
    assert model.run("embed", [FOLDER], tmp_path / "latents.parquet", limit=2).rows == 2
    with pytest.raises(IdeficsError, match="unknown option batch_size: use "):
        model.run("caption", [FOLDER], tmp_path / "a.jsonl", batch_size=3)  # type: ignore[call-arg]
    for options, said in (
        ({"limit": 2.5}, "invalid limit 2.5: expected a whole number or None"),
        ({"max_errors": float("nan")}, "invalid max_errors nan: expected a whole number or None"),
        ({"shard": ()}, r"invalid shard \(\): expected \(a whole number, a whole number\) or None"),
        ({"shard": (3, 2)}, "invalid shard '3/2': expected I/N"),
    ):
        with pytest.raises(IdeficsError, match=said):
            model.run("caption", [FOLDER], tmp_path / "a.jsonl", **options)
    shard = (np.int64(1), np.int64(2))
    folders = np.array([str(FOLDER)])
    assert model.run("caption", folders, tmp_path / "c.jsonl", limit=np.int64(1), shard=shard).rows == 1
    with pytest.raises(IdeficsError, match="cannot read gone"):
        model.run("caption", ["gone"], tmp_path / "a.jsonl")
    with pytest.raises(IdeficsError, match="unknown task 'captions': use 'caption', 'vqa', 'generate', 'embed'"):
        model.run("captions", [FOLDER], tmp_path / "a.jsonl")  # type: ignore[arg-type]
    for elsewhere in f"{tmp_path}/parts/", "-", None:
        with pytest.raises(IdeficsError, match=r"an output .* is for the command line alone: name a file"):
            model.run("caption", [FOLDER], elsewhere)  # type: ignore[arg-type]
    for inputs, said in (None, "run's inputs must be a list"), ([3], "invalid inputs of type int: expected paths"):
        with pytest.raises(IdeficsError, match=said):
            model.run("caption", inputs, tmp_path / "a.jsonl")  # type: ignore[arg-type]
    assert model.run("vqa", FOLDER, tmp_path / "b.jsonl", question="Is it red?", limit=1).rows == 1
    with pytest.raises(IdeficsError, match=r"changed.* Add update=True to do .* or start over with overwrite=True"):
        model.run("vqa", FOLDER, tmp_path / "b.jsonl", question="Is it red?", limit=2)
    with pytest.raises(IdeficsError, match="unknown task 'tag'"):
        model.render_prompt("tag", IMAGES[0])  # type: ignore[arg-type]
