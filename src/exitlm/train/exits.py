"""What a run's settings say of its exits: where they are, how each head is built, what they learn from."""

from __future__ import annotations

from exitlm.model.exits import ExitConfig
from exitlm.train.run import RunConfig

CANDIDATES, LARGE_VOCABULARY = 4096, 16384


def automatic_candidates(vocab_size: int) -> int:
    """What ``candidates = -1`` means: the most frequent ids of a large vocabulary, or all (0)."""
    return CANDIDATES if vocab_size > LARGE_VOCABULARY else 0


def default_layers(count: int) -> tuple[int, ...]:
    """About a quarter, half and three quarters of the depth (fewer in very shallow models)."""
    return tuple(sorted({min(max(1, round(count * k / 4)), max(1, count - 1)) for k in (1, 2, 3)}))


def exit_configs(config: RunConfig) -> list[ExitConfig]:
    """The settings of every exit."""
    e = config.exits
    out = []
    for i, layer in enumerate(e.layers):
        kind, init = e.of("kind", i), e.of("init", i)
        if init == "auto":
            init = "closed_form" if kind == "lens" else "copy"
        branch = e.of("branch", i) and kind == "lens"
        values = {name: e.of(name, i) for name in ("output", "rank", "candidates", "gate")}
        out.append(ExitConfig(layer=layer, kind=kind, init=init, branch=branch, **values))
    return out


def needs_final(config: RunConfig) -> bool:
    """Whether the objective reads the final exit, so that all layers must run in every step."""
    o = config.objective
    gates = o.gate > 0 and any(config.exits.of("gate", i) for i in range(len(config.exits.layers)))
    return o.distill > 0 or gates
