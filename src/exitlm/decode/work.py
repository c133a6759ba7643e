"""What a stage of a pipeline is asked, and what it answers: one pass, as plain data and tensors.

In one process the engine looks at what arrived as it goes. A stage in another process has to be told beforehand what is
wanted of the rows; that is decided when a pass is submitted, and nothing that comes later asks for more.

Shapes: M rows, T tested rows, K rows of an exit's output matrix, V vocab_size, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from exitlm.decode.batch import Batch


@dataclass(frozen=True, slots=True)
class AtExit:
    """Rows to score by one adapter's exit at a pass's last boundary.

    ``rows`` are numbers of the batch's rows, ascending. ``gates``: a threshold for each, below which its gate's score
    is all that is wanted; NaN: no gate is asked. ``logits``: whether each row's logits are wanted, too.
    """

    adapter: str
    rows: tuple[int, ...]
    gates: tuple[float, ...]
    logits: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Final:
    """A row that the final head is wanted for; ``logits``: whether its logits are, too."""

    row: int
    logits: bool


@dataclass(frozen=True, slots=True)
class Follower:
    """The log-probability of ``token`` behind a row, and of the ``most`` likely tokens, by the final head."""

    row: int
    token: int
    most: int


@dataclass(frozen=True, slots=True)
class Wants:
    """What is wanted of the rows that arrive."""

    tests: tuple[AtExit, ...] = ()
    finals: tuple[Final, ...] = ()
    followers: tuple[Follower, ...] = ()


@dataclass(frozen=True, slots=True)
class Work:
    """A pass of a stage from boundary ``first`` to boundary ``last``.

    Its rows come as ``tokens``, as hidden states ``[M, D]``, or wait in ``slots`` of the stage's own pool. Those that
    wait at the last boundary within the stage are kept in ``kept``; at the stage's end they are sent back.
    """

    number: int
    first: int
    last: int
    batch: Batch
    wants: Wants
    tokens: Sequence[int] = ()
    hidden_MD: Tensor | None = None
    slots: Sequence[int] = ()
    kept: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """What an exit or the final head says of one row. ``gate``: its gate's score (1 where none was asked), beside which
    nothing else stands where it did not fire. ``best`` is the first of the largest logits ``[K]``."""

    gate: float = 1.0
    best: int = -1
    finite: bool = True
    probability: float = 0.0
    logits_K: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Brought:
    """What a pass brought: scores of the tested rows by adapter and row, of rows at the final head by row, and
    log-probabilities by row; hidden states ``[M, D]`` at the stage's end. ``seconds`` that it took."""

    number: int
    seconds: float = 0.0
    tests: Mapping[str, Mapping[int, Scored]] = field(default_factory=dict)
    finals: Mapping[int, Scored] = field(default_factory=dict)
    followers: Mapping[int, tuple[float, dict[int, float]]] = field(default_factory=dict)
    hidden_MD: Tensor | None = None
