"""Does the passes of one stage: what is asked in a :class:`Work`, answered in a :class:`Brought`.

A worker holds layers, keys and values, and the hidden states that wait at boundaries within its layers. It knows
nothing of sequences: where everything lies is decided in the head process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from exitlm.decode.cache.hidden_pool import HiddenPool
from exitlm.decode.kernels.runner import Arrived, Runner
from exitlm.decode.kernels.scores import Scores
from exitlm.decode.remote.frames import BadFrame
from exitlm.decode.rules import fires, probability
from exitlm.decode.work import AtExit, Brought, Final, Follower, Scored, Work

_FINAL_ROWS = 64  # rows of final logits at once


class Worker:
    """Runs the passes of one stage, one after the other."""

    def __init__(self, runner: Runner) -> None:
        self.runner, fused = runner, runner.fused
        self.hidden = HiddenPool(fused.config.hidden_size, fused.dtype, fused.device)

    @torch.inference_mode()
    def perform(self, work: Work) -> Brought:
        """Run a pass.

        Raises:
            BadFrame: it is none of this stage's.
        """
        self._check(work)
        begun, runner = time.perf_counter(), self.runner
        if work.tokens:
            hidden_MD = runner.embed(work.tokens)
        elif work.slots:
            hidden_MD = self.hidden.get(work.slots)
        else:
            assert work.hidden_MD is not None
            hidden_MD = work.hidden_MD.to(self.hidden.states_SD)
        arrived = runner.run(work.first, work.last, work.batch, hidden_MD)
        if work.kept:
            self.hidden.reach(max(work.kept))
            self.hidden.put(work.kept, arrived.hidden_MD)
        tests = {test.adapter: self._test(test, work.last, arrived) for test in work.wants.tests}
        finals, followers = self._finals(work.wants.finals, arrived), self._followers(work.wants.followers, arrived)
        share = runner.fused.share
        leaves = work.last == share.last and not share.ends
        seconds = time.perf_counter() - begun
        return Brought(work.number, seconds, tests, finals, followers, arrived.hidden_MD if leaves else None)

    def clear(self, group: int, blocks: Sequence[int]) -> None:
        """Overwrite blocks whose contents may not be numbers."""
        if not (
            0 <= group < len(self.runner.pool.groups) and all(0 <= b < self.runner.pool.blocks[group] for b in blocks)
        ):
            raise BadFrame("blocks came to be cleared that the pool has not")
        self.runner.pool.clear(group, blocks)

    def _check(self, work: Work) -> None:
        share, waits = self.runner.fused.share, len(self.hidden.states_SD)
        vocab, wants = self.runner.fused.config.vocab_size, work.wants
        entering = work.first == share.first
        inside = share.first <= work.first < work.last <= share.last
        begins = bool(work.tokens) == (work.first == 0) and bool(work.slots) == (not entering)
        known = all(0 <= t < vocab for t in (*work.tokens, *(f.token for f in wants.followers)))
        there = all(slot < waits for slot in work.slots) and bool(work.kept) == (work.last < share.last)
        heads = self.runner.heads_at(work.last) if inside else ()
        at_end = (share.ends and work.last == share.last) or not (wants.finals or wants.followers)
        sizes = work.hidden_MD is None or work.hidden_MD.shape[1:] == self.hidden.states_SD.shape[1:]
        if not (inside and begins and known and there and at_end and sizes):
            raise BadFrame("a pass came that is none of this stage's")
        if not all(test.adapter in heads for test in wants.tests):
            raise BadFrame("a pass came with a test of an exit that is not there")

    def _test(self, test: AtExit, boundary: int, arrived: Arrived) -> dict[int, Scored]:
        """A gate that does not fire needs no logits."""
        gated = [row for row, threshold in zip(test.rows, test.gates, strict=True) if not math.isnan(threshold)]
        gates = (
            dict(zip(gated, self.runner.gates(boundary, arrived, gated, test.adapter), strict=True)) if gated else {}
        )
        needs = {row for row, t in zip(test.rows, test.gates, strict=True) if row not in gates or fires(gates[row], t)}
        found = {row: Scored(gate=score) for row, score in gates.items() if row not in needs}
        rows = [row for row in test.rows if row in needs]
        if rows:
            logits = dict(zip(test.rows, test.logits, strict=True))
            wanted = any(logits[row] for row in rows)
            scores = self.runner.exit_scores(boundary, arrived, rows, test.adapter, logits=wanted)
            found |= _scored(scores, rows, logits, gates, likeliest(scores))
        return found

    def _finals(self, finals: Sequence[Final], arrived: Arrived) -> dict[int, Scored]:
        found: dict[int, Scored] = {}
        for cut in range(0, len(finals), _FINAL_ROWS):
            some = finals[cut : cut + _FINAL_ROWS]
            rows = [final.row for final in some]
            scores = self.runner.final_scores(arrived, rows, logits=any(final.logits for final in some))
            found |= _scored(scores, rows, {final.row: final.logits for final in some}, {}, [0.0] * len(rows))
        return found

    def _followers(self, followers: Sequence[Follower], arrived: Arrived) -> dict[int, tuple[float, dict[int, float]]]:
        found: dict[int, tuple[float, dict[int, float]]] = {}
        for most in dict.fromkeys(follower.most for follower in followers):
            alike = [follower for follower in followers if follower.most == most]
            for cut in range(0, len(alike), _FINAL_ROWS):
                some = alike[cut : cut + _FINAL_ROWS]
                rows, tokens = [one.row for one in some], [one.token for one in some]
                found |= dict(zip(rows, self.runner.log_probabilities(arrived, rows, tokens, most), strict=True))
        return found


def likeliest(scores: Scores) -> list[float]:
    """The largest probability of each row."""
    if scores.probability is not None:
        return scores.probability
    found: list[float] = probability(scores.logits_MK).double().tolist()
    return found


def _scored(
    scores: Scores, rows: Sequence[int], logits: dict[int, bool], gates: dict[int, float], likely: Sequence[float]
) -> dict[int, Scored]:
    def row_of(i: int, row: int) -> Tensor | None:
        return scores.logits_MK[i].cpu() if logits[row] else None

    return {
        row: Scored(gates.get(row, 1.0), scores.best[i], scores.finite[i], likely[i], row_of(i, row))
        for i, row in enumerate(rows)
    }
