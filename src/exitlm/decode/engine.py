"""The engine: texts come and go at any step, and rows of many of them share each pass.

```
step:  admit texts that fit  ->  the scheduler chooses a pass: rows that wait at one boundary
       run them to the next boundary where something happens to one of them
         an exit:  the newest row of each text that tests it is scored; where the rule fires, the token (or draft) is
                   there, and its rows stay pending; the others wait to go deeper
         the end:  the final head gives tokens, and verifies drafts; what follows the first refusal is rolled back
```
Each (token, layer) is computed once, in every mode, and a text depends on nobody else's rows. The engine owns the loop;
:mod:`exitlm.decode.runner` computes, :mod:`exitlm.decode.scheduler` chooses, :mod:`exitlm.decode.sequence` remembers.

Shapes: M rows of a pass, R rows that want final logits, T tested rows, K rows of an exit's output matrix, V vocab_size.
"""

from __future__ import annotations

import collections.abc
import contextlib
import math
import secrets
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exitlm.decode.acceptance import AcceptanceTable
from exitlm.decode.batch import Batch
from exitlm.decode.block_allocator import next_key
from exitlm.decode.block_table import BlockTable
from exitlm.decode.costs import Costs
from exitlm.decode.drafting import Drafting
from exitlm.decode.fair_lock import FairLock
from exitlm.decode.formats import resolve_format
from exitlm.decode.fused import FusedModel
from exitlm.decode.generation import (
    Generation,
    GenerationConfig,
    Piece,
    Stats,
    TokenTrace,
    failed,
    mean_depth,
    speed_of,
)
from exitlm.decode.grammar import GrammarCompiler, GrammarState
from exitlm.decode.graphs import resolve_compile
from exitlm.decode.hidden_pool import HiddenPool
from exitlm.decode.lookup import NgramIndex
from exitlm.decode.measure_costs import cached
from exitlm.decode.options import EngineConfig
from exitlm.decode.output import Output
from exitlm.decode.planning import Exits, Plan, make_plan
from exitlm.decode.rules import SCORES, ExitTest, fires
from exitlm.decode.runner import Arrived, Runner
from exitlm.decode.sampling.sampler import NoTokenLeft, finite_rows
from exitlm.decode.scheduler import Exit, Limits, Rate, SequenceView, next_pass
from exitlm.decode.sequence import Draft, Sequence
from exitlm.decode.text import TextStream, Tokenizer
from exitlm.errors import UserError
from exitlm.model.decoder import EarlyExitModel
from exitlm.weights.store import cache_directory

MEASURE_AGAIN = 30.0  # seconds from one measurement on a busy machine to the next
MAX_PENDING = 64  # positions of a sequence that wait at most, if its request sets no lower cap; no token depends on it
_EXPECTED_TOKENS = 512  # blocks beside each other are kept free for as many
_ROOM_TO_COPY = 4  # shared blocks are copied where so many times as many are free
_FINAL_ROWS = 64  # rows of final logits at once
Ids = collections.abc.Sequence[int]
Request = tuple[Ids | UserError, GenerationConfig]
"""Token ids of a prompt, or what is wrong with it, and settings."""


@dataclass(frozen=True)
class Event:
    """What a step brought to one text: tokens that are certain, and with the last one the whole ``generation``, or the
    error that ended it."""

    key: int
    piece: Piece | None = None
    generation: Generation | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows for this text."""
        return self.generation is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A pass: from boundary ``first`` to ``last``, how many rows of which sequences, and the keys of those whose newest
    row is tested at ``last``."""

    first: int
    last: int
    members: list[tuple[Sequence, int]]
    tested: set[int]


class Engine:
    """Decodes with a model. Its weights are packed once; change the model's exits, then make a new engine.

    ``add``, ``abort`` and ``step`` may be called from any thread.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        *,
        quant: str = "auto",
        compile: str = "auto",
        tokenizer: Tokenizer | None = None,
        options: EngineConfig | None = None,
        costs: Costs | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        """``compile`` (auto, none, graphs, static) is how passes of few rows run, see ``graphs.py``. ``costs`` replaces
        measuring; ``cache_dir`` is where measured costs are kept."""
        matrices = [weight.detach() for weight in model.model.layers.parameters() if weight.dim() == 2]
        self.quant = resolve_format(quant, matrices)
        self.config, self.tokenizer, self.options = model.config, tokenizer, options or EngineConfig()
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)
        self.fused = FusedModel(model, self.quant, resolve_compile(compile, model.device))
        self.runner = Runner(self.fused, self.options)
        self.pool = self.runner.pool
        self.hidden = HiddenPool(model.config.hidden_size, self.fused.dtype, self.fused.device)
        self.exits = Exits(
            records={e: model.exits[str(e)].record for e in self.runner.early},
            gated=frozenset(e for e in self.runner.early if self.fused.heads[e].has_gate),
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._windows = [group.window for group in self.pool.groups]
        self._lock = FairLock()
        self._sinks: dict[int, deque[Event]] = {}
        self._outbox: deque[Event] = deque()
        self._next_key = 0
        self._most = min(self.options.max_sequences, self.options.max_rows)
        self._in_step, self._to_abort = False, list[int]()
        self._busy, self._begun = 0.0, 0.0
        self._compiler: GrammarCompiler | None = None
        self._rate, self._acceptance = Rate(), AcceptanceTable()
        self._limits = Limits(
            max_rows=self.options.max_rows, prefill_chunk=self.options.prefill_chunk, max_wait=self.options.max_wait
        )
        self._notes: dict[str, str] = {}
        self._costs, self._cache_dir = costs, cache_dir
        self._next_measure = 0.0

    # ---- the loop

    def step(self) -> list[Event]:
        """One pass, and what it brought to the texts that were added with :meth:`add`."""
        with self._lock:
            self._step()
            found = list(self._outbox)
            self._outbox.clear()
            return found

    @torch.inference_mode()
    def _step(self) -> None:
        if self._in_step:
            raise UserError("a logits_processor that decodes needs an engine of its own")
        self._in_step, self._begun = True, time.perf_counter()
        try:
            self._admit()
            chosen = self._next_pass()
            if chosen is not None:
                self._timed(chosen)
        except BaseException as error:
            self._drop_all(error)
            raise
        finally:
            self._in_step = False
            while self._to_abort:
                self.abort(self._to_abort.pop())
            self._busy = self._now()
            self._begun = time.perf_counter()

    def _next_pass(self) -> _Chosen | None:
        """What to run next. Where nothing is to be weighed, all that is ready starts together and goes to the end."""
        for sequence in list(self.running):
            if sequence.filled[0] >= sequence.prefill_end and not sequence.prepared and not sequence.moving:
                self._prepare(sequence)
        alone = len(self.running) == 1
        if any(s.is_priced or (not alone and s.plan.rule is not None) for s in self.running):
            return self._priced_pass()
        moving = [sequence for sequence in self.running if sequence.moving]
        if moving:
            first = min(sequence.front for sequence in moving)
            return self._chosen(first, [(s, s.rows_at(first)) for s in moving if s.front == first])
        decoding = sum(not sequence.prefilling for sequence in self.running)
        room, ready = min(self.options.prefill_chunk, self.options.max_rows - decoding), []
        for sequence in list(self.running):
            rows = sequence.rows_at(0)
            if sequence.filled[0] < sequence.prefill_end:
                rows = min(room, rows)
                room -= rows
            if rows and self._reserve(sequence, rows):
                ready.append((sequence, rows))
        return self._chosen(0, [(s, rows) for s, rows in ready if s.tables])  # others may have been preempted for some

    def _chosen(self, first: int, members: list[tuple[Sequence, int]]) -> _Chosen | None:
        """A pass of these rows to the next boundary where one is tested or others wait, or to the end."""
        if not members:
            return None
        fronts = {sequence.front for sequence in self.running if sequence.moving} if len(self.running) > 1 else ()
        for boundary in range(first + 1, self.runner.segments):
            tested = {s.key for s, count in members if self._tries(s, boundary, s.filled[first] + count)}
            comes_along = any(s.filled[boundary] < s.filled[boundary - 1] for s, _ in members)
            if tested or comes_along or boundary in fronts:
                return _Chosen(first, boundary, members, tested)
        return _Chosen(first, self.runner.segments, members, set())

    def _priced_pass(self) -> _Chosen | None:
        """What the scheduler chooses by the price of time."""
        found = next_pass([self._view(s) for s in self.running], self.costs, self._rate, self._limits)
        if found is None:
            return None
        by_key, bounds = {sequence.key: sequence for sequence in self.running}, self.runner.bounds
        members: list[tuple[Sequence, int]] = []
        for member in found.members:
            sequence = by_key[member.key]
            if found.first == 0:
                if not self._reserve(sequence, member.rows):
                    continue
                if not sequence.prefilling:  # drafts that were not taken
                    sequence.drop_drafts(sequence.filled[0] + member.rows - len(sequence.ids))
            members.append((sequence, member.rows))
        members = [(sequence, rows) for sequence, rows in members if sequence.tables]
        tested = {member.key for member in found.members if member.tested}
        return _Chosen(bounds.index(found.first), bounds.index(found.last), members, tested) if members else None

    def _view(self, sequence: Sequence) -> SequenceView:
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
            odds = [
                sequence.drafting.odds(e, self._acceptance, sequence.generated, len(sequence.drafts)) for e in layers
            ]
            exits = tuple(
                Exit(layer=e, firing=firing, acceptance=right) for e, (firing, right) in zip(layers, odds, strict=True)
            )
        return SequenceView(
            key=sequence.key, mode=mode, ready=ready, waiting=waiting, moving=moving, worth=worth, exits=exits,
            context=filled[0], waited=sequence.waited,
        )  # fmt: skip

    def _timed(self, chosen: _Chosen) -> None:
        """Run a pass and tell the scheduler what it took and gave, and each that waited how long."""
        begin, costs = time.perf_counter(), self._costs
        if costs is None:
            return self._run(chosen)
        decoding = [sequence for sequence in self.running if not sequence.prefilling]
        before = sum(sequence.generated for sequence in decoding)
        keys = {sequence.key for sequence, _ in chosen.members}
        at_end, worth, heads, rows = chosen.last == self.runner.segments, 0.0, 0, 0
        for sequence, count in chosen.members:
            if not sequence.prefilling:
                rows += count
                if at_end and sequence.is_priced:
                    heads += count
                    worth += sum(sequence.worths()[:count])
                elif at_end and sequence.filled[chosen.first] + count >= len(sequence.ids):
                    heads += 1
        context = sum(sequence.filled[0] for sequence in self.running) / len(self.running)
        self._run(chosen)
        seconds = time.perf_counter() - begin
        for sequence in self.running:
            if sequence.key not in keys and sequence.pending:
                sequence.waited += seconds
        if not rows:
            return None
        bounds, tests = self.runner.bounds, len(chosen.tested)

        def by_table(count: int) -> float:
            found = costs.span(bounds[chosen.first], bounds[chosen.last], count, context) + costs.final(heads)
            return found + (costs.tests(bounds[chosen.last], tests) if tests else 0.0)

        everything = sum(count for _, count in chosen.members)
        predicted, whole, B = by_table(rows), by_table(everything), len(decoding)
        emitted = sum(sequence.generated for sequence in decoding) - before
        full = costs.full(B, context)
        self._rate = self._rate.observed(
            expected=(worth or emitted) / B, done=emitted / B, predicted=predicted / full,
            measured=seconds * predicted / whole / full,
        )  # fmt: skip
        if costs.origin != "given":
            self._costs = costs.observed(whole, seconds, everything, context)
        return None

    def _run(self, chosen: _Chosen) -> None:
        """Take rows from one boundary to another, and do what happens there."""
        first, last, members = chosen.first, chosen.last, chosen.members
        parts, tokens, slots = [], [], []
        for sequence, count in members:
            start = sequence.filled[first]
            parts.append(sequence.part(start, count, self._windows))
            if first == 0:
                tokens += sequence.tokens(start, count)
            else:
                slots += sequence.slots_of(start, count)
        hidden_MD = self.hidden.get(slots) if first else self.runner.embed(tokens)
        arrived = self.runner.run(first, last, Batch.of(tuple(parts)), hidden_MD)
        layers = self.runner.bounds[last] - self.runner.bounds[first]
        for sequence, count in members:
            end = sequence.filled[first] + count
            # a draft goes deep if it is worth it, and pending rows may ride along; all other rows have to
            goes = sequence.is_priced or sequence.moving if first else sequence.prefilling or not sequence.is_priced
            sequence.filled[first:last] = [end] * (last - first)
            sequence.waited = 0.0
            if goes:
                sequence.deep_end = max(sequence.deep_end, end)
            if sequence.generated:
                sequence.tally.layer_rows += count * layers
        if last < self.runner.segments:
            self._wait(first, last, members, arrived)
            self._test(chosen, arrived)
        else:
            self._finish_rows(first, members, arrived)

    def _tries(self, sequence: Sequence, boundary: int, end: int) -> bool:
        """Whether a pass that brings the rows below ``end`` to a boundary brings one that is tested there."""
        test = sequence.test
        return test is not None and end == sequence.length and test.tries(self.runner.bounds[boundary])

    def _wait(self, first: int, last: int, members: list[tuple[Sequence, int]], arrived: Arrived) -> None:
        """Keep hidden states at a boundary."""
        slots: list[int] = []
        for sequence, count in members:
            if first == 0:
                sequence.slots += self.hidden.take(count)
            slots += sequence.slots_of(sequence.filled[last - 1] - count, count)
        self.hidden.put(slots, arrived.hidden_MD)

    # ---- at an exit

    def _test(self, chosen: _Chosen, arrived: Arrived) -> None:
        """Score the newest rows that are tested at this exit; where a rule fires, the token or draft is there."""
        rows, tested, row, boundary = [], [], -1, chosen.last
        for sequence, count in chosen.members:
            row += count
            if sequence.key in chosen.tested:
                rows.append(row)
                tested.append(sequence)
        if not rows:
            return
        layer, head = self.runner.bounds[boundary], self.runner.head(boundary)
        gates = [1.0] * len(rows)
        gated = [i for i, sequence in enumerate(tested) if sequence.plan.rule_name == "gate"]
        if gated:  # a gate that does not fire needs no logits
            for i, score in zip(gated, self.runner.gates(boundary, arrived, [rows[i] for i in gated]), strict=True):
                gates[i] = score
            quiet = [i for i in gated if not fires(gates[i], tested[i].plan.threshold(layer))]
            for i in quiet:
                self._fires(tested[i], layer, gates[i])
            left = [i for i in range(len(rows)) if i not in quiet]
            rows, tested, gates = [rows[i] for i in left], [tested[i] for i in left], [gates[i] for i in left]
            if not rows:
                return
        raw_TK = self.runner.exit_logits(boundary, arrived, rows)
        logits_TK = self._restricted(raw_TK, tested, head.candidate_ids)
        scores, best = self._scores(logits_TK, tested)
        for i, sequence in enumerate(tested):
            token = head.token(best[i])
            if not self._fires(sequence, layer, scores[i] * gates[i], token):
                continue
            if not sequence.plain:
                try:
                    token = sequence.choose(expand(logits_TK[i], head.candidate_ids, self.config.vocab_size))
                except NoTokenLeft:  # of those that this head knows: a deeper one decides
                    continue
                except UserError as error:
                    if sequence.config.mode != "lossless":  # drafts may lead where the text never comes
                        self._fail(sequence, error)
                    continue
            self._fired(sequence, layer, token, raw_TK[i], head.candidate_ids)

    @staticmethod
    def _fires(sequence: Sequence, layer: int, score: float, token: int | None = None) -> bool:
        """Whether the rule of a sequence fires for its newest row."""
        assert sequence.test is not None
        fired = sequence.test.fires(layer, score, token)
        if sequence.drafting is not None:
            sequence.drafting.tested(layer, sequence.generated, fired)
        return fired

    def _restricted(self, raw_TK: Tensor, tested: list[Sequence], candidates_K: Tensor | None) -> Tensor:
        """Logits without what each sequence may not write."""
        if not any(sequence.restricts for sequence in tested):
            return raw_TK
        rows, dtype = [], torch.promote_types(raw_TK.dtype, torch.float32)
        for sequence, raw_K in zip(tested, raw_TK, strict=True):
            try:
                logits_V = sequence.restricted(expand(raw_K, candidates_K, self.config.vocab_size))
            except UserError:  # a draft led its grammar into a dead end: nothing may follow it
                rows.append(torch.full_like(raw_K, -torch.inf, dtype=dtype))
                continue
            rows.append((logits_V if candidates_K is None else logits_V[candidates_K]).to(dtype))
        return torch.stack(rows)

    @staticmethod
    def _scores(logits_TK: Tensor, tested: list[Sequence]) -> tuple[list[float], list[int]]:
        """Score and best row of each row, with one wait for an accelerator."""
        names = [sequence.plan.rule_name for sequence in tested]
        if len(set(names)) == 1:
            score_T = SCORES[names[0]](logits_TK)
        else:
            score_T = torch.stack([SCORES[name](row_K) for name, row_K in zip(names, logits_TK, strict=True)])
        both = torch.stack([score_T.double(), logits_TK.argmax(-1).double()]).tolist()
        return both[0], [int(index) for index in both[1]]

    def _fired(self, sequence: Sequence, layer: int, token: int, raw_K: Tensor, candidates_K: Tensor | None) -> None:
        """An exit has decided the newest row: its token goes out or is drafted, and its rows stay pending."""
        test, sequence.test = sequence.test, None
        assert test is not None
        cap = MAX_PENDING if sequence.config.max_pending is None else min(MAX_PENDING, sequence.config.max_pending)
        if sequence.config.mode == "lossless" or sequence.pending <= cap:
            sequence.deep_end = 0
            sequence.tally.max_pending = max(sequence.tally.max_pending, sequence.pending)
        if sequence.config.mode == "lossless":
            assert sequence.drafting is not None
            drafted = len(sequence.drafts)
            _, estimate = sequence.drafting.odds(layer, self._acceptance, sequence.generated, drafted)
            sequence.extend_drafts([Draft(token, layer, "exit", layer, estimate, test.confidence)])
            return
        raw_V = expand(raw_K, candidates_K, self.config.vocab_size) if sequence.config.logprobs else raw_K
        sequence.tally.rounds += 1
        self._emit(sequence, TokenTrace(id=token, exit_layer=layer, source="exit", confidence=test.confidence), raw_V)
        self._tell(sequence)

    # ---- at the end

    def _finish_rows(self, first: int, members: list[tuple[Sequence, int]], arrived: Arrived) -> None:
        """Rows that have passed all layers: tokens of the final head, drafts verified, full blocks shared."""
        wanted, at = [], 0
        for sequence, count in members:
            begin = sequence.filled[-1] - count
            if first:
                self.hidden.give_back(sequence.slots[:count])
                del sequence.slots[:count]
            if sequence.wants_prompt_scores:
                self._score_prompt(sequence, begin, arrived, at, count)
            if begin + count >= len(sequence.ids) and sequence.output.finish_reason is None:
                skipped = max(0, len(sequence.ids) - 1 - begin)
                wanted.append((sequence, list(range(at + skipped, at + count))))
            at += count
        for group in _in_groups(wanted, _FINAL_ROWS):
            raw_RV = self.runner.final_logits(arrived, [row for _, rows in group for row in rows])
            finite, best, at = finite_rows(raw_RV), raw_RV.argmax(-1).tolist(), 0
            for sequence, rows in group:
                cut = slice(at, at + len(rows))
                try:
                    self._verify(sequence, raw_RV[cut], best[cut], finite[cut])
                except UserError as error:
                    self._fail(sequence, error)
                at += len(rows)
        for sequence, _ in members:
            if sequence.tables:  # it still runs
                self._publish(sequence)
                self._leave_windows(sequence)
                if sequence.output.finish_reason is not None and sequence.filled[-1] >= sequence.prompt_length:
                    sequence.tally.first = self._now()  # only prompt scores were wanted
                    self._tell(sequence)

    def _verify(self, sequence: Sequence, raw_RV: Tensor, best: list[int], finite: list[bool]) -> None:
        """Row i decides draft i, if there is one; the row after the last accepted one gives one token more. Rows that
        did not come along stay where they are as long as all before them was right."""
        drafts, tally, test = sequence.take_drafts(), sequence.tally, sequence.test
        confidence = {} if test is None else test.confidence
        if sequence.generated:
            tally.rounds += 1
        else:
            tally.first = self._now()
        taken, kept, prepared = 0, True, sequence.prepared
        for i in range(len(best)):
            self._check_finite(sequence, finite[i])
            draft = drafts[i] if i < len(drafts) else None
            token = best[i] if sequence.plain else sequence.choose(sequence.restricted(raw_RV[i]))
            kept = draft is not None and token == draft.token
            trace = TokenTrace(id=token, exit_layer=self.runner.bounds[-1], source="final", confidence=confidence)
            if draft is not None:
                trace.confidence = draft.confidence
                self._count(sequence, draft, kept)
            if draft is not None and kept:
                trace.exit_layer, trace.source, trace.drafted = draft.layer, draft.source, True
            taken += kept
            self._emit(sequence, trace, raw_RV[i])
            if not kept or sequence.output.finish_reason is not None:
                break
        if kept and sequence.output.finish_reason is None:
            tally.drafted += taken
            sequence.extend_drafts(drafts[taken:])
            sequence.prepared = prepared
        else:
            tally.drafted += len(drafts)
            sequence.test = None
            self._roll_back(sequence)
        tally.accepted += taken
        self._tell(sequence)

    def _emit(self, sequence: Sequence, token: TokenTrace, raw_V: Tensor) -> None:
        """A token is certain. ``raw_V`` are the logits, untouched, of the head that gave it."""
        if sequence.config.logprobs:
            token.logprob, token.top_logprobs = log_probabilities(raw_V, token.id, sequence.config.logprobs)
        sequence.append(token.id)
        sequence.output.push(token)

    def _count(self, sequence: Sequence, draft: Draft, kept: bool) -> None:
        """Note whether a source was right."""
        assert sequence.drafting is not None
        sequence.drafting.verified(draft.key, sequence.generated, kept)
        self._acceptance = self._acceptance.observed(draft.key, 1, int(kept))

    def _roll_back(self, sequence: Sequence) -> None:
        """Forget what was computed for refused drafts; all positions but the newest have keys at every depth then."""
        length = len(sequence.ids) - 1
        sequence.filled = [min(filled, length) for filled in sequence.filled]
        sequence.deep_end = 0
        kept = sequence.pending
        self.hidden.give_back(sequence.slots[kept:])
        del sequence.slots[kept:]

    def _check_finite(self, sequence: Sequence, finite: bool) -> None:
        """Refuse to take a token from final logits that are not ``finite``."""
        if not finite:
            dtype = self.fused.dtype
            narrow = dtype in (torch.float16, torch.bfloat16)
            token = sequence.generated + 1
            raise UserError(
                f"the final logits for new token {token} are not finite (NaN or infinity); the weights "
                + (f"are damaged, or {str(dtype).removeprefix('torch.')} is too narrow for them: get them again, or "
                   "load them with dtype 'float32'" if narrow else "are damaged: get them again")
            )  # fmt: skip

    def _score_prompt(self, sequence: Sequence, begin: int, arrived: Arrived, at: int, count: int) -> None:
        """Log-probabilities of the prompt's tokens that follow the rows ``at`` to ``at + count``."""
        most = sequence.config.prompt_logprobs or 0
        stop = min(begin + count, sequence.prompt_length - 1)
        known = len(sequence.output.prompt_logprobs)  # kept when it was preempted
        for cut in range(max(begin, known), stop, _FINAL_ROWS):
            positions = range(cut, min(cut + _FINAL_ROWS, stop))
            raw_RV = self.runner.final_logits(arrived, [at + position - begin for position in positions])
            for position, raw_V in zip(positions, raw_RV, strict=True):
                sequence.output.prompt_logprobs.append(log_probabilities(raw_V, sequence.ids[position + 1], most))

    # ---- the next token

    def _prepare(self, sequence: Sequence) -> bool:
        """Before the newest token enters: drafts that the text itself offers, or the exits that test it. False if the
        sequence has to be computed anew first."""
        original = self.fused.original_context
        if original is not None and not sequence.stretched and len(sequence.ids) > original:
            self._preempt(sequence)  # all its positions are rotated otherwise from here on
            return False
        sequence.prepared, sequence.test = True, None
        rule, config, position = sequence.plan.rule, sequence.config, sequence.length - sequence.prompt_length
        if config.mode != "lossless":
            if rule is not None and position >= config.min_exit_tokens:
                sequence.test = ExitTest(rule, position, sequence.output.max_new_tokens)
            return True
        drafting, known = sequence.drafting, len(sequence.drafts)
        assert drafting is not None
        room = sequence.output.max_new_tokens - sequence.generated - 1
        if original is not None and not sequence.stretched:  # drafts don't cross into other rotations
            room = min(room, original - len(sequence.ids))
        room -= known
        if room < 1:
            return True
        if self._draft_from_text(sequence, min(room, drafting.limit - known)):
            sequence.prepared = True
        elif rule is not None and known < drafting.exit_limit and position >= config.min_exit_tokens:
            sequence.test = ExitTest(rule, position, sequence.output.max_new_tokens)
        return True

    def _draft_from_text(self, sequence: Sequence, room: int) -> bool:
        """Draft what a grammar forces, or what followed the same tokens before; whether there was any."""
        final, drafting = self.runner.bounds[-1], sequence.drafting
        assert drafting is not None
        if sequence.grammar is not None and "grammar" in sequence.config.draft:
            forced = sequence.grammar.jump_forward()[:room]
            if sequence.extend_drafts([Draft(token, final, "grammar", "grammar", 0.95) for token in forced]):
                return True
        if sequence.index is None:
            return False
        found, n = sequence.index.draft([draft.token for draft in sequence.drafts], room)
        drafts = []
        for i, token in enumerate(found):
            _, right = drafting.odds(("lookup", n), self._acceptance, sequence.generated, len(sequence.drafts) + i)
            drafts.append(Draft(token, final, "lookup", ("lookup", n), right))
        return sequence.extend_drafts(drafts)

    # ---- who runs

    def add(self, prompt: Ids, config: GenerationConfig, *, choice: int = 0) -> int:
        """Add a text; its key. :meth:`step` brings its events. ``choice`` is which of ``n`` texts of a seed it is.

        Raises :class:`UserError` for a prompt or settings that can't be met; nothing was added then.
        """
        with self._lock:
            return self._add(prompt, config, choice, _seed(config), None)

    def _add(self, prompt: Ids, config: GenerationConfig, choice: int, seed: int, sink: deque[Event] | None) -> int:
        sequence = self._sequence(prompt, config, choice, seed)
        self._next_key += 1
        self.waiting.append(sequence)
        if sink is not None:
            self._sinks[sequence.key] = sink
        return sequence.key

    def _grammar(self, config: GenerationConfig) -> GrammarState | None:
        """The grammar of a request's ``response_format``."""
        if config.response_format is None:
            return None
        if self._compiler is None:
            if self.tokenizer is None:
                raise UserError("response_format needs a tokenizer, and this model has none")
            self._compiler = GrammarCompiler(self.tokenizer, self.config.vocab_size, self.config.eos_token_ids)
        return self._compiler.state(config.response_format, config.stop_token_ids)

    def _sequence(self, prompt: Ids, config: GenerationConfig, choice: int, seed: int) -> Sequence:
        self.check_prompt(prompt, config)
        if config.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and this model has none; use stop_token_ids")
        plan = self.plan(config)
        sampler = config.sampler(token_words(config.bad_words, self.tokenizer))
        sampler.check_vocabulary(self.config.vocab_size)
        room = self.config.max_position_embeddings - len(prompt)
        stops = frozenset(config.stop_token_ids)
        if not config.ignore_eos:
            stops |= frozenset(self.config.eos_token_ids)
        output = Output(TextStream(self.tokenizer, config.stop, prompt), stops, min(config.max_new_tokens, room))
        drafting = index = None
        if config.mode == "lossless":
            exits = {e: self.exits.expected(e, plan.rule) for e in plan.exits if plan.rule is not None}
            limits = {"max_draft": config.max_draft, "max_pending": config.max_pending}
            drafting = Drafting(exits, adaptive=config.adaptive, **limits)
            if "lookup" in config.draft:
                index = NgramIndex()
                index.extend(prompt)
        return Sequence(
            self._next_key, prompt, config, plan, output, segments=self.runner.segments, sampler=sampler,
            seed=seed, choice=choice, drafting=drafting, index=index, grammar=self._grammar(config),
        )  # fmt: skip

    def abort(self, key: int) -> None:
        """Drop a text that is not finished; nothing more comes of it. An unknown key is none that runs."""
        with self._lock:
            if self._in_step:  # by a processor, or by the end of a stream that nobody holds any more
                self._to_abort.append(key)
                return
            for sequence in [*self.running, *self.waiting]:
                if sequence.key == key:
                    self._remove(sequence)
            self._sinks.pop(key, None)
            self._outbox = deque(event for event in self._outbox if event.key != key)

    def _admit(self) -> None:
        """Let waiting texts in, in order, as long as there is room for what they have to compute."""
        for sequence in list(self.waiting):
            if len(self.running) >= self._most or (self.running and not self._fits(sequence)):
                return
            if self._begins_like_another(sequence):
                continue
            self.waiting.remove(sequence)
            original = self.fused.original_context
            sequence.stretched = original is not None and len(sequence.ids) > original
            expected = sequence.prompt_length + min(sequence.output.max_new_tokens, _EXPECTED_TOKENS)
            sequence.tables = [
                BlockTable(allocator, self.options.block_size, expected_length=expected, window=self._held(window))
                for allocator, window in zip(self.pool.allocators, self._windows, strict=True)
            ]
            if self.options.prefix_sharing and not sequence.wants_prompt_scores:
                self._adopt(sequence)
            if not sequence.tally.begun:
                sequence.tally.begun = self._now()
            self.running.append(sequence)

    def _begins_like_another(self, sequence: Sequence) -> bool:
        """Whether another choice of its prompt is being computed, whose blocks it can share in a moment."""
        if not sequence.choice or not self.options.prefix_sharing:
            return False
        same = [s for s in self.running if s.choice == 0 and s.filled[-1] < s.prefill_end]
        return any(s.ids[: s.prompt_length] == sequence.ids[: sequence.prompt_length] for s in same)

    def _held(self, window: int | None) -> int | None:
        """Positions that a sequence holds of a group at once: a window, the rows of a pass, and pending ones."""
        return None if window is None else window + self.options.prefill_chunk + MAX_PENDING

    def _fits(self, sequence: Sequence) -> bool:
        needed = len(sequence.ids) + 1
        for allocator, window in zip(self.pool.allocators, self._windows, strict=True):
            held = self._held(window)
            if -(-(needed if held is None else min(needed, held)) // self.options.block_size) > allocator.free:
                return False
        return True

    def _reserve(self, sequence: Sequence, rows: int) -> bool:
        """Blocks for the next ``rows`` positions; where none are left, the newest sequences give theirs. False if that
        is this one, or if there were drafts among the rows: they are dropped before anybody gives memory for them."""
        while not all(table.ensure(sequence.filled[0] + rows) for table in sequence.tables):
            entered = max(0, sequence.filled[0] - len(sequence.ids))
            if entered < len(sequence.drafts):
                sequence.drop_drafts(entered)
                if sequence.length == sequence.filled[0]:  # nothing enters: what waits goes deep
                    sequence.test, sequence.deep_end = None, sequence.length
                return False
            newest = max(self.running, key=lambda other: other.key)
            self._preempt(newest)
            if newest is sequence:
                return False
        return bool(sequence.tables)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's memory; it waits, and what it had computed is computed again."""
        self._release(sequence)
        sequence.restart(self.runner.segments)
        sequence.tally.preemptions += 1
        self.running.remove(sequence)
        at = next((i for i, other in enumerate(self.waiting) if other.key > sequence.key), len(self.waiting))
        self.waiting.insert(at, sequence)

    def _release(self, sequence: Sequence) -> None:
        for table in sequence.tables:
            table.release()
        self.hidden.give_back(sequence.slots)
        sequence.tables, sequence.slots = [], []

    def _remove(self, sequence: Sequence) -> None:
        self._release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End a text by an error. What it leaves may not be numbers: it is neither shared nor left to padded reads."""
        for group, table in enumerate(sequence.tables):
            for block in table.blocks:
                self.pool.allocators[group].forget(block)
            self.pool.clear(group, [b for b in table.blocks if self.pool.allocators[group].references(b) == 1])
        self._remove(sequence)
        if sequence.output.trace:
            self._send(Event(sequence.key, piece=sequence.output.take()))
        self._send(Event(sequence.key, error=error))

    def _drop_all(self, error: BaseException) -> None:
        """A pass broke off: what runs can't be trusted, so that all of it ends."""
        reason = error if isinstance(error, Exception) else RuntimeError(f"decoding was interrupted: {error!r}")
        for sequence in list(self.running):
            self._fail(sequence, reason)

    # ---- blocks

    def _leave_windows(self, sequence: Sequence) -> None:
        """Give back blocks that no row can see any more, by the deepest segment that reads them."""
        for group, table in zip(self.pool.groups, sequence.tables, strict=True):
            if group.window is not None:
                deepest = min(sequence.filled[group.segment], len(sequence.ids) - 1)  # drafts may be rolled back
                table.free_before(max(0, deepest - group.window + 1))

    def _block_key(self, sequence: Sequence, index: int) -> bytes:
        """The key of a sequence's full block: of all its ids so far, and of its rotations."""
        keys, size = sequence.block_keys, self.options.block_size
        while len(keys) <= index:
            previous = keys[-1] if keys else (b"stretched" if sequence.stretched else b"")
            keys.append(next_key(previous, sequence.ids[len(keys) * size : (len(keys) + 1) * size]))
        return keys[index]

    def _publish(self, sequence: Sequence) -> None:
        """Let others share the blocks whose positions are all verified, and filled in every entry."""
        if not self.options.prefix_sharing:
            return
        full = min(sequence.filled[-1], len(sequence.ids)) // self.options.block_size
        for index in range(sequence.published, full):
            key = self._block_key(sequence, index)
            for table in sequence.tables:
                if index >= table.freed:
                    table.publish(index, key)
        sequence.published = max(sequence.published, full)

    def _adopt(self, sequence: Sequence) -> None:
        """Begin with the blocks of a text that began alike. A windowed group needs only those in its last window.

        A runner that reads a run of neighbouring blocks faster than scattered ones gets a copy beside the blocks to
        come, while there is room: copying is once, and reading is in every pass.
        """
        size = self.options.block_size
        last = sequence.prefill_end - (sequence.prefill_end == len(sequence.ids))  # the newest token always runs
        keys = [self._block_key(sequence, index) for index in range(last // size)]
        count = len(keys)
        for allocator, window in zip(self.pool.allocators, self._windows, strict=True):
            if window is None:
                count = min(count, len(allocator.find(keys[:count])))
        while count and not all(
            all(allocator.find_one(key) is not None for key in keys[self._needed_from(window, count) : count])
            for allocator, window in zip(self.pool.allocators, self._windows, strict=True)
        ):
            count -= 1
        if not count:
            return
        for group, table in enumerate(sequence.tables):
            begin = self._needed_from(self._windows[group], count)
            found = [table.allocator.find_one(key) for key in keys[begin:count]]
            blocks = [block for block in found if block is not None]
            for block in blocks:
                table.allocator.acquire(block)
            room = table.allocator.free - table.allocator.cached
            if self.runner.reads_runs and not begin and room > _ROOM_TO_COPY * count:
                table.ensure(count * size)
                self.pool.copy(group, blocks, table.blocks)
                table.allocator.release_all(blocks)
            else:
                table.adopt(blocks, begin)
        sequence.filled = [count * size] * self.runner.segments
        sequence.published = count
        sequence.tally.shared += count * size

    def _needed_from(self, window: int | None, count: int) -> int:
        """The first of ``count`` blocks that the position behind them sees."""
        if window is None:
            return 0
        return max(0, count * self.options.block_size - window + 1) // self.options.block_size

    # ---- events

    def _now(self) -> float:
        """Seconds spent in steps."""
        return self._busy + time.perf_counter() - self._begun

    def _send(self, event: Event) -> None:
        sink = self._sinks.get(event.key)
        if event.last:
            self._sinks.pop(event.key, None)
        (self._outbox if sink is None else sink).append(event)

    def _tell(self, sequence: Sequence) -> None:
        """Hand out what is certain; the last time, the whole generation."""
        output, generation = sequence.output, None
        if output.finish_reason is not None:
            generation = self._result(sequence)
            self._publish(sequence)
            self._remove(sequence)
        self._send(Event(sequence.key, piece=output.take(), generation=generation))

    def _result(self, sequence: Sequence) -> Generation:
        output, tally, rule = sequence.output, sequence.tally, sequence.plan.rule
        seconds = self._now() - tally.first
        stats = Stats(
            mode=sequence.config.mode,
            prompt_tokens=sequence.prompt_length,
            tokens=len(output.trace),
            tokens_per_second=speed_of(len(output.trace), seconds),
            prefill_seconds=tally.first - tally.begun,
            decode_seconds=seconds,
            mean_layers=mean_depth(output.trace),
            rounds=tally.rounds,
            drafted=tally.drafted,
            accepted=tally.accepted,
            max_pending=tally.max_pending,
            layer_rows=tally.layer_rows,
            exits=sequence.plan.exits,
            rule=None if rule is None else rule.name,
            thresholds={} if rule is None else dict(rule.thresholds),
            quant=self.quant,
            costs=None if self._costs is None else self._costs.origin,
            seed=sequence.seed,
            shared_tokens=tally.shared,
            preemptions=tally.preemptions,
            exact=self.fused.dtype == torch.float64,
        )
        return Generation(
            text=None if self.tokenizer is None else "".join(token.text for token in output.trace),
            token_ids=[token.id for token in output.trace],
            exit_layers=[token.exit_layer for token in output.trace],
            trace=output.trace,
            stats=stats,
            finish_reason=output.finish_reason or "length",
            prompt_logprobs=output.prompt_logprobs,
        )

    # ---- requests from start to end

    def events(self, requests: Iterable[Request]) -> Generator[tuple[int, int, Event], None, None]:
        """Decode some texts together: (index, choice, event) as they come, until all have ended. Requests are read as
        there is room for them. Whoever stops reading aborts what is left. A request that can't be met, or that is an
        error already, ends by itself."""
        sink: deque[Event] = deque()
        open_: dict[int, tuple[int, int]] = {}
        coming = enumerate(requests)
        try:
            while True:
                while len(open_) < 2 * self.options.max_sequences and (request := next(coming, None)) is not None:
                    index, (prompt, config) = request
                    try:
                        for choice, key in enumerate(self._add_choices(prompt, config, sink)):
                            open_[key] = index, choice
                    except UserError as error:
                        yield index, 0, Event(-1, error=error)
                if not open_:
                    return
                while not sink:
                    with self._lock:
                        if not sink:
                            self._step()
                while sink:
                    event = sink.popleft()
                    yield *open_[event.key], event
                    if event.last:
                        del open_[event.key]
        finally:
            for key in open_:
                self.abort(key)

    def _add_choices(self, prompt: Ids | UserError, config: GenerationConfig, sink: deque[Event]) -> list[int]:
        """All texts of a request, or none of them."""
        if isinstance(prompt, UserError):
            raise prompt
        with self._lock:
            seed = _seed(config)
            return [self._add(prompt, config, choice, seed, sink) for choice in range(config.n)]

    def stream(self, prompt: Ids, config: GenerationConfig) -> Iterator[Piece]:
        """Decode ``prompt`` and yield pieces as they become certain (in lossless mode: after verification)."""
        with self._lock:
            self._sequence(prompt, config, 0, 0)  # a bad request is refused here, not when the first piece is read
        return self._raising(self.stream_all([(prompt, config)]))

    @staticmethod
    def _raising(pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if piece.error is not None:
                raise piece.error
            yield piece

    def stream_all(self, requests: Iterable[Request]) -> Iterator[Piece]:
        """Decode some prompts together; pieces carry the index of their prompt, and the error of one that failed."""
        for index, choice, event in self.events(requests):
            if event.error is not None and not isinstance(event.error, UserError):
                raise event.error
            piece = event.piece or Piece(text="", tokens=[], error=event.error)
            piece.index, piece.choice = index, choice
            yield piece

    def generate(self, prompt: Ids, config: GenerationConfig) -> Generation:
        """Decode ``prompt`` to the end."""
        (found,) = self.generate_all([(prompt, config)])
        if found.error is not None:
            raise found.error
        return found

    def generate_all(self, requests: Iterable[Request]) -> list[Generation]:
        """Decode some prompts together, to the end. One that failed has an ``error``."""
        found = dict(self.finished(requests))
        return [found[index] for index in range(len(found))]

    def finished(self, requests: Iterable[Request]) -> Generator[tuple[int, Generation], None, None]:
        """Decode some prompts together: (index, generation) as they finish. One that failed has an ``error``."""
        configs: list[GenerationConfig] = []
        texts: dict[int, dict[int, Generation]] = {}
        broken: set[int] = set()

        def read() -> Iterator[Request]:
            for request in requests:
                configs.append(request[1])
                yield request

        with contextlib.closing(self.events(read())) as events:
            for index, choice, event in events:
                if event.error is not None:
                    if not isinstance(event.error, UserError):
                        raise event.error
                    if index not in broken:  # one of its choices is enough
                        broken.add(index)
                        yield index, failed(event.error, configs[index].mode)
                elif event.generation is not None:
                    choices = texts.setdefault(index, {})
                    choices[choice] = event.generation
                    if len(choices) == configs[index].n and index not in broken:
                        found = choices[0]
                        found.choices = [choices[i] for i in range(len(choices))] if len(choices) > 1 else []
                        yield index, texts.pop(index)[0]

    # ---- what is asked for

    def plan(self, config: GenerationConfig) -> Plan:
        """Which exits a configuration tests, and by what rule."""
        plan = make_plan(config, self.exits, lambda: self.costs)
        if plan.why:
            self._note_off(plan)
        return plan

    def _note_off(self, plan: Plan) -> None:
        """Say which exits are left alone by default, and that naming them switches them on."""
        self._notes.pop(plan.why, None)
        if plan.off:
            reason = "by what tuning measured" if plan.why == "leave" else "by measured cost and calibration"
            none = " (none pays)" if plan.rule is None else ""
            self._notes[plan.why] = (
                f"no token will {plan.why} at exits {list(plan.off)}, {reason}{none}; name them to use them: "
                f"--exits {','.join(map(str, plan.off))}"
            )

    @property
    def costs(self) -> Costs:
        """Costs of passes on this machine: given, kept from an earlier run, or measured now; again after a while where
        the machine was too busy to be measured."""
        if self._costs is None or (not self._costs.steady and time.monotonic() >= self._next_measure):
            costs = cached(self.runner, self._cache_dir or cache_directory())
            self._costs, self._next_measure = costs, time.monotonic() + MEASURE_AGAIN
            if not costs.steady:
                longer = f"took up to {1 + costs.spread:.1f} times as long"
                self._notes["costs"] = (
                    f"this machine is busy (equal passes {longer if costs.spread < math.inf else 'were interrupted'}), "
                    "so that what exits gain here is a guess; the costs of passes are not kept, and will be measured "
                    "again"
                )
            elif costs.origin not in ("measured", "kept"):
                self._notes["costs"] = f"the costs of passes were {costs.origin}"
            else:
                self._notes.pop("costs", None)
        return self._costs

    @property
    def notes(self) -> list[str]:
        """What the user should know of the choices that were made, each in one sentence."""
        return list(self._notes.values())

    def check_prompt(self, prompt: Ids, config: GenerationConfig) -> None:
        """Refuse an empty prompt, ids that the vocabulary lacks, and a prompt that fills the context or the pool."""
        if len(prompt) == 0:
            raise UserError("the prompt is empty; give at least one token of text")
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise UserError(
                f"the prompt has token id {max(prompt) if min(prompt) >= 0 else min(prompt)}, but the vocabulary has "
                f"ids 0 to {self.config.vocab_size - 1}; use the tokenizer of this model"
            )
        context = self.config.max_position_embeddings
        if len(prompt) >= context + (config.max_new_tokens == 0):
            raise UserError(
                f"the prompt has {len(prompt)} tokens, but the model's context is {context}; shorten the prompt"
            )
        length = min(len(prompt) + config.max_new_tokens, context)
        if length > self.pool.capacity:
            raise UserError(
                f"prompt and answer have up to {length} tokens, but engine.kv_bytes holds {self.pool.capacity}; "
                f"shorten them, or set it to {self.pool.least_bytes(length)} or more"
            )


def _seed(config: GenerationConfig) -> int:
    """The seed of a request; a fresh one where it names none."""
    return secrets.randbits(63) if config.seed is None else config.seed


def token_words(words: collections.abc.Sequence[str | Ids], tokenizer: Tokenizer | None) -> list[list[int]]:
    """``bad_words`` as token ids: a text as it is written at the start of a text, and behind a space."""
    found: list[list[int]] = []
    for word in words:
        if not isinstance(word, str):
            found.append(list(word))
            continue
        if tokenizer is None:
            raise UserError("bad_words that are texts need a tokenizer, and this model has none; give token ids")
        for text in (word, f" {word}"):
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if ids and ids not in found:
                found.append(ids)
    return found


def _in_groups(wanted: list[tuple[Sequence, list[int]]], most: int) -> Iterator[list[tuple[Sequence, list[int]]]]:
    """Cut a list into groups of at most ``most`` rows; one sequence's rows stay together."""
    group: list[tuple[Sequence, list[int]]] = []
    for sequence, rows in wanted:
        if group and sum(len(each) for _, each in group) + len(rows) > most:
            yield group
            group = []
        group.append((sequence, rows))
    if group:
        yield group


def expand(logits_K: Tensor, candidates_K: Tensor | None, vocab_size: int) -> Tensor:
    """Logits of a candidate head over the whole vocabulary ``[V]``: -inf outside of the candidates."""
    if candidates_K is None:
        return logits_K
    return logits_K.new_full((vocab_size,), -torch.inf).index_copy_(0, candidates_K, logits_K)


def log_probabilities(raw_V: Tensor, token: int, most: int) -> tuple[float, dict[int, float]]:
    """The log-probability of ``token`` and of the ``most`` likely tokens, under logits ``[V]``."""
    log_p = torch.log_softmax(raw_V.float() if raw_V.dtype != torch.float64 else raw_V, -1)
    if not most:
        return float(log_p[token]), {}
    values, ids = log_p.topk(min(most, len(log_p)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return float(log_p[token]), {i: value for i, value in pairs if value > -math.inf}  # an exit's candidates alone
