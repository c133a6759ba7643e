"""The price of time: what passes cost on this machine, what was lately gained, and the pass that the scheduler chooses.

The table of costs is measured when it is first needed, and follows the passes that run. None of this changes a token.
"""

from __future__ import annotations

import collections.abc
import math
import time
from dataclasses import replace
from pathlib import Path

from exitlm.decode.arrival import Runs
from exitlm.decode.kernels.runner import Runner
from exitlm.decode.options import EngineConfig
from exitlm.decode.pricing.acceptance import AcceptanceTable
from exitlm.decode.pricing.costs import Costs
from exitlm.decode.pricing.measure_costs import NO_ROOM, cached
from exitlm.decode.pricing.scheduler import Exit, Limits, Pass, Rate, SequenceView, next_pass
from exitlm.decode.sequence import Sequence
from exitlm.weights.store import cache_directory

MEASURE_AGAIN = 30.0  # seconds from one measurement on a busy machine to the next


class Pricing:
    """Costs, acceptances and the recent gain of one engine."""

    def __init__(
        self, runner: Runs, options: EngineConfig, costs: Costs | None = None, cache_dir: Path | None = None
    ) -> None:
        """``costs`` replaces measuring; ``cache_dir`` is where measured costs are kept."""
        self.runner = runner
        self.acceptance = AcceptanceTable()
        self.note = ""  # what the user should know of the table
        self._rate = Rate()
        self._limits = Limits(max_rows=options.max_rows, prefill_chunk=options.prefill_chunk, max_wait=options.max_wait)
        self._costs, self._cache_dir = costs, cache_dir
        self._next_measure, self._unit_is_unknown = 0.0, True

    @property
    def origin(self) -> str | None:
        """Where the table came from; None where nobody needed it so far."""
        return None if self._costs is None else self._costs.origin

    @property
    def gain(self) -> float:
        """Tokens per second lately over those of plain decoding, at least 1."""
        return self._rate.gain

    @property
    def costs(self) -> Costs:
        """Costs of passes on this machine: given, kept from an earlier run, or measured now; again after a while where
        the machine was too busy to be measured."""
        if self._costs is None or (not self._costs.steady and time.monotonic() >= self._next_measure):
            assert isinstance(self.runner, Runner)  # others come with their costs
            costs = cached(self.runner, self._cache_dir or cache_directory())
            self._costs, self._next_measure = costs, time.monotonic() + MEASURE_AGAIN
            if costs.origin == NO_ROOM:
                self.note = (
                    "engine.kv_bytes leaves no room to measure what passes cost, so that what exits gain here is a "
                    "guess; raise it, or decode fewer texts at once"
                )
            elif not costs.steady:
                longer = f"took up to {1 + costs.spread:.1f} times as long"
                self.note = (
                    f"this machine is busy (equal passes {longer if costs.spread < math.inf else 'were interrupted'}), "
                    "so that what exits gain here is a guess; the costs of passes are not kept, and will be measured "
                    "again"
                )
            elif costs.origin not in ("measured", "kept"):
                self.note = f"the costs of passes were {costs.origin}"
            else:
                self.note = ""
        return self._costs

    def choose(self, sequences: collections.abc.Sequence[Sequence]) -> Pass | None:
        """The next pass of these sequences, in order of arrival."""
        return next_pass([self.view(sequence) for sequence in sequences], self.costs, self._rate, self._limits)

    def count(self, key: collections.abc.Hashable, accepted: bool) -> None:
        """Note whether a draft of a source was right, for all sequences to come."""
        self.acceptance = self.acceptance.observed(key, 1, int(accepted))

    def view(self, sequence: Sequence) -> SequenceView:
        """A sequence as the scheduler sees it."""
        filled, bounds = sequence.filled, self.runner.bounds
        waiting = tuple(
            (bounds[b], filled[b - 1] - filled[b]) for b in range(len(filled) - 1, 0, -1) if filled[b - 1] > filled[b]
        )
        moving = max(0, sequence.deep_end - filled[-1])
        if sequence.prefilling:
            prompt = sequence.prefill_end - filled[0]
            return SequenceView(
                key=sequence.key, mode=sequence.config.mode, prefill=True, prompt=prompt, waiting=waiting,
                moving=moving, context=filled[0], waited=sequence.waited,
            )  # fmt: skip
        unstarted = sequence.length - filled[0]
        ready: tuple[float, ...] = (1.0,) * unstarted
        worth: tuple[float, ...] = ()
        mode = "full" if sequence.test is None else "threshold"
        layers = [] if sequence.test is None else [e for e in sequence.plan.exits if sequence.test.tries(e)]
        exits = tuple(Exit(layer=e) for e in layers)
        if sequence.is_priced:
            assert sequence.drafting is not None
            mode, worths, verified = "lossless", sequence.worths(), len(sequence.ids) - 1
            ready = tuple(worths[max(0, filled[0] - verified) :]) if unstarted else ()
            worth = tuple(worths[filled[-1] + moving - verified : filled[0] - verified])
            keys, drafts = map(sequence.plan.source, layers), len(sequence.drafts)
            odds = [sequence.drafting.odds(key, self.acceptance, sequence.generated, drafts) for key in keys]
            exits = tuple(
                Exit(layer=e, firing=firing, acceptance=right) for e, (firing, right) in zip(layers, odds, strict=True)
            )
        return SequenceView(
            key=sequence.key, mode=mode, ready=ready, waiting=waiting, moving=moving, worth=worth, exits=exits,
            context=filled[0], waited=sequence.waited,
        )  # fmt: skip

    def observe(
        self, first: int, last: int, rows: tuple[int, int], *, sequences: int, heads: int, tests: int, context: float,
        seconds: float, own: float, emitted: int, worth: float,
    ) -> None:  # fmt: skip
        """Learn from a pass between two boundaries.

        ``rows``: those of decoding sequences, and all; ``sequences`` that decode; ``heads``: rows of final logits;
        ``tests`` at its end; ``context``: positions of a sequence on average; ``emitted`` tokens in ``seconds``, of
        which ``own`` were the engine's, where ``worth`` were to be expected.
        """
        costs = self._costs
        if costs is None or not rows[0]:
            return
        begin, end = self.runner.bounds[first], self.runner.bounds[last]

        def by_table(count: int) -> float:
            found = costs.span(begin, end, count, context) + costs.final(heads)
            return found + (costs.tests(end, tests) if tests else 0.0)

        predicted, whole, full = by_table(rows[0]), by_table(rows[1]), costs.full(sequences, context)
        self._rate = self._rate.observed(
            expected=worth / sequences, done=emitted / sequences, predicted=predicted / full,
            measured=seconds * predicted / whole / full,
        )  # fmt: skip
        if costs.origin == "guessed" and self._unit_is_unknown:  # a guess counts in layers, not in seconds
            self._unit_is_unknown = False
            self._costs = replace(costs, speed=costs.speed * seconds / whole)
        elif costs.origin != "given":
            self._costs = costs.observed(whole, seconds, rows[1], context).with_step(own)
