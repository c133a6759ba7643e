"""Measure what passes cost on this machine, and keep the table.

Costs are measured once per machine and shape and kept in the user's cache directory. A table is kept only if its times
agreed with each other (``spread``): what a busy machine gave serves one process. A kept one is compared with a few
passes before it is used, and measured again where they deviate. The table itself is :mod:`exitlm.decode.pricing.costs`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from exitlm.decode.arrival import Packed
from exitlm.decode.batch import Batch
from exitlm.decode.batch import Part as Rows
from exitlm.decode.cache.block_table import BlockTable
from exitlm.decode.kernels.fused import FusedHead, FusedModel
from exitlm.decode.kernels.native_model import NativeHead, NativeModel
from exitlm.decode.kernels.runner import Arrived, Runner
from exitlm.decode.pricing.costs import STEADY, Costs
from exitlm.decode.rules import probability
from exitlm.model.exits import ExitKey

NO_ROOM = "guessed, since the pool has no room to measure"
_FORMAT = 8  # a table that an older exitlm measured says nothing about this one's speed: count up with the hot path
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 512)
CONTEXTS = (128, 2048)
_REPEATS, _ROUNDS = 3, 4
_PATIENCE = 3.0  # seconds after which no further round of measuring begins
_CELL_SECONDS = 0.5  # what one part may take in one round, beyond its second run
_MAX_PASS = 0.03  # seconds of a pass beyond which more rows are not timed
_MAX_SWITCHES = 1  # how often the system may take the processor away while a pass is timed
_DEVIATION = 1.5  # how far times relative to a kept table may lie from each other, or all of them from 1, squared


def ideal(fused: Packed) -> Costs:
    """Costs by bytes alone, in units of a layer at any number of rows: the bound of a machine where rows are free."""
    config = fused.config
    layer = 4 * config.hidden_size * config.num_attention_heads * config.head_dim
    layer += 3 * config.hidden_size * config.intermediate_size
    head = config.hidden_size * config.vocab_size / layer
    share = _dearest(
        {
            key: head if h.candidate_list is None else head * len(h.candidate_list) / config.vocab_size
            for key, h in fused.heads.items()
        }
    )
    return Costs(
        rows=(1, 16), layer=((1.0, 1.0),), head=(head, head), test=dict.fromkeys(share, 0.0), draft=share,
        num_hidden_layers=config.num_hidden_layers,
    )  # fmt: skip


def _dearest(by_key: Mapping[ExitKey, float]) -> dict[int, float]:
    """By layer what the dearest of its exits takes: whose exit is tested does not change what is decided by costs."""
    return {e: max(taken for (_, at), taken in by_key.items() if at == e) for e in sorted({e for _, e in by_key})}


def _seconds(action: Callable[[], object], before: Callable[[], object], device: torch.device) -> list[float]:
    """Times of ``action``, each time after ``before``, which is not timed; the first one only warms up. A time in which
    the system took the processor away is left out, so that a busy machine may leave none: two threads that share a core
    give times that are equal, and a hundred times too long."""
    found: list[float] = []
    begun, count = time.perf_counter(), 0
    while count < 2 or (count <= _REPEATS and time.perf_counter() - begun < _CELL_SECONDS):
        before()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken, begin = _switches(), time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
        if count and _switches() - taken <= _MAX_SWITCHES:
            found.append(seconds)
        count += 1
    return found


def _switches() -> int:
    """How often the system has taken the processor away; 0 where it does not tell."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


Timed = tuple[Callable[[], object], Callable[[], object]]
"""What is timed, and what runs before it."""
Part = tuple[str, int | ExitKey]
"""What is timed: ``layers`` or ``head`` with a number of rows, ``context`` with a number of tokens before one row,
``test`` or ``gate`` with an exit."""


def _contexts(fused: FusedModel | NativeModel) -> tuple[int, ...]:
    """The contexts to measure: both, or less where the model's own is shorter."""
    longest = fused.config.max_position_embeddings
    near = max(1, min(CONTEXTS[0], longest - SIZES[-1]))
    return near, max(near + 1, min(CONTEXTS[1], longest - 1))


@contextmanager
def _parts(runner: Runner) -> Iterator[dict[Part, Timed]]:
    """What to time, and what to run before each time: another part, as in decoding, so that the processor's caches hold
    the other's weights then. Rows are those of one sequence, in blocks that are borrowed from the pool; a pool that has
    none left gives nothing to time."""
    fused, pool = runner.fused, runner.pool
    near, far = _contexts(fused)
    tables = [BlockTable(allocator, pool.block_size) for allocator in pool.allocators]
    try:
        if not all(table.ensure(max(near + SIZES[-1], far + 1)) for table in tables):
            yield {}
            return
        for group, table in enumerate(tables):
            pool.clear(group, table.blocks)
        windows = [group.window for group in pool.groups]
        tokens = [i % fused.config.vocab_size for i in range(SIZES[-1])]
        hidden = fused.embed(tokens)

        def layers(rows: int, context: int = near) -> None:
            firsts = tuple(0 if window is None else max(0, context + 1 - window) for window in windows)
            seen = tuple(tuple(t.slots(at, context + rows - at)) for t, at in zip(tables, firsts, strict=True))
            writes = tuple(tuple(table.slots(context, rows)) for table in tables)
            batch = Batch.of((Rows(context, rows, firsts, seen, writes),))
            runner.run(0, runner.segments, batch, fused.embed(tokens[:rows]))

        def final(rows: int) -> None:
            runner.final_scores(Arrived(hidden[:rows], hidden[:rows]), range(rows))

        def test(head: FusedHead | NativeHead) -> None:
            if isinstance(head, NativeHead):
                head.scores(hidden[:1], mass=True)
            else:
                probability(head.logits(hidden[:1], hidden[:1], hidden[:1])).tolist()

        one = partial(layers, 1)
        parts: dict[Part, Timed] = {
            ("layers", 1): (one, partial(final, 1)), ("head", 1): (partial(final, 1), one),
            ("context", far): (partial(layers, 1, far), partial(final, 1)),
        }  # fmt: skip
        for key, exit_head in fused.heads.items():
            parts["test", key] = partial(test, exit_head), one
            if exit_head.has_gate:
                parts["gate", key] = partial(exit_head.gates, hidden[:1]), one
        for rows in SIZES[1:]:  # last, as a table can do without them
            parts["layers", rows] = partial(layers, rows), partial(final, min(rows, 16))
            parts["head", rows] = partial(final, rows), partial(layers, min(rows, 16))
        yield parts
    finally:
        for table in tables:
            table.release()


@torch.inference_mode()
def measure(runner: Runner) -> Costs:
    """Time layers, heads and exits twice (a second or two for a small model), and again as long as a part took more
    than ``STEADY`` longer than at best, for some seconds at most. The best times count.

    One round can't tell a busy machine from a slow one: all times of a part may be too long by the same factor.
    """
    with _parts(runner) as parts:
        best, spread = _rounds(parts, runner.fused.device)
    if spread == math.inf:  # not one pass had the processor to itself
        guess = ideal(runner.fused)
        return replace(guess, test=guess.draft, spread=math.inf, origin="guessed" if parts else NO_ROOM)
    return _table(runner.fused, best, spread)


def _rounds(parts: Mapping[Part, Timed], device: torch.device) -> tuple[dict[Part, float], float]:
    """The best time of each part, and how far its usual times lie above it in the last round."""
    best = dict.fromkeys(parts, math.inf)
    spread, begun = math.inf, time.perf_counter()
    for number in range(_ROUNDS if parts else 0):
        usual = dict.fromkeys(parts, math.inf)
        too_long = False
        for part, (action, before) in parts.items():
            if time.perf_counter() - begun > _PATIENCE:
                break
            if too_long and part[0] in ("layers", "head"):
                continue
            if times := _seconds(action, before, device):
                usual[part], best[part] = statistics.median(times), min([*times, best[part]])
                too_long = best[part] > _MAX_PASS and part[0] == "layers"
        if max(best[part] for part in parts if part[1] == 1 or part[0] not in ("layers", "head")) < math.inf:
            timed = [rows for rows in SIZES if best["layers", rows] < math.inf]
            falls = [best["layers", few] / best["layers", more] for few, more in itertools.pairwise(timed)]
            spread = max(*(usual[part] / best[part] for part in parts if best[part] < math.inf), *falls, 1.0) - 1.0
        if (number and spread <= STEADY) or time.perf_counter() - begun > _PATIENCE:
            break
    return best, spread


def _table(fused: FusedModel | NativeModel, best: Mapping[Part, float], spread: float) -> Costs:
    """The table of the best times. More rows than were timed take proportionally long until passes tell; of another
    context only one row is timed, and every further row, of another sequence, reads as much again."""
    L = fused.config.num_hidden_layers
    layer = [seconds / L for seconds in _filled(best, "layers")]
    near, far = _contexts(fused)
    reading = max(0.0, best["context", far] / L - layer[0])
    draft = _dearest({key: best["test", key] for key in fused.heads})
    test = _dearest({key: best.get(("gate", key), best["test", key]) for key in fused.heads})
    for (_, e), exit_head in fused.heads.items():
        if exit_head.block is not None:  # every token leaves its key in the cache of each block
            draft[e] += layer[0]
            test[e] += layer[0]
    return Costs(
        rows=SIZES, contexts=(near, far), num_hidden_layers=L, test=test, draft=draft, spread=spread, origin="measured",
        layer=(tuple(layer), tuple(t + rows * reading for rows, t in zip(SIZES, layer, strict=True))),
        head=tuple(_filled(best, "head")),
    )  # fmt: skip


def _filled(best: Mapping[Part, float], name: str) -> list[float]:
    """The times by rows. They never fall, since what is below is noise of the clock."""
    found: list[float] = []
    for rows in SIZES:
        seconds = best[name, rows]
        if seconds == math.inf:
            seconds = found[-1] * rows / SIZES[len(found) - 1]
        found.append(max([seconds, *found[-1:]]))
    return found


@torch.inference_mode()
def deviation(runner: Runner, costs: Costs) -> tuple[float, float]:
    """The least and the largest time of a few passes, as a multiple of what the table says; 1 where the machine is too
    busy to say."""
    L, found = costs.num_hidden_layers, []
    with _parts(runner) as parts:
        for name, rows in (("layers", 1), ("layers", 8), ("head", 1)):
            if parts and (times := _seconds(*parts[name, rows], runner.fused.device)):
                found.append(min(times) / (costs.layers(L, rows) if name == "layers" else costs.final(rows)))
    return min(found, default=1.0), max(found, default=1.0)


def cached(runner: Runner, directory: Path) -> Costs:
    """The table that is kept in ``directory`` for this machine and these shapes, if a few passes take what it says;
    else :func:`measure`, kept if the times agreed. ``origin`` says which."""
    fused = runner.fused
    exits: dict[int, str] = {}
    for (_, e), head in fused.heads.items():  # whatever the adapters are called
        exits[e] = f"{exits.get(e, '')}{head.config!r}"
    shape = {k: v for k, v in asdict(fused.config).items() if isinstance(v, (int, float, str))}
    machine = (platform.processor(), platform.machine(), os.cpu_count(), torch.get_num_threads(), torch.__version__,
               str(fused.device), fused.compile, _device_name(fused.device))  # fmt: skip
    identity = (_FORMAT, shape, exits, fused.quant, machine, str(fused.dtype))
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:24]
    path = directory / "costs" / f"{key}.json"
    try:
        kept = _kept(json.loads(path.read_text()), fused)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        kept = None  # absent or damaged
    origin = "measured"
    if kept is not None:
        least, most = deviation(runner, kept)
        if most / least <= _DEVIATION and _DEVIATION**-2 <= least <= most <= _DEVIATION**2:
            return kept
        origin = f"measured again, since passes take {least:.2f} to {most:.2f} times as long as was kept"
    costs = measure(runner)
    if not costs.steady:  # a kept table was steady when it was measured
        return costs if kept is None else replace(kept, origin=origin.replace("measured again, since", "kept, though"))
    costs = replace(costs, origin=origin)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(costs)))
        partial.replace(path)
    except OSError:
        pass  # a cache that can't be written only means measuring again
    return costs


def _kept(data: Any, fused: FusedModel | NativeModel) -> Costs:
    """A stored table, checked. Raises one of Python's own errors for anything else."""
    layer = tuple(tuple(map(float, column)) for column in data["layer"])
    head = tuple(map(float, data["head"]))
    test, draft = ({int(e): float(v) for e, v in data[name].items()} for name in ("test", "draft"))
    seconds = (*itertools.chain(*layer), *head, *test.values(), *draft.values())
    contexts = _contexts(fused)
    if (
        data["rows"] != list(SIZES)
        or data["contexts"] != list(contexts)
        or len(layer) != len(contexts)
        or not all(len(column) == len(SIZES) for column in (*layer, head))
        or not test.keys() == draft.keys() == {e for _, e in fused.heads}
        or not all(0.0 < value < math.inf for value in seconds)
        or not 0.0 <= float(data["spread"]) <= STEADY
    ):
        raise ValueError("this is no table of costs of this model")
    depth, spread = fused.config.num_hidden_layers, float(data["spread"])
    return Costs(
        rows=SIZES, contexts=contexts, layer=layer, head=head, test=test, draft=draft, num_hidden_layers=depth,
        spread=spread, origin="kept",
    )  # fmt: skip


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
