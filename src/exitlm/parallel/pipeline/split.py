"""Which layers and which exits each pipeline stage has, and what that costs it: pure functions of the configurations.

An exit at a boundary may belong to the stage behind it, which reads its hidden state as its own input: with four stages
and exits at a quarter and a half of the depth, the first stage then has the embedding and every other one matrix of
vocabulary by hidden size (EE-LLM, arXiv 2312.04916, section 3). The balanced split is found exactly, by dynamic
programming over all of them. Not here: modules (``stage.py``) and time (``schedule.py``).

Costs are FLOPs of matrix products, two per multiplication and addition; norms, activations and the embedding's lookup
are taken as free.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from exitlm.errors import UserError
from exitlm.model.config import SLIDING, ModelConfig
from exitlm.model.exits import ExitConfig, check_layers

# layers**2 x stages (or exits): what a core searches in half a minute; 126 layers on 64 need 2**20
_MAX_BALANCED = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which layers and which exits each pipeline stage has: the 0-based layers from ``bounds[i]`` to ``bounds[i + 1]``
    (exclusive) are on stage i, ``owners`` maps an exit's 1-based layer to its stage. ``final``: the last stage has the
    final head; False where the layers above the deepest exit are not run."""

    bounds: tuple[int, ...]
    owners: Mapping[int, int]
    final: bool = True

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.bounds) - 1

    def layers(self, stage: int) -> range:
        """The 0-based layers of a stage."""
        return range(self.bounds[stage], self.bounds[stage + 1])

    def exits(self, stage: int) -> tuple[int, ...]:
        """The 1-based layers of a stage's exits, ascending."""
        return tuple(sorted(layer for layer, owner in self.owners.items() if owner == stage))


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What a stage computes per token and what it holds.

    ``layer_flops`` and ``head_flops`` (exits and final head) are those of a forward; ``forward_flops`` is their sum.
    Of the ``parameters``, ``layer_parameters`` belong to decoder layers, the optimizer has ``trained``, and each tensor
    rank has ``whole``, among them ``trained_whole`` (norms, lenses, gates; others are cut). ``head_matrices`` counts
    output matrices over the vocabulary or the candidates, one that is shared only once, and a tied embedding where a
    head of this stage uses it.
    """

    layer_flops: int
    head_flops: int
    forward_flops: int
    backward_flops: int
    parameters: int
    layer_parameters: int
    whole: int
    trained: int
    trained_whole: int
    has_embedding: bool
    has_final_head: bool
    head_matrices: int


def make_split(
    model: ModelConfig,
    exits: Sequence[ExitConfig],
    stages: int,
    *,
    place: Literal["next", "end"] = "next",
    layers_per_stage: Literal["balanced"] | Sequence[int] = "balanced",
    depth: int | None = None,
    seq_len: int = 0,
    frozen: bool = False,
    recompute: bool = False,
    teacher: bool = False,
) -> Split:
    """Cut the model into ``stages``, each with at least one layer.

    "balanced" minimises the largest time of a stage (forward and backward), then the largest number of parameters of
    one, then the sum of squared times. ``depth`` layers are run at all (None: every one, and the final head; a number:
    that many, and no final head). ``place``: an exit behind the last layer of a stage belongs to the "next" one or to
    the one that "end"s there; behind the last layer of all it belongs to the last stage, and an ``mlp`` exit to the
    stage of its layer, always. ``seq_len`` and what follows it are as for :func:`stage_costs`.

    Raises:
        UserError: fewer layers than stages, or a list that does not fit them.

    Warns:
        UserWarning: an ``mlp`` exit at a boundary stays with its layer although ``place`` is "next".
    """
    layers = model.num_hidden_layers if depth is None else depth
    check_layers([e.layer for e in exits], layers)
    if not 1 <= stages <= layers:
        raise UserError(f"{stages} pipeline stages can't share {layers} layers; use 1 to {layers} stages")
    costs = _Costs(model, exits, layers, place, depth is None, seq_len, frozen, recompute, teacher)
    if layers_per_stage == "balanced":
        if layers * layers * max(stages, len(exits)) > _MAX_BALANCED:
            raise UserError(
                f"the best split of {layers} layers with {len(exits)} exits over {stages} pipeline stages takes "
                f"minutes to find; give parallel.layers_per_stage as a list of {stages} numbers with the sum {layers}"
            )
        bounds = costs.balanced(stages)
    else:
        counts = [int(count) for count in layers_per_stage]
        if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
            raise UserError(
                f"layers_per_stage {counts} does not share {layers} layers among {stages} stages; give {stages} "
                f"positive numbers with the sum {layers}, or 'balanced'"
            )
        bounds = (0, *accumulate(counts))
    stay = [e.layer for e in exits if place == "next" and e.kind == "mlp" and e.layer in bounds[1:-1]]
    if stay:
        warnings.warn(
            f"the mlp exit{'s' * (len(stay) > 1)} {', '.join(map(str, stay))} at the end of a stage stay"
            f"{'s' * (len(stay) == 1)} there: an mlp branch reads inside its layer",
            stacklevel=2,
        )
    owners = {e.layer: i for i, (a, b) in enumerate(pairwise(bounds)) for e in costs.owned(a, b)}
    return Split(bounds=bounds, owners=dict(sorted(owners.items())), final=depth is None)


def stage_costs(
    model: ModelConfig,
    exits: Sequence[ExitConfig],
    split: Split,
    seq_len: int = 0,
    *,
    frozen: bool = False,
    recompute: bool = False,
    teacher: bool = False,
) -> list[StageCost]:
    """What each stage of ``split`` computes and holds.

    ``seq_len``: the length of the sequences, for the part of attention that grows with it (causal; 0 leaves it out).
    A backward takes twice its forward; with ``recompute`` that of a layer three times, and on a ``frozen`` model that
    of a layer nothing. The final head of a frozen model is there but has no loss. ``teacher``: exits learn from the
    final head, whose matrix every stage with exits then has, and whose logits each exit computes. Matrices that several
    heads share are counted once per stage.
    """
    costs = _Costs(model, exits, split.bounds[-1], "end", split.final, seq_len, frozen, recompute, teacher)
    by_layer = {e.layer: e for e in exits}
    return [
        costs.stage(a, b, [by_layer[layer] for layer in split.exits(i)])
        for i, (a, b) in enumerate(pairwise(split.bounds))
    ]


class _Costs:
    """The cost of any run of layers as a stage."""

    def __init__(
        self,
        model: ModelConfig,
        exits: Sequence[ExitConfig],
        layers: int,
        place: str,
        final: bool,
        seq_len: int,
        frozen: bool,
        recompute: bool,
        teacher: bool,
    ) -> None:
        self.model, self.exits, self.layers, self.place, self.final = model, exits, layers, place, final
        self.frozen, self.teacher, self.layer_backward = frozen, teacher, 0 if frozen else 3 if recompute else 2
        self.layer_flops = [_layer_flops(model, index, seq_len) for index in range(model.num_hidden_layers)]
        self.flops_below = [0, *accumulate(self.layer_flops)]

    def owned(self, a: int, b: int) -> list[ExitConfig]:
        """The exits of a stage with the layers ``a`` to ``b`` (exclusive)."""
        return [
            e
            for e in self.exits
            if (a < e.layer <= b if self.place == "end" or e.kind == "mlp" else a <= e.layer < b)
            or e.layer == b == self.layers
        ]

    def stage(self, a: int, b: int, exits: Sequence[ExitConfig]) -> StageCost:
        """The cost of the layers ``a`` to ``b`` (exclusive) with ``exits``."""
        model = self.model
        V, D = model.vocab_size, model.hidden_size
        first, last = a == 0, b == self.layers and self.final
        matrices = {_matrix(e) for e in exits} - {None}
        if last or (self.teacher and exits):
            matrices.add("shared")
        heads = [_head_parameters(model, e) for e in exits]
        exit_sizes = {_matrix(e): (e.candidates or V) * D for e in exits if e.output in ("own", "exits")}
        own = sum(size for size, _ in heads) + sum(exit_sizes.values())
        own_whole = sum(whole for _, whole in heads)
        layer_size, layer_whole = _layer_parameters(model)
        # On the first stage, the output matrix may be the embedding.
        one = first and model.tie_word_embeddings
        of_vocabulary = max(first, "shared" in matrices) if one else first + ("shared" in matrices)
        parameters = (b - a) * layer_size + own + of_vocabulary * V * D + last * D
        whole = (b - a) * layer_whole + own_whole + last * D
        exit_flops = sum(_head_flops(model, e, self.layer_flops) for e in exits)
        layer_flops, final_flops = self.flops_below[b] - self.flops_below[a], 2 * V * D
        taught_flops = len(exits) * final_flops if self.teacher else 0
        trained_flops = exit_flops + (0 if self.frozen else last * final_flops)
        return StageCost(
            layer_flops=layer_flops,
            head_flops=trained_flops + taught_flops,
            forward_flops=layer_flops + trained_flops + taught_flops,
            backward_flops=self.layer_backward * layer_flops + 2 * trained_flops,
            parameters=parameters,
            layer_parameters=(b - a) * layer_size,
            whole=whole,
            trained=own if self.frozen else parameters,
            trained_whole=own_whole if self.frozen else whole,
            has_embedding=first,
            has_final_head=last,
            head_matrices=len(matrices),
        )

    def balanced(self, stages: int) -> tuple[int, ...]:
        """The bounds of the best split."""
        n = self.layers
        # A cut leaves at least one stage before and behind it where layers are left, and a layer for every other stage.
        cuts = ((a, b) for a in range(n) for b in range(a + 1, min(n, a + n - stages + 1) + 1))
        found = {(a, b): self.stage(a, b, self.owned(a, b)) for a, b in cuts if (a > 0) + (b < n) < stages}
        time = {cut: cost.forward_flops + cost.backward_flops for cut, cost in found.items()}
        size = {cut: cost.parameters for cut, cost in found.items()}
        # A tie is broken among all splits as good as the best, which one table of pairs could not do.
        most_time, _ = _best(stages, n, time, max)
        most_size, _ = _best(stages, n, {cut: size[cut] for cut in size if time[cut] <= most_time}, max)
        squares = {cut: time[cut] ** 2 for cut in time if time[cut] <= most_time and size[cut] <= most_size}
        return _best(stages, n, squares, lambda left, right: left + right)[1]


def _best(
    stages: int, layers: int, costs: Mapping[tuple[int, int], int], join: Callable[[int, int], int]
) -> tuple[int, tuple[int, ...]]:
    """The least joined cost of a split into allowed stages (those in ``costs``), and its bounds."""
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, (0,))}
    for _ in range(stages):
        reached: dict[int, tuple[int, tuple[int, ...]]] = {}
        for (a, b), cost in costs.items():
            if a in best:
                candidate = (join(best[a][0], cost), (*best[a][1], b))
                reached[b] = min(reached.get(b, candidate), candidate)
        best = reached
    return best[layers]


def _layer_flops(model: ModelConfig, index: int, seq_len: int) -> int:
    """Forward FLOPs per token of the layer ``index``; attention over the positions that a token sees on average."""
    wide, narrow = _widths(model)
    products = 2 * model.hidden_size * (2 * wide + 2 * narrow) + _mlp_flops(model)
    window = model.sliding_window if model.layer_types[index] == SLIDING else None
    seen = min(seq_len, window or seq_len)
    pairs = seen * (seen + 1) // 2 + (seq_len - seen) * seen
    return products + (4 * wide * pairs // seq_len if seq_len else 0)


def _head_flops(model: ModelConfig, e: ExitConfig, layer_flops: Sequence[int]) -> int:
    """Forward FLOPs per token of an exit head."""
    D, rows = model.hidden_size, e.candidates or model.vocab_size
    flops = 2 * e.rank * (D + rows) if e.output == "low_rank" else 2 * D * rows
    if e.kind == "mlp" or e.branch:
        flops += _mlp_flops(model)
    if e.kind == "block":
        flops += layer_flops[e.layer - 1]
    if e.kind == "lens":
        flops += 2 * D * D
    return flops + e.gate * 2 * D


def _head_parameters(model: ModelConfig, e: ExitConfig) -> tuple[int, int]:
    """Parameters of an exit head without a matrix over the vocabulary, and how many of them no tensor rank cuts."""
    D, rows = model.hidden_size, e.candidates or model.vocab_size
    size = whole = 0
    if e.kind == "mlp" or e.branch:
        size, whole = _mlp_parameters(model)
    if e.kind == "block":
        size, whole = _layer_parameters(model)
    more = D * ((e.kind in ("norm", "mlp", "block")) + (e.kind == "mlp" and model.norm_placement != "pre"))
    more += (e.kind == "lens") * (D * D + D) + e.gate * (D + 1)
    if e.output == "low_rank":
        more += e.rank * D
        size += e.rank * rows
    return size + more, whole + more


def _matrix(e: ExitConfig) -> str | None:
    """A name for the output matrix of an exit: equal for exits that use the same one, None without one."""
    return {"shared": "shared", "exits": "exits", "own": f"exit{e.layer}", "low_rank": None}[e.output]


def _layer_parameters(model: ModelConfig) -> tuple[int, int]:
    """Parameters of a decoder layer, and how many of them no tensor rank cuts."""
    D, (wide, narrow) = model.hidden_size, _widths(model)
    size, whole = _mlp_parameters(model)
    size += D * (2 * wide + 2 * narrow) + model.qkv_bias * (wide + 2 * narrow)
    more = D * (4 if model.norm_placement == "sandwich" else 2) + model.o_bias * D
    more += {None: 0, "head": 2 * model.head_dim, "full": wide + narrow}[model.qk_norm]
    return size + more, whole + more


def _mlp_parameters(model: ModelConfig) -> tuple[int, int]:
    """Parameters of an MLP, and how many of them no tensor rank cuts."""
    D, inner = model.hidden_size, model.intermediate_size
    return 3 * D * inner + model.mlp_bias * (2 * inner + D), model.mlp_bias * D


def _mlp_flops(model: ModelConfig) -> int:
    return 6 * model.hidden_size * model.intermediate_size


def _widths(model: ModelConfig) -> tuple[int, int]:
    """The widths of the queries and of the keys."""
    return model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
