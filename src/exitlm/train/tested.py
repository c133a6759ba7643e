"""Which exits mode ``threshold`` tests by default, from what a pass reads and how often the exits fire; never a clock.

Decoding one sequence is bound by the weights that it reads, so the unit of cost here is an element of a matrix. All
matrices are taken to be of one format; rows of a pass, attention over the context, norms and biases to be free. So the
choice is a property of the exits, the same on every machine. This file does not say how fast a machine is, nor where
exits should be placed.

Exact KV defers a layer, it does not skip it: a token that leaves at an exit goes along with the next token that goes
deeper, in a pass that reads those layers anyway. So a token costs what is read down to the place where it leaves. The
bound is that of EE-LLM (arXiv 2312.04916), section 4, with a price for the tests.

Shapes: N tokens, E exits, P patterns (which of the exits fire for a token).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exitlm.model.decoder import EarlyExitModel
from exitlm.model.exits import ExitHead

MAX_COMPARED = 10  # of more exits not every subset is tried


@dataclass(frozen=True, kw_only=True)
class ExitReads:
    """Elements of matrices that an exit reads: ``test`` for each token that is tested there, ``emit`` more for each
    token that leaves there. Exits of different ``rule`` can't be tested in one request."""

    rule: str
    test: int
    emit: int


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Elements of matrices that a pass reads: of each of ``num_layers`` equal layers, of the final head and of each
    early exit, by its layer."""

    layer: int
    num_layers: int
    head: int
    exits: Mapping[int, ExitReads]

    def full(self) -> int:
        """Elements that a token reads in mode ``full``."""
        return self.num_layers * self.layer + self.head


def reads_of(model: EarlyExitModel) -> Reads:
    """Count the matrices of a model, of which some layers may be absent, and of its early exits. An exit after the last
    layer is left out."""
    num_layers, head = model.config.num_hidden_layers, model.config.vocab_size * model.config.hidden_size
    return Reads(
        layer=_matrices(next(iter(model.model.layers.values()))),
        num_layers=num_layers,
        head=head,
        exits={e: _exit_reads(exit_head, head) for e, exit_head in model.exit_heads().items() if e < num_layers},
    )


def _matrices(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() >= 2)


def _exit_reads(exit_head: ExitHead, final: int) -> ExitReads:
    """What one exit reads. A gate decides before features and logits are computed, but for a block: that runs for
    every token, since its keys and values are needed by the next ones."""
    config = exit_head.config
    parts = {name: _matrices(part) for name, part in exit_head.named_children()}
    gate, block = parts.pop("gate", 0), parts.get("block", 0)
    if config.output == "shared":
        parts["output"] = config.candidates * exit_head.model_config.hidden_size or final
    logits = sum(parts.values())
    if config.gate:
        return ExitReads(rule="gate", test=gate + block, emit=logits - block)
    return ExitReads(rule="probability", test=logits, emit=0)


def elements_read(reads: Reads, exits: Sequence[int], fires_EP: Mapping[int, Tensor], count_P: Tensor) -> int:
    """Elements that all N tokens read together where ``exits`` (ascending) are tested: the sum over tested exits i of

        reach_i (the layers from exit i - 1 to i + test_i) + leave_i emit_i,  and  reach_end (the other layers + head)

    ``reach_i`` tokens fire at no tested exit before i; ``leave_i`` of them fire at i. Both are counted, so that how
    the exits depend on each other is in them. ``fires_EP[e]`` ``[P]`` says whether exit e fires for a pattern, and
    ``count_P`` how many tokens have it. The speed relative to ``full`` is N * full / elements.
    """
    left_P, total, depth = count_P, 0, 0
    reach = int(left_P.sum())
    for e in exits:
        left_P = left_P * ~fires_EP[e]
        total += reach * ((e - depth) * reads.layer + reads.exits[e].test)
        leave, depth = reach - int(left_P.sum()), e
        total += leave * reads.exits[e].emit
        reach -= leave
    return total + reach * ((reads.num_layers - depth) * reads.layer + reads.head)


def choose_tested(reads: Reads, fires_EN: Mapping[int, Tensor]) -> tuple[int, ...]:
    """The exits that ``threshold`` tests by default: those with which a token reads least (:func:`elements_read`), so
    that the expected speed is highest; () where none pays. Equal costs go to fewer exits, then to shallower ones.

    ``fires_EN[e]`` ``[N]`` (bool) says for which held-out tokens exit e fires at its stored threshold; other exits
    than those of ``reads`` are ignored. All exits of a subset have one rule. Counts are whole numbers, so the choice is
    exact. Of up to ``MAX_COMPARED`` exits of a rule all subsets are compared; of more, exits are added and removed one
    by one, the best change first, as long as one gains.
    """
    layers = sorted(reads.exits.keys() & fires_EN.keys())
    if not layers:
        return ()
    stacked_EN = torch.stack([fires_EN[e].cpu() for e in layers])
    patterns_EP, count_P = torch.unique(stacked_EN, dim=1, return_counts=True)
    fires_EP = dict(zip(layers, patterns_EP, strict=True))

    def cost(subset: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        return elements_read(reads, subset, fires_EP, count_P), len(subset), subset

    best = cost(())
    for rule in sorted({reads.exits[e].rule for e in layers}):
        alike = [e for e in layers if reads.exits[e].rule == rule]
        if len(alike) <= MAX_COMPARED:
            subsets = (s for size in range(1, len(alike) + 1) for s in itertools.combinations(alike, size))
            best = min(best, *map(cost, subsets))
            continue
        found, previous = cost(()), None
        while found != previous:
            previous = found
            found = min(found, *(cost(tuple(sorted({*found[2]} ^ {e}))) for e in alike))
        best = min(best, found)
    return best[2]
