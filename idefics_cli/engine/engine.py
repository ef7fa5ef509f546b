"""The decoding engine: encode each image once, read each prompt once, keep rows busy, move no key to reorder beams.

Prompts come in as token ids with pixels, hypotheses go out as they finish. The engine knows nothing of tokenization and
nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from idefics_cli.engine.model_runner import ModelRunner
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.engine.prompt_source import EncodedPrompt, IterableSource, PromptSource
from idefics_cli.engine.scheduler import Outcome, Scheduler


class Engine(ModelRunner):
    """Decodes streams of prompts with one model."""

    def generate(self, prompts: Iterable[EncodedPrompt], options: DecodingOptions) -> Iterator[tuple[int, Outcome]]:
        """`stream` over an iterable, which is taken from a few batches ahead."""
        return self.stream(IterableSource(prompts), options)

    def stream(
        self, source: PromptSource, options: DecodingOptions, banned_sequences: Sequence[Sequence[int]] = ()
    ) -> Iterator[tuple[int, Outcome]]:
        """(number of the prompt, its hypotheses, best first) for each prompt, in the order in which they finish.

        Prompts are numbered from 0 in the order taken. The source is waited for only while there is nothing else to
        do. A prompt that the device's memory does not hold even alone, or whose values are not finite, has a RowError
        in place of hypotheses; IdeficsError is raised where all of the first ones are not. `banned_sequences` are as
        `Vocabulary` has them, for this stream, beside its own.
        """
        banned = (*self.vocabulary.banned_sequences, *map(tuple, banned_sequences))
        vocabulary = replace(self.vocabulary, banned_sequences=banned)
        yield from Scheduler(self, source, options, vocabulary).run()
