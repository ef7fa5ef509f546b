"""Decoding through `GenerationMixin.generate`: slow, obvious, and the reference for anything faster.

Tensors in, token sequences out. It knows no text and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from idefics_cli.engine.options import DecodingOptions
from idefics_cli.model.modeling import IdeficsForVisionText2Text


@dataclass(frozen=True)
class Vocabulary:
    """The token ids with a meaning of their own: those that end a text, those never written, and padding.

    The last id of a banned sequence is not written where the others stand right before it, the prompt's end included.
    """

    end_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...]
    pad_token_id: int
    banned_sequences: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Hypothesis:
    """One decoded text: its ids without the closing end token, and its score as the cli page defines it."""

    token_ids: tuple[int, ...]
    score: float


def generation_config(options: DecodingOptions, vocabulary: Vocabulary) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        num_beams=options.num_beams,
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens or None,
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping if options.num_beams > 1 else False,
        no_repeat_ngram_size=options.no_repeat_ngram_size or None,
        num_return_sequences=options.num_return_sequences,
        suppress_tokens=list(vocabulary.banned_token_ids) or None,
        bad_words_ids=[list(sequence) for sequence in vocabulary.banned_sequences] or None,
        eos_token_id=list(vocabulary.end_token_ids),
        pad_token_id=vocabulary.pad_token_id,
        return_dict_in_generate=True,
        output_scores=options.num_beams > 1,
        output_logits=options.num_beams == 1,
    )


@torch.inference_mode()
def generate(
    model: IdeficsForVisionText2Text, inputs: dict[str, Tensor], options: DecodingOptions, vocabulary: Vocabulary
) -> list[list[Hypothesis]]:
    """For each row of `inputs` (the model's own keyword tensors, left-padded) its best hypotheses, best first."""
    output = model.generate(**inputs, generation_config=generation_config(options, vocabulary))
    prompt_length = inputs["input_ids"].shape[1]
    generated = output.sequences[:, prompt_length:]  # (rows * num_return_sequences, new tokens)
    if options.num_beams > 1:
        scores = output.sequences_scores.tolist()
    else:
        scores = greedy_scores(output, generated, options, vocabulary)
    hypotheses = [
        Hypothesis(until_end(row, vocabulary.end_token_ids), score)
        for row, score in zip(generated.tolist(), scores, strict=True)
    ]
    per_row = options.num_return_sequences
    return [hypotheses[first : first + per_row] for first in range(0, len(hypotheses), per_row)]


def until_end(token_ids: Sequence[int], end_token_ids: Sequence[int]) -> tuple[int, ...]:
    """The ids before the first end token."""
    end = next((position for position, token_id in enumerate(token_ids) if token_id in end_token_ids), None)
    return tuple(token_ids[:end])


def greedy_scores(
    output: GenerateDecoderOnlyOutput, generated: Tensor, options: DecodingOptions, vocabulary: Vocabulary
) -> list[float]:
    """What beam search with one beam would say: the sum of log-probabilities, the end token's among them, over
    length ** length_penalty. `generate` gives raw logits only for greedy search."""
    scores = []
    log_probabilities = torch.stack(output.logits, dim=1).float().log_softmax(dim=-1)  # (rows, new tokens, vocabulary)
    chosen = log_probabilities.gather(-1, generated[:, :, None]).squeeze(-1)  # (rows, new tokens)
    for row, token_ids in zip(chosen, generated.tolist(), strict=True):
        length = min(len(until_end(token_ids, vocabulary.end_token_ids)) + 1, len(token_ids))
        scores.append(float(row[:length].sum()) / length**options.length_penalty)
    return scores
