"""What the replies of a chat took together, for ``/stats``. Plain counting."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from exitlm.chat.partner import Facts, Taken


@dataclass
class Totals:
    """Sums over replies; ``layers`` counts tokens by the layer they left at, ``seconds`` are of decoding. ``context``
    are the tokens of the last turn that was counted, with all before it."""

    replies: int = 0
    stopped: int = 0
    tokens: int = 0
    timed: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    reused: int = 0
    drafted: int = 0
    accepted: int = 0
    context: int | None = None
    layers: Counter[int] = field(default_factory=Counter)
    last: Taken | None = None

    def add(self, taken: Taken, layers: list[int]) -> None:
        """Count a reply, whose tokens left at ``layers``."""
        self.replies += 1
        self.stopped += taken.ended == "stopped"
        self.tokens += taken.tokens or 0
        if taken.tokens and taken.tokens_per_second:
            self.timed += taken.tokens - 1
            self.seconds += (taken.tokens - 1) / taken.tokens_per_second
        if taken.prompt_tokens is not None:
            self.prompt_tokens += taken.prompt_tokens
            self.context = taken.prompt_tokens + (taken.tokens or 0)
        self.reused += taken.reused or 0
        self.drafted += taken.drafted
        self.accepted += taken.accepted
        self.layers.update(layers)
        self.last = taken

    def lines(self, facts: Facts) -> list[str]:
        """Each figure that there is, with its name before it."""
        stopped = f", {self.stopped} stopped" if self.stopped else ""
        rows = [("model", facts.name), ("replies", f"{self.replies}{stopped}")]
        speed = f", {self.timed / self.seconds:.1f} tokens/s" if self.seconds else ""
        rows.append(("tokens", f"{self.tokens}{speed}"))
        if total := sum(self.layers.values()):
            mean = sum(layer * count for layer, count in self.layers.items()) / total
            shares = ", ".join(f"{layer}: {count / total:.0%}" for layer, count in sorted(self.layers.items()))
            rows.append(("layers", f"{mean:.1f}{facts.of_layers} on average"))
            rows.append(("left at", shares))
        if self.prompt_tokens:
            rows.append(("prompts", f"{self.prompt_tokens} tokens, {self.reused} of them computed before"))
        if self.drafted:
            rows.append(("drafts", f"{self.drafted}, {self.accepted / self.drafted:.0%} accepted"))
        if (last := self.last) is not None:
            if self.context is not None:
                rows.append(("context", f"{self.context}{f' of {facts.context}' if facts.context else ''} tokens"))
            if last.exact is not None:
                rows.append(("path", "exact" if last.exact else "not exact"))
            if last.seed is not None:
                rows.append(("last seed", str(last.seed)))
            rows += last.details.items()
        wide = max(len(name) for name, _ in rows)
        return [f"{name:<{wide}}  {value}" for name, value in rows]
