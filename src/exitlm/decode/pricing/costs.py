"""What passes cost: a table of seconds by rows and context, plain data without any clock or tensor.

``measure_costs.py`` fills a table; the scheduler and the simulator read it. The second half of this file weighs exits
against a table. Bounds: EE-LLM section 4; arXiv 2211.17192 for the expected number of accepted drafts.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from exitlm.model.record import Calibration

STEADY = 0.3  # the largest spread of a table that is kept: 0.1 on an idle machine, 0.8 to 50 on a busy one
_LARGEST_SUBSET = 4
_SPEED_WEIGHT, _SHAPE_WEIGHT = 0.1, 0.1  # how far one pass moves all cells, and the cells next to it further
_STEP_WEIGHT = 0.05  # how far one pass moves the engine's own share
_MAX_RATIO = 3.0  # a pass that was interrupted tells no more than this


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of a layer (``layer[context][rows]``), of the final head (by rows), and of each exit's test and draft.

    ``rows`` and ``contexts`` are the axes: the rows of a pass, of one sequence with so many tokens before them.
    ``test`` and ``draft`` hold seconds for one row by the exit's layer (where several adapters have one, of the
    dearest); a draft is a test that reads the exit's vocabulary matrix. ``step`` are seconds of the engine's own in
    each pass, so that a pass that is cut in two at an exit costs them twice. ``speed`` multiplies everything; it
    follows the machine. ``spread`` says how much longer than at best a part took, as a share, or fewer rows than more
    of them; ``origin`` where a table came from.
    """

    rows: tuple[int, ...]
    layer: tuple[tuple[float, ...], ...]
    head: tuple[float, ...]
    test: Mapping[int, float]
    draft: Mapping[int, float]
    num_hidden_layers: int
    contexts: tuple[int, ...] = (128,)
    step: float = 0.0
    speed: float = 1.0
    spread: float = 0.0
    origin: str = "given"

    @property
    def steady(self) -> bool:
        """Whether the times agreed, so that they tell of the machine and not of what else it did."""
        return self.spread <= STEADY

    def _cell(self, rows: float) -> tuple[int, float]:
        """The measured row count at or below ``rows``, and how far ``rows`` lies on the way to the next one."""
        right = bisect.bisect_left(self.rows, rows)
        if right == 0 or self.rows[right] == rows:
            return right, 0.0
        low, high = self.rows[right - 1], self.rows[right]
        return right - 1, (rows - low) / (high - low)

    def _at(self, table: Sequence[float], rows: float) -> float:
        """Linear interpolation over the measured row counts; beyond the last, proportional growth."""
        if rows >= self.rows[-1]:
            return table[-1] * (rows / self.rows[-1]) * self.speed
        left, share = self._cell(rows)
        return (table[left] + share * (table[left + 1] - table[left]) if share else table[left]) * self.speed

    def _layer(self, rows: float, context: float) -> float:
        """Seconds of a layer: linear between contexts and beyond the longest, constant below the shortest."""
        near = self._at(self.layer[0], rows)
        if context <= self.contexts[0] or len(self.contexts) == 1:
            return near
        right = min(bisect.bisect_left(self.contexts, context), len(self.contexts) - 1)
        low, high = self.contexts[right - 1], self.contexts[right]
        if right > 1:
            near = self._at(self.layer[right - 1], rows)
        return near + (context - low) / (high - low) * (self._at(self.layer[right], rows) - near)

    def span(self, first: int, last: int, rows: float, context: float = 0.0) -> float:
        """Seconds of a pass from layer ``first`` up to ``last`` on ``rows`` rows, each behind ``context`` tokens."""
        return (last - first) * self._layer(rows, context) + self.step * self.speed if rows and last > first else 0.0

    def final(self, rows: float = 1) -> float:
        """Seconds of the final head on ``rows`` rows."""
        return self._at(self.head, rows) if rows else 0.0

    def tests(self, layer: int, rows: float = 1, *, draft: bool = True) -> float:
        """Seconds of the test of the exit at ``layer`` on ``rows`` rows, with its token where ``draft`` says so,
        in a pass that ends there anyway.

        Only one row is measured; a vocabulary matrix is taken to grow with rows as the final head does."""
        one = self.draft[layer] if draft else self.test[layer]
        growth = self._at(self.head, rows) / self.head[0] if rows > 1 and self.head[0] else self.speed
        return one * growth if rows else 0.0

    def layers(self, count: int, rows: int) -> float:
        """Seconds of ``count`` layers on ``rows`` rows, of a pass that is there anyway."""
        return count * self._layer(rows, 0.0) if rows else 0.0

    def cut(self) -> float:
        """Seconds that it costs to end a pass at an exit and go on with another."""
        return self.step * self.speed

    def full(self, rows: float = 1, context: float = 0.0) -> float:
        """Seconds of all layers and the final head on ``rows`` rows."""
        return self.deep(0, rows, context)

    def deep(self, after: int, rows: float, context: float = 0.0) -> float:
        """Seconds of the layers behind layer ``after`` and the final head on ``rows`` rows."""
        return self.span(after, self.num_hidden_layers, rows, context) + self.final(rows)

    def draft_cost(self, layer: int, rows: int = 1) -> float:
        """Seconds that one more draft from the exit at ``layer`` adds to a round that verifies ``rows`` rows so far."""
        return self.span(0, layer, 1) + self.tests(layer) + self.deep(layer, rows + 1) - self.deep(layer, rows)

    def observed(self, predicted: float, seconds: float, rows: int, context: float = 0.0) -> Costs:
        """The table after a pass of ``rows`` rows that took ``seconds`` where the table said ``predicted``.

        Most of a deviation is the machine's (another program, another clock rate) and moves every cell alike, which
        changes no decision; what remains moves the cells next to the pass. More rows never cost less: the pass is right
        and older cells give way.
        """
        ratio = min(max(seconds / predicted, 1 / _MAX_RATIO), _MAX_RATIO)
        left, share = self._cell(min(rows, self.rows[-1]))
        change = ratio**_SHAPE_WEIGHT
        column = min(range(len(self.contexts)), key=lambda c: abs(self.contexts[c] - context))
        cells = list(self.layer[column])
        for i, weight in ((left, 1.0 - share), (left + 1, share)):
            if weight:
                cells[i] *= 1.0 + weight * (change - 1.0)
        falling = itertools.accumulate(reversed(cells[: left + 1]), min)
        cells[: left + 1] = reversed(list(falling))
        layer = (*self.layer[:column], tuple(itertools.accumulate(cells, max)), *self.layer[column + 1 :])
        return replace(self, layer=layer, speed=self.speed * ratio**_SPEED_WEIGHT)

    def with_step(self, seconds: float) -> Costs:
        """The table after a pass in which the engine itself took so long; one that was interrupted tells little."""
        now = seconds / self.speed
        if not self.step:
            return replace(self, step=now)
        return replace(self, step=self.step + _STEP_WEIGHT * (min(now, _MAX_RATIO * self.step) - self.step))


def choose_drafting(
    costs: Costs, calibrations: Mapping[int, Calibration], tests: Mapping[int, float]
) -> dict[int, float]:
    """The exits to draft at in lossless mode, and the score from which each drafts, that gain most time per token by
    their calibration curves; {} where none pays.

    An exit's threshold is the one that gains most by itself. Of several exits, a deeper one is taken to fire for the
    tokens of the shallower ones too (coverage is nested), and is tested only for the rest.
    """
    worth = costs.full()
    chosen: dict[int, tuple[float, float, float]] = {}
    for layer, curve in calibrations.items():
        points = zip(curve.scores, curve.coverage, curve.precision, strict=True)
        cost = costs.draft_cost(layer)
        gain, score, covered, precise = max((c * (p * worth - cost), s, c, p) for s, c, p in points)
        if gain > 0.0 and score < 1.0:
            chosen[layer] = (score, covered, precise * worth - cost)
    best: tuple[float, tuple[int, ...]] = (0.0, ())
    layers = sorted(chosen)
    for count in range(1, min(len(layers), _LARGEST_SUBSET) + 1):
        for subset in itertools.combinations(layers, count):
            left, gain = 1.0, 0.0
            for layer in subset:
                gain -= left * tests[layer]
                _, covered, worthwhile = chosen[layer]
                fired = max(0.0, covered - (1.0 - left))
                gain += fired * worthwhile
                left -= fired
            best = max(best, (gain, subset))
    return {layer: chosen[layer][0] for layer in best[1]}
