"""Exit heads: what turns the hidden state of an inner layer into logits, and the probe that says whether to trust them.

A head is, in this order, all parts optional but the last: MLP branch, full decoder block, norm, output matrix
(EE-LLM section 3.1, EE-Tuning section 3.2). ``lens`` is an affine map into the space after the final norm, which has a
closed-form solution (:class:`RidgeStatistics`). This file knows nothing of losses, files or the decode loop.

Shapes: B sequences, T positions, D hidden_size, V vocab_size, K rows of the output matrix (V, or the candidates).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exitlm.errors import UserError, nearest
from exitlm.model.config import ModelConfig
from exitlm.model.layers import MLP, AttentionContext, DecoderLayer, PastProtocol, RMSNorm, Tap, model_norm
from exitlm.model.record import ExitRecord
from exitlm.values import flag, whole, wrong

ExitKind = Literal["embed", "norm", "mlp", "block", "lens"]
OutputKind = Literal["shared", "own", "exits", "low_rank"]
InitKind = Literal["copy", "random", "identity", "closed_form"]
ExitKey = tuple[str, int]
"""An exit of a model with several adapters: the adapter's name, and the layer."""
OWN_EXITS = "exits"
"""The name of the exits that came from no adapter directory of their own."""


@dataclass(frozen=True, kw_only=True)
class ExitConfig:
    """One exit: the 1-based ``layer`` whose output it reads, and how its head is built.

    ``output``: ``shared`` multiplies with the final head's matrix, ``own`` has a matrix of its own, ``exits`` shares
    one among all exits that say so, ``low_rank`` factorises it at ``rank``. ``candidates`` > 0 restricts any of them to
    that many token ids. ``gate`` adds a scalar probe; ``branch`` adds an MLP that starts at zero to a ``lens``.
    """

    layer: int
    kind: ExitKind = "lens"
    output: OutputKind = "shared"
    rank: int = 64
    candidates: int = 0
    init: InitKind = "copy"
    gate: bool = False
    branch: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", whole(self.layer, "the layer of an exit"))
        for name, plain in (("rank", whole), ("candidates", whole), ("gate", flag), ("branch", flag)):
            object.__setattr__(self, name, plain(getattr(self, name), f"exit {self.layer}: {name}"))
        for name, literal in (("kind", ExitKind), ("output", OutputKind), ("init", InitKind)):
            value, known = getattr(self, name), get_args(literal)
            if not isinstance(value, str):
                raise wrong(f"exit {self.layer}: {name}", value, f"one of {', '.join(known)}")
            if value not in known:
                raise UserError(
                    f"exit {self.layer}: {name} is {value!r}, but must be one of {', '.join(known)}"
                    f"{nearest(value, known)}"
                )
        if self.branch and self.kind != "lens":
            raise UserError(
                f"exit {self.layer}: a branch belongs to kind 'lens'; use kind 'mlp' instead of branch = true"
            )
        if self.init == "closed_form" and self.kind != "lens":
            raise UserError(f"exit {self.layer}: init 'closed_form' belongs to kind 'lens', not to '{self.kind}'")
        if self.rank < 1 or self.candidates < 0:
            raise UserError(
                f"exit {self.layer}: rank is {self.rank} and candidates {self.candidates}, but rank must be at least 1 "
                "and candidates at least 0"
            )


class ExitHead(nn.Module):
    """The head of one exit. ``record`` is what tuning measured of it."""

    candidate_ids: Tensor | None

    def __init__(self, config: ExitConfig, model_config: ModelConfig, candidate_ids: Tensor | None = None) -> None:
        super().__init__()
        self.config, self.model_config = config, model_config
        self.record = ExitRecord()
        D, V = model_config.hidden_size, model_config.vocab_size
        if config.candidates > V:
            raise UserError(
                f"exit {config.layer}: {config.candidates} candidates, but the vocabulary has {V} tokens; "
                "use fewer, or 0 for the whole vocabulary"
            )
        if config.output == "low_rank" and config.rank > D:
            raise UserError(f"exit {config.layer}: rank {config.rank} exceeds the hidden size {D}; use a smaller one")
        if config.candidates:
            ids = torch.arange(config.candidates) if candidate_ids is None else candidate_ids[: config.candidates]
            if len(ids) != config.candidates:
                raise UserError(
                    f"exit {config.layer}: {config.candidates} candidates are asked for, but only {len(ids)} ids are "
                    "given; give more, or ask for fewer"
                )
            check_candidates(ids, config.layer, V)
            self.register_buffer("candidate_ids", ids.sort().values.long())
        else:
            self.candidate_ids = None
        rows = config.candidates or V
        if config.kind == "mlp" or config.branch:
            self.mlp = MLP(model_config)
        if config.kind == "mlp" and model_config.norm_placement != "pre":
            self.mlp_post_norm = model_norm(model_config)
        if config.kind == "block":
            self.block = DecoderLayer(model_config, config.layer - 1)
        if config.kind in ("norm", "mlp", "block"):
            self.norm = model_norm(model_config)
        if config.kind == "lens":
            self.lens = nn.Linear(D, D)
        if config.gate:
            self.gate = nn.Linear(D, 1)
        if config.output in ("own", "exits"):
            self.output = nn.Linear(D, rows, bias=False)
        elif config.output == "low_rank":
            self.output_down = nn.Linear(D, config.rank, bias=False)
            self.output_up = nn.Linear(config.rank, rows, bias=False)

    @property
    def block_key(self) -> str:
        """The name under which a ``block`` head keeps its keys and values in a cache."""
        return f"exit{self.config.layer}"

    def unit(self, hidden: Tensor) -> Tensor:
        """The RMS norm without weights, ``[..., D]``: what the lens, its branch and the gate read."""
        return F.rms_norm(hidden, (hidden.shape[-1],), None, self.model_config.rms_norm_eps)

    def features(self, tap: Tap, context: AttentionContext | None = None, past: PastProtocol | None = None) -> Tensor:
        """The input of the output matrix, ``[B, T, D]``. A ``block`` needs ``context`` (and ``past``, to be cached)."""
        kind = self.config.kind
        if kind == "embed":
            return tap.hidden
        features: Tensor
        if kind == "norm":
            features = self.norm(tap.hidden)
            return features
        if kind == "mlp":
            assert tap.residual is not None
            assert tap.normed is not None
            branch = self.mlp(tap.normed)
            if hasattr(self, "mlp_post_norm"):
                branch = self.mlp_post_norm(branch)
            features = self.norm(tap.residual + branch)
            return features
        if kind == "block":
            assert context is not None
            features = self.norm(self.block(tap.hidden, context, past, key=self.block_key))
            return features
        unit = self.unit(tap.hidden)
        features = self.lens(unit)
        return features + self.mlp(unit) if self.config.branch else features

    def gate_logit(self, hidden: Tensor) -> Tensor:
        """Log-odds ``[...]`` that this exit's argmax is the final argmax, from the hidden state ``[..., D]``."""
        logit: Tensor = self.gate(self.unit(hidden)).squeeze(-1)
        return logit

    def output_weight(self, final_weight: Tensor) -> Tensor:
        """The output matrix ``[K, D]``; ``final_weight`` is the final head's ``[V, D]``."""
        if self.config.output in ("own", "exits"):
            return self.output.weight
        if self.config.output == "low_rank":
            return self.output_up.weight @ self.output_down.weight
        return final_weight if self.candidate_ids is None else final_weight[self.candidate_ids]

    def project(self, features: Tensor, final_weight: Tensor) -> Tensor:
        """Logits over the head's own rows, ``[..., K]``."""
        if self.config.output == "low_rank":
            logits: Tensor = self.output_up(self.output_down(features))
            return logits
        return F.linear(features, self.output_weight(final_weight))

    def expand(self, logits: Tensor) -> Tensor:
        """Logits over the vocabulary ``[..., V]``: -inf outside of the candidates."""
        if self.candidate_ids is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.model_config.vocab_size), -torch.inf)
        return full.index_copy_(-1, self.candidate_ids, logits)

    @torch.no_grad()
    def initialise(
        self, layers: Mapping[int, DecoderLayer], final_norm: RMSNorm, final_weight: Tensor, generator: torch.Generator
    ) -> None:
        """Give every tensor its first value (EE-Tuning section 3.2: output matrix from the final head's
        ``final_weight`` ``[V, D]``, norm from ``final_norm``, MLP from the same layer's MLP, block from the last layer;
        or random). ``layers`` are the model's by 0-based index. ``closed_form`` begins as the identity: the solution
        needs data, which is the tuner's."""
        config, std = self.config, self.model_config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0 - self.model_config.norm_offset)
            elif parameter.dim() >= 2:
                noise = torch.empty(parameter.shape, dtype=torch.float32, device="cpu").normal_(
                    0.0, std, generator=generator
                )
                parameter.copy_(noise)
        if config.branch:
            self.mlp.down_proj.weight.zero_()
        if config.gate:
            self.gate.weight.zero_()
        if config.init == "random":
            return
        if config.kind == "lens":
            self.lens.weight.copy_(torch.diag(final_norm.scale()))
        if config.kind in ("norm", "mlp", "block"):
            self.norm.load_state_dict(final_norm.state_dict())
        if config.kind == "mlp":
            layer = layers[config.layer - 1]
            self.mlp.load_state_dict(layer.mlp.state_dict())
            post = layer.post_mlp_norm()
            if post is not None:
                self.mlp_post_norm.load_state_dict(post.state_dict())
        if config.kind == "block":
            self.block.load_state_dict(layers[self.model_config.num_hidden_layers - 1].state_dict())
        rows = final_weight if self.candidate_ids is None else final_weight[self.candidate_ids]
        if config.output in ("own", "exits"):
            self.output.weight.copy_(rows)
        elif config.output == "low_rank":
            down = top_directions(rows, config.rank)
            self.output_down.weight.copy_(down)
            self.output_up.weight.copy_(rows @ down.T)


def top_directions(weight_KD: Tensor, rank: int) -> Tensor:
    """The ``rank`` right singular vectors of a ``[K, D]`` matrix with the largest singular values, ``[rank, D]``."""
    if rank > weight_KD.shape[1]:
        raise UserError(
            f"low_rank output: rank {rank} exceeds the hidden size {weight_KD.shape[1]}; use a smaller rank"
        )
    wide = weight_KD.double()
    _, vectors = torch.linalg.eigh(wide.T @ wide)
    top: Tensor = vectors[:, -rank:].flip(1).T.to(weight_KD.dtype).contiguous()
    return top


class RidgeStatistics:
    """Sums for the closed-form lens: the affine map that takes ``unit(hidden)`` to the final features with the least
    squared error (ridge regression). Sums are float64 and do not depend on how the rows are cut into calls up to
    rounding."""

    def __init__(self, hidden_size: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.input_sum = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        self.target_sum = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        self.gram = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=device)
        self.cross = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=device)

    def add(self, input_ND: Tensor, target_ND: Tensor) -> None:
        """Add N rows: what the lens reads (``head.unit(hidden)``) and what it should give (the final features)."""
        x, z = input_ND.double(), target_ND.double()
        self.count += len(x)
        self.input_sum += x.sum(0)
        self.target_sum += z.sum(0)
        self.gram += x.T @ x
        self.cross += x.T @ z

    def solve(self, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
        """``(A [D, D], b [D])`` of ``A x + b``, float64; ``ridge`` is relative to the mean variance of the inputs."""
        if self.count < 2:
            raise UserError("the closed-form lens needs at least 2 tokens of data; give more data or init = 'identity'")
        x_mean, z_mean = self.input_sum / self.count, self.target_sum / self.count
        gram = self.gram - self.count * torch.outer(x_mean, x_mean)
        cross = self.cross - self.count * torch.outer(x_mean, z_mean)
        gram.diagonal().add_(gram.diagonal().mean() * ridge + 1e-12)
        slope = torch.linalg.solve(gram, cross).T
        return slope, z_mean - slope @ x_mean


def check_layers(layers: Sequence[int], num_hidden_layers: int) -> None:
    """Refuse exit layers that are out of range or given twice."""
    for layer in layers:
        if not 1 <= layer <= num_hidden_layers:
            raise UserError(f"exit layer {layer} does not exist: the model has layers 1 to {num_hidden_layers}")
    twice = sorted(layer for layer, count in Counter(layers).items() if count > 1)
    if twice:
        raise UserError(f"exit layer {twice[0]} is given more than once; give each layer once")


def check_candidates(ids_K: Tensor, layer: int, vocab_size: int) -> None:
    """Refuse candidate ids that the vocabulary lacks or that are given twice (their probability would count twice)."""
    if ids_K.device.type == "meta":
        return
    if not 0 <= int(ids_K.min()) <= int(ids_K.max()) < vocab_size:
        raise UserError(f"exit {layer}: candidate ids must lie in 0..{vocab_size - 1}, the vocabulary of the model")
    if len(set(ids_K.tolist())) != len(ids_K):
        raise UserError(f"exit {layer}: a candidate id is given more than once; give each id once")
