"""The text of one run: blocks to train on and to validate on, from files or written by the model itself.

Here the settings meet ``data.py`` and ``selftext.py``, which know nothing of them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exitlm.decode.kernels.packed import why_not_native
from exitlm.errors import UserError
from exitlm.model.config import ModelConfig
from exitlm.model.decoder import EarlyExitModel
from exitlm.progress import Progress
from exitlm.train.data import (
    Blocks,
    ByteTokenizer,
    TextTokenizer,
    Tokens,
    expand,
    hold_out,
    load_blocks,
    tokenise_all,
)
from exitlm.train.run import RunConfig
from exitlm.train.selftext import Answer, Writing, as_blocks, fitting, prompts_digest, read_prompts, write_answers
from exitlm.train.stream import Stream
from exitlm.weights.checkpoint import Checkpoint, load_tokenizer
from exitlm.weights.load import load_model


@dataclass(frozen=True)
class Corpus:
    """Training and held-out blocks; they share no document (no prompt), unless there is a single block. ``order`` says
    which block of ``train`` comes when, where the files have weights."""

    train: Blocks
    validation: Blocks
    order: Stream | None = None

    def digest(self) -> str:
        """What identifies the text."""
        return hashlib.sha256(f"{self.train.digest} {self.validation.digest}".encode()).hexdigest()


def open_tokens(config: RunConfig, opened: Checkpoint) -> Tokens:
    """The tokenizer that the settings name, else the base's own.

    Raises:
        UserError: there is none.
    """
    name = config.data.tokenizer
    if name == "bytes":
        return ByteTokenizer()
    found = load_tokenizer(Path(name)) if name else opened.tokenizer()
    if found is None:
        raise UserError(
            f"{opened.name} came without a tokenizer; give one with data.tokenizer (a directory, or 'bytes')"
        )
    return TextTokenizer(found)


def self_tokens(config: RunConfig) -> int | None:
    """N where the data is ``self:N``, or None where it is files.

    Raises:
        UserError: N is no positive number, or self text and files are mixed.
    """
    files = config.data.files
    own = [f for f in files if f.startswith("self:")]
    if not own:
        return None
    if len(files) > 1:
        raise UserError("self text and files don't mix in one run; give either self:N or files")
    digits = own[0].removeprefix("self:").replace("_", "")
    if not digits.isdecimal() or len(digits) > 15 or int(digits) < 1:
        raise UserError(f"'{own[0]}' must be self:N with a positive number of tokens, such as self:20000")
    return int(digits)


def corpus_of_files(config: RunConfig, opened: Checkpoint, tokens: Tokens, cache: Path) -> Corpus:
    """Tokenise and pack ``data.files``; validation is ``data.validation_files`` or held out."""
    d, vocab = config.data, opened.model_config.vocab_size
    expand([*d.files, *d.validation_files])  # complain about a missing file before reading any
    check_context(d.seq_len, opened.model_config)
    if d.weights:
        rows = rows_of_files(config, tokens, vocab, cache)
        read, count = rows.held
        validation = Blocks.joined(read.sources, read.digest).subset(range(count))
        return Corpus(Blocks.joined(rows.train.sources, rows.train.digest), validation, rows.train)
    blocks = load_blocks(d.files, tokens, vocab_size=vocab, seq_len=d.seq_len, cache=cache)
    if not d.validation_files:
        return Corpus(*hold_out(blocks, d.validation_sequences, config.train.seed))
    held = load_blocks(d.validation_files, tokens, vocab_size=vocab, seq_len=d.seq_len, cache=cache)
    return Corpus(blocks, held.subset(range(min(len(held), d.validation_sequences))))


@dataclass(frozen=True)
class RowsOfText:
    """What a run with all parameters reads: rows without end, and ``held``: those of held-out text, how many count."""

    train: Stream
    held: tuple[Stream, int]


def rows_of_files(config: RunConfig, tokens: Tokens, vocab_size: int, cache: Path) -> RowsOfText:
    """Tokenise and pack ``data.files``, each a source of its own where they have weights; validation is as in
    :func:`corpus_of_files`."""
    d, seed = config.data, config.train.seed
    options: dict[str, Any] = {"vocab_size": vocab_size, "seq_len": d.seq_len, "cache": cache}
    tokenise_all(expand([*d.files, *d.validation_files]), tokens, vocab_size=vocab_size, cache=cache)
    sources = [load_blocks(names, tokens, **options) for names in ([[f] for f in d.files] if d.weights else [d.files])]
    if d.validation_files:
        held = [load_blocks(d.validation_files, tokens, **options)]
    else:
        share = -(-d.validation_sequences // len(sources))
        both = [hold_out(blocks, share, seed) for blocks in sources]
        sources, held = [train for train, _ in both], [validation for _, validation in both]
    train = Stream(sources, seq_len=d.seq_len, seed=seed, weights=d.weights)
    validation = Stream(held, seq_len=d.seq_len, seed=seed, shuffle=False)
    return RowsOfText(train, (validation, min(len(validation), d.validation_sequences)))


def corpus_of_answers(
    config: RunConfig,
    opened: Checkpoint,
    tokens: Tokens,
    model: EarlyExitModel,
    cache: Path,
    stopped: Callable[[], bool],
) -> Corpus | None:
    """Let the model answer prompts: sampled for training, greedily and other prompts for validation. None if
    ``stopped()`` before the end; what was written by then is kept in ``cache``."""
    d, count = config.data, self_tokens(config)
    check_context(d.seq_len, opened.model_config)
    sets = read_prompts(d.prompts, d.validation_sequences)
    train, held = (fitting([tokens.prompt(text) for text in texts], d.seq_len) for texts in sets)
    vocab, highest = opened.model_config.vocab_size, max(max(prompt) for prompt in [*train, *held])
    if highest >= vocab:
        raise UserError(
            f"the tokenizer gives token id {highest}, but the model's vocabulary has {vocab} tokens; "
            "use the tokenizer that belongs to the model"
        )
    stop_ids = {*opened.model_config.eos_token_ids, *([] if tokens.eos_id is None else [tokens.eos_id])}
    dtype = getattr(torch, d.self_dtype)
    writing = Writing(
        base=opened.digest(),
        prompts=prompts_digest(train),
        seq_len=d.seq_len,
        temperature=d.self_temperature,
        batch=max(1, min(d.self_batch, 2 * (count or 1) // d.seq_len)),  # few tokens make few answers, not short ones
        seed=config.train.seed,
        dtype=d.self_dtype,
        stop_ids=tuple(sorted(stop_ids)),
        kernels="torch" if why_not_native(opened.model_config, model.device, dtype) else "native",
    )
    greedy = replace(writing, prompts=prompts_digest(held), temperature=0.0, seed=0, batch=d.self_batch)
    writer = _Writer(opened, model, dtype)
    sampled = _shown("the model writes text", train, writing, count, writer, cache, stopped)
    answered = [] if stopped() else _shown("it answers held-out prompts", held, greedy, None, writer, cache, stopped)
    return None if stopped() else Corpus(as_blocks(sampled), as_blocks(answered))


class _Writer:
    """The model in the dtype of the writing, loaded when it is first needed."""

    def __init__(self, opened: Checkpoint, model: EarlyExitModel, dtype: torch.dtype) -> None:
        self.opened, self.model, self.dtype = opened, model, dtype

    def __call__(self) -> EarlyExitModel:
        if self.model.dtype != self.dtype:
            self.model = load_model(self.opened, dtype=self.dtype, device=self.model.device)
        return self.model


def _shown(
    title: str,
    prompts: list[list[int]],
    writing: Writing,
    count: int | None,
    writer: _Writer,
    cache: Path,
    stopped: Callable[[], bool],
) -> list[Answer]:
    """:func:`write_answers` with a progress bar, if anything has to be written."""
    bar: Progress | None = None
    began, first = time.perf_counter(), 0

    def report(done: int, total: int) -> None:
        nonlocal bar, began, first
        if bar is None:
            bar, began, first = Progress(title, total), time.perf_counter(), done
        rate = (done - first) / max(1e-9, time.perf_counter() - began)
        bar.update(min(done, total), f"{rate:,.0f} tok/s" if count is not None and done > first else "")

    try:
        vocab_size = writer.opened.model_config.vocab_size
        options: dict[str, Any] = {"vocab_size": vocab_size, "cache": cache, "report": report, "stopped": stopped}
        return list(write_answers(writer, prompts, writing, tokens=count, **options))
    finally:
        if bar is not None:
            bar.close()


def check_context(seq_len: int, config: ModelConfig) -> None:
    """Refuse sequences longer than the model's context."""
    longest = config.max_position_embeddings
    if seq_len > longest:
        raise UserError(f"data.seq_len is {seq_len}, but the model's context has {longest} positions; lower it")
