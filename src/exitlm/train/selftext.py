"""Text that the model writes itself: answers to prompts, sampled in batches, kept in a file that survives a kill.

Exits tuned on it agree with the final head more often than exits tuned on documents, since it is what decoding visits.
Each answer has a seed of its own, from the run's seed and the answer's number. Each batch is appended to the file with
an fsync; a killed run goes on with the next batch and ends with the same file.
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

from exitlm.decode.engine import Engine
from exitlm.decode.generation import GenerationConfig
from exitlm.decode.options import MAX_ROWS, EngineConfig
from exitlm.errors import UserError
from exitlm.model.decoder import EarlyExitModel
from exitlm.train.data import Blocks, batch_indices
from exitlm.weights.store import cannot_keep

FORMAT = 2
LEAST_ANSWER = 16


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How answers are written: prompt and answer together have at most ``seq_len + 1`` tokens; temperature 0 is greedy;
    ``prompts`` is a digest of the encoded prompts, ``base`` of the weights; ``kernels`` says whose arithmetic it is."""

    base: str
    prompts: str
    seq_len: int
    temperature: float
    batch: int
    seed: int
    dtype: str
    stop_ids: tuple[int, ...]
    kernels: str = "torch"
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
        engine: Engine | None = None
        done = index = 0
        written = _read_batches(file, chosen, writing.seq_len + 1, vocab_size)
        while done < total:
            room = None if tokens is None else total - done
            if room is not None and index < len(written) and written[index].cut and written[index].tokens < room:
                file.truncate(written.pop().place)  # it was cut for fewer tokens
            if index == len(written):
                engine = engine or _engine(model(), writing)
                found = _write_batch(engine, chosen(index), writing, index, stopped, room, shown)
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
    engine: Engine,
    prompts: Sequence[list[int]],
    writing: Writing,
    index: int,
    stopped: Callable[[], bool],
    room: int | None,
    report: Callable[[int], None],
) -> tuple[list[Answer], bool] | None:
    """Answer one batch, and whether it was cut where it had ``room`` tokens; None if ``stopped()`` while at it.
    ``report`` is told how many tokens there are by now, or without ``room`` how many answers are finished."""
    longest = min(writing.seq_len + 1, engine.config.max_position_embeddings)
    rows = {
        engine.add(prompt, _settings(writing, index * writing.batch + row, longest - len(prompt))): row
        for row, prompt in enumerate(prompts)
    }
    answers: list[list[int]] = [[] for _ in prompts]
    running, cut = dict(rows), False
    try:
        while running and not cut:
            if stopped():
                return None
            finished = len(prompts) - len(running)
            for event in engine.step():
                if event.error is not None:
                    raise UserError(
                        f"the model can't write text ({event.error}); where data.self_dtype is too narrow for its "
                        "weights, set it to 'float32'"
                    ) from event.error
                if event.piece is not None:
                    answers[rows[event.key]] += event.piece.token_ids
                if event.last:
                    running.pop(event.key)
            report(finished if room is None else sum(map(len, answers)))
            if room is not None and running:  # all unfinished ones have come as far as the shortest of them
                least = min(len(answers[row]) for row in running.values())
                cut = sum(min(len(answer), least) for answer in answers) >= room
    finally:
        for key in running:
            engine.abort(key)
    found = [Answer([*p, *a], len(p)) for p, a in zip(prompts, answers, strict=True)]
    if room is None or sum(map(len, answers)) < room:
        return found, False
    kept = first_tokens(found, room)
    return kept, kept != found or cut


def _settings(writing: Writing, number: int, room: int) -> GenerationConfig:
    """How the answer of this number is written: by a seed of its own, so that a prompt asked twice has two answers."""
    seed = hashlib.sha256(f"{writing.seed} {number}".encode()).digest()[:8]
    return GenerationConfig(
        mode="full", temperature=writing.temperature, seed=int.from_bytes(seed) >> 1, max_new_tokens=room,
        stop_token_ids=writing.stop_ids,
    )  # fmt: skip


def _engine(model: EarlyExitModel, writing: Writing) -> Engine:
    """What writes: every answer as if it were alone, where its kernels are exact."""
    rows = max(MAX_ROWS, writing.batch)
    return Engine(model, options=EngineConfig(max_sequences=writing.batch, max_rows=rows))
