"""The losses where each of several ranks has some rows of every matrix: the values and gradients of one process."""

import random
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from exitlm.train.objective import LossJob, LossSettings, Teacher, VocabularyPart, chunked_losses, whole_loss
from tests.parallel.launch import launch

N, D, TOLERANCE = 13, 5, 1e-12
SETTINGS = [
    LossSettings(distill=d, temperature=t, confidence_weighted=c, confidence_temperature=u, renormalise=r)
    for d, t, (c, u), r in product((0.0, 0.4, 1.0), (1.0, 2.5), ((False, 1.0), (True, 1.0), (True, 0.6)), (False, True))
]
VOCABULARIES = (48, 49, 31, 7, 4)  # of 4 rows the third of three ranks has none


def problem(seed: int, vocab: int, candidates: str, tied: bool) -> dict[str, Any]:
    """Features, matrices, labels and weights of one head with a teacher. ``tied``: every logit occurs several times."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=g, dtype=torch.float64)
        return values.round() if tied else values

    weight, final = rand(vocab, D), rand(vocab, D)
    if tied:
        weight, final = (m[torch.randint(vocab, (vocab,), generator=g)] for m in (weight, final))
    ids: Tensor | None = None
    if candidates == "some":
        ids = torch.randperm(vocab, generator=g)[: max(2, vocab // 3)].sort().values
    elif candidates == "first":  # all on the first rank
        ids = torch.arange(min(3, vocab // 3 + 1))
    elif candidates == "last":
        ids = torch.arange(vocab - min(3, vocab // 3 + 1), vocab)
    labels = torch.randint(vocab, (N,), generator=g)
    labels[::5] = -100
    share = torch.rand(N, generator=g, dtype=torch.float64) * (labels >= 0)
    return {"x": rand(N, D), "w": weight, "tx": rand(N, D), "tw": final, "ids": ids, "y": labels, "n": share}


def losses(p: dict[str, Any], settings: LossSettings, chunk: int, group: Any = None) -> tuple[Any, ...]:
    """Of one head: loss, hits, confidences, gradients for the features and for the whole matrix, and the same again
    from the logits at once."""
    vocab, ids = len(p["w"]), p["ids"]
    rows, part = torch.arange(vocab), None
    if group is not None:
        each = -(-vocab // dist.get_world_size(group))
        first = min(vocab, each * dist.get_rank(group))
        rows, part = rows[first : first + each], VocabularyPart(group=group, first=first)
        ids = None if ids is None else ids[(ids >= first) & (ids < first + each)]
    mine = rows if ids is None else ids
    teacher = None
    if settings.distill > 0:
        teacher = Teacher(features_ND=p["tx"], weight_VD=p["tw"][rows])
    job = LossJob(
        ids=(ids,), weight_N=p["n"], labels_N=p["y"], teacher=teacher, settings=settings, chunk=chunk, part=part
    )
    found = chunked_losses(job, [p["x"]], [p["w"][mine]], [True, True])
    at_once = whole_loss(job, p["x"], p["w"][mine])
    assert found.grad_features[0] is not None
    assert found.grad_weights[0] is not None
    grad_x, grad_w = found.grad_features[0], torch.zeros_like(p["w"]).index_copy(0, mine, found.grad_weights[0])
    grad_again = at_once[3] @ p["w"][mine]
    for grad in (grad_x, grad_w, grad_again):
        if group is not None:
            dist.all_reduce(grad, group=group)
    return found.loss_E[0], found.correct_EN[0], found.confidence_EN[0], grad_x, grad_w, *at_once[:3], grad_again


def compare(seeds: list[int]) -> list[str]:
    """What differs, in words."""
    groups = {2: dist.new_group([0, 1]), 3: dist.group.WORLD}
    wrong = []
    for seed in seeds:
        draw = random.Random(seed)
        vocab = draw.choice(VOCABULARIES)
        candidates, tied = draw.choice(("none", "none", "some", "first", "last")), draw.random() < 0.4
        settings, chunk, ranks = draw.choice(SETTINGS), draw.choice((4, 64)), draw.choice((2, 3))
        if ranks == 2 and dist.get_rank() == 2:
            continue
        p = problem(seed, vocab, candidates, tied)
        names = ("loss", "hits", "confidence", "features", "matrix", "loss", "hits", "confidence", "features")
        pairs = zip(names, losses(p, settings, chunk, groups[ranks]), losses(p, settings, chunk), strict=True)
        for name, here, there in pairs:
            off = float((here.double() - there.double()).abs().max())
            if not off <= TOLERANCE:
                wrong.append(f"seed {seed}, {ranks} ranks, {vocab} rows, {candidates}, tied {tied}: {name} {off:.1e}")
    return wrong


def test_parts_give_what_the_whole_gives() -> None:
    """Vocabularies that do not divide, candidates on one rank only, equal logits on several ranks."""
    wrong = launch(3, compare, list(range(60)))
    assert not any(wrong), "\n".join(sorted({what for one in wrong for what in one})[:20])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_parts_give_what_the_whole_gives_in_many_cases() -> None:
    wrong = launch(3, compare, list(range(60, 1000)))
    assert not any(wrong), "\n".join(sorted({what for one in wrong for what in one})[:20])


def best_ids() -> list[list[int]]:
    """Which id is taken of equal ones, by two and by three ranks."""
    groups = {2: dist.new_group([0, 1]), 3: dist.group.WORLD}
    out = []
    for ranks, group in groups.items():
        if dist.get_rank() >= ranks:
            continue
        weight = torch.zeros(12, 1, dtype=torch.float64)
        weight[[5, 8, 11]] = 1.0  # on two ranks, or on two of three
        first, each = dist.get_rank(group) * 12 // ranks, 12 // ranks
        job = LossJob(
            ids=(None,),
            weight_N=torch.ones(2, dtype=torch.float64),
            labels_N=torch.tensor([5, 8]),
            teacher=None,
            settings=LossSettings(),
            chunk=2,
            part=VocabularyPart(group=group, first=first),
        )
        ones = torch.ones(2, 1, dtype=torch.float64)
        found = chunked_losses(job, [ones], [weight[first : first + each]], [False, False])
        out.append(found.correct_EN[0].tolist())
    return out


def test_of_equal_logits_the_first_id_wins() -> None:
    """As with one process: 5 is right, and 8, which is as large, is not."""
    assert launch(3, best_ids) == [[[True, False], [True, False]]] * 2 + [[[True, False]]]
