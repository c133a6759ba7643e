"""Training text: files to tokens, tokens to blocks, and the order in which blocks are visited.

A file is tokenised once, several at a time, into a shard in the cache (:mod:`exitlm.train.shard`); packing cuts the
documents into blocks of ``seq_len`` positions. A block holds pieces of one or several documents, and each piece is a
sequence of its own to the model (no attention across documents). The order here is that of tuning, a pure function of
seed and step; that of full training is :mod:`exitlm.train.stream`. Text that the model writes itself is
:mod:`exitlm.train.selftext`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exitlm.errors import UserError
from exitlm.train.shard import META, OFFSETS, TOKENS, Shard, Tokenised, allow_open_files, publish
from exitlm.train.texts import packaged
from exitlm.weights.checkpoint import chat_text
from exitlm.weights.store import kept_digest

FORMAT = 2
PIECE_CHARS = 1 << 18
BATCH_CHARS = 1 << 22
LEAST_PIECE = 8
MOST_THREADS = 8
REMEDY = "put it right, or name another tokenizer with data.tokenizer"
PROBE = "A probe: 12.5 words,\n\tdéjà vu  "


@dataclass(frozen=True)
class Segment:
    """``ids`` [n+1]: the first n are the model's input, the last n what they predict; those from ``first`` on count."""

    ids: Tensor
    first: int

    @property
    def targets(self) -> int:
        """How many positions count."""
        return len(self.ids) - 1 - self.first


class Tokens(Protocol):
    """What turns text into ids: :class:`ByteTokenizer`, or :class:`TextTokenizer` around one of ``transformers``."""

    eos_id: int | None
    size: int
    digest: str
    prefix: list[int]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without ``prefix``, which begins every document."""
        ...

    def arrays(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The same as arrays of any unsigned type; several threads call it at once."""
        ...

    def prompt(self, text: str) -> list[int]:
        """The ids of a question to the model, up to where its answer begins."""
        ...

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The text of a conversation."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, and 256 at the end of a document."""

    eos_id: int | None = 256
    size = 257
    digest = "bytes"

    def __init__(self) -> None:
        self.prefix: list[int] = []

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The bytes of each text."""
        return [list(text.encode("utf-8")) for text in texts]

    def arrays(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The bytes of each text, without a Python number for each."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def prompt(self, text: str) -> list[int]:
        """The text and a line end."""
        return list(f"{text}\n".encode())

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """One line for each message."""
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages)


class TextTokenizer:
    """A ``transformers`` tokenizer; the fast ones encode a batch on all cores."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos_id: int | None = tokenizer.eos_token_id
        self.size: int = len(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
        self.digest: str = hashlib.sha256(f"{text}{tokenizer.chat_template}".encode()).hexdigest()
        whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
        self.prefix: list[int] = next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])
        self._backend: Any = None  # which encodes in half the time, but not what a class does before it in Python
        if backend is not None:
            probed = backend.encode_batch_fast([PROBE], add_special_tokens=False)[0].ids
            self._backend = backend if probed == self.encode_batch([PROBE])[0] else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without the special tokens that the tokenizer puts around it."""
        if self._backend is not None:
            return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def arrays(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The same as arrays."""
        return [np.array(ids, dtype=np.uint32) for ids in self.encode_batch(texts)]

    def prompt(self, text: str) -> list[int]:
        """The text as a user's message in the chat template, or as it is where there is none."""
        if not self.tokenizer.chat_template:
            return self.prefix + self.encode_batch([text])[0]
        message = [{"role": "user", "content": text}]
        return self.encode_batch([chat_text(self.tokenizer, message, answer=True, remedy=REMEDY)])[0]

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation in the tokenizer's chat template."""
        if not self.tokenizer.chat_template:
            raise UserError('the data holds "messages", but the tokenizer has no chat template; give plain "text"')
        return chat_text(self.tokenizer, messages, answer=False, remedy=REMEDY)


class Blocks:
    """A list of blocks over shards of tokens. ``segments`` [S, 4] holds (shard, start, stop, first), ``bounds`` [n+1]
    cuts it into blocks; ``stop - start`` is one more than the positions."""

    def __init__(
        self,
        shards: Sequence[NDArray[Any] | Shard],
        segments: NDArray[np.int64],
        bounds: NDArray[np.int64],
        digest: str,
    ) -> None:
        self.shards, self.segments, self.bounds, self.digest = list(shards), segments, bounds, digest

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> list[Segment]:
        out = []
        for shard, start, stop, first in self.segments[self.bounds[index] : self.bounds[index + 1]].tolist():
            ids = np.asarray(self.shards[shard][start:stop], dtype=np.int64)
            out.append(Segment(torch.from_numpy(ids), first))
        return out

    def targets(self, index: int) -> int:
        """How many positions of a block count."""
        rows = self.segments[self.bounds[index] : self.bounds[index + 1]]
        return int((rows[:, 2] - rows[:, 1] - 1 - rows[:, 3]).sum())

    def total_targets(self) -> int:
        """How many positions count in all."""
        rows = self.segments
        return int((rows[:, 2] - rows[:, 1] - 1 - rows[:, 3]).sum())

    def longest(self) -> int:
        """How many positions the longest block has."""
        ends = np.concatenate([[0], np.cumsum(self.segments[:, 2] - self.segments[:, 1] - 1)])[self.bounds]
        return int(np.diff(ends).max(initial=0))

    def subset(self, indices: Sequence[int]) -> Blocks:
        """The blocks at ``indices``, in that order."""
        parts = [self.segments[self.bounds[i] : self.bounds[i + 1]] for i in indices]
        sizes = np.array([0, *(len(p) for p in parts)], dtype=np.int64)
        segments = np.concatenate(parts) if parts else self.segments[:0]
        label = hashlib.sha256(f"{self.digest}{list(indices)}".encode()).hexdigest()
        return Blocks(self.shards, segments, sizes.cumsum(), label)

    @staticmethod
    def joined(parts: Sequence[Blocks], digest: str) -> Blocks:
        """The blocks of all ``parts``, one after the other."""
        shards: list[NDArray[Any] | Shard] = []
        segments, bounds, count = [], [np.zeros(1, dtype=np.int64)], 0
        for part in parts:
            segments.append(part.segments + np.array([len(shards), 0, 0, 0]))
            bounds.append(part.bounds[1:] + count)
            shards += part.shards
            count += len(part.segments)
        return Blocks(shards, np.concatenate(segments), np.concatenate(bounds), digest)

    def counts(self, vocab_size: int) -> Tensor:
        """How often each id is a target, ``[V]``."""
        total = np.zeros(vocab_size, dtype=np.int64)
        for shard, start, stop, first in self.segments.tolist():
            total += np.bincount(self.shards[shard][start + 1 + first : stop], minlength=vocab_size)
        return torch.from_numpy(total)


def batch_indices(count: int, step: int, size: int, seed: int) -> list[int]:
    """The blocks of optimizer step ``step``: consecutive entries of one shuffled pass over ``count`` blocks after the
    other. A pure function, so that any step can be resumed."""
    out: list[int] = []
    order: tuple[int, NDArray[np.int64]] | None = None
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, count)
        if order is None or order[0] != epoch:
            order = (epoch, np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count))
        out.append(int(order[1][place]))
    return out


def hold_out(blocks: Blocks, count: int, seed: int) -> tuple[Blocks, Blocks]:
    """Split into training and validation blocks: at most ``count`` and a tenth of all, at least one."""
    if len(blocks) < 2:
        return blocks, blocks
    held = max(1, min(count, len(blocks) // 10))
    order = np.random.Generator(np.random.PCG64([seed, 1 << 40])).permutation(len(blocks))
    return blocks.subset(sorted(order[held:].tolist())), blocks.subset(sorted(order[:held].tolist()))


def load_blocks(files: Sequence[str], tokens: Tokens, *, vocab_size: int, seq_len: int, cache: Path) -> Blocks:
    """Tokenise (or take from ``cache``) and pack ``files``.

    Raises:
        UserError: a file that is missing, empty, binary or malformed; a tokenizer with ids beyond ``vocab_size``.
    """
    shards: list[Shard] = []
    pieces: list[NDArray[np.int64]] = []
    bounds: list[NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
    digest = hashlib.sha256(f"{FORMAT} {seq_len}".encode())
    count = 0
    for shard, offsets, name in tokenise_all(expand(files), tokens, vocab_size=vocab_size, cache=cache):
        digest.update(name.encode())
        segments, cuts = pack(offsets, seq_len)
        pieces.append(np.insert(segments, 0, len(shards), axis=1))
        bounds.append(cuts[1:] + count)
        count += len(segments)
        shards.append(shard)
    if count == 0:
        raise UserError(f"{', '.join(files)} hold too little text to train on: no document has two tokens")
    return Blocks(shards, np.concatenate(pieces), np.concatenate(bounds), digest.hexdigest())


def pack(offsets: NDArray[np.int64], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut documents (``offsets`` [d+1] into a shard) into blocks of at most ``seq_len`` positions: segments [S, 3] of
    (start, stop, first = 0) and block bounds. Every token but the first of a document is predicted exactly once; a
    document is not split for the sake of a rest of fewer than ``LEAST_PIECE`` positions."""
    segments: list[tuple[int, int, int]] = []
    bounds = [0]
    space = seq_len
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        position = start
        while (left := stop - 1 - position) > 0:
            if space < seq_len and space < min(left, LEAST_PIECE):
                bounds.append(len(segments))
                space = seq_len
            take = min(space, left)
            segments.append((position, position + take + 1, 0))
            position += take
            space -= take
            if space == 0:
                bounds.append(len(segments))
                space = seq_len
    if bounds[-1] != len(segments):
        bounds.append(len(segments))
    return np.array(segments, dtype=np.int64).reshape(-1, 3), np.array(bounds, dtype=np.int64)


def tokenise_all(paths: Sequence[Path], tokens: Tokens, *, vocab_size: int, cache: Path) -> list[Tokenised]:
    """:func:`tokenise` of each, several at once in threads: tokenizers of ``transformers``, hashing and writing leave
    Python to the others. The first error ends all."""
    allow_open_files(len(paths))
    workers = min(len(paths), os.cpu_count() or 1, MOST_THREADS)
    if workers < 2:
        return [tokenise(path, tokens, vocab_size=vocab_size, cache=cache) for path in paths]
    halt = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        one = partial(tokenise, tokens=tokens, vocab_size=vocab_size, cache=cache, stopped=halt.is_set)
        jobs = [pool.submit(one, path) for path in paths]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            halt.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [job.result() for job in jobs]


def tokenise(
    path: Path, tokens: Tokens, *, vocab_size: int, cache: Path, stopped: Callable[[], bool] = lambda: False
) -> Tokenised:
    """The shard of one file, the offsets of its documents, and the digest of both: from the cache, or written there by
    one process while the others wait."""
    key = hashlib.sha256(f"{FORMAT} {tokens.digest} {vocab_size} {_file_digest(path)}".encode()).hexdigest()[:32]
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)

    def write(home: Path) -> None:
        _write_shard(path, tokens, vocab_size, home, dtype, stopped)

    return publish(cache / "tokens" / key, dtype, write, stopped)


def _write_shard(
    path: Path, tokens: Tokens, vocab_size: int, home: Path, dtype: np.dtype[Any], stopped: Callable[[], bool]
) -> None:
    digest, offsets, length = hashlib.sha256(), [0], 0
    last: int | None = None
    with (home / TOKENS).open("wb") as out:
        for texts, ends in _batches(documents(path, tokens)):
            if stopped():
                raise CancelledError
            parts: list[NDArray[Any] | list[int]] = [[]]
            for ids, end in zip(tokens.arrays(texts), ends, strict=True):
                if len(ids):
                    if length == offsets[-1] and ids[: len(tokens.prefix)].tolist() != tokens.prefix:
                        parts.append(tokens.prefix)
                        length += len(tokens.prefix)
                    parts.append(ids)
                    length, last = length + len(ids), int(ids[-1])
                if end and tokens.eos_id is not None and tokens.eos_id != last and length > offsets[-1]:
                    parts.append([tokens.eos_id])
                    length += 1
                if end:
                    offsets.append(length)
            flat = np.concatenate(parts, dtype=np.uint32, casting="unsafe")
            if (highest := int(flat.max(initial=0))) >= vocab_size:
                raise UserError(
                    f"the tokenizer gives token id {highest}, but the model's vocabulary has {vocab_size} tokens; "
                    "use the tokenizer that belongs to the model"
                )
            data = flat.astype(dtype).tobytes()
            out.write(data)
            digest.update(data)
    if length == 0:
        raise UserError(f"{path} is empty: it holds no text to train on")
    np.save(home / OFFSETS, np.array(offsets, dtype=np.int64))
    digest.update(np.array(offsets, dtype=np.int64).tobytes())
    (home / META).write_text(json.dumps({"digest": digest.hexdigest(), "tokens": length, "source": str(path)}))


def _batches(pieces: Iterator[tuple[str, bool]]) -> Iterator[tuple[list[str], list[bool]]]:
    texts: list[str] = []
    ends: list[bool] = []
    size = 0
    for text, end in pieces:
        texts.append(text)
        ends.append(end)
        size += len(text)
        if size >= BATCH_CHARS:
            yield texts, ends
            texts, ends, size = [], [], 0
    if texts:
        yield texts, ends


# ---- files


def expand(files: Sequence[str]) -> list[Path]:
    """The paths that names and globs stand for, in the given order; those of one glob sorted by name. packaged:NAME is
    a text that comes with exitlm."""
    out: list[Path] = []
    for name in files:
        if name.startswith("packaged:"):
            name = str(packaged(name.removeprefix("packaged:")))
        found = [] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        out += [_present(path) for path in found or [name]]
    return out


def _present(name: str) -> Path:
    try:
        mode = os.stat(name).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"the data file {name} does not exist; check the path (self:100000 lets the model write text)"
        ) from error
    except OSError as error:
        raise UserError(f"the data file {name} cannot be read: {error.strerror}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"the data file {name} is a pipe or a device, which can't be read twice; save its text first")
    if stat.S_ISDIR(mode):
        _check_dataset(Path(name))  # before all in it is read
    return Path(name)


def documents(path: Path, tokens: Tokens) -> Iterator[tuple[str, bool]]:
    """Pieces of text in order, each with whether a document ends with it. Only plain text files are split in pieces."""
    if path.is_dir():
        yield from ((_text_of(row, f"{path}, row {i}", tokens), True) for i, row in enumerate(_dataset_rows(path)))
    elif path.suffix == ".parquet":
        yield from ((_text_of(row, f"{path}, row {i}", tokens), True) for i, row in enumerate(_parquet_rows(path)))
    elif path.suffix in (".jsonl", ".ndjson", ".json"):
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: not a JSON object ({error.msg})") from error
                yield _text_of(row, f"{path}, line {number}", tokens), True
    else:
        yield from _text_pieces(path)


def _text_pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """One document, cut after line ends where it is long."""
    held, size = [], 0
    for line in _lines(path):
        held.append(line)
        size += len(line)
        if size >= PIECE_CHARS:
            yield "".join(held), False
            held, size = [], 0
    yield "".join(held), True


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as handle:
            for line in handle:
                if "\0" in line:
                    raise UserError(f"{path} is a binary file, not text; give text, JSONL or Parquet")
                yield line
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is a binary file, not UTF-8 text; give text, JSONL or Parquet") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _text_of(row: Any, where: str, tokens: Tokens) -> str:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        messages = row["messages"]
        if all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            return tokens.chat(messages)
        raise UserError(f'{where}: each of the "messages" must have a "role" and a "content"')
    raise UserError(f'{where}: expected a "text" field (a string) or "messages" (a list)')


def _check_dataset(path: Path) -> None:
    if not ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        raise UserError(
            f"{path} is a directory, but no Hugging Face dataset; name its files, or a glob such as {path}/*.txt"
        )


def _dataset_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path}: reading a Hugging Face dataset needs 'pip install datasets'") from error
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no dataset that can be loaded: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        data = data["train"] if "train" in data else next(iter(data.values()))
    yield from data


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs 'pip install datasets'") from error
    try:
        file = parquet.ParquetFile(path)
        columns = [c for c in ("text", "messages") if c in file.schema_arrow.names]
        if not columns:
            raise UserError(f'{path} has no column "text" or "messages"; it has: {", ".join(file.schema_arrow.names)}')
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file that can be read: {error}") from error


def _file_digest(path: Path) -> str:
    """sha256 of a file, or of a dataset directory's files with their names; kept while they stay as they are."""
    folder = path.is_dir()
    parts = [part for part in sorted(path.rglob("*")) if part.is_file()] if folder else [path]

    def compute() -> str:
        digest = hashlib.sha256()
        for part in parts:
            if folder:
                digest.update(str(part.relative_to(path)).encode())
            try:
                with part.open("rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
            except OSError as error:
                raise UserError(f"{part} cannot be read: {error.strerror}") from error
        return digest.hexdigest()

    return kept_digest(parts, f"text {path}", compute) + path.suffix
