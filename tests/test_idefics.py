"""The Python API over a tiny model with random weights: what goes in verbatim, and what each field says."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_checkpoint

from idefics_cli import Candidate, Idefics, IdeficsError, Result, RowError, Shot
from idefics_cli.engine.prompt_source import EncodedImage, EncodedPrompt, IterableSource
from idefics_cli.engine.reference import collate
from idefics_cli.engine.transfer import pixel_values
from idefics_cli.prompts.postprocess import PostProcess
from idefics_cli.prompts.templates import END_OF_UTTERANCE, TASKS, PromptOptions, choose_template, shared_start


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Idefics:
    return Idefics.from_pretrained(save_checkpoint(tmp_path_factory.mktemp("base")), batch_size=3)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Idefics:
    return Idefics.from_pretrained(save_checkpoint(tmp_path_factory.mktemp("instruct"), instruct=True))


def image(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@pytest.fixture(scope="module")
def prompts() -> list[list]:
    """Of different lengths, with no to three images."""
    return [
        ["User: what is this?", image(1), "A cat. And", image(2), image(3), "?"],
        [image(4)],
        ["hello world"],
        ["Image:", image(5), "Caption:"],
        ["Question: how many? Answer: two. " * 4, image(6)],
        [image(7), "one", image(8)],
        ["Answer:"],
    ]


def log_probability(model: Idefics, encoded: EncodedPrompt, length: int) -> float:
    """The sum over the last `length` tokens, in one forward pass without a cache."""
    pixels = [pixel_values(each[None], model.engine.pixel_of_byte)[0] for each in encoded.pixels]
    encoded = EncodedPrompt(encoded.input_ids, tuple(pixels))
    with torch.no_grad():
        logits = model.model(**collate([encoded], model.engine.vocabulary, model.images.image_size)).logits[0]
    chosen = torch.tensor(encoded.input_ids[-length:])[:, None]
    return float(logits.log_softmax(-1)[-length - 1 : -1].gather(-1, chosen).sum())


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_the_score_is_what_the_page_says(base: Idefics, prompts: list, num_beams: int, length_penalty: float) -> None:
    """The sum of log-probabilities over length ** length_penalty, with the end token where the text has one."""
    settings = {"num_beams": num_beams, "max_new_tokens": 6, "length_penalty": length_penalty}
    for prompt, result in zip(prompts, base.generate(prompts, **settings), strict=True):
        token_ids = result.token_ids
        if len(token_ids) < 6:
            token_ids = (*token_ids, base.encoder.eos_token_id)
        encoded = base.encode(prompt, 30)
        encoded = EncodedPrompt([*encoded.input_ids, *token_ids], encoded.pixels)
        expected = log_probability(base, encoded, len(token_ids)) / len(token_ids) ** length_penalty
        assert result.score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("norm", ["none", "tokens", "bytes"])
def test_the_likeliest_choice_is_the_answer_and_all_are_candidates(base: Idefics, norm: str) -> None:
    """Beside the prompt and each choice as one text, which ends with the choice's tokens."""
    choices = ["yes", "no", "two small dogs", "a red cat on the mat"]
    prompts = [["Image:", image(seed), "Question: what is this? Answer:"] for seed in range(4)] + [["Answer:"]]
    for prompt, result in zip(prompts, base.score([(p, choices) for p in prompts], choice_norm=norm), strict=True):
        expected = {}
        for each in result.candidates:
            encoded = base.encode([*prompt[:-1], f"{prompt[-1]} {each.text}"], 0)
            assert tuple(encoded.input_ids[-each.tokens :]) == each.token_ids
            divisor = {"none": 1, "tokens": each.tokens, "bytes": len(each.text)}[norm]
            expected[each.text] = log_probability(base, encoded, each.tokens) / divisor
        assert {each.text: each.score for each in result.candidates} == pytest.approx(expected, abs=1e-4)
        assert expected.keys() == set(choices) and result.text == max(expected, key=expected.get)
        assert result.score == result.candidates[0].score


def test_image_tokens_are_never_written_and_ends_are_cut(base: Idefics, prompts: list) -> None:
    """Even by a model that wants nothing else: its head prefers them to every other token."""
    head = base.model.lm_head.additional_fc.weight
    original = head.clone()
    try:
        with torch.no_grad():
            head.copy_(base.model.lm_head.weight.abs().amax(0).expand_as(head) * 50 * head.sign())
        for result in base.generate(prompts, max_new_tokens=6, num_beams=2):
            assert not set(result.token_ids) & {*base.encoder.banned_token_ids, *base.encoder.end_token_ids}
    finally:
        with torch.no_grad():
            head.copy_(original)


def test_the_end_of_an_utterance_ends_a_text(instruct: Idefics) -> None:
    """A model whose every next token is <end_of_utterance> says nothing."""
    end = instruct.encoder.end_token_ids[1]
    norm, head = instruct.model.model.norm.weight, instruct.model.lm_head
    with torch.no_grad():
        norm.zero_()  # all logits equal
    head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor([end]), 50.0))
    (result,) = instruct.generate([["hello"]], num_beams=3)
    assert (result.text, result.tokens, result.token_ids) == ("", 0, ())
    assert result.score == pytest.approx(0.0, abs=1e-3)


def test_candidates_are_the_best_first(base: Idefics) -> None:
    (result,) = base.generate([["hello", image()]], num_beams=4, num_return_sequences=3, max_new_tokens=5)
    assert len(result.candidates) == 3
    assert result.candidates[0] == Candidate(result.text, result.score, result.tokens, result.token_ids)
    scores = [candidate.score for candidate in result.candidates]
    assert scores == sorted(scores, reverse=True)
    assert len({candidate.token_ids for candidate in result.candidates}) == 3
    assert all(candidate.tokens == len(candidate.token_ids) for candidate in result.candidates)


def test_captions_are_asked_for_as_the_checkpoint_was_published(
    base: Idefics, instruct: Idefics, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = {
        base: (
            "Image:Caption: a man riding a bicycle down a quiet street\n"
            "Image:Caption: two dogs playing with a ball in the grass\nImage:",
            "Caption:",
        ),
        instruct: ("User:", "Describe the image briefly.", END_OF_UTTERANCE, "\nAssistant:"),
    }
    for model, expected in published.items():
        seen = []
        encode = model.encoder.encode
        recording = lambda prompt, encode=encode, seen=seen: seen.append(prompt) or encode(prompt)  # noqa: E731
        monkeypatch.setattr(model.encoder, "encode", recording)
        (result,) = model.caption([image()], max_new_tokens=3)
        (prompt,) = seen
        assert isinstance(prompt[1], EncodedImage)
        assert (prompt[0], *prompt[2:]) == expected
        assert result.text is not None and result.error is None
        monkeypatch.undo()


def test_texts_of_captions_and_answers_end_at_the_first_stop_word() -> None:
    long = Candidate("red\nImage: more", -1.0, 4, (1, 2, 3, 4))
    finished = Result.of([long, replace(long, text="blue")]).finished(PostProcess(("Image", "\n")))
    assert finished.text == "red" and [each.text for each in finished.candidates] == ["red", "blue"]
    assert finished.token_ids == long.token_ids and finished.score == -1.0
    failed = Result(error=RowError("image_missing", "no such file"))
    assert failed.finished(PostProcess()) == failed


def test_captions_from_paths_images_and_pixels_are_one(base: Idefics, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    image(9).save(path)
    sources = [str(path), path, path.read_bytes(), image(9), base.prepare_image(path)]
    texts = {result.token_ids for result in base.caption(sources, max_new_tokens=5)}
    assert len(texts) == 1


def test_bad_rows_are_errors_among_good_ones(base: Idefics, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n...")
    row_error = RowError("row_invalid", "said before")
    captions = base.caption([image(), tmp_path / "gone.png", tmp_path / "broken.png", row_error], max_new_tokens=3)
    assert codes(captions) == [None, "image_missing", "image_unreadable", "row_invalid"]
    assert captions[1] == Result(error=captions[1].error) and captions[0].text is not None
    texts = base.generate([["a", image(), tmp_path / "gone.png", "c"], ["word " * 400], ["short"]], max_new_tokens=4)
    assert codes(texts) == ["image_missing", "prompt_too_long", None]
    good = (["Answer:"], ["yes", "no"])
    scored = base.score([good, ([tmp_path / "gone.png", "?"], ["yes"]), (["a"], []), (["word " * 400], ["yes"]), good])
    assert codes(scored) == [None, "image_missing", "row_invalid", "prompt_too_long", None]
    assert scored[0].score == pytest.approx(scored[4].score) and scored[0].text == scored[4].text in ("yes", "no")
    assert base.generate([]) == base.caption([]) == []


def codes(results: list[Result]) -> list[str | None]:
    return [result.error and result.error.code for result in results]


def test_a_prompt_with_its_longest_choice_may_fill_the_model(base: Idefics) -> None:
    space = base.model.config.max_position_embeddings
    per_word = len(base.encoder.encode(("a a",))) - len(base.encoder.encode(("a",)))
    fitting = ["a" + " a" * ((space - len(base.encoder.encode(("a a",)))) // per_word)]
    assert base.score([(fitting, ["a"])])[0].error is None
    assert base.score([(fitting, ["a", "a a a"])])[0].error.code == "prompt_too_long"


def test_text_stays_text(base: Idefics) -> None:
    """Special tokens' own words, addresses and paths in a prompt are words."""
    awkward = ["<image>", "</s>", "<fake_token_around_image>", "http://example.com/cat.png", "/etc/hostname", ""]
    results = base.generate([[text, image(), text] for text in awkward], max_new_tokens=3)
    assert all(result.error is None for result in results)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beans": 3}, "num_beans.*num_beams"),
        ({"num_return_sequences": 4}, "num_return_sequences 4 is more than num_beams 3"),
        *(({"num_beams": value}, "num_beams") for value in (0, True, 10**30)),
        ({"temperature": 0.5}, "^temperature has no effect unless tokens are drawn: add do_sample=True$"),
        ({"seed": 1}, "^seed has no effect: add do_sample=True$"),
        *(({"frame": value}, f"invalid frame '{value}'") for value in (0, -1)),
        *(({"max_new_tokens": value}, "max_new_tokens") for value in (1.5, 256)),
        *(({"early_stopping": value}, "early_stopping") for value in ("soon", 1)),
        *(({"length_penalty": value}, "length_penalty") for value in ("long", np.nan, -np.inf, 1e5, -5.0)),
    ],
)
def test_options_that_cannot_be_are_told(base: Idefics, options: dict[str, Any], said: str) -> None:
    with pytest.raises(IdeficsError, match=said):
        base.generate([["a"]], **options)


def test_messages_name_options_by_keyword(base: Idefics, tmp_path: Path) -> None:
    with pytest.raises(IdeficsError, match=r"^early_stopping=False has no effect where answers are ranked: leave it"):
        base.answer(image(), "What?", choices=["a", "b"], early_stopping=False)
    with pytest.raises(IdeficsError, match=r"^num_shots 2 is more than the list of shots has, 1: lower it"):
        base.caption(image(), shots=[Shot(image(), answer="a")], num_shots=2)
    with pytest.raises(IdeficsError, match=r"^quantize nf4 runs on CUDA, not on cpu: use quantize int8"):
        Idefics.from_pretrained("demo", quantize="nf4", device="cpu")
    image().save(tmp_path / "a.png")
    with pytest.raises(IdeficsError, match=r"^max_new_tokens 300 leaves no space for a prompt: use fewer than 256"):
        base.caption(image(), max_new_tokens=300)
    beyond = base.caption(tmp_path / "a.png", frame=2).error
    assert beyond is not None and beyond.message == "frame 2 is beyond the end: the image has 1"


def test_no_choices_are_not_free_text(base: Idefics) -> None:
    with pytest.raises(IdeficsError, match="the choices are empty: give two or more"):
        base.answer(image(), "What?", choices=[])
    for result in base.score("a", []), base.answer(image(), "What?", choices_column="gone"):
        assert str(result.error) == "row_invalid: the choices are empty: give two or more"


@pytest.mark.parametrize("one", [3, None, object()])
def test_what_is_no_list_is_told(base: Idefics, one: Any) -> None:
    for method in base.caption, base.embed:
        with pytest.raises(IdeficsError, match=rf"{method.__name__}'s images must be a list.*write \[image\]"):
            method(one)
    with pytest.raises(IdeficsError, match=f"generate's prompts must be a list, not {type(one).__name__}: write"):
        base.generate(one)
    with pytest.raises(IdeficsError, match="generate's prompts must be a list, not dict: write"):
        base.generate({"role": "user", "content": "What?"})  # type: ignore[arg-type]
    with pytest.raises(IdeficsError, match=f"a prompt must be a list, not {type(one).__name__}: write"):
        base.generate([["a"], one])


def test_other_shapes_and_norms_are_told(base: Idefics) -> None:
    with pytest.raises(IdeficsError, match=r"shape \(3, 5, 5\)"):
        base.caption([torch.zeros(3, 5, 5)])
    with pytest.raises(IdeficsError, match="use 'none', 'tokens', 'bytes'"):
        base.score([], choice_norm="length")


@pytest.mark.parametrize(
    "pairs", [(image(), "a?"), [image()], "ab", None, [(image(), "a?", "b?")], [image(), "a?"], ["ab"]]
)
def test_what_is_no_list_of_pairs_is_told(base: Idefics, pairs: Any) -> None:
    with pytest.raises(IdeficsError, match=r"answer's pairs must be a list.*: write \[\(image, question\)\]"):
        base.answer(pairs)
    with pytest.raises(IdeficsError, match=r"score's pairs must be a list.*: write \[\(prompt, choices\)\]"):
        base.score(pairs)


def test_questions_are_not_given_beside_the_images(base: Idefics) -> None:
    with pytest.raises(IdeficsError, match=r"the question must be a text, not list: write \[\(image, question\)\]"):
        base.answer([image(), image()], ["a?", "b?"])  # type: ignore[call-overload]


@pytest.mark.parametrize("question", ["", " ", "\t\n", None])
def test_a_question_that_asks_nothing_is_an_error_among_others(base: Idefics, question: str | None) -> None:
    results = base.answer([(image(), "What?"), (image(), question), (image(), "Why?")], max_new_tokens=2)
    assert codes(results) == [None, "row_invalid", None]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((4, 4, 3), np.uint8), "PIL.Image.fromarray()"),
        (io.BytesIO(b"a"), "use its read()"),
        (Image.new("RGB", (0, 5)), "the image is empty: 0 x 5 pixels"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_image_is_an_error_that_says_how_to_make_one(base: Idefics, given: Any, said: str) -> None:
    good, bad = base.caption([image(), given], max_new_tokens=2)
    assert good.error is None and bad.error is not None and said in str(bad.error)


def test_a_file_object_or_a_view_of_bytes_is_one_image(base: Idefics, tmp_path: Path) -> None:
    image().save(tmp_path / "a.png")
    encoded = (tmp_path / "a.png").read_bytes()
    assert "use its read()" in str(base.caption(io.BytesIO(encoded)).error)
    assert base.caption(memoryview(encoded), max_new_tokens=2).ok  # type: ignore[call-overload]


def test_numbers_may_be_numpys(base: Idefics) -> None:
    plain = base.generate([["a"]], num_beams=2, max_new_tokens=3, length_penalty=0.5)
    numpys = {"num_beams": np.int64(2), "max_new_tokens": np.uint8(3), "length_penalty": np.float32(0.5)}
    assert base.generate([["a"]], **numpys) == plain


def test_device_and_dtype_may_be_torchs() -> None:
    model = Idefics.from_pretrained("demo", device=torch.device("cpu"), dtype=torch.bfloat16, batch_size=np.int64(2))
    assert (model.model.device, model.model.dtype, model.batch_size) == (torch.device("cpu"), torch.bfloat16, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *(({"batch_size": size}, f"invalid batch_size {size!r}") for size in (0, -1, "auto", 1.5, True)),
        ({"device": 0}, "unknown device '0'"),
        ({"device_map": "spread"}, "unknown device_map 'spread'"),
        ({"dtype": torch.float64}, "unknown dtype 'torch.float64'"),
        *(({"model": name}, "invalid model of type") for name in (b"demo", 3)),
        ({"adapter": 3}, "invalid adapter of type int: expected a folder"),
    ],
)
def test_what_no_model_is_loaded_with_is_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(IdeficsError, match=re.escape(said)):
        Idefics.from_pretrained(**{"model": "demo", **options})


def test_answers_encode_an_image_once(base: Idefics) -> None:
    base.engine.clear_caches()
    base.engine.times.reset()
    asked = [(image(20), f"question {number}?") for number in range(5)] + [(image(21), "and this?")]
    results = base.answer(asked, max_new_tokens=3)
    assert base.engine.times.images == 2 and all(result.error is None for result in results)
    assert results[2].token_ids == base.answer([asked[2]], max_new_tokens=3)[0].token_ids


def test_instruction_and_shots_of_the_published_prompt_are_read_once(base: Idefics) -> None:
    base.engine.clear_caches()
    start = shared_start(choose_template(PromptOptions("vqa"), False), TASKS["vqa"].text_only_shots)
    shared_len = len(base.encoder.encode(start)) + 1  # and the token before the image
    read = []
    for seed in 30, 31:
        base.engine.times.reset()
        base.answer([(image(seed), "what is this?")], max_new_tokens=2)
        read.append(base.engine.times.prompt_tokens)
    assert read[0] - read[1] == shared_len > 50


@pytest.mark.parametrize("rest", ["hello", "", " x", "\n", image(1)])
def test_what_prompts_share_are_whole_tokens(base: Idefics, rest: str | Image.Image) -> None:
    """A text that follows may change the last token of what stands before it."""
    for start in ("Question: how man",), (image(2), "a"), (image(2),), ():
        encoded, alone = base.encode([*start, rest], 5, start), base.encoder.encode(start)
        shared = encoded.input_ids[: encoded.shared_len]
        assert shared[: len(alone)] == alone[: len(shared)] and len(shared) >= (len(alone) - 2 if start else 0)
        assert bool(shared) is bool(start)


def test_a_stream_gives_what_generate_gives(base: Idefics, prompts: list) -> None:
    """Prompts encoded elsewhere, numbered as they are taken."""
    encoded = [base.encode(prompt, 30) for prompt in prompts]
    streamed = list(base.stream(IterableSource(encoded), num_beams=2, max_new_tokens=6))
    expected = base.generate(prompts, num_beams=2, max_new_tokens=6)
    assert [result.token_ids for _, result in sorted(streamed, key=lambda pair: pair[0])] == [
        result.token_ids for result in expected
    ]
    with pytest.raises(IdeficsError, match="leaves no space"):
        next(base.stream(IterableSource(encoded), max_new_tokens=100_000))
