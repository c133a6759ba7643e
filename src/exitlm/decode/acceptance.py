"""How far to draft: acceptance as it was observed in this text, weighed against measured costs.

Every number here is a function of the tokens and of the costs table, never of the clock, so the same request makes the
same choices. A source that does not pay is left alone for a while and then tried again; it always drafts before it may
be left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exitlm.decode.costs import Costs

_MEMORY = 0.97
_PRIOR_WEIGHT = 4.0
_TRIALS = 4
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 256
LOOKUP_PRIOR = {2: 0.35, 3: 0.5, 4: 0.65}
MAX_DRAFT = 15  # of a round, where a request names no other
MOST_DRAFTS = 63  # with the newest token: rows of final logits at once, and rows that a windowed pool has room for


@dataclass
class Acceptance:
    """A decayed estimate of the chance that the next draft of a source is accepted."""

    prior: float
    tried: float = 0.0
    accepted: float = 0.0
    trials: int = 0
    pause: int = _FIRST_PAUSE
    resume_at: int = 0

    @property
    def rate(self) -> float:
        """The estimate, in (0, 1)."""
        return (self.prior * _PRIOR_WEIGHT + self.accepted) / (_PRIOR_WEIGHT + self.tried)

    def observe(self, drafted: int, accepted: int) -> None:
        """Count a round: the drafts up to the first refusal were tried."""
        tried = min(drafted, accepted + 1)
        self.tried = self.tried * _MEMORY + tried
        self.accepted = self.accepted * _MEMORY + accepted
        self.trials += tried

    def paused(self, position: int, pays: bool) -> bool:
        """Whether to leave this source alone at this output position."""
        if pays or self.trials < _TRIALS:
            return False
        if position < self.resume_at:
            return True
        if self.resume_at:
            self.pause = min(self.pause * 2, _LONGEST_PAUSE)
        first = self.resume_at == 0
        self.resume_at = position + self.pause
        return first


class DraftPolicy:
    """Decides per source whether a draft pays and how long it should be."""

    def __init__(
        self, costs: Costs | None, priors: dict[int, float], max_draft: int | None, max_pending: int | None
    ) -> None:
        """``costs`` None means not adaptive: always draft, as long as ``max_draft`` allows."""
        self.costs = costs
        self.limit = min(MOST_DRAFTS, MAX_DRAFT if max_draft is None else max_draft)
        self.exit_limit = self.limit if max_pending is None else min(self.limit, max_pending)
        self.exits = {layer: Acceptance(prior) for layer, prior in priors.items()}
        self.lookups = {n: Acceptance(prior) for n, prior in LOOKUP_PRIOR.items()}

    def lookup_length(self, n: int, rows: int, room: int, position: int) -> int:
        """How many tokens of an n-gram match to verify beside ``rows`` other rows; 0 for none."""
        limit = min(self.limit, room)
        if self.costs is None or limit < 1:
            return max(0, limit)
        source = self.lookups[n]
        rate, base = source.rate, self.costs.full(rows)
        best, length, expected = 1.0, 0, 1.0
        for k in range(1, limit + 1):
            expected += rate**k
            speed = expected * base / self.costs.full(rows + k)
            if speed > best:
                best, length = speed, k
        if source.paused(position, length > 0):
            return 0
        return max(1, length)

    def skipped(self, position: int) -> frozenset[int]:
        """Exits that should not be tried at this output position because their drafts do not pay here."""
        if self.costs is None:
            return frozenset()
        skip = set()
        for layer, source in self.exits.items():
            pays = source.rate * self.costs.full() > self.costs.draft_cost(layer)
            if source.paused(position, pays):
                skip.add(layer)
        return frozenset(skip)

    def skipped_behind(self, chain: Sequence[int], skip: frozenset[int]) -> frozenset[int]:
        """``skip`` and the exits where one more draft, behind unverified ones from the exits in ``chain``, would lower
        the expected tokens per second of this round: it counts only if all before it are accepted."""
        if self.costs is None or not chain:
            return skip
        expected, survives, spent = 1.0, 1.0, self.costs.full()
        for rows, layer in enumerate(chain, 1):
            survives *= self.exits[layer].rate
            expected += survives
            spent += self.costs.draft_cost(layer, rows)
        cost = {layer: self.costs.draft_cost(layer, len(chain) + 1) for layer in self.exits}
        return skip | {e for e, source in self.exits.items() if survives * source.rate * spent <= expected * cost[e]}

    def observe_exit(self, layer: int, accepted: bool) -> None:
        """Count a verified draft of an exit."""
        if layer in self.exits:
            self.exits[layer].observe(1, int(accepted))

    def observe_lookup(self, n: int, drafted: int, accepted: int) -> None:
        """Count a verified n-gram draft."""
        self.lookups[n].observe(drafted, accepted)
