"""What a request will do, as far as its settings and the exits' records decide: exits, rule, thresholds, drafts.

What the user gave is always honoured. In ``threshold`` mode the rest comes from the adapter alone, so that a text is
the same on every machine; what is *drafted* in ``lossless`` mode may follow measured costs, since it changes no token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from exitlm.decode.generation import GenerationConfig
from exitlm.decode.pricing.costs import Costs, choose_drafting
from exitlm.decode.rules import PATIENCE_REACHED, ExitRule
from exitlm.errors import UserError
from exitlm.model.exits import ExitHead, ExitKey
from exitlm.model.record import ExitRecord

DEFAULT_THRESHOLD = 0.9
_OWN_DEFAULTS = {"patience": PATIENCE_REACHED, "fixed": 0.0}  # rules with an integer of their own
_PRIOR_FIRING, _PRIOR_ACCEPTANCE = 0.5, 0.7


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The rule of a request, None where no exit is tested; ``off`` names exits that are left alone by default, and
    ``why``; ``adapters`` tells of each layer whose exit it is."""

    rule: ExitRule | None = None
    off: tuple[int, ...] = ()
    why: str = ""
    adapters: Mapping[int, str] = field(default_factory=dict)

    @property
    def exits(self) -> list[int]:
        """The layers whose exits are tested, ascending."""
        return [] if self.rule is None else sorted(self.rule.thresholds)

    @property
    def rule_name(self) -> str:
        """The rule that is tested."""
        assert self.rule is not None
        return self.rule.name

    def threshold(self, layer: int) -> float:
        """The threshold of an exit that is tested."""
        assert self.rule is not None
        return self.rule.thresholds[layer]

    def source(self, layer: int) -> tuple[str, str, int]:
        """What drafts of an exit are counted under: two adapters' exits at a layer are right in different measure."""
        return "exit", self.adapters[layer], layer


@dataclass(frozen=True, kw_only=True)
class Exits:
    """What planning knows of the early exits that a request may test, one a layer: their records, which have gates, how
    their heads are built, and whose they are. ``owner`` is who has them, in words."""

    records: Mapping[int, ExitRecord]
    gated: frozenset[int]
    kinds: Mapping[int, str] = field(default_factory=dict)
    adapters: Mapping[int, str] = field(default_factory=dict)
    owner: str = "the model"

    @classmethod
    def of(cls, heads: Mapping[ExitKey, ExitHead], owner: str = "the model") -> Exits:
        """Those of some heads; of several at a layer, the first one."""
        chosen: dict[int, tuple[str, ExitHead]] = {}
        for (adapter, layer), head in heads.items():
            chosen.setdefault(layer, (adapter, head))
        return cls(
            records={e: head.record for e, (_, head) in chosen.items()},
            gated=frozenset(e for e, (_, head) in chosen.items() if head.config.gate),
            kinds={e: head.config.kind for e, (_, head) in chosen.items()},
            adapters={e: adapter for e, (adapter, _) in chosen.items()},
            owner=owner,
        )

    @property
    def layers(self) -> list[int]:
        """All of them, ascending."""
        return sorted(self.records)

    def default_rule(self, layers: Sequence[int]) -> str:
        """The gate where all have one, else the probability."""
        return "gate" if layers and self.gated.issuperset(layers) else "probability"

    def default_threshold(self, layer: int, rule: str) -> float:
        """What tuning stored for this rule, else a fair guess."""
        if rule in _OWN_DEFAULTS:
            return _OWN_DEFAULTS[rule]
        record = self.records[layer]
        stored = record.threshold is not None and record.rule in (None, rule)
        return record.threshold if stored and record.threshold is not None else DEFAULT_THRESHOLD

    def tested(self) -> list[int]:
        """The exits that ``threshold`` mode tests by default: what tuning decided, else those with a stored threshold
        below 1."""
        kept = [e for e in self.layers if self.records[e].tested is not False]
        rule = self.default_rule(kept)
        return [e for e in kept if self.records[e].tested or self.default_threshold(e, rule) < 1.0]

    def expected(self, layer: int, rule: ExitRule) -> tuple[float, float]:
        """The chances that this rule fires at an exit, and that it is right then: as tuning measured them at the
        nearest score, else fair guesses."""
        curve = self.records[layer].calibration
        if curve is None or self.records[layer].rule not in (None, rule.name):
            return _PRIOR_FIRING, _PRIOR_ACCEPTANCE
        threshold = rule.thresholds[layer]
        at = min(range(len(curve.scores)), key=lambda i: abs(curve.scores[i] - threshold))
        firing, right = (min(0.99, max(0.01, found)) for found in (curve.coverage[at], curve.precision[at]))
        return firing, right


def make_plan(config: GenerationConfig, exits: Exits, costs: Callable[[], Costs]) -> Plan:
    """The plan of a request. ``costs`` is asked only where drafts are left at their default. Raises :class:`UserError`
    for settings that these exits can't meet."""
    return replace(_plan(config, exits, costs), adapters=exits.adapters)


def _plan(config: GenerationConfig, exits: Exits, costs: Callable[[], Costs]) -> Plan:
    if config.mode == "full" or (config.mode == "lossless" and "exits" not in config.draft):
        return Plan()
    layers = _active(config, exits)
    if not layers:
        if config.mode == "threshold":
            if exits.records:
                raise UserError(f"exits is empty; name some of {exits.layers}, or use mode 'full'")
            raise UserError(
                f"mode 'threshold' needs exits, but {exits.owner} has none; make some with: exitlm tune BASE --out DIR"
            )
        return Plan()
    name = config.rule or exits.default_rule(layers)
    thresholds = _thresholds(config, exits, layers, name)
    if name == "gate":
        for layer in layers:
            if layer not in exits.gated:
                raise UserError(
                    f"rule 'gate' needs a gate, but exit {layer} has none; tune with --set exits.gate=true or use "
                    "rule 'probability'"
                )
    if name == "fixed":
        layer = config.exit_layer if config.exit_layer is not None else layers[-1]
        if layer not in layers:
            raise UserError(f"exit_layer {layer} is no active exit; use one of {layers}")
        return Plan(rule=ExitRule(name=name, thresholds={layer: thresholds[layer]}))
    if config.rule is None and config.threshold is None and config.exits is None:
        return _default_drafting(config, exits, name, costs) if config.mode == "lossless" else _default(exits)
    return Plan(rule=ExitRule(name=name, thresholds=thresholds, patience=config.patience))


def _active(config: GenerationConfig, exits: Exits) -> list[int]:
    if config.exits is None:
        return exits.layers
    for layer in config.exits:
        if layer not in exits.records:
            have = ", ".join(map(str, exits.layers)) or "none"
            raise UserError(f"{exits.owner} has no exit at layer {layer} (it has: {have}); tune one with: exitlm tune")
    return sorted(config.exits)


def _thresholds(config: GenerationConfig, exits: Exits, layers: Sequence[int], rule: str) -> dict[int, float]:
    """One threshold per active exit: the given ones, else the defaults."""
    given, found = config.threshold, {layer: exits.default_threshold(layer, rule) for layer in layers}
    if given is None:
        return found
    if isinstance(given, Mapping):
        for layer in given:
            if layer not in found:
                raise UserError(
                    f"a threshold is given for {layer!r}, which is no active exit; the active ones of {exits.owner} "
                    f"are {layers}"
                )
        return {**found, **given}
    return dict.fromkeys(layers, given)


def _default(exits: Exits) -> Plan:
    """``threshold`` mode, all at default: what tuning says is worth testing."""
    layers = exits.tested()
    off = tuple(e for e in exits.layers if e not in layers)
    if not layers:
        return Plan(off=off, why="leave")
    name = exits.default_rule(layers)
    found = {e: exits.default_threshold(e, name) for e in layers}
    return Plan(rule=ExitRule(name=name, thresholds=found), off=off, why="leave")


def _default_drafting(config: GenerationConfig, exits: Exits, name: str, costs: Callable[[], Costs]) -> Plan:
    """``lossless`` mode, all at default: the exits and scores that gain most by calibration and costs."""
    found = {e: exits.default_threshold(e, name) for e in exits.layers}
    why = ""
    if config.adaptive:
        records = {e: record for e, record in exits.records.items() if record.rule == name}
        curves = {e: record.calibration for e, record in records.items() if record.calibration is not None}
        table = costs()
        tests = {e: table.cut() + (table.test[e] if name == "gate" else table.draft[e]) for e in exits.layers}
        chosen = choose_drafting(table, curves, tests) if curves else {}
        found.update({e: chosen.get(e, 1.0) for e in curves})
        why = "draft"
    found = {e: threshold for e, threshold in found.items() if threshold < 1.0}
    off = tuple(e for e in exits.layers if e not in found) if why else ()
    return Plan(rule=ExitRule(name=name, thresholds=found) if found else None, off=off, why=why)
