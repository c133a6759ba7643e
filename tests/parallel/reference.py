"""What training must give: the gradient of a plain model, on one process, by autograd, from the formulas of the losses.

Nothing of the code under test computes here: no stage, no chunk, no schedule. Every use of a matrix that several heads
share is a leaf of its own, so that gradients can be told apart by the stage that they arise on. Not a test.

Shapes: n pieces (documents within rows) of one length t, N tokens of them, V vocab_size, K rows of a head's matrix.
"""

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from exitlm.model.config import ModelConfig
from exitlm.model.decoder import EarlyExitModel
from exitlm.model.exits import ExitConfig, ExitHead
from exitlm.model.layers import AttentionContext, Tap
from exitlm.train.stream import Batch

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of ids, labels (-100: none) and numbers of documents, ``[R, T]`` each; what training reads as a stream."""

    ids: Tensor
    labels: Tensor
    documents: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows."""
        chosen = list(rows)
        return Batch(self.ids[chosen], self.labels[chosen].clone(), self.documents[chosen])

    def valid(self, rows: Sequence[int]) -> int:
        """How many of their labels count."""
        return int((self.labels[list(rows)] >= 0).sum())


def random_table(rows: int, length: int, vocab: int, seed: int, *, packed: bool = True) -> Table:
    """Rows with differing numbers of labels (some have none) and, if ``packed``, of documents. A row does not depend on
    how many there are."""
    ids, labels = torch.zeros(2, rows, length, dtype=torch.long)
    documents = torch.zeros(rows, length, dtype=torch.long)
    for row in range(rows):
        g = torch.Generator().manual_seed(1_000_003 * seed + row)
        ids[row], labels[row] = torch.randint(vocab, (2, length), generator=g)
        missing = float(torch.rand(1, generator=g)) if row else 0.0
        labels[row, torch.rand(length, generator=g) < (1.0 if missing > 0.9 else missing)] = -100
        for cut in (length // 3, length // 2):
            documents[row, cut:] += int(torch.randint(2, (1,), generator=g)) * (packed and cut > 0)
    return Table(ids=ids, labels=labels, documents=documents)


@dataclass(frozen=True)
class Values:
    """The first value of every tensor, a function of its name: nothing in it is neutral, neither norms nor biases."""

    seed: int = 0
    dtype: torch.dtype = torch.float64

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """The value of the parameter ``name``."""
        g = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        noise = torch.randn(tuple(shape), generator=g, dtype=torch.float64)
        if name.endswith(".bias"):
            noise = 0.3 * noise
        elif "norm" in name:
            noise = 1.0 + 0.3 * noise
        else:
            noise = noise * (0.5 if name in (EMBEDDING, HEAD) else shape[-1] ** -0.5)
        return noise.to(self.dtype)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss: for an exit ``(1 - distill) * CE + distill * temperature**2 * KL(final || exit)``, each token times its
    confidence if it is ``weighted``, and ``gate`` times the gate's; for the final head CE. A loss counts by its weight,
    in ``weights`` by layer (the final head is 0); the gate's does not."""

    weights: Mapping[int, float]
    distill: float = 0.0
    temperature: float = 1.0
    weighted: bool = False
    confidence_temperature: float = 1.0
    gate: float = 0.0


@dataclass
class Sums:
    """Of one head, over tokens: how many, their losses, hits and confidences, and the gate's loss."""

    tokens: float = 0.0
    loss: float = 0.0
    accuracy: float = 0.0
    confidence: float = 0.0
    gate_loss: float = 0.0
    confidence_weight: float = 0.0


@dataclass
class Found:
    """``by_use``: the gradient of a tensor by (its name, the stage of the use). ``sums`` by head."""

    by_use: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    sums: dict[int, Sums] = field(default_factory=dict)

    def add(self, other: "Found", first: int = 0) -> None:
        """Add another gradient, from stage ``first`` on."""
        for key, grad in other.by_use.items():
            if key[1] >= first:
                self.by_use[key] = self.by_use[key] + grad if key in self.by_use else grad
        for head, sums in other.sums.items():
            mine = self.sums.setdefault(head, Sums())
            for name, value in vars(sums).items():
                setattr(mine, name, getattr(mine, name) + value)

    def gradients(self, divisors: Mapping[int, float] | None = None) -> dict[str, Tensor]:
        """By name; each stage's part divided by its divisor."""
        out: dict[str, Tensor] = {}
        for (name, stage), grad in self.by_use.items():
            part = grad / (divisors or {}).get(stage, 1.0)
            out[name] = out[name] + part if name in out else part
        return out


class Reference:
    """A model with exits, on one process. ``bounds`` and ``owners`` say on which stage a layer or exit would be: this
    names the uses of tensors, and changes no number. ``frozen``: only what belongs to exits is trained."""

    def __init__(
        self,
        config: ModelConfig,
        exits: Sequence[ExitConfig],
        values: Values,
        *,
        bounds: Sequence[int] = (0, 1 << 30),
        owners: Mapping[int, int] | None = None,
        candidate_ids: Tensor | None = None,
        frozen: bool = False,
    ) -> None:
        self.exits = {e.layer: e for e in exits}
        last = len(bounds) - 2
        owners = owners or {}
        self.model = EarlyExitModel(dataclasses.replace(config, tie_word_embeddings=False)).to(values.dtype)
        for e in exits:
            self.model.exits[str(e.layer)] = ExitHead(e, config, candidate_ids).to(values.dtype)
        sharing = sorted(e.layer for e in exits if e.output == "exits")
        head_name = EMBEDDING if config.tie_word_embeddings else HEAD
        self.uses: list[tuple[str, int, Tensor]] = []
        self.matrices: dict[int, Tensor] = {}
        for name, p in self.model.named_parameters():
            parts = name.split(".")
            true, stage = name, 0
            if parts[0] == "exits":
                stage = owners.get(int(parts[1]), 0)
                if int(parts[1]) in sharing and parts[2] == "output":
                    true = f"exits.{sharing[0]}.output.weight"
            elif parts[1] == "layers":
                stage = next(s for s in range(last + 1) if bounds[s] <= int(parts[2]) < bounds[s + 1])
            elif name != EMBEDDING:
                stage, true = last, head_name if name == HEAD else name
            with torch.no_grad():
                p.copy_(values.tensor(true, p.shape))
            if not frozen or parts[0] == "exits":
                self.uses.append((true, stage, p))
        for e in exits:
            if e.output == "shared":
                matrix = self.model.lm_head.weight.detach().clone().requires_grad_(not frozen)
                self.matrices[e.layer] = matrix
                if not frozen:
                    self.uses.append((head_name, owners.get(e.layer, 0), matrix))
        self.across = False

    def find(
        self,
        table: Table,
        rows: Sequence[int],
        objective: Objective,
        shares: Mapping[int, float],
        dropped: frozenset[int] = frozenset(),
    ) -> Found:
        """The gradient of the losses of ``shares``'s heads on these rows, where a token counts its head's share;
        ``dropped`` layers (0-based) are skipped."""
        total = torch.zeros((), dtype=torch.float64)
        found = Found()
        for ids, labels in self._pieces(table, rows):
            taps, context = self._run(ids, dropped)
            final = self.model.lm_head(self.model.final_features(taps[max(taps)].hidden)).flatten(0, 1)
            for layer, share in shares.items():
                if layer == 0:
                    loss, sums = _final_loss(final, labels)
                    total = total + objective.weights[0] * share * loss
                else:
                    head = self.model.exits[str(layer)]
                    features = head.features(taps[layer], context)
                    logits = head.project(features, self.matrices.get(layer, features)).flatten(0, 1)
                    loss, gate, sums = _exit_loss(head, logits, final.detach(), taps[layer].hidden, labels, objective)
                    total = total + share * (objective.weights[layer] * loss + objective.gate * gate)
                found.add(Found(sums={layer: sums}))
        leaves = [leaf for _, _, leaf in self.uses]
        grads: Sequence[Tensor | None] = [None] * len(leaves)
        if total.requires_grad:
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
        for (name, stage, leaf), grad in zip(self.uses, grads, strict=True):
            found.add(Found(by_use={(name, stage): torch.zeros_like(leaf) if grad is None else grad}))
        return found

    def _pieces(self, table: Table, rows: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids ``[n, t]`` and labels ``[N]`` of all documents of one length after the other."""
        by_length: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for row in rows:
            numbers = torch.zeros_like(table.documents[row]) if self.across else table.documents[row]
            for number in numbers.unique():
                mine = numbers == number
                by_length.setdefault(int(mine.sum()), []).append((table.ids[row][mine], table.labels[row][mine]))
        for pieces in by_length.values():
            yield torch.stack([ids for ids, _ in pieces]), torch.cat([labels for _, labels in pieces])

    def _run(self, ids: Tensor, dropped: frozenset[int]) -> tuple[dict[int, Tap], AttentionContext]:
        context = self.model.context_for(*ids.shape)
        tap = Tap(self.model.embed(ids))
        taps = {}
        for index, layer in self.model.model.layers.by_number().items():
            tap = Tap(tap.hidden) if index in dropped else Tap(*layer.parts(tap.hidden, context))
            taps[index + 1] = tap
        return taps, context


def _final_loss(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Sums]:
    valid = labels_N >= 0
    loss = F.cross_entropy(logits_NV, labels_N, ignore_index=-100, reduction="sum")
    hits = (logits_NV.argmax(-1) == labels_N) & valid
    sure = logits_NV.detach().softmax(-1).amax(-1)[valid]
    return loss, Sums(float(valid.sum()), float(loss.detach()), float(hits.sum()), float(sure.sum()))


def _exit_loss(
    head: ExitHead, logits_NK: Tensor, final_NV: Tensor, hidden: Tensor, labels_N: Tensor, o: Objective
) -> tuple[Tensor, Tensor, Sums]:
    """The loss of an exit and of its gate, summed over tokens that count."""
    valid = labels_N >= 0
    ids_K = torch.arange(final_NV.shape[1]) if head.candidate_ids is None else head.candidate_ids
    log_q = logits_NK.log_softmax(-1)
    ce_N = -(log_q * (labels_N[:, None] == ids_K)).sum(-1)
    log_p = (final_NV / o.temperature).log_softmax(-1)[:, ids_K]
    mass = log_p.exp().sum(-1, keepdim=True)
    kl_N = (log_p.exp() * (log_p - mass.log() - (logits_NK / o.temperature).log_softmax(-1))).sum(-1)
    loss_N = (1 - o.distill) * ce_N + o.distill * o.temperature**2 * kl_N
    weight_N = (logits_NK.detach() / o.confidence_temperature).softmax(-1).amax(-1)
    if o.weighted:
        loss_N = loss_N * weight_N
    loss = (loss_N * valid).sum()
    teaches = o.distill > 0 or o.gate > 0
    right_N = ids_K[logits_NK.argmax(-1)] == (final_NV.argmax(-1) if teaches else labels_N)
    gate = torch.zeros((), dtype=logits_NK.dtype)
    if o.gate and head.config.gate:
        logit_N = head.gate_logit(hidden).flatten()
        p_N = torch.where(right_N, logit_N.sigmoid(), (-logit_N).sigmoid())
        gate = -(p_N.log() * valid).sum()
    sure = log_q.detach().exp().amax(-1)
    counts = [
        valid.sum(),
        loss.detach(),
        (right_N & valid).sum(),
        sure[valid].sum(),
        gate.detach(),
        weight_N[valid].sum(),
    ]
    return loss, gate, Sums(*map(float, counts))
