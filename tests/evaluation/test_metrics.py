"""VQA accuracy, exact match and CIDEr beside slower, independent ways to the same numbers."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import shutil
import statistics
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_cli.errors import IdeficsError
from idefics_cli.evaluation.metrics import (
    CONTRACTIONS,
    cider,
    exact_match,
    normalize_answer,
    require_cider,
    tokenize,
    vqa_accuracy,
)

NEEDS_CIDER = "CIDEr's package is the extra `score`"
NEEDS_JAVA = pytest.mark.skipif(shutil.which("java") is None, reason="the Penn Treebank tokenizer needs Java")

# ---- VQA accuracy, written once more, letter by letter and set by set

SIGNS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "ten": "10"}
APOSTROPHES = {"dont": "don't", "cant": "can't", "youd've": "you'd've", "twas": "'twas", "somebody'd": "somebodyd"}


def slow_normalize(text: str) -> str:
    text = "".join(" " if letter in "\n\t" else letter for letter in text).strip()
    triples = zip(text, text[1:], text[2:], strict=False)
    number = any(a.isdigit() and comma == "," and b.isdigit() for a, comma, b in triples)
    pairs = {a + b for a, b in itertools.pairwise(text)}
    letters = []
    for letter in text:
        if letter not in SIGNS:
            letters.append(letter)
        elif not (number or letter + " " in pairs or " " + letter in pairs):
            letters.append(" ")
    taken = 0
    kept = []
    for letter, after in itertools.zip_longest(letters, letters[1:], fillvalue=""):
        if letter == "." and not after.isdigit() and taken < 32:
            taken += 1
        else:
            kept.append(letter)
    words = [DIGITS.get(word, word) for word in "".join(kept).lower().split()]
    words = [word for word in words if word not in {"a", "an", "the"}]
    return " ".join(APOSTROPHES.get(word, word) for word in words)


def slow_accuracy(answer: str, references: list[str]) -> Fraction:
    """Over every way to leave one of the references out."""
    if len({text.strip() for text in references}) > 1:
        answer, references = slow_normalize(answer), [slow_normalize(text) for text in references]
    else:
        answer, references = answer.strip(), [text.strip() for text in references]
    subsets = list(itertools.combinations(references, len(references) - 1))
    scores = [min(Fraction(1), Fraction(sum(text == answer for text in subset), 3)) for subset in subsets]
    return sum(scores) / len(scores)


WORDS = """
    the a An one TWO ten none dont can't cant youd've somebody'd 1,000 3.5 3. ... a.b . - e-mail t-shirt red,blue (x)
    what? ! yes Yes No it's a/b ` _ é U.S. twas '
"""
BREAKS = ["\n", "\t", "  ", "red, blue", "5 , 6"]


def generated_cases(number: int):
    rng = random.Random(number)

    def text() -> str:
        return rng.choice([" ", "", " "]).join(rng.choices([*WORDS.split(), *BREAKS], k=rng.randint(0, 4)))

    for _ in range(number):
        pool = [text() for _ in range(rng.randint(1, 4))]
        references = [rng.choice(pool) for _ in range(10)]
        yield rng.choice([*pool, text(), rng.choice(pool).upper()]), references


def test_vqa_accuracy_of_1000_generated_answers_with_10_references_each():
    cases = list(generated_cases(1000))
    expected = [slow_accuracy(answer, references) for answer, references in cases]
    assert [vqa_accuracy(*case) for case in cases] == pytest.approx([float(value) for value in expected], abs=1e-12)
    assert sum(0 < value < 1 for value in expected) > 200, "the cases are to be of every kind"


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("a.,1- ?'\nTheé"), max_size=12))
def test_normalised_letter_by_letter(text):
    assert normalize_answer(text) == slow_normalize(text)


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("A red car.", "red car"),
        ("None", "0"),
        ("DONT", "don't"),
        ("t-shirt", "t shirt"),
        ("red, blue", "red blue"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma in a number removes every sign without a blank
        ("3.5", "3.5"),
        ("somebody'd", "somebodyd"),
        ("." * 40, "." * 8),
        ("the", ""),
    ],
)
def test_normalised_by_hand(answer, normalised):
    assert normalize_answer(answer) == normalised


def test_the_contractions_are_the_authors():
    """The digest is of the entries of their table that are written in lower case and change a word."""
    digest = hashlib.sha256(json.dumps(sorted(CONTRACTIONS.items())).encode()).hexdigest()
    assert len(CONTRACTIONS) == 114
    assert digest == "853d25c89947b7f6d41f6c5f81b2d6c3119927f4b16f557fc1b03af6ef45605e"


def test_accuracy_by_hand():
    of_ten = [vqa_accuracy("red", ["red"] * matches + ["blue"] * (10 - matches)) for matches in (0, 1, 2, 3, 4, 10)]
    assert of_ten == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])
    # References that all agree are compared as they stand.
    assert [vqa_accuracy("Yes", [*["yes"] * 9, other]) for other in ("yes", "no")] == [0, 1]
    # Few references cannot reach 1, and a single one is equal or not.
    assert vqa_accuracy("red", ["red", "red"]) == pytest.approx(1 / 3)
    assert vqa_accuracy("red", ["red", "blue"]) == pytest.approx(1 / 6)
    assert [vqa_accuracy(answer, ["two"]) for answer in ("Two.", "three")] == [1, 0]


def test_exact_match_ignores_white_space_and_nothing_else():
    assert exact_match(" a  red\ncar", ["x", "a red car "]) == 1
    assert exact_match("A red car", ["a red car"]) == exact_match("", ["a"]) == 0


# ---- CIDEr

NOUNS, VERBS = ["man", "dog", "horse", "child", "bus"], ["rides", "sees", "holds", "passes"]
ENDINGS = [".", "", " on the beach.", ", doesn't it?", " (old)", ' "quickly"', " - at 3,000 feet", " in St. Louis!"]


def generated_captions(number: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)

    def sentence() -> str:
        return f"A {rng.choice(NOUNS)} {rng.choice(VERBS)} a {rng.choice(NOUNS)}{rng.choice(ENDINGS)}"

    references = [[sentence() for _ in range(rng.randint(1, 5))] for _ in range(number)]
    texts = [rng.choice([*group, sentence(), ""]) for group in references]
    return texts, references


@NEEDS_JAVA
def test_cider_is_the_reference_packages():
    reference = pytest.importorskip("pycocoevalcap.cider.cider", reason=NEEDS_CIDER)
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts, references = generated_captions(150)
    expected = PTBTokenizer().tokenize({n: [{"caption": t} for t in group] for n, group in enumerate(references)})
    candidates = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(texts)})
    mean, values = reference.Cider().compute_score(expected, candidates)
    assert cider(texts, references) == values.tolist()
    assert statistics.fmean(cider(texts, references)) == pytest.approx(mean)
    assert max(values) > 5 and min(values) == 0


@NEEDS_JAVA
def test_every_text_is_one_line_to_the_tokenizer():
    pytest.importorskip("pycocoevalcap", reason=NEEDS_CIDER)
    blank = ["", " ", "a\nb", "a\r\u2028b\x85c", "-", "\ufeff"]
    awkward = [*blank, "\0x", "\x1a", "\ud800 y", "🐎 é", "<image> </s>", "a" * 5000]
    assert tokenize([*awkward, "last one"], "ptb")[-1] == "last one"
    assert tokenize(awkward, "ptb")[:4] == ["", "", "a b", "a b c"]
    assert len(tokenize(awkward, "ptb")) == len(awkward)


@NEEDS_JAVA
def test_the_tokenizer_without_java_finds_the_same_words_in_plain_captions():
    pytest.importorskip("pycocoevalcap", reason=NEEDS_CIDER)
    pytest.importorskip("nltk", reason=NEEDS_CIDER)
    texts, references = generated_captions(100, seed=1)
    plain = [text for text in [*texts, *itertools.chain(*references)] if "St." not in text]
    assert len(plain) > 200
    assert tokenize(plain, "treebank") == tokenize(plain, "ptb")
    assert tokenize(["Two dogs. One cat."], "treebank") != tokenize(["Two dogs. One cat."], "ptb")


def test_what_cider_lacks_is_named_with_what_brings_it(monkeypatch):
    pytest.importorskip("pycocoevalcap", reason=NEEDS_CIDER)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(IdeficsError, match="Java"):
        require_cider("ptb")
    require_cider("treebank")
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    with pytest.raises(IdeficsError, match="nltk"):
        require_cider("treebank")
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(IdeficsError, match=r"idefics-cli\[score\]"):
        require_cider("ptb")
