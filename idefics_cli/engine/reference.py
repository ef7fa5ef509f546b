"""Decoding through `GenerationMixin.generate`: slow, obvious, and the reference for anything faster.

Tensors in, token sequences out. It knows no text and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from idefics_cli.engine.options import DecodingOptions, Hypothesis, Vocabulary
from idefics_cli.engine.prompt_source import EncodedPrompt
from idefics_cli.model.kv_interface import image_attention_mask
from idefics_cli.model.modeling import IdeficsForVisionText2Text


def collate(encoded: Sequence[EncodedPrompt], vocabulary: Vocabulary, image_size: int) -> dict[str, Tensor]:
    """Rows -> the model's own keyword tensors, padded on the left; `image_size` is S, needed where no row has an image.

    `input_ids` and `attention_mask` (rows, tokens), `pixel_values` (rows, images, 3, S, S) with at least one image,
    absent ones all zero, and `image_attention_mask` (rows, tokens, images).
    """
    assert encoded, "a batch has at least one row"
    for row in encoded:
        num_image_tokens = row.input_ids.count(vocabulary.image_token_id)
        assert num_image_tokens == len(row.pixels), f"{num_image_tokens} image tokens for {len(row.pixels)} images"
    ids = [torch.tensor(row.input_ids) for row in encoded]
    pad_left = partial(pad_sequence, batch_first=True, padding_side="left")
    input_ids = pad_left(ids, padding_value=vocabulary.pad_token_id)
    num_images = max(1, *(len(row.pixels) for row in encoded))
    pixel_values = torch.zeros(len(encoded), num_images, 3, image_size, image_size)
    for images, row in zip(pixel_values, encoded, strict=True):
        for image, pixels in zip(images, row.pixels, strict=False):
            assert pixels.is_floating_point(), "bytes of an image are not its pixels"
            image.copy_(pixels)
    return {
        "input_ids": input_ids,
        "attention_mask": pad_left([torch.ones_like(each) for each in ids]),
        "pixel_values": pixel_values,
        "image_attention_mask": image_attention_mask(
            input_ids, num_images, vocabulary.image_token_id, vocabulary.end_token_ids[0]
        ),
    }


def generation_config(options: DecodingOptions, vocabulary: Vocabulary) -> GenerationConfig:
    return GenerationConfig(
        do_sample=options.do_sample,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
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
