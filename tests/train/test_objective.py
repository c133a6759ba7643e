"""The chunked losses against plain autograd on full logits, their memory, the gate, the schedules."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from exitlm.train.objective import (
    HeadInput,
    LossSettings,
    Teacher,
    candidate_vocabulary,
    chunk_tokens,
    exit_weight,
    gate_loss,
    linear_losses,
    sampled_vocabulary,
)

N, D, V = 23, 7, 31


def reference(
    features: Tensor,
    weight: Tensor,
    ids: Tensor | None,
    token_weight: Tensor,
    labels: Tensor,
    final: Tensor,
    s: LossSettings,
) -> Tensor:
    """The definition, on full logits: ``final`` are the teacher's."""
    logits = features @ weight.T
    rows = torch.arange(V) if ids is None else ids
    log_q, log_q_tau = logits.log_softmax(-1), (logits / s.temperature).log_softmax(-1)
    log_p = (final / s.temperature).log_softmax(-1)[:, rows]
    if s.renormalise:
        log_p = (final[:, rows] / s.temperature).log_softmax(-1)
    mass = log_p.exp().sum(-1, keepdim=True)
    kl = (log_p.exp() * (log_p - mass.log() - log_q_tau)).sum(-1) * s.temperature**2
    ce = torch.stack([-log_q[n, rows == y].sum() for n, y in enumerate(labels)])
    confidence = log_q.exp().amax(-1).detach() if s.confidence_weighted else 1.0
    return (token_weight * confidence * ((1 - s.distill) * ce + s.distill * kl)).sum()


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "f1": rand(N, D), "f2": rand(N, D), "w1": rand(V, D), "w2": rand(11, D), "tf": rand(N, D), "tw": rand(V, D),
        "y": torch.randint(V, (N,), generator=g), "n": rand(N).abs(),
        "ids": torch.randperm(V, generator=g)[:11].sort().values,
    }  # fmt: skip


CASES = [
    LossSettings(distill=d, temperature=t, confidence_weighted=c, renormalise=r)
    for d, t, c, r in product((0.0, 0.4, 1.0), (1.0, 2.5), (False, True), (False, True))
]


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("chunk", [5, 64])
def test_equals_the_definition(tensors: dict[str, Tensor], settings: LossSettings, chunk: int) -> None:
    t = tensors
    leaves = [t[k].clone().requires_grad_() for k in ("f1", "w1", "f2", "w2")]
    final = t["tf"] @ t["tw"].T
    heads = [
        HeadInput(features_ND=leaves[0], weight_KD=leaves[1]),
        HeadInput(features_ND=leaves[2], weight_KD=leaves[3], ids_K=t["ids"]),
    ]
    teacher = Teacher(features_ND=t["tf"], weight_VD=t["tw"])
    result = linear_losses(heads, t["n"], labels_N=t["y"], teacher=teacher, settings=settings, chunk=chunk)
    (result.loss_E * torch.tensor([1.0, 0.3], dtype=torch.float64)).sum().backward()
    grads = [leaf.grad for leaf in leaves]

    again = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    first = reference(again[0], again[1], None, t["n"], t["y"], final, settings)
    second = reference(again[2], again[3], t["ids"], t["n"], t["y"], final, settings)
    (first + 0.3 * second).backward()
    torch.testing.assert_close(result.loss_E.detach(), torch.stack([first, second]).detach(), rtol=0, atol=1e-12)
    for grad, leaf in zip(grads, again, strict=True):
        torch.testing.assert_close(grad, leaf.grad, rtol=0, atol=1e-12)
    logits = t["f2"] @ t["w2"].T
    assert torch.equal(result.correct_EN[1], t["ids"][logits.argmax(-1)] == final.argmax(-1))
    torch.testing.assert_close(result.confidence_EN[1], logits.softmax(-1).amax(-1), rtol=0, atol=1e-12)


def test_known_argmax_and_normaliser_spare_the_full_product(tensors: dict[str, Tensor]) -> None:
    t = tensors
    final = t["tf"] @ t["tw"].T
    head = HeadInput(features_ND=t["f2"], weight_KD=t["w2"], ids_K=t["ids"])
    settings = LossSettings(distill=1.0, temperature=2.0)
    known = Teacher(
        features_ND=t["tf"], weight_VD=t["tw"], argmax_N=final.argmax(-1), lse_N=(final / 2.0).logsumexp(-1)
    )
    with Largest() as seen:
        short = linear_losses([head], t["n"], teacher=known, settings=settings, chunk=N)
    full = linear_losses(
        [head], t["n"], teacher=Teacher(features_ND=t["tf"], weight_VD=t["tw"]), settings=settings, chunk=N
    )
    torch.testing.assert_close(short.loss_E, full.loss_E, rtol=0, atol=1e-12)
    assert torch.equal(short.correct_EN, full.correct_EN)
    assert seen.elements < N * V


def test_gradcheck(tensors: dict[str, Tensor]) -> None:
    t = tensors
    teacher = Teacher(features_ND=t["tf"], weight_VD=t["tw"])

    def loss(features: Tensor, weight: Tensor) -> Tensor:
        head = HeadInput(features_ND=features, weight_KD=weight)
        settings = LossSettings(distill=0.5, temperature=1.5)
        return linear_losses([head], t["n"], labels_N=t["y"], teacher=teacher, settings=settings, chunk=4).loss_E

    assert torch.autograd.gradcheck(loss, (t["f1"].requires_grad_(), t["w1"].requires_grad_()))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [False, True])
def test_no_tensor_of_tokens_by_vocabulary(dtype: torch.dtype, own: bool) -> None:
    tokens, vocab, width, chunk = 96, 500, 4, 8
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=own)
    features = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    teacher = Teacher(
        features_ND=torch.randn(tokens, width, dtype=dtype), weight_VD=torch.randn(vocab, width, dtype=dtype)
    )
    with Largest() as seen:
        result = linear_losses(
            [HeadInput(features_ND=features, weight_KD=weight)] * 2,
            torch.full((tokens,), 1 / tokens),
            labels_N=torch.randint(vocab, (tokens,)),
            teacher=teacher,
            settings=LossSettings(distill=0.5),
            chunk=chunk,
        )
        result.loss_E.sum().backward()
    assert seen.elements == chunk * vocab
    assert features.grad is not None
    assert (weight.grad is not None) == own


def test_bfloat16_is_close_to_float32() -> None:
    torch.manual_seed(0)
    x, w, tx = torch.randn(64, 32), torch.randn(200, 32) * 0.3, torch.randn(64, 32)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        head = HeadInput(features_ND=x.to(dtype), weight_KD=w.to(dtype))
        teacher = Teacher(features_ND=tx.to(dtype), weight_VD=w.to(dtype))
        result = linear_losses([head], torch.full((64,), 1 / 64), teacher=teacher, settings=LossSettings(distill=1.0))
        losses.append(float(result.loss_E))
        assert result.loss_E.dtype == torch.float32
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_chunk_bounds_memory() -> None:
    assert chunk_tokens(49152) * 49152 * 4 <= 32 << 20
    assert chunk_tokens(10**9) == 16


def test_gate_loss_is_weighted_binary_cross_entropy() -> None:
    logit, correct, weight = torch.tensor([0.5, -2.0]), torch.tensor([True, False]), torch.tensor([0.25, 0.75])
    p = torch.sigmoid(logit)
    expected = -(0.25 * p[0].log() + 0.75 * (1 - p[1]).log())
    torch.testing.assert_close(gate_loss(logit, correct, weight), expected)


def test_exit_weight_goes_up_and_down() -> None:
    assert [exit_weight(s, 0.0, 1.0, 4, "linear") for s in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert exit_weight(2, 1.0, 0.0, 4, "cosine") == pytest.approx(0.5)
    assert exit_weight(1, 1.0, 0.0, 4, "cosine") == pytest.approx(0.5 * (1 + 2**-0.5))
    assert exit_weight(0, 0.2, 0.7, 0, "linear") == 0.7


def test_sampled_vocabulary_holds_the_teachers_tokens_and_rare_ones() -> None:
    g = torch.Generator().manual_seed(0)
    best = torch.tensor([[900, 3], [7, 900]])
    ids = sampled_vocabulary(best, torch.arange(10), 1000, 200, g)
    assert torch.equal(ids, ids.unique())
    assert {900, 3, 7} <= set(ids.tolist())
    assert (ids >= 10).sum() > 80
    again = sampled_vocabulary(best, torch.arange(10), 1000, 200, torch.Generator().manual_seed(0))
    assert torch.equal(ids, again)


def test_sampled_vocabulary_has_few_sizes_where_it_is_large() -> None:
    g = torch.Generator().manual_seed(0)
    best = torch.randint(40_000, (100,), generator=g)
    sizes = {len(sampled_vocabulary(best, torch.arange(500), 40_000, count, g)) for count in range(200, 600, 37)}
    assert sizes <= {512, 1024}


def test_candidates_are_special_then_frequent_then_low_ids() -> None:
    counts = torch.zeros(20, dtype=torch.long)
    counts[[9, 4, 15]] = torch.tensor([5, 7, 5])
    assert candidate_vocabulary(counts, [19, 2], 7).tolist() == [2, 19, 4, 9, 15, 0, 1]


def test_gradients_of_pure_distillation_do_not_depend_on_the_path() -> None:
    """The fast path (distill 1, temperature 1) against the general one with a negligible share of cross-entropy."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(N, D, generator=g, dtype=torch.float64).requires_grad_()
    w, tx = torch.randn(V, D, generator=g, dtype=torch.float64), torch.randn(N, D, generator=g, dtype=torch.float64)
    grads = []
    for distill in (1.0, 1.0 - 1e-13):
        result = linear_losses(
            [HeadInput(features_ND=x, weight_KD=w)],
            torch.ones(N, dtype=torch.float64),
            labels_N=torch.zeros(N, dtype=torch.long),
            teacher=Teacher(features_ND=tx, weight_VD=w),
            settings=LossSettings(distill=distill),
            chunk=6,
        )
        grads.append(torch.autograd.grad(result.loss_E.sum(), x)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-10)
    assert F.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0) > 1 - 1e-12
