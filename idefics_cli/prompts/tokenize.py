"""Prompt -> token ids, and generated ids -> text. Knows text and where images stand in it, no model.

The ids are those of transformers' IDEFICS processor, without its traps: a text is never an address that is fetched,
never loses its spaces, and never turns into a special token, whatever words it holds.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer

from idefics_cli.errors import CheckpointError, IdeficsError
from idefics_cli.prompts.templates import END_OF_UTTERANCE, Prompt, SpecialToken, merge_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"
FAKE = "<fake_token_around_image>"
AROUND_IMAGE = (SpecialToken(FAKE), SpecialToken(IMAGE), SpecialToken(FAKE))
# Characters that Unicode promises never to assign (and halves of characters, which no encoder takes): not text.
FIRST_MARKER = 0xFDD0
NOT_TEXT = re.compile("[\ud800-\udfff\ufdd0-\ufdef]")
REPLACEMENT = "\ufffd"


class PromptEncoder:
    """Prompts -> token ids, and generated ids -> text, with the checkpoint's own tokenizer.

    Text is encoded by a twin of the tokenizer in which no special token can be spelled out. Where a special token
    belongs, the twin gets a *marker* instead: a character that is not text, added as a token, so that it splits its
    surroundings just as the special token would. Markers that come in as text, and halves of surrogate pairs, become
    U+FFFD.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises CheckpointError when the tokenizer lacks `<s>`, `</s>` or one of the two image tokens."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise CheckpointError(
                f"{type(tokenizer).__name__} has no backend of the tokenizers library: add tokenizer.json"
            )
        self._tokenizer: Tokenizer = backend
        self.bos_token_id: int = self._required(tokenizer.bos_token)
        self.eos_token_id: int = self._required(tokenizer.eos_token)
        self.image_token_id: int = self._required(IMAGE)
        self.fake_token_id: int = self._required(FAKE)
        self.pad_token_id: int = _first_known(tokenizer.pad_token_id, tokenizer.unk_token_id, self.eos_token_id)
        end_of_utterance = backend.token_to_id(END_OF_UTTERANCE.name)
        self.is_instruct: bool = end_of_utterance is not None
        self.end_token_ids: tuple[int, ...] = (self.eos_token_id, end_of_utterance)[: 1 + self.is_instruct]
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.banned_token_ids: tuple[int, ...] = (self.image_token_id, self.fake_token_id)
        self._encoding = threading.Lock()
        self._build_twin(tokenizer)

    def _required(self, name: str | None) -> int:
        token_id = None if name is None else self._tokenizer.token_to_id(name)
        if token_id is None:
            missing = name or "token for the start or the end of a text"
            raise CheckpointError(f"the tokenizer has no {missing}: use IDEFICS's own tokenizer files")
        return token_id

    def _build_twin(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._bos = SpecialToken(str(tokenizer.bos_token))
        marked = (self._bos.name, str(tokenizer.eos_token), IMAGE, FAKE, END_OF_UTTERANCE.name)
        names = dict.fromkeys((*marked, *tokenizer.all_special_tokens))
        ids = {name: self._tokenizer.token_to_id(name) for name in names}
        special_ids = {name: token_id for name, token_id in ids.items() if token_id is not None}
        self._special_ids = frozenset(special_ids.values())
        self._twin = literal_twin(self._tokenizer, special_ids)
        marked_ids = {name: special_ids[name] for name in marked if name in special_ids}
        self._markers = _add_markers(self._twin, self._tokenizer, marked_ids, self._bos.name)
        # The first half is for vocabularies in which the letters of a special token can add up to it after all.
        unknown_token_id = _first_known(tokenizer.unk_token_id, self.pad_token_id)
        self._own_ids = dict.fromkeys(self._special_ids, unknown_token_id)
        self._own_ids |= {self._twin.token_to_id(marker): special_ids[name] for name, marker in self._markers.items()}
        expected = [self.bos_token_id, self.fake_token_id, self.image_token_id, self.fake_token_id]
        if (found := self.encode((object(),))) != expected:
            raise CheckpointError(f"the tokenizer splits its special tokens, {expected} as {found}: restore its files")

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of the prompt after one `<s>`: `<image>` once for every image, no special token for any text.

        Neighbouring images share the `<fake_token_around_image>` between them; an empty text between them does not
        count. Raises IdeficsError for a special token that this tokenizer lacks. Threads take turns: the work is the
        interpreter's and the tokenizer's, which several do no faster, and the thread that runs the model needs the
        interpreter's lock hundreds of times a step.
        """
        with self._encoding:
            marked = "".join(self._marked(item) for item in (self._bos, *_with_image_tokens(merge_texts(prompt))))
            return [self._own_ids.get(token_id, token_id) for token_id in self._twin_ids(marked)]

    def spelled(self, prompt: Prompt) -> str:
        """The same for people to read: special tokens by their names."""
        items = (self._bos, *_with_image_tokens(merge_texts(prompt)))
        return "".join(item if isinstance(item, str) else item.name for item in items)

    def _marked(self, item: str | SpecialToken) -> str:
        if isinstance(item, str):
            return NOT_TEXT.sub(REPLACEMENT, item)
        if item.name not in self._markers:
            raise IdeficsError(f"the tokenizer has no {item.name}: use a template for this kind of model")
        return self._markers[item.name]

    def _twin_ids(self, text: str) -> list[int]:
        """A batch, of one: it lets other threads run meanwhile, and one text alone does not."""
        return self._twin.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def banned_sequences(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Each word's token ids as a text of its own: what transformers takes as `bad_words_ids`.

        The last id of a sequence must not follow the others; it is free elsewhere. LLaMA's "\n" is a piece for a blank
        and then a byte, so that neither blanks nor a line break right after a word are banned.
        """
        return tuple(dict.fromkeys(tuple(self._twin_ids(self._marked(word))) for word in words))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of generated ids, stripped, special tokens left out."""
        text_ids = [int(token_id) for token_id in token_ids if int(token_id) not in self._special_ids]
        return self._tokenizer.decode(text_ids, skip_special_tokens=True).strip()


def _first_known(*token_ids: int | None) -> int:
    return next(token_id for token_id in token_ids if token_id is not None)


def literal_twin(tokenizer: Tokenizer, special_names: Collection[str]) -> Tokenizer:
    """A copy of the tokenizer to which the special tokens' names are ordinary words."""
    description = json.loads(tokenizer.to_str())
    description["truncation"] = description["padding"] = None
    for token in description["added_tokens"]:
        token["special"] |= token["content"] in special_names
    if "merges" in description["model"]:  # a converted vocabulary may hold merges that end in "</s>"
        merges = description["model"]["merges"]
        description["model"]["merges"] = [pair for pair in merges if _merged(pair) not in special_names]
    twin = Tokenizer.from_str(json.dumps(description))
    twin.encode_special_tokens = True
    return twin


def _merged(pair: str | Sequence[str]) -> str:
    return pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair)


def _add_markers(twin: Tokenizer, original: Tokenizer, special_ids: dict[str, int], bos: str) -> dict[str, str]:
    """Give the twin a marker for every special token, with its habits about blanks beside it. Returns {name: marker}.

    `normalized` says whether a token is looked for before or after the normaliser. That of `<s>` is kept, since it
    decides whether the text after it begins with a blank; the others could no longer be found inside a prompt.
    """
    habits = original.get_added_tokens_decoder()
    markers = {name: chr(FIRST_MARKER + index) for index, name in enumerate(special_ids)}
    for name, marker in markers.items():
        habit = habits.get(special_ids[name], AddedToken(name, normalized=False))
        normalized = name == bos and habit.normalized
        token = AddedToken(marker, lstrip=habit.lstrip, rstrip=habit.rstrip, normalized=normalized, special=False)
        twin.add_tokens([token])
    return markers


def _with_image_tokens(prompt: Prompt) -> Iterator[str | SpecialToken]:
    """The prompt with the special tokens of every image in the image's place."""
    after_image = False
    for item in prompt:
        is_image = not isinstance(item, str | SpecialToken)
        if is_image:
            yield from AROUND_IMAGE[after_image:]
        elif item in AROUND_IMAGE:
            raise IdeficsError(f"{item.name} stands only where an image is: put the image into the prompt")
        else:
            yield item
        after_image = is_image
