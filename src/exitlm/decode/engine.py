"""The engine: texts come and go at any step, and rows of many of them share each pass.

```
step:  admit texts that fit  ->  the agenda chooses a pass: rows that wait at one boundary
       run them to the next boundary where something happens to one of them
         an exit:  the newest row of each text that tests it is scored; where the rule fires, the token (or draft) is
                   there, and its rows stay pending; the others wait to go deeper
         the end:  the final head gives tokens, and verifies drafts; what follows the first refusal is rolled back
```
Each (token, layer) is computed once, in every mode, and a text depends on nobody else's rows. This file is the loop;
``agenda.py`` chooses, ``kernels/runner.py`` computes, ``cache/memory.py`` keeps, ``sequence.py`` remembers,
``accounts.py`` tells what it took, and ``streams.py`` runs requests from start to end.

Shapes: M rows of a pass, R rows that want final logits, T tested rows, K rows of an exit's output matrix, V vocab_size.
"""

from __future__ import annotations

import collections.abc
import secrets
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from exitlm.decode import streams
from exitlm.decode.accounts import Accounts
from exitlm.decode.agenda import Agenda, Chosen
from exitlm.decode.arrival import Arrival, Here, Runs
from exitlm.decode.batch import Batch
from exitlm.decode.cache.memory import MAX_PENDING, Memory
from exitlm.decode.departed import Departed, Member, by_adapter, prompt_positions
from exitlm.decode.fair_lock import FairLock
from exitlm.decode.generation import Generation, GenerationConfig, Piece, RefusedDraft, TokenTrace
from exitlm.decode.intake import Intake
from exitlm.decode.kernels.packed import packed_model
from exitlm.decode.kernels.runner import Runner
from exitlm.decode.kernels.scores import log_probabilities
from exitlm.decode.logits import expand, in_groups, not_finite, restricted, scores
from exitlm.decode.options import EngineConfig
from exitlm.decode.pricing.costs import Costs
from exitlm.decode.pricing.pricing import Pricing
from exitlm.decode.results import result
from exitlm.decode.roster import Roster
from exitlm.decode.rules import fires
from exitlm.decode.sampling.sampler import NoTokenLeft
from exitlm.decode.sequence import Draft, Sequence
from exitlm.decode.streams import Event, Request
from exitlm.decode.text import Tokenizer
from exitlm.errors import UserError
from exitlm.model.decoder import EarlyExitModel

_FINAL_ROWS = 64  # rows of final logits at once
Ids = collections.abc.Sequence[int]


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
        options = options or EngineConfig()
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.runner = Runner(packed_model(model, quant, compile, options), options)
        pricing = Pricing(self.runner, options, costs, cache_dir)
        self._assemble(model, self.runner, pricing, tokenizer, options)

    def _assemble(
        self, model: EarlyExitModel, runner: Runs, pricing: Pricing, tokenizer: Tokenizer | None,
        options: EngineConfig,
    ) -> None:  # fmt: skip
        """Put the parts together around a runner."""
        self.config, self.tokenizer, self.options = model.config, tokenizer, options
        self.runs, self.fused, self.pricing, self.quant = runner, runner.fused, pricing, runner.fused.quant
        self.memory = Memory(runner, options)
        self.intake = Intake(runner, model.heads_by_key(), tokenizer, lambda: pricing.costs)
        self.roster = Roster(
            self.memory, min(options.max_sequences, options.max_rows), runner.segments, self.fused.original_context
        )
        self.agenda = Agenda(runner, self.roster, pricing, options)
        self.accounts = Accounts(runner, pricing)
        self.lock = FairLock()
        self._sinks: dict[int, deque[Event]] = {}
        self._outbox: deque[Event] = deque()
        self._next_key = 0
        self._in_step, self._to_abort = False, list[int]()
        self.lost, self.is_down = 0, False  # stages that were lost, and whether the last one could not be replaced

    @property
    def stage_seconds(self) -> collections.abc.Sequence[float]:
        """What the passes of each stage took so far; none where there is one process."""
        return ()

    def close(self) -> None:
        """Give back what is not memory: other processes, where there are some."""

    def tend(self) -> None:
        """Look after what may change while nothing is decoded; for whoever has an engine that waits."""

    # ---- the loop

    def step(self) -> list[Event]:
        """One pass, and what it brought to the texts that were added with :meth:`add`."""
        with self.lock:
            self.advance()
            found = list(self._outbox)
            self._outbox.clear()
            return found

    @torch.inference_mode()
    def advance(self) -> None:
        """One pass; what it brought goes to the sinks. The caller holds :attr:`lock`."""
        if self._in_step:
            raise UserError("a logits_processor that decodes needs an engine of its own")
        self._in_step = True
        self.accounts.begin_step()
        try:
            self.roster.admit(self.accounts.now())
            self._turn()
        except BaseException as error:
            self._drop_all(error)
            raise
        finally:
            self._in_step = False
            while self._to_abort:
                self.abort(self._to_abort.pop())
            self.accounts.end_step()

    def _turn(self) -> None:
        """Choose a pass, run it, and do what it brings."""
        chosen = self.agenda.next_pass()
        if chosen is None:
            return
        before = self.accounts.before(chosen, self.roster.running)
        first, last = chosen.first, chosen.last
        departed = self._depart(chosen)
        hidden_MD = self.memory.hidden.get(departed.slots) if first else self.runner.embed(departed.tokens)
        begin = time.perf_counter()
        arrived = self.runner.run(first, last, departed.batch, hidden_MD)
        seconds = time.perf_counter() - begin
        self.accounts.in_kernels += seconds
        if departed.batch.count == 1:
            self.accounts.times.add(first, last, seconds)
        self._arrive(departed, Here(self.runner, last, arrived))
        if before is not None:
            self.accounts.after(chosen, before, self.roster.running)

    def _depart(self, chosen: Chosen) -> Departed:
        """Rows set out from one boundary to another."""
        first, last = chosen.first, chosen.last
        layers = self.runs.bounds[last] - self.runs.bounds[first]
        parts, tokens, slots, members, row = [], [], [], [], 0
        for sequence, count in chosen.members:
            start = sequence.sent[first]
            parts.append(sequence.part(start, count, self.memory.windows))
            if first == 0:
                tokens += sequence.tokens(start, count)
                if last < self.runs.segments:
                    sequence.slots += self.memory.hidden.take(count)
            else:
                slots += sequence.slots_of(start, count)
            # a draft goes deep if it is worth it, and pending rows may ride along; all other rows have to
            goes = sequence.is_priced or sequence.moving if first else sequence.prefilling or not sequence.is_priced
            sequence.sent[first:last] = [start + count] * (last - first)
            sequence.waited = 0.0
            if goes:
                sequence.deep_end = max(sequence.deep_end, start + count)
            if sequence.generated:
                sequence.tally.layer_rows += count * layers
            members.append(Member(sequence, start, count, row, sequence.epoch))
            row += count
        return Departed(first, last, Batch.of(tuple(parts)), members, chosen.tested, tokens, slots)

    def _arrive(self, departed: Departed, arrived: Arrival) -> None:
        """Do what has to be done where rows have come to; those that were taken back meanwhile bring nothing."""
        first, last = departed.first, departed.last
        members = [member for member in departed.members if member.epoch == member.sequence.epoch]
        for member in members:
            member.sequence.filled[first:last] = [member.end] * (last - first)
        if last == self.runs.segments:
            self._finish_rows(first, members, arrived)
            return
        self._wait(departed, members, arrived)
        self._test(departed, members, arrived)

    def _wait(self, departed: Departed, members: list[Member], arrived: Arrival) -> None:
        """Keep hidden states at a boundary."""
        hidden_MD = arrived.hidden_MD
        if hidden_MD is None or not members:  # a stage keeps them, or nobody wants them
            return
        if len(members) == len(departed.members):
            slots = [slot for m in members for slot in m.sequence.slots_of(m.start, m.count)]
            self.memory.hidden.put(slots, hidden_MD)
            return
        for m in members:
            self.memory.hidden.put(m.sequence.slots_of(m.start, m.count), hidden_MD[m.row : m.row + m.count])

    # ---- at an exit

    def _test(self, departed: Departed, members: list[Member], arrived: Arrival) -> None:
        """Score the newest rows that are tested at this boundary, those of each adapter by its own exit."""
        layer = self.runs.bounds[departed.last]
        for adapter, tested in by_adapter(members, departed.tested, layer).items():
            rows, sequences = [member.newest for member in tested], [member.sequence for member in tested]
            self._test_exit(departed.last, adapter, arrived, rows, sequences)

    def _test_exit(
        self, boundary: int, adapter: str, arrived: Arrival, rows: list[int], tested: list[Sequence]
    ) -> None:
        """Score some rows at one exit; where a rule fires, the token or draft is there."""
        layer, head = self.runs.bounds[boundary], self.runs.head(boundary, adapter)
        gates = [1.0] * len(rows)
        gated = [i for i, sequence in enumerate(tested) if sequence.plan.rule_name == "gate"]
        if gated:  # a gate that does not fire needs no logits
            found_gates = arrived.gates([rows[i] for i in gated], adapter)
            for i, score in zip(gated, found_gates, strict=True):
                gates[i] = score
            quiet = [i for i in gated if not fires(gates[i], tested[i].plan.threshold(layer))]
            for i in quiet:
                self._fires(tested[i], layer, gates[i])
            left = [i for i in range(len(rows)) if i not in quiet]
            rows, tested, gates = [rows[i] for i in left], [tested[i] for i in left], [gates[i] for i in left]
            if not rows:
                return
        started = time.perf_counter()
        found = arrived.exit_scores(rows, adapter)
        self.accounts.in_kernels += time.perf_counter() - started
        raw_TK = found.logits_MK
        logits_TK = restricted(raw_TK, tested, head.candidate_ids, self.config.vocab_size)
        scored, best = scores(logits_TK, tested, found)
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
            sequence.drafting.tested(sequence.plan.source(layer), sequence.generated, fired)
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
            drafted, key = len(sequence.drafts), sequence.plan.source(layer)
            _, estimate = sequence.drafting.odds(key, self.pricing.acceptance, sequence.generated, drafted)
            sequence.extend_drafts([Draft(token, layer, "exit", key, estimate, test.confidence)])
            return
        raw_V = expand(raw_K, candidates_K, self.config.vocab_size) if sequence.config.logprobs else raw_K
        sequence.tally.rounds += 1
        self._emit(sequence, TokenTrace(id=token, exit_layer=layer, source="exit", confidence=test.confidence), raw_V)
        self._tell(sequence)

    # ---- at the end

    def _finish_rows(self, first: int, members: list[Member], arrived: Arrival) -> None:
        """Rows that have passed all layers: tokens of the final head, drafts verified, full blocks shared."""
        wanted = []
        for member in members:
            sequence, count = member.sequence, member.count
            if first:
                self.memory.hidden.give_back(sequence.slots[:count])
                del sequence.slots[:count]
            if sequence.wants_prompt_scores:
                self._score_prompt(member, arrived)
            if rows := member.final_rows():
                wanted.append((sequence, rows))
        for group in in_groups(wanted, _FINAL_ROWS):
            started = time.perf_counter()
            found = arrived.final_scores([row for _, rows in group for row in rows])
            raw_RV, finite, best, at = found.logits_MK, found.finite, found.best, 0
            seconds = time.perf_counter() - started
            self.accounts.in_kernels += seconds
            if len(best) == 1:
                self.accounts.times.add_head(seconds)
            for sequence, rows in group:
                cut = slice(at, at + len(rows))
                try:
                    self._verify(sequence, raw_RV[cut], best[cut], finite[cut])
                except UserError as error:
                    self._fail(sequence, error)
                at += len(rows)
        for sequence in (member.sequence for member in members):
            if sequence.tables:  # it still runs
                self.memory.publish(sequence)
                self.memory.leave_windows(sequence)
                if sequence.output.finish_reason is not None and sequence.filled[-1] >= sequence.prompt_length:
                    sequence.tally.first = self.accounts.now()  # only prompt scores were wanted
                    self._tell(sequence)

    def _verify(self, sequence: Sequence, raw_RV: Tensor, best: list[int], finite: list[bool]) -> None:
        """Row i decides draft i, if there is one; the row after the last accepted one gives one token more. Rows that
        did not come along stay where they are as long as all before them was right."""
        drafts, tally, test = sequence.take_drafts(), sequence.tally, sequence.test
        confidence = {} if test is None else test.confidence
        if sequence.generated:
            tally.rounds += 1
        else:
            tally.first = self.accounts.now()
        taken, kept, prepared = 0, True, sequence.prepared
        for i in range(len(best)):
            if not finite[i]:
                raise not_finite(sequence.generated + 1, self.fused.dtype, self.fused.cache_dtype)
            draft = drafts[i] if i < len(drafts) else None
            token = best[i] if sequence.plain else sequence.choose(sequence.restricted(raw_RV[i]))
            kept = draft is not None and token == draft.token
            trace = TokenTrace(id=token, exit_layer=self.runs.bounds[-1], source="final", confidence=confidence)
            if draft is not None:
                trace.confidence = draft.confidence
                self._count(sequence, draft, kept)
            if draft is not None and kept:
                trace.exit_layer, trace.source, trace.drafted = draft.layer, draft.source, True
            elif draft is not None:
                trace.refused = RefusedDraft(id=draft.token, layer=draft.layer, source=draft.source)
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
        if drafts:
            dropped = [] if kept and sequence.output.finish_reason is None else drafts[taken:]
            self.accounts.verified(sequence, drafts[:taken], dropped)
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

    def _score_prompt(self, member: Member, arrived: Arrival) -> None:
        """Log-probabilities of the prompt's tokens that follow the rows of a member."""
        sequence = member.sequence
        positions = prompt_positions(member)
        for cut in range(0, len(positions), _FINAL_ROWS):
            some = positions[cut : cut + _FINAL_ROWS]
            rows, tokens = [member.row + p - member.start for p in some], [sequence.ids[p + 1] for p in some]
            most = sequence.config.prompt_logprobs or 0
            sequence.output.prompt_logprobs += arrived.log_probabilities(rows, tokens, most)

    # ---- who runs

    def add(self, prompt: Ids, config: GenerationConfig, *, choice: int = 0) -> int:
        """Add one text, whatever ``config.n`` is; its key. :meth:`step` brings its events. ``choice`` says which of the
        texts of a seed it is.

        Raises :class:`UserError` for a prompt or settings that can't be met; nothing was added then.
        """
        with self.lock:
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
        with self.lock:
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

    def _send(self, event: Event) -> None:
        sink = self._sinks.get(event.key)
        if event.last:
            self._sinks.pop(event.key, None)
        (self._outbox if sink is None else sink).append(event)

    def _tell(self, sequence: Sequence) -> None:
        """Hand out what is certain; the last time, the whole generation."""
        output, generation = sequence.output, None
        if output.finish_reason is not None:
            seconds = self.accounts.now() - sequence.tally.first
            generation = result(
                sequence, seconds, has_text=self.tokenizer is not None, quant=self.quant,
                kernels=self.fused.kernels_name, costs=self.pricing.origin, exact=self.fused.exact,
            )  # fmt: skip
            self.memory.publish(sequence)
            self.roster.remove(sequence)
            self.accounts.ended(sequence, generation.stats)
        self._send(Event(sequence.key, piece=output.take(), generation=generation))

    # ---- requests from start to end

    @property
    def most(self) -> int:
        """Texts that are decoded together."""
        return self.roster.most

    def add_choices(self, prompt: Ids, config: GenerationConfig, sink: deque[Event]) -> list[int]:
        """Add all texts of a request, or none of them, whose events go to ``sink``; their keys."""
        with self.lock:
            seed = _seed(config)
            return [self._add(prompt, config, choice, seed, sink) for choice in range(config.n)]

    def events(self, requests: Iterable[Request]) -> Generator[tuple[int, int, Event], None, None]:
        """See :func:`exitlm.decode.streams.events`."""
        return streams.events(self, requests)

    def stream(self, prompt: Ids, config: GenerationConfig) -> Iterator[Piece]:
        """Decode ``prompt`` and yield pieces as they become certain (in lossless mode: after verification)."""
        with self.lock:
            self.intake.sequence(-1, prompt, config, 0, 0)  # a bad request is refused here, not when it is read
        return streams.pieces_of_one(self, (prompt, config))

    def stream_all(self, requests: Iterable[Request]) -> Iterator[Piece]:
        """Decode some prompts together; pieces carry the index of their prompt, and the error of one that failed."""
        return streams.pieces(self, requests)

    def generate(self, prompt: Ids, config: GenerationConfig) -> Generation:
        """Decode ``prompt`` to the end."""
        ((_, found),) = streams.finished(self, [(prompt, config)])
        if found.error is not None:
            raise found.error
        return found

    def generate_all(self, requests: Iterable[Request]) -> list[Generation]:
        """Decode some prompts together, to the end. One that failed has an ``error``."""
        found = dict(streams.finished(self, requests))
        return [found[index] for index in range(len(found))]

    def finished(self, requests: Iterable[Request]) -> Generator[tuple[int, Generation], None, None]:
        """Decode some prompts together: (index, generation) as they finish. One that failed has an ``error``."""
        return streams.finished(self, requests)

    @property
    def notes(self) -> list[str]:
        """What the user should know of the choices that were made, each in one sentence."""
        notes = (self.fused.note, self.pricing.note, *self.intake.notes.values(), self.accounts.times.note)
        return [note for note in notes if note]


def _seed(config: GenerationConfig) -> int:
    """The seed of a request; a fresh one where it names none."""
    return secrets.randbits(63) if config.seed is None else config.seed
