"""What the engine reads of logits: what may not come, an exit's score, log-probabilities. Pure functions of rows.

Shapes: T tested rows, K rows of an exit's output matrix, V vocab_size.
"""

from __future__ import annotations

import collections.abc

import torch
from torch import Tensor

from exitlm.decode.kernels.scores import Scores
from exitlm.decode.rules import SCORES, certain, probability
from exitlm.decode.sequence import Sequence
from exitlm.errors import UserError

_KNOWN = (probability, certain)
"""Scores that the head's own numbers give."""


def expand(logits_K: Tensor, candidates_K: Tensor | None, vocab_size: int) -> Tensor:
    """Logits of a candidate head over the whole vocabulary ``[V]``: -inf outside of the candidates."""
    if candidates_K is None:
        return logits_K
    return logits_K.new_full((vocab_size,), -torch.inf).index_copy_(0, candidates_K, logits_K)


def restricted(
    raw_TK: Tensor, tested: collections.abc.Sequence[Sequence], candidates_K: Tensor | None, vocab_size: int
) -> Tensor:
    """Logits without what each sequence may not write."""
    if not any(sequence.restricts for sequence in tested):
        return raw_TK
    rows, dtype = [], torch.promote_types(raw_TK.dtype, torch.float32)
    for sequence, raw_K in zip(tested, raw_TK, strict=True):
        try:
            logits_V = sequence.restricted(expand(raw_K, candidates_K, vocab_size))
        except UserError:  # a draft led its grammar into a dead end: nothing may follow it
            rows.append(torch.full_like(raw_K, -torch.inf, dtype=dtype))
            continue
        rows.append((logits_V if candidates_K is None else logits_V[candidates_K]).to(dtype))
    return torch.stack(rows)


def scores(
    logits_TK: Tensor, tested: collections.abc.Sequence[Sequence], known: Scores | None = None
) -> tuple[list[float], list[int]]:
    """Score and best row of each row, with one wait for an accelerator. ``known`` is what came with the logits before
    anything was restricted. Each row is decided by itself: whose else is tested changes nothing of it."""
    given = [None if known is None else _given(known, row, sequence) for row, sequence in enumerate(tested)]
    rest = [row for row, score in enumerate(given) if score is None]
    if rest:
        rows_RK = logits_TK if len(rest) == len(given) else logits_TK[rest]
        names = [tested[row].plan.rule_name for row in rest]
        if len(set(names)) == 1:
            score_R = SCORES[names[0]](rows_RK)
        else:
            score_R = torch.stack([SCORES[name](row_K) for name, row_K in zip(names, rows_RK, strict=True)])
        found, best = torch.stack([score_R.double(), rows_RK.argmax(-1).double()]).tolist()
    else:
        found, best = [], []
    computed = {row: (score, int(at)) for row, score, at in zip(rest, found, best, strict=True)}
    both = []
    for row, score in enumerate(given):
        if score is None:
            both.append(computed[row])
        else:
            assert known is not None
            both.append((score, known.best[row]))
    return [score for score, _ in both], [at for _, at in both]


def _given(known: Scores, row: int, sequence: Sequence) -> float | None:
    """A row's score, where the numbers that came with its logits tell it."""
    if known.probability is None or not known.finite[row] or not is_given(sequence):
        return None
    return known.probability[row] if SCORES[sequence.plan.rule_name] is probability else 1.0


def is_given(sequence: Sequence) -> bool:
    """Whether the head's own numbers tell a sequence's score, so that it needs no logits."""
    return not sequence.restricts and SCORES[sequence.plan.rule_name] in _KNOWN


def not_finite(token: int, dtype: torch.dtype, cache: torch.dtype) -> UserError:
    """The sentence for final logits that are not numbers, for the new token of this number. ``cache``: what holds keys
    and values."""
    remedy = ""
    if dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        remedy = f", or {name} is too narrow for them: get them again, or load them with dtype 'float32'"
    elif cache == torch.float16:
        remedy = ", or their keys exceed float16: get them again, or decode with EngineConfig(kv_dtype='float32')"
    return UserError(
        f"the final logits for new token {token} are not finite (NaN or infinity); the weights are damaged"
        + (remedy or ": get them again")
    )


def in_groups(
    wanted: collections.abc.Sequence[tuple[Sequence, list[int]]], most: int
) -> collections.abc.Iterator[list[tuple[Sequence, list[int]]]]:
    """Cut a list into groups of at most ``most`` rows; one sequence's rows stay together."""
    group: list[tuple[Sequence, list[int]]] = []
    for sequence, rows in wanted:
        if group and sum(len(each) for _, each in group) + len(rows) > most:
            yield group
            group = []
        group.append((sequence, rows))
    if group:
        yield group
