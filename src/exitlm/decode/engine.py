"""The engine: texts come and go at any step, and rows of many of them share each pass.

```
step:  admit texts that fit  ->  the scheduler chooses a pass: rows that wait at one boundary
       run them to the next boundary where something happens to one of them
         an exit:  the newest row of each text that tests it is scored; where the rule fires, the token (or draft) is
                   there, and its rows stay pending; the others wait to go deeper
         the end:  the final head gives tokens, and verifies drafts; what follows the first refusal is rolled back
```
Each (token, layer) is computed once, in every mode, and a text depends on nobody else's rows. This file is the loop;
``kernels/runner.py`` computes, ``pricing/scheduler.py`` chooses, ``cache/memory.py`` keeps, ``sequence.py`` remembers,
and ``streams.py`` runs requests from start to end.

Shapes: M rows of a pass, R rows that want final logits, T tested rows, K rows of an exit's output matrix, V vocab_size.
"""

from __future__ import annotations

import collections.abc
import secrets
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exitlm.decode import streams
from exitlm.decode.batch import Batch
from exitlm.decode.cache.memory import MAX_PENDING, Memory
from exitlm.decode.fair_lock import FairLock
from exitlm.decode.generation import Generation, GenerationConfig, Piece, Stats, TokenTrace
from exitlm.decode.intake import Intake
from exitlm.decode.kernels.formats import resolve_format
from exitlm.decode.kernels.fused import FusedModel
from exitlm.decode.kernels.graphs import resolve_compile
from exitlm.decode.kernels.runner import Arrived, Runner
from exitlm.decode.logits import expand, in_groups, log_probabilities, not_finite, restricted, scores
from exitlm.decode.options import EngineConfig
from exitlm.decode.pricing.costs import Costs
from exitlm.decode.pricing.pass_times import PassTimes
from exitlm.decode.pricing.pricing import Pricing
from exitlm.decode.results import result
from exitlm.decode.roster import Roster
from exitlm.decode.rules import ExitTest, fires
from exitlm.decode.sampling.sampler import NoTokenLeft, finite_rows
from exitlm.decode.sequence import Draft, Sequence
from exitlm.decode.streams import Event, Request
from exitlm.decode.text import Tokenizer
from exitlm.errors import UserError
from exitlm.model.decoder import EarlyExitModel

_TOKENS_TO_JUDGE, _SLOWER = 32, 0.95  # of a text that is told to have been slower than full
_FINAL_ROWS = 64  # rows of final logits at once
Ids = collections.abc.Sequence[int]


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
        self.memory = Memory(self.runner, self.options)
        self.pricing = Pricing(self.runner, self.options, costs, cache_dir)
        records = {e: model.exits[str(e)].record for e in self.runner.early}
        self.intake = Intake(self.runner, records, tokenizer, lambda: self.pricing.costs)
        self.roster = Roster(
            self.memory, min(self.options.max_sequences, self.options.max_rows), self.runner.segments,
            self.fused.original_context,
        )  # fmt: skip
        self._times, self._slow = PassTimes(), ""
        self._lock = FairLock()
        self._sinks: dict[int, deque[Event]] = {}
        self._outbox: deque[Event] = deque()
        self._next_key = 0
        self._in_step, self._to_abort = False, list[int]()
        self._busy, self._begun = 0.0, 0.0

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
            self.roster.admit(self._now())
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
        for sequence in list(self.roster.running):
            if sequence.filled[0] >= sequence.prefill_end and not sequence.prepared and not sequence.moving:
                self._prepare(sequence)
        alone = len(self.roster.running) == 1
        if not alone:
            for sequence in self.roster.running:
                sequence.alone = False
        if any(s.is_priced or (not alone and s.plan.rule is not None) for s in self.roster.running):
            return self._priced_pass()
        moving = [sequence for sequence in self.roster.running if sequence.moving]
        if moving:
            first = min(sequence.front for sequence in moving)
            return self._chosen(first, [(s, s.rows_at(first)) for s in moving if s.front == first])
        decoding = sum(not sequence.prefilling for sequence in self.roster.running)
        room, ready = min(self.options.prefill_chunk, self.options.max_rows - decoding), []
        for sequence in list(self.roster.running):
            rows = sequence.rows_at(0)
            if sequence.filled[0] < sequence.prefill_end:
                rows = min(room, rows)
                room -= rows
            if rows and self.roster.reserve(sequence, rows):
                ready.append((sequence, rows))
        return self._chosen(0, [(s, rows) for s, rows in ready if s.tables])  # some may have given way for others

    def _chosen(self, first: int, members: list[tuple[Sequence, int]]) -> _Chosen | None:
        """A pass of these rows to the next boundary where one is tested or others wait, or to the end."""
        if not members:
            return None
        fronts = (
            {sequence.front for sequence in self.roster.running if sequence.moving}
            if len(self.roster.running) > 1
            else ()
        )
        for boundary in range(first + 1, self.runner.segments):
            tested = {s.key for s, count in members if self._tries(s, boundary, s.filled[first] + count)}
            comes_along = any(s.filled[boundary] < s.filled[boundary - 1] for s, _ in members)
            if tested or comes_along or boundary in fronts:
                return _Chosen(first, boundary, members, tested)
        return _Chosen(first, self.runner.segments, members, set())

    def _priced_pass(self) -> _Chosen | None:
        """What the scheduler chooses by the price of time."""
        found = self.pricing.choose(self.roster.running)
        if found is None:
            return None
        by_key, bounds = {sequence.key: sequence for sequence in self.roster.running}, self.runner.bounds
        members: list[tuple[Sequence, int]] = []
        for member in found.members:
            sequence = by_key[member.key]
            if found.first == 0:
                if not self.roster.reserve(sequence, member.rows):
                    continue
                if not sequence.prefilling:  # drafts that were not taken
                    sequence.drop_drafts(sequence.filled[0] + member.rows - len(sequence.ids))
            members.append((sequence, member.rows))
        members = [(sequence, rows) for sequence, rows in members if sequence.tables]
        tested = {member.key for member in found.members if member.tested}
        return _Chosen(bounds.index(found.first), bounds.index(found.last), members, tested) if members else None

    def _timed(self, chosen: _Chosen) -> None:
        """Run a pass and tell the scheduler what it took and gave, and each that waited how long."""
        begin = time.perf_counter()
        if self.pricing.origin is None:
            self._run(chosen)
            return
        decoding = [sequence for sequence in self.roster.running if not sequence.prefilling]
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
        context = sum(sequence.filled[0] for sequence in self.roster.running) / len(self.roster.running)
        self._run(chosen)
        seconds = time.perf_counter() - begin
        for sequence in self.roster.running:
            if sequence.key not in keys and sequence.pending:
                sequence.waited += seconds
        emitted = sum(sequence.generated for sequence in decoding) - before
        self.pricing.observe(
            chosen.first, chosen.last, (rows, sum(count for _, count in chosen.members)), sequences=len(decoding),
            heads=heads, tests=len(chosen.tested), context=context, seconds=seconds, emitted=emitted,
            worth=worth or emitted,
        )  # fmt: skip

    def _run(self, chosen: _Chosen) -> None:
        """Take rows from one boundary to another, and do what happens there."""
        first, last, members = chosen.first, chosen.last, chosen.members
        parts, tokens, slots = [], [], []
        for sequence, count in members:
            start = sequence.filled[first]
            parts.append(sequence.part(start, count, self.memory.windows))
            if first == 0:
                tokens += sequence.tokens(start, count)
            else:
                slots += sequence.slots_of(start, count)
        hidden_MD = self.memory.hidden.get(slots) if first else self.runner.embed(tokens)
        begin = time.perf_counter()
        arrived = self.runner.run(first, last, Batch.of(tuple(parts)), hidden_MD)
        if len(members) == 1 and members[0][1] == 1:
            self._times.add(first, last, time.perf_counter() - begin)
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
                sequence.slots += self.memory.hidden.take(count)
            slots += sequence.slots_of(sequence.filled[last - 1] - count, count)
        self.memory.hidden.put(slots, arrived.hidden_MD)

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
        logits_TK = restricted(raw_TK, tested, head.candidate_ids, self.config.vocab_size)
        scored, best = scores(logits_TK, tested)
        for i, sequence in enumerate(tested):
            token = head.token(best[i])
            if not self._fires(sequence, layer, scored[i] * gates[i], token):
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
            _, estimate = sequence.drafting.odds(layer, self.pricing.acceptance, sequence.generated, drafted)
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
                self.memory.hidden.give_back(sequence.slots[:count])
                del sequence.slots[:count]
            if sequence.wants_prompt_scores:
                self._score_prompt(sequence, begin, arrived, at, count)
            if begin + count >= len(sequence.ids) and sequence.output.finish_reason is None:
                skipped = max(0, len(sequence.ids) - 1 - begin)
                wanted.append((sequence, list(range(at + skipped, at + count))))
            at += count
        for group in in_groups(wanted, _FINAL_ROWS):
            started = time.perf_counter()
            raw_RV = self.runner.final_logits(arrived, [row for _, rows in group for row in rows])
            finite, best, at = finite_rows(raw_RV), raw_RV.argmax(-1).tolist(), 0
            if len(best) == 1:
                self._times.add_head(time.perf_counter() - started)
            for sequence, rows in group:
                cut = slice(at, at + len(rows))
                try:
                    self._verify(sequence, raw_RV[cut], best[cut], finite[cut])
                except UserError as error:
                    self._fail(sequence, error)
                at += len(rows)
        for sequence, _ in members:
            if sequence.tables:  # it still runs
                self.memory.publish(sequence)
                self.memory.leave_windows(sequence)
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
            if not finite[i]:
                raise not_finite(sequence.generated + 1, self.fused.dtype)
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
            self.memory.roll_back(sequence)
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
        self.pricing.count(draft.key, kept)

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
            self.roster.preempt(sequence)  # all its positions are rotated otherwise from here on
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
            _, right = drafting.odds(
                ("lookup", n), self.pricing.acceptance, sequence.generated, len(sequence.drafts) + i
            )
            drafts.append(Draft(token, final, "lookup", ("lookup", n), right))
        return sequence.extend_drafts(drafts)

    # ---- who runs

    def add(self, prompt: Ids, config: GenerationConfig, *, choice: int = 0) -> int:
        """Add one text, whatever ``config.n`` is; its key. :meth:`step` brings its events. ``choice`` says which of the
        texts of a seed it is.

        Raises :class:`UserError` for a prompt or settings that can't be met; nothing was added then.
        """
        with self._lock:
            return self._add(prompt, config, choice, _seed(config), None)

    def _add(self, prompt: Ids, config: GenerationConfig, choice: int, seed: int, sink: deque[Event] | None) -> int:
        sequence = self.intake.sequence(self._next_key, prompt, config, choice, seed)
        self._next_key += 1
        self.roster.waiting.append(sequence)
        if sink is not None:
            self._sinks[sequence.key] = sink
        return sequence.key

    def abort(self, key: int) -> None:
        """Drop a text that is not finished; nothing more comes of it. An unknown key is none that runs."""
        with self._lock:
            if self._in_step:  # by a processor, or by the end of a stream that nobody holds any more
                self._to_abort.append(key)
                return
            for sequence in [*self.roster.running, *self.roster.waiting]:
                if sequence.key == key:
                    self.roster.remove(sequence)
            self._sinks.pop(key, None)
            self._outbox = deque(event for event in self._outbox if event.key != key)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End a text by an error."""
        self.memory.spoil(sequence)
        self.roster.remove(sequence)
        if sequence.output.trace:
            self._send(Event(sequence.key, piece=sequence.output.take()))
        self._send(Event(sequence.key, error=error))

    def _drop_all(self, error: BaseException) -> None:
        """A pass broke off: what runs can't be trusted, so that all of it ends."""
        reason = error if isinstance(error, Exception) else RuntimeError(f"decoding was interrupted: {error!r}")
        for sequence in list(self.roster.running):
            self._fail(sequence, reason)

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
            generation = result(
                sequence, self._now() - sequence.tally.first, has_text=self.tokenizer is not None, quant=self.quant,
                costs=self.pricing.origin, exact=self.fused.dtype == torch.float64,
            )  # fmt: skip
            self.memory.publish(sequence)
            self.roster.remove(sequence)
            if sequence.alone:
                self._note_speed(generation.stats)
        self._send(Event(sequence.key, piece=output.take(), generation=generation))

    def _note_speed(self, stats: Stats) -> None:
        """Say where ``threshold`` was slower than ``full``, by the passes themselves, for a text that ran alone."""
        if stats.mode != "threshold" or stats.tokens < _TOKENS_TO_JUDGE or self.fused.device.type != "cpu":
            return
        ratio = self._times.full(self.runner.segments) * stats.tokens_per_second
        if ratio < _SLOWER:
            early = f"left at {stats.mean_layers:.1f} of {self.runner.bounds[-1]} layers on average"
            self._slow = (
                f"mode threshold ran at {ratio:.2f} times the speed of full, by the times of passes; tokens {early}"
            )
        elif ratio >= 1.0:
            self._slow = ""

    # ---- requests from start to end

    @property
    def most(self) -> int:
        """Texts that are decoded together."""
        return self.roster.most

    def add_choices(self, prompt: Ids, config: GenerationConfig, sink: deque[Event]) -> list[int]:
        """Add all texts of a request, or none of them, whose events go to ``sink``; their keys."""
        with self._lock:
            seed = _seed(config)
            return [self._add(prompt, config, choice, seed, sink) for choice in range(config.n)]

    def step_for(self, sink: deque[Event]) -> None:
        """One pass, unless another thread's has put something into the sink."""
        with self._lock:
            if not sink:
                self._step()

    def events(self, requests: Iterable[Request]) -> Generator[tuple[int, int, Event], None, None]:
        """See :func:`exitlm.decode.streams.events`."""
        return streams.events(self, requests)

    def stream(self, prompt: Ids, config: GenerationConfig) -> Iterator[Piece]:
        """Decode ``prompt`` and yield pieces as they become certain (in lossless mode: after verification)."""
        with self._lock:
            self.intake.sequence(-1, prompt, config, 0, 0)  # a bad request is refused here, not when it is read
        return streams.pieces_of_one(self, (prompt, config))

    def stream_all(self, requests: Iterable[Request]) -> Iterator[Piece]:
        """Decode some prompts together; pieces carry the index of their prompt, and the error of one that failed."""
        return streams.pieces(self, requests)

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
        return streams.finished(self, requests)

    @property
    def notes(self) -> list[str]:
        """What the user should know of the choices that were made, each in one sentence."""
        return [note for note in (self.pricing.note, *self.intake.notes.values(), self._slow) if note]


def _seed(config: GenerationConfig) -> int:
    """The seed of a request; a fresh one where it names none."""
    return secrets.randbits(63) if config.seed is None else config.seed
