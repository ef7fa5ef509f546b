"""One step of decoding as pure tensor functions over (rows, beams): beam search, greedy search and sampling.

The semantics are those of transformers' `GenerationMixin._beam_search` and `_sample` (generation/utils.py): the same
candidates, the same scores, the same stopping, and with the same draws the same samples. But every row keeps its own
length, so rows may start and end at different times, and nothing here reads a tensor's value on the host. Tensors in,
tensors out: no model, no cache, no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from idefics_cli.engine.options import DecodingOptions, Vocabulary
from idefics_cli.engine.sampling import sample, warp
from idefics_cli.engine.transfer import send, send_ids

NEVER = -1.0e9  # transformers' stand-in for "not a candidate": finite, so that sums of it stay ordered


@dataclass(frozen=True)
class BeamRules:
    """What does not change during a run, as tensors on the device.

    `forbidden` (tokens,) are never written, `end_ids` (tokens,) end a text, as `ends` (vocabulary,) says too,
    `penalties` (max_new_tokens + 1,) is length ** length_penalty. `banned_last` (sequences,) is not written where
    `banned_start` (sequences, tokens) stands right before it, padded on the left with −1, which any token matches.
    A step looks at `num_candidates` continuations of a row's beams, and draws `num_draws` times.
    """

    options: DecodingOptions
    forbidden: Tensor
    banned_start: Tensor
    banned_last: Tensor
    end_ids: Tensor
    ends: Tensor
    penalties: Tensor
    num_candidates: int
    num_draws: int

    @classmethod
    def of(
        cls,
        options: DecodingOptions,
        vocab_size: int,
        vocabulary: Vocabulary,
        device: torch.device | str = "cpu",
    ) -> BeamRules:
        ends, banned = vocabulary.end_token_ids, vocabulary.banned_sequences
        # As in transformers, an end token alone is not banned: texts must end.
        singles = [ids[0] for ids in banned if len(ids) == 1 and ids[0] not in ends]
        several, width = [ids for ids in banned if len(ids) > 1], longest_start(banned)
        starts = [[-1] * (width + 1 - len(ids)) + list(ids[:-1]) for ids in several]
        lengths = range(options.max_new_tokens + 1)
        # Even if every beam's best token ends its text, enough candidates are left to continue with.
        num_candidates = max(2, 1 + len(ends)) * options.num_beams
        num_choices = num_candidates if options.num_beams > 1 else options.num_paths
        ids_of = partial(send_ids, device=device)
        return cls(
            options,
            forbidden=ids_of([*vocabulary.banned_token_ids, *singles]),
            banned_start=ids_of(starts).view(len(several), width),
            banned_last=ids_of([ids[-1] for ids in several]),
            end_ids=ids_of(ends),
            ends=torch.zeros(vocab_size, dtype=torch.bool, device=device).index_fill(0, ids_of(ends), True),
            penalties=send(torch.tensor([float(max(each, 1)) ** options.length_penalty for each in lengths]), device),
            num_candidates=num_candidates,
            num_draws=num_choices if options.do_sample else 0,
        )


def longest_start(banned_sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens must be known to tell what may not come next."""
    return max((len(sequence) - 1 for sequence in banned_sequences if sequence), default=0)


@dataclass(frozen=True)
class BeamState:
    """Where each row's search stands. `tokens` of unwritten positions are meaningless.

    Running beams, best first: `scores` (rows, beams), `tokens` (rows, beams, max_new_tokens), all of length `length`
    (rows,). Finished texts, best first: `final_scores`, `final_tokens`, `final_lengths` and `is_final` likewise.
    `improvable` (rows,): a running beam may still beat a finished text. `done` (rows,): the row's search is over.
    `draws` (rows, max_new_tokens, draws): numbers from 0 to 1 that each step samples by.

    With one beam per text (greedy, samples) a path stays in its place, and so does its finished text.
    """

    scores: Tensor
    tokens: Tensor
    length: Tensor
    final_scores: Tensor
    final_tokens: Tensor
    final_lengths: Tensor
    is_final: Tensor
    improvable: Tensor
    done: Tensor
    draws: Tensor

    @classmethod
    def start(cls, draws: Tensor, options: DecodingOptions) -> BeamState:
        """Of beams only the first counts at first: the others would repeat it."""
        rows, beams, longest, device = len(draws), options.num_paths, options.max_new_tokens, draws.device
        scores = torch.full((rows, beams), NEVER if options.num_beams > 1 else 0.0, device=device)
        scores[:, 0] = 0.0
        return cls(
            scores=scores,
            tokens=torch.zeros(rows, beams, longest, dtype=torch.long, device=device),
            length=torch.zeros(rows, dtype=torch.long, device=device),
            final_scores=torch.full((rows, beams), NEVER, device=device),
            final_tokens=torch.zeros(rows, beams, longest, dtype=torch.long, device=device),
            final_lengths=torch.zeros(rows, beams, dtype=torch.long, device=device),
            is_final=torch.zeros(rows, beams, dtype=torch.bool, device=device),
            improvable=torch.ones(rows, dtype=torch.bool, device=device),
            done=torch.zeros(rows, dtype=torch.bool, device=device),
            draws=draws,
        )

    def pick(self, rows: Tensor) -> BeamState:
        """The rows of these indices."""
        return BeamState(**{each.name: getattr(self, each.name)[rows] for each in fields(self)})

    @staticmethod
    def join(first: BeamState, second: BeamState) -> BeamState:
        """The rows of both."""
        pairs = {each.name: (getattr(first, each.name), getattr(second, each.name)) for each in fields(BeamState)}
        return BeamState(**{name: torch.cat(pair) for name, pair in pairs.items()})


def step(logits: Tensor, state: BeamState, rules: BeamRules, context: Tensor) -> tuple[BeamState, Tensor]:
    """Write one token to every beam: logits (rows, beams, vocabulary) -> the next state and each new beam's parent.

    Parents are (rows, beams), indices among the row's old beams. `context` (rows, prompt tokens), padded on the left
    with −1, is what n-gram blocking, banned sequences and the penalty look at before the generated tokens.
    """
    return (beam_step if rules.options.num_beams > 1 else path_step)(logits, state, rules, context)


def path_step(logits: Tensor, state: BeamState, rules: BeamRules, context: Tensor) -> tuple[BeamState, Tensor]:
    """`step` where each beam is a text of its own: greedy search, or samples.

    A score is the sum of the model's own log-probabilities, whatever a token was chosen by. A text is over at its first
    end token; until the row's others are, what is written after it means nothing.
    """
    options, logits = rules.options, logits.float()
    choice = allowed_scores(logits.clone(), state, rules, context)
    if options.do_sample:
        draws = drawn_now(state)[:, :, None]  # (rows, beams, 1)
        tokens = sample(warp(choice, options, keep=1), draws)  # (rows, beams, 1)
    else:
        tokens = choice.argmax(dim=2, keepdim=True)
    chosen = choice.gather(2, tokens).squeeze(2)  # −inf: nothing may be written
    log_probabilities = logits.gather(2, tokens).squeeze(2) - logits.logsumexp(dim=2)
    scores = state.scores + torch.where(chosen == -torch.inf, chosen, log_probabilities)
    length = state.length + 1  # (rows,)
    tokens = tokens.squeeze(2)  # (rows, beams)
    parents = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    sequences = extended(state, parents, tokens)
    stops = rules.ends[tokens] | (length >= options.max_new_tokens)[:, None] | ~scores.isfinite()
    ends_now = stops & ~state.is_final
    penalised = scores / rules.penalties[length.clamp(max=options.max_new_tokens)][:, None]
    is_final = state.is_final | stops
    stepped = replace(
        state,
        scores=scores,
        tokens=sequences,
        length=length,
        final_scores=torch.where(ends_now, penalised, state.final_scores),
        final_tokens=torch.where(ends_now[:, :, None], sequences, state.final_tokens),
        final_lengths=torch.where(ends_now, length[:, None], state.final_lengths),
        is_final=is_final,
        done=is_final.all(dim=1),
    )
    return stepped, parents


def drawn_now(state: BeamState) -> Tensor:
    """The numbers that this step samples by, (rows, draws)."""
    now = state.length.clamp(max=state.draws.shape[1] - 1)[:, None, None]
    return state.draws.gather(1, now.expand(-1, 1, state.draws.shape[2])).squeeze(1)


def beam_step(logits: Tensor, state: BeamState, rules: BeamRules, context: Tensor) -> tuple[BeamState, Tensor]:
    """`step` of beam search, or of sampling from what it would choose from."""
    options = rules.options
    log_probabilities = allowed_log_probabilities(logits, state, rules, context)
    if options.do_sample:
        log_probabilities = warp(log_probabilities, options, keep=len(rules.end_ids) + 1)
        scores, parents, tokens = sampled_candidates(log_probabilities, state)
    else:
        scores, parents, tokens = candidates(log_probabilities, state.scores, rules.num_candidates)
    length = state.length + 1  # (rows,)
    stops = rules.ends[tokens] | (length >= options.max_new_tokens)[:, None]  # (rows, candidates)
    sequences = extended(state, parents, tokens)  # (rows, candidates, max_new_tokens)

    final = merge_final(state, scores, sequences, length, stops, rules)
    going_on = scores + stops.float() * NEVER
    chosen = going_on.topk(options.num_beams, dim=1).indices  # (rows, beams)
    running = going_on.gather(1, chosen)
    improvable = state.improvable & can_improve(running, final, length, rules)
    done = ~improvable | (length >= options.max_new_tokens)
    if options.early_stopping is True:
        done = done | final.is_final.all(dim=1)
    stepped = replace(
        final,
        scores=running,
        tokens=sequences.gather(1, chosen[:, :, None].expand(-1, -1, sequences.shape[2])),
        length=length,
        improvable=improvable,
        done=state.done | done,
    )
    return stepped, parents.gather(1, chosen)


def allowed_log_probabilities(logits: Tensor, state: BeamState, rules: BeamRules, context: Tensor) -> Tensor:
    """log p of each next token, −inf where it may not be written; not normalised again, as in transformers.

    The vocabulary is gone through as seldom as it can be: only the few tokens that are not allowed are written to.
    """
    return allowed_scores(logits.log_softmax(dim=-1, dtype=torch.float32), state, rules, context)


def allowed_scores(scores: Tensor, state: BeamState, rules: BeamRules, context: Tensor) -> Tensor:
    """`scores` (rows, beams, vocabulary), which are changed in place: −inf where a token may not be written."""
    if rules.options.repetition_penalty != 1.0:
        penalise_repetition(scores, known_tokens(state, context), rules.options.repetition_penalty)
    scores.index_fill_(2, rules.forbidden, -torch.inf)
    if rules.options.min_new_tokens:
        too_short = (state.length < rules.options.min_new_tokens)[:, None, None]
        scores.index_copy_(2, rules.end_ids, scores[..., rules.end_ids].masked_fill(too_short, -torch.inf))
    if rules.options.no_repeat_ngram_size:
        scores.masked_fill_(repeated_ngrams(state, context, rules), -torch.inf)
    if len(rules.banned_last):
        add_bans(scores, state, rules, context)
    return scores


def penalise_repetition(scores: Tensor, known: Tensor, penalty: float) -> None:
    """Make the tokens of prompt and text less likely, in place, each once (Keskar et al. 2019, section 4.1)."""
    tokens = torch.where(known < 0, known.amax(dim=2, keepdim=True), known)  # where there is none, any of the others
    found = scores.gather(2, tokens)
    scores.scatter_(2, tokens, torch.where(found < 0, found * penalty, found / penalty))


def add_bans(scores: Tensor, state: BeamState, rules: BeamRules, context: Tensor) -> None:
    """−inf, in place, on tokens that would complete a banned sequence."""
    recent = last_tokens(known_tokens(state, context), state, rules.banned_start.shape[1])  # (rows, beams, tokens)
    same = (recent[:, :, None] == rules.banned_start) | (rules.banned_start < 0)
    penalties = torch.zeros(same.shape[:3], device=same.device).masked_fill(same.all(dim=-1), -torch.inf)
    scores.scatter_add_(2, rules.banned_last.expand_as(penalties), penalties)


def repeated_ngrams(state: BeamState, context: Tensor, rules: BeamRules) -> Tensor:
    """(rows, beams, vocabulary): true on tokens that would complete an n-gram which prompt or text holds already."""
    size = rules.options.no_repeat_ngram_size
    sequence = known_tokens(state, context)
    rows, beams, _ = sequence.shape
    if sequence.shape[2] < size:
        return torch.zeros(rows, beams, rules.ends.shape[0], dtype=torch.bool, device=sequence.device)
    windows = sequence.unfold(2, size, 1)  # (rows, beams, windows, size)
    tail = last_tokens(sequence, state, size - 1)
    same = (windows[..., :-1] == tail[:, :, None]).all(dim=-1) & (windows >= 0).all(dim=-1)
    repeats = torch.zeros(rows, beams, rules.ends.shape[0] + 1, dtype=torch.bool, device=sequence.device)
    # Windows that do not match write to a column after the vocabulary, which is dropped.
    target = torch.where(same, windows[..., -1], rules.ends.shape[0])
    return repeats.scatter(2, target, True)[..., :-1]


def known_tokens(state: BeamState, context: Tensor) -> Tensor:
    """Prompt and text, (rows, beams, prompt tokens + max_new_tokens), −1 where there is no token."""
    _, beams, longest = state.tokens.shape
    written = torch.arange(longest, device=state.tokens.device) < state.length[:, None, None]
    return torch.cat([context[:, None].expand(-1, beams, -1), state.tokens.masked_fill(~written, -1)], dim=2)


def last_tokens(sequence: Tensor, state: BeamState, count: int) -> Tensor:
    """The last `count` of `known_tokens`, (rows, beams, count); −2 before the first."""
    end = sequence.shape[2] - state.tokens.shape[2] + state.length  # (rows,)
    places = end[:, None] + torch.arange(-count, 0, device=sequence.device)  # (rows, count)
    found = sequence.gather(2, places.clamp(min=0)[:, None].expand(-1, sequence.shape[1], -1))
    return found.masked_fill((places < 0)[:, None], -2)


def candidates(log_probabilities: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best `count` continuations of all beams, whose own `scores` (rows, beams) count: scores, parents and tokens,
    each (rows, count), best first."""
    per_beam = min(count, log_probabilities.shape[2])
    best, tokens = log_probabilities.topk(per_beam, dim=2)  # (rows, beams, per beam): no more of one beam can count
    total, places = (best + scores[:, :, None]).flatten(1).topk(count, dim=1)
    return total, places // per_beam, tokens.flatten(1).gather(1, places)


def sampled_candidates(log_probabilities: Tensor, state: BeamState) -> tuple[Tensor, Tensor, Tensor]:
    """As `candidates`, drawn without repetition in place of the best: the order is that of the draws."""
    total = (log_probabilities + state.scores[:, :, None]).flatten(1)
    places = sample(total, drawn_now(state))
    vocab_size = log_probabilities.shape[2]
    return total.gather(1, places), places // vocab_size, places % vocab_size


def extended(state: BeamState, parents: Tensor, tokens: Tensor) -> Tensor:
    """Each candidate's whole text, (rows, candidates, max_new_tokens)."""
    longest = state.tokens.shape[2]
    sequences = state.tokens.gather(1, parents[:, :, None].expand(-1, -1, longest))
    place = state.length.clamp(max=longest - 1)[:, None, None].expand(-1, parents.shape[1], 1)
    return sequences.scatter(2, place, tokens[:, :, None])


def merge_final(
    state: BeamState, scores: Tensor, sequences: Tensor, length: Tensor, stops: Tensor, rules: BeamRules
) -> BeamState:
    """The best texts among those finished before and the candidates that end now.

    Only the first `num_beams` candidates may end; a row whose search is over takes none.
    """
    beams = rules.options.num_beams
    ends_now = stops & (torch.arange(stops.shape[1], device=stops.device) < beams)
    closed = ~state.improvable
    if rules.options.early_stopping is True:
        closed = closed | state.is_final.all(dim=1)
    penalised = scores / rules.penalties[length.clamp(max=rules.options.max_new_tokens)][:, None]
    penalised = penalised + (~ends_now).float() * NEVER
    penalised = penalised.masked_fill(closed[:, None], -torch.inf)  # NaN, too
    merged_scores = torch.cat([state.final_scores, penalised], dim=1)
    best = merged_scores.topk(beams, dim=1).indices  # (rows, beams)
    merged_tokens = torch.cat([state.final_tokens, sequences], dim=1)
    merged_lengths = torch.cat([state.final_lengths, length[:, None].expand_as(stops)], dim=1)
    return replace(
        state,
        final_scores=merged_scores.gather(1, best),
        final_tokens=merged_tokens.gather(1, best[:, :, None].expand(-1, -1, merged_tokens.shape[2])),
        final_lengths=merged_lengths.gather(1, best),
        is_final=torch.cat([state.is_final, ends_now], dim=1).gather(1, best),
    )


def can_improve(running: Tensor, final: BeamState, length: Tensor, rules: BeamRules) -> Tensor:
    """Whether the best running beam may still beat the worst finished text, (rows,).

    How long it would become is guessed as transformers does: as long as it is, or, for `early_stopping="never"` with
    a positive penalty, as long as it may be.
    """
    options = rules.options
    if options.early_stopping == "never" and options.length_penalty > 0.0:
        penalty = rules.penalties[-1]
    else:
        penalty = rules.penalties[length.clamp(max=options.max_new_tokens)]
    best_possible = running[:, 0] / penalty
    worst = final.final_scores.amin(dim=1, keepdim=True)
    worst = torch.where(final.is_final, worst, NEVER)  # (rows, beams)
    return (best_possible[:, None] > worst).any(dim=1)
