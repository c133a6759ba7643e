"""What one sequence may draft in ``lossless`` mode, and how often each of its sources was right.

Which of it is drafted is the scheduler's choice, by the price of time; nothing here changes a token.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from exitlm.decode.pricing.acceptance import LOOKUP_PRIOR, PREDICTION_PRIOR, Acceptance, AcceptanceTable

MAX_DRAFT = 15  # of a round, where a request names no other
MOST_DRAFTS = 63  # with the newest token: rows of final logits at once, and rows that a windowed pool has room for


class Drafting:
    """Limits, and the sources by their keys: an exit by :meth:`Plan.source`, a look-up by ("lookup", n), "prediction".
    All sequences of an engine call a source alike."""

    def __init__(
        self,
        exits: Mapping[Hashable, tuple[float, float]],
        *,
        adaptive: bool,
        max_draft: int | None = None,
        max_pending: int | None = None,
        predicts: bool = False,
    ) -> None:
        """``exits`` maps keys to the chances that tuning found: that the rule fires, and that it is right then.
        Without ``adaptive``, all is drafted that the limits allow. ``predicts``: the request expects a text."""
        self.adaptive = adaptive
        self.limit = min(MOST_DRAFTS, MAX_DRAFT if max_draft is None else max_draft)
        self.exit_limit = self.limit if max_pending is None else min(self.limit, max_pending)
        self.sources: dict[Hashable, Acceptance] = {
            key: Acceptance(prior=right, firing_prior=firing) for key, (firing, right) in exits.items()
        }
        self.sources |= {("lookup", n): Acceptance(prior=prior) for n, prior in LOOKUP_PRIOR.items()}
        if predicts:
            self.sources["prediction"] = Acceptance(prior=PREDICTION_PRIOR)

    def odds(self, key: Hashable, table: AcceptanceTable, position: int, drafts: int) -> tuple[float, float]:
        """The chances (firing, acceptance) of a source at an output position, behind ``drafts`` that are not verified;
        ``table`` holds what all sequences tell of it."""
        return table.inform(key, self.sources[key]).odds(position, drafts)

    def tested(self, key: Hashable, position: int, fired: bool) -> None:
        """Count a test of an exit."""
        self.sources[key] = self.sources[key].after_test(position, fired)

    def verified(self, key: Hashable, position: int, accepted: bool) -> None:
        """Count a draft that was accepted, or the first one that was refused."""
        if key in self.sources:
            self.sources[key] = self.sources[key].after_drafts(position, 1, int(accepted))
