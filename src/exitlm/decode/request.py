"""One request while it is decoded: prefill, then rounds of the pending-token loop until a stop.

``full`` and ``threshold`` emit one token per round. ``lossless`` drafts at exits or from the text before, and a round
ends when the last layer has verified all drafts: greedy by equality, sampling by rejection
(:mod:`exitlm.decode.accept`); what follows the first refusal is rolled back.

Shapes: V vocab_size, K rows of an exit's output matrix, R verified rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exitlm.decode.accept import accept
from exitlm.decode.drafting import DraftPolicy
from exitlm.decode.generation import GenerationConfig, TokenTrace
from exitlm.decode.lookup import NgramIndex
from exitlm.decode.rules import ExitRule
from exitlm.decode.sample import draw, finite_rows, sampler_of
from exitlm.decode.step import Fired, RuleTest, SequenceState, expand_logits
from exitlm.errors import UserError


@dataclass
class Draft:
    """A token that is not verified yet. ``q_V`` is the distribution it was drawn from, None if it was certain."""

    token: int
    layer: int
    source: str
    q_V: Tensor | None = None
    ngram: int = 0
    confidence: dict[int, float] = field(default_factory=dict)


class Request:
    """State of one request. Call :meth:`prefill` once, then :meth:`round` until :attr:`finish_reason` is set."""

    def __init__(
        self,
        state: SequenceState,
        prompt: Sequence[int],
        config: GenerationConfig,
        *,
        rule: ExitRule | None,
        policy: DraftPolicy | None,
        stop_ids: frozenset[int],
        max_new_tokens: int,
    ) -> None:
        self.state, self.prompt, self.config, self.rule, self.policy = state, list(prompt), config, rule, policy
        self.stop_ids, self.max_new_tokens = stop_ids, max_new_tokens
        self.final_layer = state.fused.config.num_hidden_layers
        self.sampler = sampler_of(config)
        self.generator = torch.Generator()
        if config.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(config.seed)
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.drafted = self.accepted = self.rounds = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self.index: NgramIndex | None = None
        if config.mode == "lossless" and "lookup" in config.draft:
            self.index = NgramIndex()
            self.index.extend(prompt)

    @torch.inference_mode()
    def prefill(self) -> list[TokenTrace]:
        """Run the prompt through all layers; the first token comes from the final head."""
        begin = time.perf_counter()
        hidden = self.state.prefill(self.prompt)
        self.state.depths.high_water = self.state.layer_rows = 0
        out = self._emit_final(hidden, {})
        self.prefill_seconds = time.perf_counter() - begin
        return out

    @torch.inference_mode()
    def round(self) -> list[TokenTrace]:
        """The tokens that become certain next: one, or in lossless mode up to all drafts and one more."""
        begin = time.perf_counter()
        self.rounds += 1
        if len(self.prompt) + len(self.tokens) > self.state.reach:
            self.state.prefill([*self.prompt, *self.tokens[:-1]], len(self.prompt) + len(self.tokens))
        out = self._draft_and_verify() if self.config.mode == "lossless" else self._one_token()
        self.decode_seconds += time.perf_counter() - begin
        return out

    def _one_token(self) -> list[TokenTrace]:
        test: RuleTest | None = None
        if self.rule is not None and len(self.tokens) >= self.config.min_exit_tokens:
            test = RuleTest(self.rule, len(self.tokens), self.max_new_tokens)
        outcome = self.state.advance(self.tokens[-1:], test, self.config.max_pending)
        confidence = {} if test is None else test.confidence
        if outcome.fired is None:
            assert outcome.final_RD is not None
            return self._emit_final(outcome.final_RD[-1:], confidence)
        fired = outcome.fired
        logits = self._exit_logits(fired)
        token = self._choose(logits) if logits is not None else fired.head.token(int(fired.logits_K.argmax()))
        return [self._record(token, fired.layer, "exit", confidence, logits if logits is not None else fired.logits_K)]

    def _exit_logits(self, fired: Fired) -> Tensor | None:
        """The exit's logits over the vocabulary, or None where the argmax of its own rows is enough."""
        if self.sampler.plain and not self.config.logprobs:
            return None
        return expand_logits(fired.head, fired.logits_K, self.state.fused.config.vocab_size)

    def _emit_final(self, hidden_1D: Tensor, confidence: dict[int, float]) -> list[TokenTrace]:
        logits = self.state.fused.final_logits(hidden_1D)
        self._check_finite(finite_rows(logits)[0])
        return [self._record(self._choose(logits[0]), self.final_layer, "final", confidence, logits[0])]

    def _check_finite(self, finite: bool) -> None:
        """Refuse to take a token from final logits that are not ``finite``."""
        if not finite:
            dtype = self.state.fused.dtype
            narrow = dtype in (torch.float16, torch.bfloat16)
            raise UserError(
                f"the final logits for new token {len(self.tokens) + 1} are not finite (NaN or infinity); the weights "
                + (f"are damaged, or {str(dtype).removeprefix('torch.')} is too narrow for them: get them again, or "
                   "load them with dtype 'float32'" if narrow else "are damaged: get them again")
            )  # fmt: skip

    def _choose(self, logits_V: Tensor, drafts: Sequence[int] = ()) -> int:
        """A token from logits ``[V]`` after the text so far (and unverified ``drafts``)."""
        text = self._text(drafts)
        if self.sampler.greedy:
            return int(self.sampler.penalise(logits_V, text).argmax())
        return draw(self.sampler.distribution(logits_V, text), self.generator)

    def _text(self, drafts: Sequence[int] = ()) -> list[int]:
        """The tokens before the next one, where a filter depends on them."""
        return [] if self.sampler.repetition_penalty == 1.0 else [*self.prompt, *self.tokens, *drafts]

    def _record(
        self, token: int, layer: int, source: str, confidence: dict[int, float], logits_V: Tensor, drafted: bool = False
    ) -> TokenTrace:
        trace = TokenTrace(id=token, exit_layer=layer, source=source, confidence=confidence, drafted=drafted)
        if self.config.logprobs:
            log_p = torch.log_softmax(logits_V.float() if logits_V.dtype != torch.float64 else logits_V, -1)
            trace.logprob = float(log_p[token])
            values, ids = log_p.topk(min(self.config.logprobs, len(log_p)))
            pairs = zip(ids.tolist(), values.tolist(), strict=True)
            trace.top_logprobs = {i: value for i, value in pairs if value > -math.inf}  # an exit's candidates alone
        self.tokens.append(token)
        if self.index is not None:
            self.index.extend([token])
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_new_tokens:
            self.finish_reason = "length"
        return trace

    # ---- lossless mode

    def _draft_and_verify(self) -> list[TokenTrace]:
        assert self.policy is not None
        drafts: list[Draft] = []
        skip = self.policy.skipped(len(self.tokens))
        while True:
            newest = drafts[-1].token if drafts else self.tokens[-1]
            room = self._room() - len(drafts)
            found = self._look_up(drafts, room)
            if found:
                outcome = self.state.advance([newest, *(draft.token for draft in found)])
                drafts += found
                confidence: dict[int, float] = {}
            else:
                test = self._exit_test(drafts, room, skip)
                outcome = self.state.advance([newest], test)
                confidence = {} if test is None else test.confidence
                if outcome.final_RD is None:
                    assert outcome.fired is not None
                    drafts.append(self._draft_at_exit(outcome.fired, drafts, confidence))
                    continue
            assert outcome.final_RD is not None
            return self._verify(outcome.final_RD, drafts, confidence)

    def _room(self) -> int:
        """How many drafts fit in this round: with one more token they reach neither the limit nor new rotations."""
        known = len(self.tokens)
        return min(self.max_new_tokens - known - 1, self.state.reach - len(self.prompt) - known)

    def _look_up(self, drafts: Sequence[Draft], room: int) -> list[Draft]:
        if self.index is None or room < 1 or self.policy is None:
            return []
        tokens, n = self.index.draft([draft.token for draft in drafts], min(room, self.policy.limit))
        if not tokens:
            return []
        length = self.policy.lookup_length(n, len(drafts) + 1, room, len(self.tokens))
        return [Draft(token, self.final_layer, "lookup", ngram=n) for token in tokens[:length]]

    def _exit_test(self, drafts: Sequence[Draft], room: int, skip: frozenset[int]) -> RuleTest | None:
        policy = self.policy
        if self.rule is None or policy is None or room < 1 or len(drafts) >= policy.exit_limit:
            return None
        position = len(self.tokens) + len(drafts)
        if position < self.config.min_exit_tokens:
            return None
        skip = policy.skipped_behind([draft.layer for draft in drafts], skip)
        return RuleTest(self.rule, position, self.max_new_tokens, skip)

    def _draft_at_exit(self, fired: Fired, drafts: Sequence[Draft], confidence: dict[int, float]) -> Draft:
        if self.sampler.plain:
            token = fired.head.token(int(fired.logits_K.argmax()))
            return Draft(token, fired.layer, "exit", confidence=confidence)
        logits = expand_logits(fired.head, fired.logits_K, self.state.fused.config.vocab_size)
        before = [draft.token for draft in drafts]
        if self.sampler.greedy:
            return Draft(self._choose(logits, before), fired.layer, "exit", confidence=confidence)
        q = self.sampler.distribution(logits, self._text(before))
        return Draft(draw(q, self.generator), fired.layer, "exit", q, confidence=confidence)

    def _verify(self, final_RD: Tensor, drafts: list[Draft], confidence: dict[int, float]) -> list[TokenTrace]:
        """Row i of ``final_RD`` decides draft i; the row after the last accepted one gives one more token."""
        logits = self.state.fused.final_logits(final_RD)
        assert len(logits) == len(drafts) + 1
        finite = finite_rows(logits)
        best = logits.argmax(-1).tolist() if self.sampler.plain else None
        known = len(self.tokens)
        out: list[TokenTrace] = []
        taken = 0
        for i, draft in enumerate(drafts):
            self._check_finite(finite[i])
            token = best[i] if best is not None else self._decide(logits[i], draft)
            kept = token == draft.token
            taken += kept
            layer, source = (draft.layer, draft.source) if kept else (self.final_layer, "final")
            out.append(self._record(token, layer, source, draft.confidence, logits[i], drafted=kept))
            if not kept or self.finish_reason is not None:
                break
        else:
            self._check_finite(finite[-1])
            token = best[-1] if best is not None else self._choose(logits[-1])
            out.append(self._record(token, self.final_layer, "final", confidence, logits[-1]))
        self._count(drafts, taken)
        # the newest token has no keys yet; every token before it has, at every depth
        self.state.truncate(len(self.prompt) + known + len(out) - 1)
        return out

    def _decide(self, logits_V: Tensor, draft: Draft) -> int:
        if self.sampler.greedy:
            return self._choose(logits_V)
        p = self.sampler.distribution(logits_V, self._text())
        return accept(p, draft.q_V, draft.token, self.generator)

    def _count(self, drafts: Sequence[Draft], taken: int) -> None:
        assert self.policy is not None
        self.drafted += len(drafts)
        self.accepted += taken
        exits = [draft for draft in drafts if draft.source == "exit"]
        for i, draft in enumerate(exits[: taken + 1]):
            self.policy.observe_exit(draft.layer, i < taken)
        found = [draft for draft in drafts if draft.source == "lookup"]
        if found and taken >= len(exits):
            self.policy.observe_lookup(found[0].ngram, len(found), taken - len(exits))
