from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from idefics_cli.cli.options import (
    ImageFlags,
    InputFlags,
    ModelFlags,
    OutputFlags,
    flattened,
    parse_keep,
    parse_shard,
)
from idefics_cli.cli.task_options import (
    AskFlags,
    ChoiceFlags,
    DecodingFlags,
    PromptFlags,
    QuestionFlags,
    ScoreFlags,
    TextFlags,
    parse_words,
)
from idefics_cli.rows import ImageOptions

# ---- groups


@dataclass(frozen=True)
class Pair:
    first: Annotated[int, typer.Option(help="The first.")]
    second: Annotated[str, typer.Option(help="The second.")] = "b"


def test_groups_are_shown_field_by_field_and_put_together_again() -> None:
    seen: list[Any] = []

    @flattened
    def command(pair: Pair, debug: bool = False) -> None:
        """What it does."""
        seen.append((pair, debug))

    parameters = inspect.signature(command).parameters
    assert [(each.name, each.default) for each in parameters.values()] == [
        ("first", inspect.Parameter.empty),
        ("second", "b"),
        ("debug", False),
    ]
    assert parameters["first"].annotation.__metadata__[0].help == "The first."
    assert command.__doc__ == "What it does."
    command(first=1, second="c", debug=True)
    assert seen == [(Pair(1, "c"), True)]


@dataclass(frozen=True)
class Nest:
    pair: Pair
    third: Annotated[int, typer.Option(help="The third.")] = 3


def test_groups_may_stand_in_groups() -> None:
    seen: list[Nest] = []

    @flattened
    def command(nest: Nest) -> None:
        seen.append(nest)

    assert list(inspect.signature(command).parameters) == ["first", "second", "third"]
    command(first=1, second="c", third=4)
    assert seen == [Nest(Pair(1, "c"), 4)]


def test_two_groups_with_one_field_are_a_bug() -> None:
    def command(pair: Pair, first: int = 0) -> None: ...

    with pytest.raises(AssertionError, match="first"):
        flattened(command)


def test_one_process_for_each_processor_and_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for processors, expected in (2, 2), (64, 8), (None, 1):
        monkeypatch.setattr("os.cpu_count", lambda number=processors: number)
        assert ImageOptions().num_workers == expected
    assert ImageOptions(workers=20).num_workers == 20


def test_a_group_becomes_the_value_it_speaks_of() -> None:
    reading = InputFlags(["a.csv"], keep="x, y,x", limit=3, shard="2/4", no_recursive=True).reading(("q",), True)
    assert (reading.keep, reading.limit, reading.shard, reading.recursive) == (("x", "y"), 3, (2, 4), False)
    assert reading.columns == ("q",) and reading.needs_image
    request = ModelFlags("demo", "main", "fp32", "cpu", True).request
    assert vars(request) == {
        "model": "demo",
        "revision": "main",
        "dtype": "fp32",
        "device": "cpu",
        "allow_pickle": True,
    }
    assert ImageFlags(max_pixels=5).decoding.max_pixels == 5
    assert DecodingFlags().decoding(15).max_new_tokens == 15
    assert DecodingFlags(max_new_tokens=3, num_beams=1).decoding(15).max_new_tokens == 3


def ask_flags(**prompts: Any) -> AskFlags:
    return AskFlags(PromptFlags(**prompts), TextFlags(), ChoiceFlags(), ScoreFlags(), DecodingFlags())


def test_shots_come_from_a_file() -> None:
    asking = ask_flags(shots="s.csv").options("caption")
    assert asking.prompts.num_shots == 4 and asking.shots is not None
    asking = ask_flags(shots="s.csv", num_shots=2, shot_selection="random", seed=3).options(
        "vqa", QuestionFlags(["What?"])
    )
    assert (asking.prompts.num_shots, asking.questions, asking.decoding.max_new_tokens) == (2, ("What?",), 15)


# ---- what contradicts itself


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (OutputFlags(overwrite=True).check, "nothing to overwrite on stdout"),
        (OutputFlags(retry_errors=True).check, "it needs the finished file"),
        (OutputFlags("f.jsonl", overwrite=True, retry_errors=True).check, "give one"),
        (lambda: InputFlags(["a"], null=True).reading((), True), "add - to the inputs"),
        (
            lambda: ask_flags(num_shots=2).options("caption"),
            "add --shots FILE",
        ),
        (
            lambda: ask_flags(shot_selection="similar").options("caption"),
            "add --shots FILE",
        ),
        (lambda: ask_flags(shot_selection="random").options("caption"), "add --shots FILE"),
        (lambda: ask_flags(shots="s.csv", seed=1).options("caption"), "add --shot-selection random"),
        (lambda: TextFlags(prefix="\udcfa").finish(None), "is no UTF-8"),
        (lambda: TextFlags(suffix="\udcfa").finish(None), "is no UTF-8"),
        (ChoiceFlags(choice_norm="tokens").options, "add --choices A,B"),
        (lambda: QuestionFlags(["Why?"], "asked").asked, "-q asks the same of every row"),
        (
            lambda: ask_flags(prompt="{image} Yes?").options("vqa", QuestionFlags(["Why?"])),
            "put {question} where it is to stand",
        ),
        (lambda: DecodingFlags(batch_size="0").rows_per_batch, "neither `auto` nor a number above 0"),
        (lambda: DecodingFlags(batch_size="²").rows_per_batch, "neither `auto` nor a number above 0"),
    ],
)
def test_a_contradiction_is_named(check: Any, said: str) -> None:
    with pytest.raises(typer.BadParameter, match=said):
        check()


@pytest.mark.parametrize(
    ("choices", "text", "decoding", "named"),
    [
        (ChoiceFlags("a,b"), TextFlags(), DecodingFlags(num_beams=1), "--num-beams"),
        (ChoiceFlags("a,b"), TextFlags(), DecodingFlags(max_new_tokens=9, batch_size="4"), "--max-new-tokens"),
        (ChoiceFlags("a,b"), TextFlags(), DecodingFlags(early_stopping=False), "--no-early-stopping"),
        (ChoiceFlags(choices_column="c"), TextFlags(), DecodingFlags(num_return_sequences=2), "--num-return-sequences"),
        (ChoiceFlags(choices_column="c"), TextFlags(stop_words="a"), DecodingFlags(), "--stop-words"),
    ],
)
def test_nothing_says_how_answers_are_written_that_are_ranked(
    choices: ChoiceFlags, text: TextFlags, decoding: DecodingFlags, named: str
) -> None:
    flags = AskFlags(PromptFlags(), text, choices, ScoreFlags(), decoding)
    with pytest.raises(typer.BadParameter, match=f"answers of {choices.flag} are ranked") as caught:
        flags.options("vqa", QuestionFlags(["Why?"]))
    assert caught.value.param_hint == named


def test_what_answers_that_are_ranked_may_be_given() -> None:
    flags = AskFlags(
        PromptFlags(), TextFlags("<", ">"), ChoiceFlags("a,b"), ScoreFlags(), DecodingFlags(batch_size="4")
    )
    assert flags.options("vqa", QuestionFlags(["Why?"])).choices is not None


@pytest.mark.parametrize(
    "flags", [OutputFlags(), OutputFlags(overwrite=True, sidecar=True), OutputFlags("f.jsonl", retry_errors=True)]
)
def test_what_goes_together(flags: OutputFlags) -> None:
    flags.check()


# ---- texts


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_every_share_is_read(place: int, more: int) -> None:
    assert parse_shard(f"{place}/{place + more}") == (place, place + more)


@pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "1/0", "-1/4", "1/4/4", "a/b", "1.0/4", "１/４", " 1/4"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no share"):
        parse_shard(text)


def test_columns_and_words() -> None:
    assert [parse_keep(text) for text in (None, "all", "a", "a,b,a")] == [(), "all", ("a",), ("a", "b")]
    for text in "", "a,,b", ",":
        with pytest.raises(typer.BadParameter, match="empty name"):
            parse_keep(text)
    assert [parse_words(text) for text in (None, "", "a", "a,,b")] == [None, (), ("a",), ("a", "b")]
