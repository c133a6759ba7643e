"""Text that the model writes itself: answers to prompts, sampled in batches, kept in a file that survives a kill.

Exits tuned on it agree with the final head more often than exits tuned on documents, since it is what decoding visits.
Each batch is a pure function of its index and the settings, and is appended to the file with an fsync; a killed run
goes on with the next batch and ends with the same file. This is the plain batched reference loop: no exits, no drafts.

Shapes: B prompts of a batch, S positions so far, V vocab_size, KV key/value heads, Dh head_dim.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from exitlm.decode.sampling.sampler import finite_rows
from exitlm.errors import UserError
from exitlm.model.decoder import EarlyExitModel
from exitlm.train.data import Blocks, batch_indices
from exitlm.weights.store import cannot_keep

FORMAT = 1
LEAST_ANSWER = 16


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How answers are written: prompt and answer together have at most ``seq_len + 1`` tokens; temperature 0 is greedy;
    ``prompts`` is a digest of the encoded prompts, ``base`` of the weights."""

    base: str
    prompts: str
    seq_len: int
    temperature: float
    batch: int
    seed: int
    dtype: str
    stop_ids: tuple[int, ...]
    format: int = FORMAT

    def key(self) -> str:
        """The name of the file that holds these answers."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Answer:
    """``ids``: prompt and answer; the answer begins at ``start``."""

    ids: list[int]
    start: int


def read_prompts(path: str, held: int) -> tuple[list[str], list[str]]:
    """Prompts for training and, disjoint from them, for validation. ``path``: a text file with a prompt per line or
    JSONL with "prompt", of which up to ``held`` and at most a fifth are kept for validation; empty: the packaged ones.
    """
    if not path:
        home = resources.files("exitlm.train") / "prompts"
        sets = [(home / f"{name}.txt").read_text(encoding="utf-8").splitlines() for name in ("train", "validation")]
        train, validation = ([p.replace("\\n", "\n") for p in lines if p.strip()] for lines in sets)
        return train, validation[:held]
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    except OSError as error:
        raise UserError(f"the prompts {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the prompts {path} are not UTF-8 text") from error
    if path.endswith((".jsonl", ".ndjson")):
        lines = [_prompt_of(line, f"{path}, line {i}") for i, line in enumerate(lines, 1)]
    lines = list(dict.fromkeys(lines))
    if len(lines) < 2:
        raise UserError(f"{path} holds {len(lines)} different prompts; give at least 2, one is kept for validation")
    count = max(1, min(held, len(lines) // 5))
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(lines)).tolist()
    return [lines[i] for i in sorted(order[count:])], [lines[i] for i in sorted(order[:count])]


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not a JSON object ({error.msg})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise UserError(f'{where}: expected a "prompt" field (a string that is not empty)')
    return str(row["prompt"])


def prompts_digest(prompts: Sequence[Sequence[int]]) -> str:
    """sha256 of encoded prompts."""
    return hashlib.sha256(json.dumps([list(p) for p in prompts]).encode()).hexdigest()


def fitting(prompts: Sequence[list[int]], seq_len: int) -> list[list[int]]:
    """The prompts that leave room for an answer."""
    fit = [p for p in prompts if 0 < len(p) <= seq_len + 1 - min(LEAST_ANSWER, seq_len // 2)]
    if not fit:
        raise UserError(f"no prompt leaves room for an answer in data.seq_len = {seq_len} tokens; raise data.seq_len")
    return fit


def write_answers(
    model: Callable[[], EarlyExitModel],
    prompts: Sequence[list[int]],
    writing: Writing,
    *,
    tokens: int | None,
    vocab_size: int,
    cache: Path,
    report: Callable[[int, int], None] = lambda done, total: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Answer]:
    """The answers, from the cache as far as they are there, else written now: batches until ``tokens`` answer tokens
    are reached, where the last one is cut, or (``tokens`` None) each prompt once. ``model``, whose ids are below
    ``vocab_size``, is only called if something must be written. Ends early when ``stopped()``; batches that were
    written stay."""

    def chosen(index: int) -> list[list[int]]:
        return [prompts[i] for i in _choose(len(prompts), index, writing, once=tokens is None)]

    def shown(more: int) -> None:
        report(min(done + more, total), total)

    home = cache / "self" / writing.key()
    total = tokens if tokens is not None else len(prompts)
    with _exclusive(home / "answers.jsonl") as file:
        loaded: EarlyExitModel | None = None
        done = index = 0
        written = _read_batches(file, chosen, writing.seq_len + 1, vocab_size)
        while done < total:
            room = None if tokens is None else total - done
            if room is not None and index < len(written) and written[index].cut and written[index].tokens < room:
                file.truncate(written.pop().place)  # it was cut for fewer tokens
            if index == len(written):
                loaded = loaded or model()
                found = _write_batch(loaded, chosen(index), writing, index, stopped, room, shown)
                if found is None:
                    return
                written.append(_append(file, index, *found))
            answers = written[index].answers if room is None else first_tokens(written[index].answers, room)
            yield from answers
            done += len(answers) if tokens is None else sum(len(answer.ids) - answer.start for answer in answers)
            index += 1
            report(min(done, total), total)


def first_tokens(answers: Sequence[Answer], count: int) -> list[Answer]:
    """The answers as they were at the step by which they had ``count`` tokens together, each one more in every step
    until its end; as they are if they have fewer."""
    lengths = [len(answer.ids) - answer.start for answer in answers]
    longest = max(lengths)
    steps = next((s for s in range(1, longest) if sum(min(n, s) for n in lengths) >= count), longest)
    return [Answer(answer.ids[: answer.start + steps], answer.start) for answer in answers]


def as_blocks(answers: Sequence[Answer]) -> Blocks:
    """One block for each answer; only the tokens of the answers count."""
    flat = np.array([i for a in answers for i in a.ids], dtype=np.uint32)
    stops = np.cumsum([len(a.ids) for a in answers], dtype=np.int64)
    lengths = np.array([len(a.ids) for a in answers], dtype=np.int64)
    firsts = np.array([a.start - 1 for a in answers], dtype=np.int64)
    segments = np.stack([np.zeros_like(stops), stops - lengths, stops, firsts], axis=1)
    digest = hashlib.sha256(flat.tobytes() + segments.tobytes()).hexdigest()
    return Blocks([flat], segments, np.arange(len(answers) + 1, dtype=np.int64), digest)


# ---- the file


@contextmanager
def _exclusive(path: Path) -> Iterator[IO[bytes]]:
    """The file, locked against other writers (they wait)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+b")
    except OSError as error:
        raise cannot_keep(path, error) from error
    with opened as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@dataclass(frozen=True)
class _Batch:
    """Answers, whether they were cut when there were tokens enough, and the byte at which they begin in the file."""

    answers: list[Answer]
    cut: bool
    place: int

    @property
    def tokens(self) -> int:
        """How many tokens the answers have."""
        return sum(len(answer.ids) - answer.start for answer in self.answers)


def _read_batches(
    file: IO[bytes], prompts: Callable[[int], list[list[int]]], longest: int, vocab_size: int
) -> list[_Batch]:
    """All batches that are whole but for the last one, which may be cut; what a kill left behind them, or what answers
    no ``prompts(batch)``, is taken off."""
    file.seek(0)
    batches: list[_Batch] = []
    end = 0
    for line in file:
        try:
            row: Any = json.loads(line) if line.endswith(b"\n") else None
            if row["batch"] != len(batches) or (batches and batches[-1].cut):
                break
            pairs = list(zip(row["rows"], prompts(len(batches)), strict=True))
            if not all(_is_answer(start, ids, prompt, longest, vocab_size) for (start, ids), prompt in pairs):
                break
        except (ValueError, TypeError, KeyError, RecursionError):  # another line than was written
            break
        batches.append(_Batch([Answer(ids, start) for (start, ids), _ in pairs], bool(row.get("cut")), end))
        end += len(line)
    file.truncate(end)
    return batches


def _is_answer(start: Any, ids: Any, prompt: list[int], longest: int, vocab_size: int) -> bool:
    """Whether ``ids`` are a prompt, up to ``start``, and at least one token more, all in the vocabulary."""
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        return False
    return type(start) is int and start == len(prompt) < len(ids) <= longest and ids[:start] == prompt


def _append(file: IO[bytes], index: int, answers: list[Answer], cut: bool) -> _Batch:
    row = {"batch": index, "rows": [[answer.start, answer.ids] for answer in answers], **({"cut": True} if cut else {})}
    try:
        place = file.seek(0, os.SEEK_END)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise cannot_keep(Path(file.name), error) from error
    return _Batch(answers, cut, place)


# ---- writing


def _choose(count: int, index: int, writing: Writing, once: bool) -> list[int]:
    """The prompts of a batch: consecutive entries of one shuffled pass after the other; in order where each is answered
    ``once``."""
    if once:
        return list(range(min(index * writing.batch, count), min((index + 1) * writing.batch, count)))
    return batch_indices(count, index, writing.batch, writing.seed)


def _write_batch(
    model: EarlyExitModel,
    prompts: Sequence[list[int]],
    writing: Writing,
    index: int,
    stopped: Callable[[], bool],
    room: int | None,
    report: Callable[[int], None],
) -> tuple[list[Answer], bool] | None:
    """Answer one batch, and whether it was cut where it had ``room`` tokens; None if ``stopped()`` while at it.
    ``report`` is told how many tokens there are by now, or without ``room`` how many answers are finished."""
    generator = torch.Generator().manual_seed((writing.seed * 1_000_003 + index) % (1 << 62))
    answers: list[list[int]] = [[] for _ in prompts]
    count, cut = 0, False
    for step in answer_steps(model, prompts, writing, generator):
        if stopped():
            return None
        for row, token in step:
            answers[row].append(token)
        count += len(step)
        report(len(prompts) - len(step) if room is None else count)
        if cut := room is not None and count >= room:
            break
    return [Answer([*p, *a], len(p)) for p, a in zip(prompts, answers, strict=True)], cut


@torch.no_grad()
def answer_steps(
    model: EarlyExitModel, prompts: Sequence[list[int]], writing: Writing, generator: torch.Generator
) -> Iterator[list[tuple[int, int]]]:
    """Decode a left-padded batch step by step: pairs (row, token) of the rows that are not finished. Finished rows
    leave the batch once a quarter of it is finished."""
    device = model.lm_head.weight.device
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    room = torch.tensor([writing.seq_len + 1 - len(p) for p in prompts])
    limit = min(int(room.max()), model.config.max_position_embeddings - width)
    past = RowsPast(width + limit)
    rows = list(range(len(prompts)))
    alive = [True] * len(prompts)
    depth = model.config.num_hidden_layers
    for length in range(1, limit + 1):
        hidden = model.taps(ids, [depth], attention_mask=mask, past=past)[depth].hidden[:, -1]
        past.advance(ids.shape[1])
        logits_BV = torch.nn.functional.linear(model.final_features(hidden), model.lm_head.weight)
        if not all(finite_rows(logits_BV)):
            raise UserError(
                "the model's final logits are not finite (NaN or infinity), so it can't write text; its weights are "
                f"damaged, or {writing.dtype} is too narrow for them: set data.self_dtype to 'float32'"
            )
        chosen = draw(logits_BV, writing.temperature, generator)
        tokens = chosen.tolist()
        step = [(row, token) for row, token, live in zip(rows, tokens, alive, strict=True) if live]
        yield step
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            alive[i] = alive[i] and token not in writing.stop_ids and length < int(room[row])
        if not any(alive):
            return
        ids, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if alive.count(False) * 4 >= len(alive):
            keep = torch.tensor([i for i, live in enumerate(alive) if live], device=device)
            ids, mask = ids[keep], mask[keep]
            past.keep(keep)
            rows = [row for row, live in zip(rows, alive, strict=True) if live]
            alive = [True] * len(rows)


def draw(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One id per row ``[B]``: the best one at temperature 0, else by inverting the distribution function."""
    if temperature == 0.0:
        return logits_BV.argmax(-1)
    wide = torch.promote_types(logits_BV.dtype, torch.float32)
    cdf_BV = torch.softmax(logits_BV.to(wide) / temperature, -1).cumsum(-1)
    u_B = torch.rand(len(cdf_BV), generator=generator, dtype=torch.float64).to(cdf_BV) * cdf_BV[:, -1]
    found = torch.searchsorted(cdf_BV, u_B[:, None], right=True)[:, 0]
    return found.clamp_(max=logits_BV.shape[-1] - 1)


class RowsPast:
    """A cache for the rows of a batch: preallocated, and rows may leave it."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.stored: dict[Any, tuple[Tensor, Tensor]] = {}

    def update(self, key: Any, key_BKTd: Tensor, value_BKTd: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions and return all, ``[B, KV, length + T, Dh]`` each."""
        if key not in self.stored:
            B, KV, _, Dh = key_BKTd.shape
            self.stored[key] = (
                key_BKTd.new_zeros(B, KV, self.capacity, Dh),
                value_BKTd.new_zeros(B, KV, self.capacity, value_BKTd.shape[-1]),
            )
        keys, values = self.stored[key]
        end = self.length + key_BKTd.shape[2]
        keys[:, :, self.length : end] = key_BKTd
        values[:, :, self.length : end] = value_BKTd
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, count: int) -> None:
        """Count ``count`` positions as stored."""
        self.length += count

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.stored = {key: (k[rows], v[rows]) for key, (k, v) in self.stored.items()}
