"""Is that chance? P-values of counts, and a verdict over several of them. Not a test."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def chi_square(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """The p-value of counts of cells that have these probabilities; cells that expect fewer than 5 are one cell."""
    total = sum(counts)
    pairs = [(n, total * p) for n, p in zip(counts, probabilities, strict=True)]
    if any(n and not mean for n, mean in pairs):
        return 0.0  # something came that has no probability
    large = [pair for pair in pairs if pair[1] >= 5]
    rest = [pair for pair in pairs if pair[1] < 5]
    if (mean := sum(mean for _, mean in rest)) >= 5:
        large.append((sum(n for n, _ in rest), mean))
    return _tail(sum((n - mean) ** 2 / mean for n, mean in large), len(large) - 1)


def contingency(first_N: Tensor, second_N: Tensor, kinds: int) -> float:
    """The p-value of pairs of whole numbers below ``kinds`` if the two of a pair don't depend on each other."""
    table = torch.bincount(first_N * kinds + second_N, minlength=kinds**2).view(kinds, kinds).double()
    mean = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
    assert mean.min() >= 5
    return _tail(float(((table - mean) ** 2 / mean).sum()), (kinds - 1) ** 2)


def rejected(p_values: Mapping[str, float], level: float = 0.01) -> list[str]:
    """The names of the hypotheses that Holm's method rejects: the chance that it rejects a true one is ``level``."""
    found: list[str] = []
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p > level / (len(p_values) - rank):
            break
        found.append(name)
    return found


def _tail(statistic: float, freedom: int) -> float:
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
