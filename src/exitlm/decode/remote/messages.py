"""Passes and what they bring, as frames. The order of the numbers is the protocol; ``PROTOCOL`` counts its versions.

A batch's runs of slots travel as they are, since the head has decided where everything lies. Whoever receives them
checks that they lie in its pool, so that a frame can make no kernel write elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from exitlm.decode.batch import Batch, Part, Run
from exitlm.decode.remote.frames import BadFrame, Frame, Kind
from exitlm.decode.rules import fires
from exitlm.decode.work import AtExit, Brought, Final, Follower, Scored, Wants, Work

PROTOCOL = 1


class _Numbers:
    """Reads whole numbers one after the other."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers, self._at, self._end = numbers, 0, len(numbers)

    def one(self) -> int:
        """The next one."""
        at = self._at
        if at >= self._end:
            raise _ends()
        self._at = at + 1
        return self._numbers[at]

    def next(self, count: int) -> Sequence[int]:
        """The next ``count``."""
        at = self._at
        if not 0 <= count <= self._end - at:
            raise _ends()
        self._at = at + count
        return self._numbers[at : at + count]

    def count(self) -> int:
        """The next one, which says how many things follow."""
        found = self.one()
        if not 0 <= found <= self._end - self._at:
            raise _ends()
        return found

    def some(self) -> Sequence[int]:
        """So many as the next one says."""
        return self.next(self.one())

    def end(self) -> None:
        """Nothing may be left."""
        if self._at < self._end:
            raise BadFrame("a frame came with numbers that belong to nothing")


def _ends() -> BadFrame:
    return BadFrame("a frame came that ends too early")


# ---- passes


def of_work(work: Work, adapters: Sequence[str]) -> Frame:
    """A pass as a frame; ``adapters`` go by their numbers."""
    ints = [work.number, work.first, work.last, len(work.batch.parts)]
    for part in work.batch.parts:
        ints += [part.start, part.count, part.stretched, len(part.firsts), *part.firsts]
        for runs in (*part.reads, *part.writes):
            ints.append(len(runs))
            for run in runs:
                ints += run
    for numbers in (work.tokens, work.slots, work.kept):
        ints += [len(numbers), *numbers]
    wants, floats = work.wants, list[float]()
    ints.append(len(wants.tests))
    for test in wants.tests:
        ints += [adapters.index(test.adapter), len(test.rows), *test.rows, *test.logits]
        floats += test.gates
    ints.append(len(wants.finals))
    for final in wants.finals:
        ints += [final.row, final.logits]
    ints.append(len(wants.followers))
    for one in wants.followers:
        ints += [one.row, one.token, one.most]
    return Frame(Kind.PASS, ints, floats, [] if work.hidden_MD is None else [work.hidden_MD])


def to_work(frame: Frame, adapters: Sequence[str], blocks: Sequence[int], block_size: int) -> Work:
    """The pass in a frame. ``blocks`` of each group are what the pool has.

    Raises:
        BadFrame: it is none, or its rows lie outside of the pool.
    """
    read, floats = _Numbers(frame.ints), iter(frame.floats)
    number, first, last, parts = read.next(4)
    slots = [count * block_size for count in blocks]
    batch = Batch.of(tuple([_part(read, slots) for _ in range(parts)]))
    tokens, waiting, kept = list(read.some()), list(read.some()), list(read.some())
    tests = []
    for _ in range(read.count()):
        adapter, rows = read.one(), read.some()
        if not 0 <= adapter < len(adapters):
            raise BadFrame("a pass came with an adapter that is not here")
        gates = tuple([next(floats, math.nan) for _ in rows])
        tests.append(AtExit(adapters[adapter], tuple(rows), gates, tuple(map(bool, read.next(len(rows))))))
    numbers = read.next(2 * read.one())
    finals = tuple([Final(row, bool(logits)) for row, logits in zip(numbers[::2], numbers[1::2], strict=True)])
    numbers = read.next(3 * read.one())
    triples = zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    followers = tuple([Follower(*three) for three in triples])
    read.end()
    hidden = frame.tensors[0] if frame.tensors else None
    given = [len(tokens), len(waiting), 0 if hidden is None else len(hidden)]
    asked = [row for test in tests for row in test.rows]
    asked += [each.row for each in finals]
    asked += [each.row for each in followers]
    if sorted(given) != [0, 0, batch.count] or (kept and len(kept) != batch.count):
        raise BadFrame("a pass came with rows that are not those of its batch")
    below = min([*asked, *waiting, *kept], default=0)
    if below < 0 or max(asked, default=0) >= batch.count:
        raise BadFrame("a pass came that asks for rows which it has not")
    return Work(number, first, last, batch, Wants(tuple(tests), finals, followers), tokens, hidden, waiting, kept)


def _part(read: _Numbers, slots: Sequence[int]) -> Part:
    start, count, stretched, groups = read.next(4)
    firsts = tuple(read.next(groups))
    if groups != len(slots) or count < 1 or min(firsts) < 0 or max(firsts) > start:
        raise BadFrame("a pass came with rows that are none")
    end = start + count
    reads = tuple([_runs(read, end - first, most) for first, most in zip(firsts, slots, strict=True)])
    return Part(start, count, firsts, reads, tuple([_runs(read, count, most) for most in slots]), bool(stretched))


def _runs(read: _Numbers, positions: int, most: int) -> tuple[Run, ...]:
    """Runs of slots for so many positions, all below ``most``."""
    count, runs = read.one(), tuple[Run, ...]()
    if count == 1:  # as it mostly is
        first, many = read.next(2)
        runs, total = ((first, many),), many
        good = many > 0 <= first and first + many <= most
    else:
        numbers = read.next(2 * count)
        runs = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        total = sum(numbers[1::2])
        good = all(many > 0 <= first and first + many <= most for first, many in runs)
    if not good:
        raise BadFrame("a pass came with slots that the pool has not")
    if total != positions:
        raise BadFrame("a pass came with slots that are not those of its rows")
    return runs


# ---- what they bring


def of_brought(brought: Brought, adapters: Sequence[str]) -> Frame:
    """What a pass brought as a frame."""
    ints, floats, logits = [brought.number], [brought.seconds], list[Tensor]()
    ints.append(len(brought.tests))
    for adapter, rows in brought.tests.items():
        ints.append(adapters.index(adapter))
        _put(rows, ints, floats, logits)
    _put(brought.finals, ints, floats, logits)
    ints.append(len(brought.followers))
    for row, (one, likely) in brought.followers.items():
        ints += [row, len(likely), *likely]
        floats += [one, *likely.values()]
    joined = list[Tensor]()
    for width in dict.fromkeys(len(each) for each in logits):  # heads differ in how many logits they have
        joined.append(torch.stack([each for each in logits if len(each) == width]))
    hidden = [] if brought.hidden_MD is None else [brought.hidden_MD]
    return Frame(Kind.DONE, [*ints, len(hidden)], floats, [*joined, *hidden])


def _put(rows: Mapping[int, Scored], ints: list[int], floats: list[float], logits: list[Tensor]) -> None:
    ints.append(len(rows))
    for row, scored in rows.items():
        width = 0 if scored.logits_K is None else len(scored.logits_K)
        ints += [row, scored.best, scored.finite, width]
        floats += [scored.gate, scored.probability]
        if scored.logits_K is not None:
            logits.append(scored.logits_K)


def to_brought(frame: Frame, adapters: Sequence[str]) -> Brought:
    """What a frame says that a pass brought.

    Raises:
        BadFrame: it says nothing of the kind.
    """
    read, floats = _Numbers(frame.ints), iter(frame.floats)
    has_hidden = bool(frame.ints and frame.ints[-1])
    tensors = list(frame.tensors)
    hidden = tensors.pop() if has_hidden and tensors else None
    if any(each.dim() != 2 for each in frame.tensors):
        raise BadFrame("an answer came with tensors that are no rows")
    rows_of = {each.shape[1]: iter(each) for each in tensors}
    number, seconds = read.one(), next(floats, 0.0)

    def scored() -> dict[int, Scored]:
        found: dict[int, Scored] = {}
        for _ in range(read.count()):
            row, best, finite, width = read.one(), read.one(), bool(read.one()), read.one()
            gate, probability = next(floats, math.nan), next(floats, math.nan)
            logits = next(rows_of.get(width, iter(())), None) if width else None
            if width and logits is None:
                raise BadFrame("an answer came without its logits")
            found[row] = Scored(gate, best, finite, probability, logits)
        return found

    tests = {}
    for _ in range(read.count()):
        adapter = read.one()
        if not 0 <= adapter < len(adapters):
            raise BadFrame("an answer came from an adapter that is not here")
        tests[adapters[adapter]] = scored()
    finals, followers = scored(), dict[int, tuple[float, dict[int, float]]]()
    for _ in range(read.count()):
        row, likely = read.one(), read.some()
        one = next(floats, math.nan)
        followers[row] = one, {token: next(floats, math.nan) for token in likely}
    read.one()
    read.end()
    return Brought(number, seconds, tests, finals, followers, hidden)


def check_answer(work: Work, brought: Brought, widths: Mapping[str, int], vocab: int, hidden: int | None) -> None:
    """Whether an answer has what a pass wanted. ``widths`` of each exit's logits; ``hidden``: of the states that leave,
    if they do.

    Raises:
        BadFrame: something is missing, or can't be.
    """
    good = 0.0 <= brought.seconds < math.inf
    if hidden is None:
        good &= brought.hidden_MD is None
    else:
        good &= brought.hidden_MD is not None and brought.hidden_MD.shape == (work.batch.count, hidden)
    for test in work.wants.tests:
        found = brought.tests.get(test.adapter, {})
        for row, threshold, logits in zip(test.rows, test.gates, test.logits, strict=True):
            one = found.get(row)
            quiet = one is not None and not math.isnan(threshold) and not fires(one.gate, threshold)
            good &= one is not None and (quiet or _is_good(one, widths[test.adapter], logits))
    for final in work.wants.finals:
        last = brought.finals.get(final.row)
        good &= last is not None and _is_good(last, vocab, final.logits)
    good &= all(follower.row in brought.followers for follower in work.wants.followers)
    if not good:
        raise BadFrame("an answer came that is none to what was asked")


def _is_good(one: Scored, width: int, logits: bool) -> bool:
    has = one.logits_K is not None and len(one.logits_K) == width
    return (has or not logits) and (not one.finite or 0 <= one.best < width)
