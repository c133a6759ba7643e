"""The engine: a packed model, its defaults, and requests. One sequence at a time.

It turns a :class:`GenerationConfig` into an exit rule, active exits and a drafting policy. What is left at its default
is chosen by measured costs, once; what the user gave is always honoured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from exitlm.decode.cache import KeyValueCache
from exitlm.decode.costs import Costs, choose_drafting, choose_exits
from exitlm.decode.drafting import DraftPolicy
from exitlm.decode.formats import resolve_format
from exitlm.decode.fused import FusedModel
from exitlm.decode.generation import Generation, GenerationConfig, Piece, TokenTrace, summarise
from exitlm.decode.graphs import resolve_compile
from exitlm.decode.measure_costs import cached
from exitlm.decode.request import Request
from exitlm.decode.rules import PATIENCE_REACHED, ExitRule
from exitlm.decode.step import SequenceState
from exitlm.decode.text import TextStream, Tokenizer
from exitlm.errors import UserError
from exitlm.model.decoder import EarlyExitModel
from exitlm.weights.store import cache_directory

DEFAULT_THRESHOLD = 0.9
_OWN_DEFAULTS = {"patience": PATIENCE_REACHED, "fixed": 0.0}  # rules with an integer of their own
_PRIOR_ACCEPTANCE = 0.7
MEASURE_AGAIN = 30.0  # seconds from one measurement on a busy machine to the next


class Engine:
    """Decodes with a model. The model's weights are packed once; change the model's exits, then make a new engine."""

    def __init__(
        self,
        model: EarlyExitModel,
        *,
        quant: str = "auto",
        compile: str = "auto",
        tokenizer: Tokenizer | None = None,
        costs: Costs | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        """``compile`` (auto, none, graphs, static) is how passes of few rows run, see ``graphs.py``. ``costs`` replaces
        measuring; ``cache_dir`` is where measured costs are kept."""
        matrices = [weight.detach() for weight in model.model.layers.parameters() if weight.dim() == 2]
        self.quant = resolve_format(quant, matrices)
        self.config, self.tokenizer = model.config, tokenizer
        self.fused = FusedModel(model, self.quant, resolve_compile(compile, model.device))
        self.records: dict[int, dict[str, Any]] = {int(name): model.exits[name].record for name in model.exits}
        self.early = [e for e in sorted(self.fused.heads) if e < self.config.num_hidden_layers]
        self._notes: dict[str, str] = {}
        self._costs, self._cache_dir = costs, cache_dir
        self._next_measure = 0.0
        self._free: list[KeyValueCache] = []
        self._chosen: tuple[int, ...] | None = None

    @property
    def costs(self) -> Costs:
        """Costs of passes on this machine: given, kept from an earlier run, or measured now; again after a while where
        the machine was too busy to be measured."""
        if self._costs is None or (not self._costs.steady and time.monotonic() >= self._next_measure):
            costs = cached(self.fused, self._cache_dir or cache_directory())
            self._costs, self._next_measure, self._chosen = costs, time.monotonic() + MEASURE_AGAIN, None
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

    # ---- what to run

    def _default_rule(self, layers: Sequence[int]) -> str:
        return "gate" if layers and all(self.fused.heads[e].has_gate for e in layers) else "probability"

    def _default_threshold(self, layer: int, rule: str) -> float:
        """What tuning stored for this rule, else a fair guess."""
        if rule in _OWN_DEFAULTS:
            return _OWN_DEFAULTS[rule]
        record = self.records[layer]
        stored = record.get("rule", rule) == rule
        return float(record.get("threshold", DEFAULT_THRESHOLD)) if stored else DEFAULT_THRESHOLD

    def _thresholds(self, config: GenerationConfig, layers: Sequence[int], rule: str) -> dict[int, float]:
        """One threshold per active exit: the given ones, else the defaults."""
        given, found = config.threshold, {layer: self._default_threshold(layer, rule) for layer in layers}
        if given is None:
            return found
        if isinstance(given, Mapping):
            for layer in given:
                if layer not in found:
                    raise UserError(
                        f"a threshold is given for {layer!r}, which is no active exit; the active ones are {layers}"
                    )
            return {**found, **{int(layer): float(value) for layer, value in given.items()}}
        if isinstance(given, Sequence):
            order = list(layers if config.exits is None else config.exits)
            if len(given) != len(order):
                raise UserError(
                    f"{len(given)} thresholds are given for {len(order)} active exits {order}; give one for each"
                )
            return {int(layer): float(value) for layer, value in zip(order, given, strict=True)}
        return dict.fromkeys(layers, float(given))

    def _active(self, config: GenerationConfig) -> list[int]:
        if config.exits is None:
            return list(self.early)
        for layer in config.exits:
            if layer not in self.early:
                have = ", ".join(map(str, self.early)) or "none"
                raise UserError(f"the model has no exit at layer {layer} (it has: {have}); tune one with: exitlm tune")
        return sorted(map(int, config.exits))

    def plan(self, config: GenerationConfig) -> tuple[list[int], ExitRule | None]:
        """The active exits and the rule for a configuration (none in mode ``full``)."""
        if config.mode == "full" or (config.mode == "lossless" and "exits" not in config.draft):
            return [], None
        layers = self._active(config)
        if not layers:
            if config.mode == "threshold":
                if self.early:
                    raise UserError(f"exits is empty; name some of {self.early}, or use mode 'full'")
                raise UserError(
                    "mode 'threshold' needs exits, but the model has none; make some with: exitlm tune BASE --out DIR"
                )
            return [], None
        name = config.rule or self._default_rule(layers)
        thresholds = self._thresholds(config, layers, name)
        if name == "gate":
            for layer in layers:
                if not self.fused.heads[layer].has_gate:
                    raise UserError(
                        f"rule 'gate' needs a gate, but exit {layer} has none; tune with --set exits.gate=true or use "
                        "rule 'probability'"
                    )
        if name == "fixed":
            layer = config.exit_layer if config.exit_layer is not None else layers[-1]
            if layer not in layers:
                raise UserError(f"exit_layer {layer} is no active exit; use one of {layers}")
            return [layer], ExitRule(name=name, thresholds={layer: thresholds[layer]})
        if config.rule is None and config.threshold is None and config.exits is None:
            return self._default_plan(config, name)
        return layers, ExitRule(name=name, thresholds=thresholds, patience=config.patience)

    def _default_plan(self, config: GenerationConfig, name: str) -> tuple[list[int], ExitRule | None]:
        """All at default: drop exits that never fire or, by the costs, do not pay."""
        thresholds = {e: self._default_threshold(e, name) for e in self.early}
        known = all(self.records[e].get("rule") == name and "coverage" in self.records[e] for e in self.early)
        if config.mode == "lossless":
            if config.adaptive:
                records = {e: self.records[e] for e in self.early if self.records[e].get("rule") == name}
                curves = {e: record["calibration"] for e, record in records.items() if record.get("calibration")}
                costs = self.costs
                chosen = choose_drafting(costs, curves, self._tests(name)) if curves else {}
                thresholds.update({e: chosen.get(e, 1.0) for e in curves})
            layers = [e for e in self.early if thresholds[e] < 1.0]
            if config.adaptive:
                self._note_off(layers, "draft", "calibration" if layers else "calibration (none pays)")
        elif known:
            layers = list(self._paying_exits(thresholds, name))
        else:
            layers = list(self.early)
        if not layers:
            return [], None
        return layers, ExitRule(name=name, thresholds={e: thresholds[e] for e in layers})

    def _tests(self, name: str) -> dict[int, float]:
        """Seconds of testing each exit by a rule."""
        assert self._costs is not None  # read once for a plan, so that no two tables are mixed
        return {e: self._costs.test[e] if name == "gate" else self._costs.draft[e] for e in self.early}

    def _paying_exits(self, thresholds: Mapping[int, float], name: str) -> tuple[int, ...]:
        costs = self.costs
        if self._chosen is None:
            coverage = {e: float(self.records[e]["coverage"]) for e in self.early if thresholds[e] < 1.0}
            self._chosen, speed = choose_exits(costs, coverage, self._tests(name))
            gain = f"expected speed with {list(self._chosen)}: {speed:.2f}x of full" if self._chosen else "none pays"
            self._note_off(self._chosen, "leave", f"coverage ({gain})")
        return self._chosen

    def _note_off(self, layers: Sequence[int], what: str, measure: str) -> None:
        """Say which exits the costs switch off, and that naming them switches them on."""
        off = [e for e in self.early if e not in layers]
        self._notes.pop(what, None)
        if off:
            note = f"no token will {what} at exits {off}, by measured cost and {measure}; name them to use them"
            self._notes[what] = note

    @property
    def notes(self) -> list[str]:
        """What the user should know of the choices that were made, each in one sentence."""
        return list(self._notes.values())

    # ---- running

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Refuse an empty prompt, ids that the vocabulary lacks, and one that fills the context."""
        if len(prompt) == 0:
            raise UserError("the prompt is empty; give at least one token of text")
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise UserError(
                f"the prompt has token id {max(prompt) if min(prompt) >= 0 else min(prompt)}, but the vocabulary has "
                f"ids 0 to {self.config.vocab_size - 1}; use the tokenizer of this model"
            )
        if len(prompt) >= self.config.max_position_embeddings:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, but the model's context is "
                f"{self.config.max_position_embeddings}; shorten the prompt"
            )

    def start(self, prompt: Sequence[int], config: GenerationConfig) -> Request:
        """A request that is ready to be prefilled. Its cache comes back with :meth:`finish`."""
        self.check_prompt(prompt)
        layers, rule = self.plan(config)
        max_new_tokens = min(config.max_new_tokens, self.config.max_position_embeddings - len(prompt))
        cache = self._free.pop() if self._free else self.fused.new_cache()
        state = SequenceState(self.fused, layers, cache, len(prompt) + max_new_tokens)
        policy: DraftPolicy | None = None
        if config.mode == "lossless":
            priors = {}
            for layer in layers:
                assert rule is not None
                priors[layer] = _expected_precision(self.records[layer], rule, layer)
            costs = self.costs if config.adaptive else None
            policy = DraftPolicy(costs, priors, config.max_draft, config.max_pending)
        stops = frozenset(config.stop_token_ids)
        if not config.ignore_eos:
            stops |= frozenset(self.config.eos_token_ids)
        return Request(state, prompt, config, rule=rule, policy=policy, stop_ids=stops, max_new_tokens=max_new_tokens)

    def finish(self, request: Request) -> None:
        """Take a request's cache back for the next one."""
        if len(self._free) < 2:
            self._free.append(request.state.cache)

    def _pieces(self, request: Request) -> Iterator[Piece]:
        text = TextStream(self.tokenizer, request.config.stop, request.prompt)
        broken = False
        try:
            tokens = request.prefill()
            while True:
                out: list[TokenTrace] = []
                for token in tokens:
                    token.text = text.push(token.id)
                    out.append(token)
                    if text.finished:
                        request.finish_reason = "stop"
                        request.accepted -= sum(token.drafted for token in tokens[len(out) :])
                        break
                if request.finish_reason is not None:
                    out[-1].text += text.flush()
                    if text.finished:
                        request.finish_reason = "stop"
                yield Piece(text="".join(token.text for token in out), tokens=out)
                if request.finish_reason is not None:
                    return
                tokens = request.round()
        except UserError:  # what it leaves in the cache may not be numbers, and padded reads would meet them
            broken = True
            raise
        finally:
            if not broken:
                self.finish(request)

    def stream(self, prompt: Sequence[int], config: GenerationConfig) -> Iterator[Piece]:
        """Decode ``prompt`` and yield pieces as they become certain (in lossless mode: after verification)."""
        if config.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and this model has none; use stop_token_ids")
        return self._pieces(self.start(prompt, config))

    def generate(self, prompt: Sequence[int], config: GenerationConfig) -> Generation:
        """Decode ``prompt`` to the end."""
        if config.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and this model has none; use stop_token_ids")
        request = self.start(prompt, config)
        trace = [token for piece in self._pieces(request) for token in piece.tokens]
        return self.result(request, trace)

    def result(self, request: Request, trace: list[TokenTrace]) -> Generation:
        """The finished generation of a request and its tokens."""
        rule = request.rule
        stats: dict[str, Any] = {
            "mode": request.config.mode,
            "prompt_tokens": len(request.prompt),
            **summarise(trace, request.decode_seconds),
            "prefill_seconds": request.prefill_seconds,
            "decode_seconds": request.decode_seconds,
            "rounds": request.rounds,
            "drafted": request.drafted,
            "accepted": request.accepted,
            "acceptance": request.accepted / request.drafted if request.drafted else None,
            "max_pending": request.state.depths.high_water,
            "layer_rows": request.state.layer_rows,
            "exits": [] if rule is None else sorted(rule.thresholds),
            "rule": None if rule is None else rule.name,
            "thresholds": {} if rule is None else dict(rule.thresholds),
            "quant": self.quant,
            "costs": None if self._costs is None else self._costs.origin,
        }
        return Generation(
            text=None if self.tokenizer is None else "".join(token.text for token in trace),
            token_ids=[token.id for token in trace],
            exit_layers=[token.exit_layer for token in trace],
            trace=trace,
            stats=stats,
            finish_reason=request.finish_reason or "length",
        )


def _expected_precision(record: Mapping[str, Any], rule: ExitRule, layer: int) -> float:
    """The precision that tuning measured for this rule at the nearest score, else a fair guess."""
    curve = record.get("calibration")
    if not curve or record.get("rule", rule.name) != rule.name:
        return _PRIOR_ACCEPTANCE
    threshold = rule.thresholds[layer]
    at = min(range(len(curve["scores"])), key=lambda i: abs(float(curve["scores"][i]) - threshold))
    return min(0.99, max(0.01, float(curve["precision"][at])))
