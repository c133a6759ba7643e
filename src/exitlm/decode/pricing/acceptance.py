"""How often the drafts of a source are right: decayed counts with a prior, for one sequence and for all.

A source is an exit, or n-gram lookup with a match of n tokens; a confidence bin can be part of its key. A source that
the scheduler leaves alone would never be seen to have improved, so after a pause it is offered as if it were always
right. A probe that is refused doubles the next pause, one that is accepted halves it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

LOOKUP_PRIOR: Mapping[int, float] = {2: 0.35, 3: 0.5, 4: 0.65}
PREDICTION_PRIOR = 0.8
_MEMORY, _TABLE_MEMORY = 0.985, 0.999
_WEIGHT, _TABLE_WEIGHT, _LARGEST_WEIGHT = 4.0, 16.0, 16.0
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 256
_PROBE = 0.99  # what a probe is taken for; 1 would be a certain token


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """A source in one sequence: the chance that its test fires, and that a draft of it is accepted.

    ``prior`` and ``firing_prior`` are believed before anything was seen, as if ``weight`` drafts had told so.
    Positions are output positions.
    """

    prior: float
    firing_prior: float = 1.0
    weight: float = _WEIGHT
    drafted: float = 0.0
    accepted: float = 0.0
    tested: float = 0.0
    fired: float = 0.0
    trials: int = 0
    last: int = 0
    pause: int = _FIRST_PAUSE

    @property
    def rate(self) -> float:
        """The estimated chance that the next draft is accepted, in (0, 1) for such a prior."""
        return (self.prior * self.weight + self.accepted) / (self.weight + self.drafted)

    @property
    def firing(self) -> float:
        """The estimated chance that the next test fires."""
        return (self.firing_prior * self.weight + self.fired) / (self.weight + self.tested)

    def is_probe(self, position: int) -> bool:
        """Whether the source was left alone so long that it should be tried whatever the estimates say."""
        return position - self.last >= self.pause

    def odds(self, position: int, drafts: int = 0) -> tuple[float, float]:
        """The chances (firing, acceptance) to plan with at ``position``, behind ``drafts`` that are not verified.

        A first draft is judged kindly: a probe counts as right, and while little was tried, its acceptance is put one
        standard deviation higher, or a few early refusals would end drafting where it pays."""
        if drafts:
            return self.firing, self.rate
        if self.is_probe(position):
            return 1.0, _PROBE
        deviation = math.sqrt(self.rate * (1.0 - self.rate) / (_WEIGHT + self.trials))
        return self.firing, min(1.0, self.rate + deviation)

    def after_test(self, position: int, fired: bool) -> Acceptance:
        """Count a test; one that did not fire ends a probe."""
        probe = self.is_probe(position)
        after = replace(self, tested=self.tested * _MEMORY + 1.0, fired=self.fired * _MEMORY + fired)
        if fired:
            return after  # its verification ends the probe
        return replace(after, last=position, pause=min(2 * self.pause, _LONGEST_PAUSE) if probe else self.pause)

    def after_drafts(self, position: int, drafted: int, accepted: int) -> Acceptance:
        """Count a verified draft of ``drafted`` tokens: those up to the first refused one were tried."""
        tried, pause = min(drafted, accepted + 1), self.pause
        if self.is_probe(position):
            pause = max(pause // 2, _FIRST_PAUSE) if accepted else min(2 * pause, _LONGEST_PAUSE)
        decay = _MEMORY**tried
        return replace(
            self, drafted=self.drafted * decay + tried, accepted=self.accepted * decay + accepted,
            trials=self.trials + tried, last=position, pause=pause,
        )  # fmt: skip


@dataclass(frozen=True)
class AcceptanceTable:
    """What all sequences together tell of each source: the prior of the next one. It starts from what tuning stored."""

    stored: Mapping[Hashable, float] = field(default_factory=dict)
    counts: Mapping[Hashable, tuple[float, float]] = field(default_factory=dict)

    def prior(self, key: Hashable, default: float = 0.5) -> tuple[float, float]:
        """The acceptance to expect of a source, and what it weighs: more, the more was seen of it."""
        drafted, accepted = self.counts.get(key, (0.0, 0.0))
        rate = (self.stored.get(key, default) * _TABLE_WEIGHT + accepted) / (_TABLE_WEIGHT + drafted)
        return min(max(rate, 0.01), 0.99), min(_WEIGHT + drafted / _TABLE_WEIGHT, _LARGEST_WEIGHT)

    def inform(self, key: Hashable, source: Acceptance) -> Acceptance:
        """A sequence's source with what all sequences tell by now as its prior."""
        prior, weight = self.prior(key, source.prior)
        return replace(source, prior=prior, weight=weight)

    def observed(self, key: Hashable, drafted: int, accepted: int) -> AcceptanceTable:
        """The table after a verified draft of any sequence."""
        tried = min(drafted, accepted + 1)
        before = self.counts.get(key, (0.0, 0.0))
        decay = _TABLE_MEMORY**tried
        after = (before[0] * decay + tried, before[1] * decay + accepted)
        return replace(self, counts={**self.counts, key: after})
