"""Beam search for one row, slow and obvious: lists, a sort, and a whole forward pass for every beam and token.

A third opinion beside transformers' search and our tensors. The stopping rules are those of transformers'
`_beam_search`, told in its documentation of `early_stopping`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from idefics_cli.engine.options import DecodingOptions


def slow_beam_search(
    model,
    row: dict[str, Tensor],
    options: DecodingOptions,
    ends: set[int],
    banned: set[int],
    banned_sequences: Sequence[tuple[int, ...]] = (),
) -> list[tuple[float, list[int]]]:
    """(score, token ids with their end token) of the finished texts, best first. `row`: the tensors of one prompt."""
    beams, longest, penalty = options.num_beams, options.max_new_tokens, options.length_penalty
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, longest + 1):
        candidates = []
        for score, ids in running:
            log_probabilities = next_log_probabilities(model, row, ids)
            prompt = row["input_ids"][0].tolist()
            tokens = forbidden(prompt, ids, options, ends, banned)
            tokens |= completing(prompt + ids, banned_sequences, ends)
            log_probabilities[list(tokens)] = -torch.inf
            candidates += [(score + float(value), [*ids, token]) for token, value in enumerate(log_probabilities)]
        candidates.sort(key=lambda candidate: -candidate[0])
        candidates = candidates[: max(2, 1 + len(ends)) * beams]
        stops = [ids[-1] in ends or length == longest for _, ids in candidates]
        finished += [
            (s / length**penalty, ids) for (s, ids), stop in zip(candidates[:beams], stops, strict=False) if stop
        ]
        finished = sorted(finished, key=lambda text: -text[0])[:beams]
        running = [candidate for candidate, stop in zip(candidates, stops, strict=True) if not stop][:beams]
        if not running or (len(finished) == beams and not worth_going_on(running, finished, length, options)):
            break
    return finished


def worth_going_on(running: list, finished: list, length: int, options: DecodingOptions) -> bool:
    """Asked when there are as many finished texts as beams."""
    if options.early_stopping is True or options.num_beams == 1:  # one beam is greedy search
        return False
    reach = options.max_new_tokens if options.early_stopping == "never" and options.length_penalty > 0 else length
    return running[0][0] / reach**options.length_penalty > finished[-1][0]


def forbidden(
    prompt: list[int], ids: list[int], options: DecodingOptions, ends: set[int], banned: set[int]
) -> set[int]:
    """Tokens that may not come next."""
    tokens = set(banned)
    if len(ids) < options.min_new_tokens:
        tokens |= ends
    size, written = options.no_repeat_ngram_size, prompt + ids
    if size:
        tail = written[len(written) - size + 1 :]
        starts = range(len(written) - size + 1)
        tokens |= {written[start + size - 1] for start in starts if written[start : start + size - 1] == tail}
    return tokens


def completing(written: list[int], banned_sequences: Sequence[tuple[int, ...]], ends: set[int]) -> set[int]:
    """Tokens that would complete a banned sequence; an end token alone is none, since texts must end."""
    several = [ids for ids in banned_sequences if len(ids) > 1 or ids[0] not in ends]
    return {ids[-1] for ids in several if tuple(written[len(written) - len(ids) + 1 :]) == ids[:-1]}


@torch.no_grad()
def next_log_probabilities(model, row: dict[str, Tensor], ids: list[int]) -> Tensor:
    input_ids = torch.cat([row["input_ids"], torch.tensor([ids], dtype=torch.long)], dim=1)
    mask = row["image_attention_mask"]
    mask = torch.cat([mask, mask[:, -1:].expand(-1, len(ids), -1)], dim=1)
    logits = model(input_ids=input_ids, pixel_values=row["pixel_values"], image_attention_mask=mask).logits
    return logits[0, -1].float().log_softmax(dim=-1)
