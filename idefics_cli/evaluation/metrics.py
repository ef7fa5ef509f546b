"""Measures of texts against references: VQA accuracy, exact match and CIDEr. Texts in, numbers out; no files."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from idefics_cli.errors import IdeficsError, one_line

# ---- VQA accuracy, as its authors compute it (Antol et al. 2015; GT-Vision-Lab/VQA, vqaEval.py)

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
PERIODS_TAKEN_AWAY = 32  # the authors pass re.UNICODE, which is 32, where re.sub takes the count
COUNTED = "zero one two three four five six seven eight nine ten"
NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(COUNTED.split())}
ARTICLES = ("a", "an", "the")
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# One apostrophe is missing: the authors' table, every entry of it that a word in lower case can meet.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # stands in their table the wrong way round


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Mean over the references of min(1, matches among the others / 3), in 0..1.

    As in the authors' code the texts are normalised unless all references are the same; fewer than four references
    cannot reach 1. With a single one their formula always gives 0; it counts as IDEFICS's authors have it: 1 if
    the two are equal when normalised.
    """
    assert references, "VQA accuracy needs references"
    texts = [_without_breaks(text) for text in (answer, *references)]
    if len(set(texts[1:])) > 1 or len(references) == 1:
        texts = [normalize_answer(text) for text in texts]
    given, *expected = texts
    if len(expected) == 1:
        return float(given == expected[0])
    matches = [reference == given for reference in expected]
    return sum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(matches)


def normalize_answer(text: str) -> str:
    """Without punctuation, articles and capitals; numbers up to ten as digits, apostrophes back in their places."""
    words = (NUMBER_WORDS.get(word, word) for word in _without_punctuation(_without_breaks(text)).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_breaks(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """A sign goes if it stands beside a blank anywhere, or if a comma stands within a number; else it becomes one."""
    has_number = COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for sign in PUNCTUATION:
        beside_blank = f"{sign} " in text or f" {sign}" in text
        stripped = stripped.replace(sign, "" if beside_blank or has_number else " ")
    return PERIOD.sub("", stripped, count=PERIODS_TAKEN_AWAY)


def exact_match(text: str, references: Sequence[str]) -> float:
    """1 if the text is exactly one of the references; white space at the ends and in runs does not count."""
    return float(one_line(text) in map(one_line, references))


# ---- CIDEr, by pycocoevalcap

NOT_A_CHARACTER = re.compile("[\0\ud800-\udfff]")


def cider(texts: Sequence[str], references: Sequence[Sequence[str]], tokenization: str = "ptb") -> list[float]:
    """CIDEr-D of each text, 0..10, as pycocoevalcap computes it over all of them; their mean is the corpus's.

    With one text only it is 0: its words are weighed by how few of the rows have them.
    """
    from pycocoevalcap.cider.cider import Cider

    words = iter(tokenize([*texts, *(reference for group in references for reference in group)], tokenization))
    candidates = {row: [next(words)] for row in range(len(texts))}
    expected = {row: [next(words) for _ in group] for row, group in enumerate(references)}
    return [float(value) for value in Cider().compute_score(expected, candidates)[1]]


def require_cider(tokenization: str) -> None:
    """Raises IdeficsError for what CIDEr needs and this machine lacks."""
    try:
        import pycocoevalcap.cider.cider  # noqa: F401

        if tokenization == "treebank":
            import nltk.tokenize  # noqa: F401
    except ImportError as error:
        needed = "pycocoevalcap, and nltk for --tokenization treebank"
        remedy = 'pip install "idefics-cli[score]", or use --metric exact'
        raise IdeficsError(f"CIDEr needs {needed}: {remedy}") from error
    if tokenization == "ptb" and shutil.which("java") is None:
        raise IdeficsError("CIDEr splits words with Java: install a Java runtime, or use --tokenization treebank")


def tokenize(texts: Sequence[str], tokenization: str) -> list[str]:
    """Each text in lower case as words with blanks between them, the punctuation that pycocoevalcap drops left out."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    lines = [one_line(NOT_A_CHARACTER.sub(" ", text)) for text in texts]
    split = _split_by_treebank if tokenization == "treebank" else _split_by_ptb
    dropped = set(PUNCTUATIONS)
    return [" ".join(word for word in words if word not in dropped) for words in split(lines)]


def _split_by_ptb(lines: Sequence[str]) -> list[list[str]]:
    """By Stanford's tokenizer, from the archive within pycocoevalcap, in one run of Java."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    archive = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(archive), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "".join(f"{line}\n" for line in lines)
    try:
        finished = subprocess.run(command, input=text.encode(), capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace")
        raise IdeficsError(f"Java's tokenizer failed ({error} {said}): use --tokenization treebank") from error
    found = finished.stdout.decode().split("\n")[:-1]
    if len(found) != len(lines):
        raise IdeficsError(f"Java's tokenizer made {len(found)} of {len(lines)} lines: use --tokenization treebank")
    return [line.split() for line in found]


def _split_by_treebank(lines: Sequence[str]) -> list[list[str]]:
    from nltk.tokenize import TreebankWordTokenizer

    tokenize_line = TreebankWordTokenizer().tokenize
    # Lower case comes last, as with Stanford's: -lrb- and its like stay words, since only -LRB- is dropped.
    return [[word.lower() for word in tokenize_line(line, convert_parentheses=True)] for line in lines]
