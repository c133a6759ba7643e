"""One text while it is decoded: its tokens, how deep each position has gone, and what it holds of the pools.

```
positions      0 ....................... len(ids) ....... len(ids) + len(drafts)
               verified tokens           drafts
filled[0]      positions that have passed the first segment
filled[s]      ... segment s; it never grows with s
sent[s]        ... or are on their way through it, in a process of their own; else the same as filled[s]
```
The rows between ``filled[b]`` and ``filled[b - 1]`` are *pending* at boundary b: their hidden states wait in slots
until a deeper pass takes them along (EE-LLM section 4 computes them again; here nothing is computed twice). A sequence
knows nothing of batches or layers.
"""

from __future__ import annotations

import collections.abc
import itertools
import operator
import time
from dataclasses import dataclass, field

from torch import Tensor

from exitlm.decode.batch import Part
from exitlm.decode.cache.block_table import BlockTable
from exitlm.decode.generation import GenerationConfig
from exitlm.decode.lookup import NgramIndex
from exitlm.decode.output import Output
from exitlm.decode.planning import Plan
from exitlm.decode.prediction import Prediction
from exitlm.decode.pricing.drafting import Drafting
from exitlm.decode.rules import ExitTest
from exitlm.decode.sampling.grammar import GrammarState, mask_logits
from exitlm.decode.sampling.sampler import Draw, Sampler, TokenCounts


@dataclass
class Draft:
    """A token that is not verified yet: where it came from (``key`` names the source in :class:`Drafting`), the scores
    of the exits tried for it, and the chance that it is right."""

    token: int
    layer: int
    source: str
    key: collections.abc.Hashable = None
    estimate: float = 1.0
    confidence: dict[int, float] = field(default_factory=dict)


@dataclass
class Tally:
    """What decoding a sequence took. ``queued``: seconds from its request to its admission. ``begun`` and ``first`` are
    the engine's busy seconds at admission and at the first token."""

    queued: float = 0.0
    begun: float = 0.0
    first: float = 0.0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    predicted: int = 0
    predicted_accepted: int = 0
    max_pending: int = 0
    layer_rows: int = 0
    preemptions: int = 0
    shared: int = 0


class Sequence:
    """State of one text. Everything that decides its tokens is its own: settings, seed, and the tokens before."""

    def __init__(
        self,
        key: int,
        prompt: collections.abc.Sequence[int],
        config: GenerationConfig,
        plan: Plan,
        output: Output,
        *,
        segments: int,
        sampler: Sampler,
        seed: int,
        choice: int = 0,
        drafting: Drafting | None = None,
        index: NgramIndex | None = None,
        prediction: Prediction | None = None,
        grammar: GrammarState | None = None,
    ) -> None:
        self.key, self.config, self.plan, self.output = key, config, plan, output
        self.sampler, self.seed, self.choice = sampler, seed, choice
        self.drafting, self.index, self.prediction, self.grammar = drafting, index, prediction, grammar
        self.restricts = sampler.restricts or grammar is not None
        self.plain = sampler.plain and grammar is None
        self.ids, self.prompt_length = list(prompt), len(prompt)
        self.drafts: list[Draft] = []
        watched = sampler.restricts or sampler.penalises or sampler.processor is not None
        self.counts = TokenCounts(self.ids) if watched else None
        self.tally = Tally()
        self.requested = time.monotonic()
        self.waited, self.alone = 0.0, True
        self.stretched = False
        self.epoch = 0  # passes that were sent in an older one bring nothing any more
        self.restart(segments)

    def restart(self, segments: int) -> None:
        """Forget all that was computed; the tokens stay. All but the newest token then go through all layers again, of
        a text that has no token of its own yet the whole prompt."""
        self.set_filled([0] * segments)
        self.tables: list[BlockTable] = []
        self.slots: list[int] = []  # of the positions from filled[-1] to filled[0]
        self.block_keys: list[bytes] = []
        self.published = 0
        self.take_drafts()
        self.test: ExitTest | None = None
        self.prepared = False
        self.deep_end = 0
        self.prefill_end = max(self.prompt_length, len(self.ids) - 1)

    # ---- where its rows are

    def set_filled(self, filled: list[int]) -> None:
        """It stands here, and whatever is on its way is in vain."""
        self.filled, self.sent = filled, list(filled)
        self.epoch += 1

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether log-probabilities of the prompt's own tokens are wanted and not all there."""
        known = len(self.output.prompt_logprobs)
        return self.config.prompt_logprobs is not None and known < self.prompt_length - 1 and not self.generated

    @property
    def generated(self) -> int:
        """How many tokens it has of its own."""
        return len(self.ids) - self.prompt_length

    @property
    def length(self) -> int:
        """Verified tokens and drafts."""
        return len(self.ids) + len(self.drafts)

    @property
    def pending(self) -> int:
        """Positions that have entered and not reached the end."""
        return self.filled[0] - self.filled[-1]

    @property
    def moving(self) -> bool:
        """Whether rows wait that have to go deeper: those below ``deep_end``."""
        return self.filled[-1] < self.deep_end

    @property
    def prefilling(self) -> bool:
        """Whether part of the prompt has not reached the end."""
        return self.filled[-1] < self.prefill_end

    @property
    def is_priced(self) -> bool:
        """Whether its drafts are the scheduler's choice."""
        return self.drafting is not None and self.drafting.adaptive

    def worths(self) -> list[float]:
        """Expected tokens of the rows from the newest verified token on: 1, and the chance that all drafts up to a row
        are right."""
        return list(itertools.accumulate((draft.estimate for draft in self.drafts), operator.mul, initial=1.0))

    @property
    def front(self) -> int:
        """The boundary where rows wait that have to go deeper."""
        return next(b for b in range(1, len(self.filled)) if self.filled[b] < self.deep_end)

    def rows_at(self, boundary: int) -> int:
        """How many rows a pass takes from a boundary: of those that wait there, the ones that have to go deeper, or at
        boundary 0 the tokens that have not entered, of a prompt those that are still part of it."""
        if boundary:
            return min(self.filled[boundary - 1], self.deep_end) - self.filled[boundary]
        entered = self.filled[0]
        return (self.prefill_end if entered < self.prefill_end else self.length) - entered

    def tokens(self, start: int, count: int) -> list[int]:
        """Ids of the tokens at these positions."""
        known = self.ids[start : start + count]
        if len(known) < count:
            first = max(0, start - len(self.ids))
            known += [draft.token for draft in self.drafts[first : first + count - len(known)]]
        return known

    def part(self, start: int, count: int, windows: collections.abc.Sequence[int | None]) -> Part:
        """Rows from ``start`` on as part of a batch; ``windows`` are those of the groups of cache entries."""
        end = start + count
        firsts = tuple(0 if window is None else max(0, start + 1 - window) for window in windows)
        reads = tuple(tuple(t.slots(at, end - at)) for t, at in zip(self.tables, firsts, strict=True))
        writes = tuple(tuple(table.slots(start, count)) for table in self.tables)
        return Part(start, count, firsts, reads, writes, self.stretched)

    def slots_of(self, start: int, count: int) -> list[int]:
        """Hidden slots of pending positions."""
        first = start - self.filled[-1]
        return self.slots[first : first + count]

    # ---- its tokens

    def append(self, token: int) -> None:
        """A verified token. There are no drafts, which would be for its place and those behind."""
        self.ids.append(token)
        if self.counts is not None:
            self.counts.push(token)
        if self.grammar is not None:
            self.grammar.advance(token)
        if self.index is not None:
            self.index.extend([token])
        if self.prediction is not None:
            self.prediction.extend([token])
        self.prepared = False

    def extend_drafts(self, drafts: collections.abc.Sequence[Draft]) -> bool:
        """More drafts behind those it has, up to the first that its grammar forbids; whether there were any."""
        for count, draft in enumerate(drafts):
            if self.grammar is not None:
                if not self.grammar.allowed(draft.token):
                    return count > 0
                self.grammar.advance(draft.token)
            self.drafts.append(draft)
            if self.counts is not None:
                self.counts.push(draft.token)
            self.prepared = False
        return bool(drafts)

    def take_drafts(self) -> list[Draft]:
        """All drafts, which it has no longer."""
        drafts, self.drafts = self.drafts, []
        if self.counts is not None:
            self.counts.pop(len(drafts))
        if self.grammar is not None:
            self.grammar.rollback(len(drafts))
        return drafts

    def drop_drafts(self, kept: int) -> None:
        """Keep only the first drafts."""
        if kept < len(self.drafts):
            prepared, drafts = self.prepared, self.take_drafts()
            self.extend_drafts(drafts[: max(0, kept)])
            self.prepared = prepared

    def restricted(self, logits_V: Tensor) -> Tensor:
        """Raw logits ``[V]`` for the next token without what may not come, before any rule or sampling. Raises
        :class:`UserError` where its grammar allows nothing."""
        if self.grammar is not None:
            logits_V = mask_logits(logits_V[None], self.grammar.packed()[None])[0]
        if self.counts is not None and self.sampler.restricts:
            logits_V = self.sampler.restrict(logits_V, self.counts.ids)
        return logits_V

    def choose(self, logits_V: Tensor) -> int:
        """The next token, from restricted logits ``[V]``."""
        if self.counts is not None:
            logits_V = self.sampler.shape(logits_V, self.counts)
        return self.sampler.choose(
            logits_V, Draw(seed=self.seed, choice=self.choice, position=self.length - self.prompt_length)
        )
