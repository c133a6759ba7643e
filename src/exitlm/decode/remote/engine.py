"""The engine over a pipeline: the same loop, whose passes are under way in several processes at once.

```
turn:  for each stage that has nothing to do: choose a pass of the rows that wait at its boundaries, and submit it
       wait for what passes bring, and do what the engine does wherever rows arrive
```
When an exit fires on the first stage, the next token starts there while later stages fill the keys of the last one
(EE-LLM section 4, its second method); drafts start while those before them are verified. A stage that is lost is
replaced, and its keys are computed anew: all texts give their memory and wait, as if it had run short.
"""

from __future__ import annotations

import bisect
import warnings

from torch import Tensor

from exitlm.decode.agenda import Chosen
from exitlm.decode.departed import Departed
from exitlm.decode.engine import Engine
from exitlm.decode.generation import TokenTrace
from exitlm.decode.options import EngineConfig
from exitlm.decode.pricing.costs import Costs
from exitlm.decode.pricing.measure_costs import ideal
from exitlm.decode.pricing.pricing import Pricing
from exitlm.decode.remote.asked import There, wants
from exitlm.decode.remote.hello import Refused
from exitlm.decode.remote.lost import PipelineDown, StageLost
from exitlm.decode.remote.pipeline import Pipeline
from exitlm.decode.remote.stage_agenda import StageAgenda
from exitlm.decode.sequence import Sequence
from exitlm.decode.text import Tokenizer
from exitlm.decode.work import Work
from exitlm.errors import UserError
from exitlm.model.decoder import EarlyExitModel

_TRIES = 3  # to replace a stage
_IN_VAIN = 30  # how often stages are replaced without one pass to the end: then it is the texts that break them


class PipelinedEngine(Engine):
    """Decodes with a pipeline of stages."""

    def __init__(
        self, model: EarlyExitModel, pipeline: Pipeline, *, tokenizer: Tokenizer | None = None,
        options: EngineConfig | None = None, costs: Costs | None = None,
    ) -> None:  # fmt: skip
        """``costs`` say which exits are worth a draft (None: by bytes alone)."""
        options = options or EngineConfig()
        self.pipeline, self._in_vain, self._closed = pipeline, 0, False
        self._flights: dict[int, Departed] = {}
        self._down: StageLost | None = None
        pricing = Pricing(pipeline, options, costs or ideal(pipeline.fused))
        self._assemble(model, pipeline, pricing, tokenizer, options)
        self._stages = StageAgenda(self.agenda, pipeline, options)

    @property
    def stage_seconds(self) -> list[float]:
        """See :class:`~exitlm.decode.engine.Engine`."""
        return self.pipeline.computed

    def close(self) -> None:
        """End the other processes, after the pass that runs. Texts that are left end by an error when they go on."""
        with self.lock:
            self._closed = True
            self.pipeline.close()

    def tend(self) -> None:
        """Replace a stage that ended while nothing was decoded."""
        with self.lock:
            if self._closed or self._in_step:
                return
            try:
                self.pipeline.tend()
            except StageLost as lost:
                self._replace(lost)

    def _drop_all(self, error: BaseException) -> None:
        self._flights.clear()
        super()._drop_all(error)

    def _turn(self) -> None:
        if self._closed:
            raise UserError("the engine was closed, and with it the processes of its stages; load the model again")
        if self._down is not None:
            self._replace(self._down)
        pipeline = self.pipeline
        try:
            for number in pipeline.free:
                while number in pipeline.free and (chosen := self._stages.next_pass(number)) is not None:
                    self._submit(number, chosen)
            for brought in pipeline.wait():
                departed = self._flights.pop(brought.number, None)
                if departed is not None and departed.last == pipeline.segments:
                    self._in_vain = 0
                if departed is not None:  # else it is of a time before a stage was lost
                    self._arrive(departed, There(brought))
        except StageLost as lost:
            self._replace(lost)

    def _stage(self, layer: int) -> int:
        """The stage, from 1, whose last layers a head stands behind."""
        return 1 + bisect.bisect_left([share.layers.stop for share in self.pipeline.shares], layer)

    def _fired(self, sequence: Sequence, layer: int, token: int, raw_K: Tensor, candidates_K: Tensor | None) -> None:
        self._stages.passed(self._stage(layer))
        super()._fired(sequence, layer, token, raw_K, candidates_K)

    def _emit(self, sequence: Sequence, token: TokenTrace, raw_V: Tensor) -> None:
        token.stage = self._stage(token.exit_layer)
        if token.source == "final":
            self._stages.passed(self.pipeline.stages)
        super()._emit(sequence, token, raw_V)

    def _submit(self, number: int, chosen: Chosen) -> None:
        departed, share = self._depart(chosen), self.pipeline.shares[number]
        enters, leaves = departed.first == share.first, departed.last == share.last
        kept = [] if leaves else [s for m in departed.members for s in m.sequence.slots_of(m.start, m.count)]
        hidden_MD = self.memory.hidden.get(departed.slots) if departed.first and enters else None
        work = Work(
            number=0, first=departed.first, last=departed.last, batch=departed.batch,
            wants=wants(departed, self.pipeline.bounds), tokens=departed.tokens,
            hidden_MD=hidden_MD, slots=[] if enters else departed.slots, kept=kept,
        )  # fmt: skip
        self._flights[self.pipeline.submit(number, work)] = departed

    def _replace(self, lost: StageLost) -> None:
        """Replace a stage. Its keys are computed anew, and no token is lost."""
        self._down, place = lost, f"stage {lost.number + 1} of {self.pipeline.stages}"
        self.lost += 1
        self._in_vain += 1
        self._flights.clear()
        for sequence in list(self.roster.running):
            self.roster.preempt(sequence)
        for allocator in self.memory.pool.allocators:
            allocator.clear()
        if self._in_vain > _IN_VAIN:
            self._in_vain = 0
            reason = PipelineDown(f"{place} was lost {_IN_VAIN} times without one pass to the end; last: {lost}")
            for sequence in list(self.roster.waiting):
                self._fail(sequence, reason)
        times = f"; losses so far: {self.lost}"  # so that no warning is like another, which would not be shown
        warnings.warn(f"{place} was lost ({lost}); it is replaced{times}", stacklevel=2)
        error: Exception = lost
        for _ in range(_TRIES):
            try:
                self.pipeline.restart(lost.number)
                self._down, self.is_down = None, False
                return
            except StageLost as another:
                error = lost = self._down = another
            except UserError as failed:
                error = failed
                if not isinstance(failed, Refused):  # none came in all the time that there was
                    break
        self.is_down = True
        reason = PipelineDown(f"{place} ended and can't be replaced: {error}")
        for sequence in list(self.roster.waiting):
            self._fail(sequence, reason)
