"""Options dataclasses as the command line shows them, and the pairs of options that contradict each other."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from idefics_cli.bench.options import BenchOptions
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.cli.app import app
from idefics_cli.cli.options import flattened
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.errors import IdeficsError
from idefics_cli.pipeline.options import RunOptions, parse_batch_size
from idefics_cli.prompts.choices import ChoiceOptions
from idefics_cli.prompts.postprocess import PostProcess
from idefics_cli.prompts.templates import PromptOptions
from idefics_cli.rows import ImageOptions, ReadOptions, parse_keep, parse_shard
from idefics_cli.tasks.options import CaptionVqaOptions, GenerateOptions, ShotOptions
from idefics_cli.validation import Help

# ---- dataclasses on the command line


@dataclass(frozen=True)
class Inner:
    hidden: str
    size: Annotated[int, Help("How many", min=1)] = 3
    words: Annotated[tuple[str, ...], Help("Words", flags=("-w", "--words"))] = ()


@dataclass(frozen=True)
class Outer:
    names: Annotated[tuple[str, ...], Help("Names")]
    inner: Inner
    pair: Annotated[tuple[int, int] | None, Help("Two numbers", parse=parse_shard)] = None
    plain: Annotated[bool, Help("A switch")] = False
    deep: Annotated[bool, Help("Not so deep", flags=("--no-deep",))] = True
    early: Annotated[bool | Literal["never"], Help("Stop early")] = True
    reading: ReadOptions | None = field(default=None)  # not a group: not shown

    def __post_init__(self) -> None:
        if self.plain and not self.deep:
            raise IdeficsError("--plain needs depth: leave --no-deep out")


def outer(*left_out: str, **own: Any) -> tuple[Callable[..., None], list[Outer]]:
    seen: list[Outer] = []

    @flattened(*left_out, **own)
    def command(outer: Outer) -> None:
        """What it does."""
        seen.append(outer)

    return command, seen


def typed(**given: Any) -> dict[str, Any]:
    usual = {"names": ["a"], "size": 3, "words": None, "pair": None, "plain": False, "no_deep": False, "early": True}
    return {**usual, "debug": False, **given}


def test_fields_are_shown_one_by_one() -> None:
    command, _ = outer(size=9, hidden="h")
    parameters = inspect.signature(command).parameters
    assert {name: each.default for name, each in parameters.items()} == {
        "names": inspect.Parameter.empty,
        "size": 9,
        "words": None,
        "pair": None,
        "plain": False,
        "no_deep": False,
        "early": True,
        "config": None,
        "debug": False,
    }
    shown = {name: each.annotation.__metadata__[0] for name, each in parameters.items()}
    assert (shown["size"].help, shown["size"].min, shown["size"].metavar) == ("How many. [default: 9]", 1, "N")
    flags = [shown[name].default for name in ("words", "plain", "no_deep", "early")]
    assert flags == ["-w", "--plain/--no-plain", "--no-deep/--deep", ...]
    assert isinstance(shown["names"], typer.models.ArgumentInfo)
    assert command.__doc__ == "What it does."


def test_what_is_typed_becomes_the_dataclass() -> None:
    command, seen = outer("size", hidden="h")
    assert "size" not in inspect.signature(command).parameters
    command(**{name: value for name, value in typed().items() if name != "size"})
    assert seen == [Outer(("a",), Inner("h", 3))]
    command, seen = outer(hidden="h")
    command(**typed(names=["a", "b"], size=5, words=["x"], pair="1/2", no_deep=True, early=False))
    assert seen == [Outer(("a", "b"), Inner("h", 5, ("x",)), (1, 2), deep=False, early=False)]


@pytest.mark.parametrize(
    ("given", "said"),
    [({"pair": "3/2"}, "--pair: invalid shard '3/2'"), ({"plain": True, "no_deep": True}, "--plain needs depth")],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], given: dict[str, Any], said: str
) -> None:
    command, seen = outer(hidden="h")
    with pytest.raises(typer.Exit) as ended:
        command(**typed(**given))
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.exit_code == 2 and line.startswith(f"Error: {said}") and not seen


# ---- what contradicts itself


def vqa(**changes: Any) -> CaptionVqaOptions:
    return CaptionVqaOptions(PromptOptions("vqa", **changes.pop("prompts", {})), **{"decoding": DECODING, **changes})


DECODING = DecodingOptions(max_new_tokens=15)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RunOptions(("a",), overwrite=True), "--overwrite needs an output file: add -o F.jsonl"),
        (lambda: RunOptions(("a",), retry_errors=True), "--retry-errors needs the finished output"),
        (lambda: RunOptions(("a",), answers_column="a"), "--answers-column scores the finished output"),
        (lambda: RunOptions(("a",), "f.jsonl", overwrite=True, retry_errors=True), "--overwrite discards what"),
        (lambda: RunOptions(("a",), reading=ReadOptions(null=True)), "--null .* add - to the inputs"),
        (lambda: ShotOptions(number=2), "--num-shots needs examples: add --shots FILE"),
        (lambda: ShotOptions(selection="similar"), "--shot-selection needs examples: add --shots FILE"),
        (lambda: vqa(decoding=replace(DECODING, seed=1)), "--seed has no effect: add --do-sample, or --shot-selection"),
        (lambda: GenerateOptions(DecodingOptions(seed=1)), "--seed has no effect: add --do-sample"),
        (lambda: PostProcess(prefix="\udcfa"), "--prefix is not valid UTF-8"),
        (lambda: ChoiceOptions(norm="tokens"), "--choice-norm needs answers to rank: add --choices A,B"),
        (lambda: ChoiceOptions(("a",), "column"), "use one of them"),
        (lambda: vqa(questions=(" ",)), "-q is empty"),
        (lambda: vqa(questions=("Why?",), question_column="asked"), "--question-column: use one of them"),
        (lambda: vqa(questions=("Why?",), prompts={"text": "Yes?"}), r"write \{question\} where it belongs"),
        (lambda: vqa(prompts={"bare": True}, shots=ShotOptions("s.csv")), "leave --shots and --num-shots out"),
        (lambda: BenchOptions(rows=1, scenes=1), "--rows counts prompts and --scenes images: use one of them"),
        (lambda: BenchOptions(ModelRequest(revision="a"), random="tiny"), "--revision has no effect"),
        (lambda: BenchOptions(ModelRequest(allow_pickle=True), random="tiny"), "--allow-pickle has no effect"),
    ],
)
def test_a_contradiction_is_named(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(IdeficsError, match=said):
        make()


@pytest.mark.parametrize("command", ["caption", "vqa", "generate", "embed", "score", "bench", "info"])
def test_help_has_no_brackets_within_brackets_and_no_option_without_effect(command: str) -> None:
    shown = " ".join(CliRunner().invoke(app, [command, "--help"]).stdout.split())
    assert "default: (" not in shown
    assert ("--sidecar " in shown) == ("--sidecar-ext " in shown) == ("--sidecar-existing " in shown)
    assert "[default: auto]" in shown


CHOICES = ChoiceOptions(("a", "b"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"decoding": DecodingOptions(num_beams=1, max_new_tokens=15)}, "--num-beams"),
        ({"decoding": DecodingOptions(max_new_tokens=9)}, "--max-new-tokens"),
        ({"decoding": DecodingOptions(max_new_tokens=15, early_stopping=False)}, "--no-early-stopping"),
        ({"decoding": DecodingOptions(max_new_tokens=15, do_sample=True)}, "--do-sample"),
        ({"postprocess": PostProcess(("a",))}, "--stop-words"),
    ],
)
def test_how_texts_are_decoded_has_no_effect_on_ranked_answers(changes: dict[str, Any], named: str) -> None:
    for choices in CHOICES, ChoiceOptions(column="c"):
        with pytest.raises(IdeficsError, match=f"^{named} has no effect where answers are ranked"):
            vqa(choices=choices, **changes)
    assert vqa(choices=CHOICES, postprocess=PostProcess(None, "<", ">")).choices == CHOICES


def test_what_goes_together() -> None:
    RunOptions(("a",), sidecar=True, sidecar_existing="skip")
    RunOptions(("-",), "f.jsonl", retry_errors=True, reading=ReadOptions(null=True))
    shots = ShotOptions("s.csv", selection="random", seed=3)
    assert (ShotOptions().number, shots.number, vqa(shots=shots).prompts.num_shots) == (0, 4, 4)


def test_one_process_for_each_processor_and_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for processors, expected in (2, 2), (64, 8), (None, 1):
        monkeypatch.setattr("os.cpu_count", lambda number=processors: number)
        assert ImageOptions().num_workers == expected
    assert ImageOptions(workers=20).num_workers == 20


# ---- texts


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_every_shard_is_read(place: int, more: int) -> None:
    assert parse_shard(f"{place}/{place + more}") == (place, place + more)


@pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "1/0", "-1/4", "1/4/4", "a/b", "1.0/4", "１/４", " 1/4"])
def test_invalid_shards(text: str) -> None:
    said = (
        "shards are counted from 1, as 1/4 for the first" if text == "0/4" else "expected I/N with 1 <= I <= N, or auto"
    )
    with pytest.raises(IdeficsError, match=rf"^invalid shard '.*': {said}$"):
        parse_shard(text)


def test_columns_and_batch_sizes() -> None:
    assert [parse_keep(text) for text in ("all", "a", "a, b,a")] == ["all", ("a",), ("a", "b")]
    for text in "", "a,,b", ",":
        with pytest.raises(IdeficsError, match="empty name"):
            parse_keep(text)
    assert [parse_batch_size(text) for text in ("auto", "7")] == [None, 7]
    for text in "0", "²", "-1", "none":
        with pytest.raises(IdeficsError, match=f"invalid batch size '{text}': expected auto or a number above 0"):
            parse_batch_size(text)
