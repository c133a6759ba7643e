"""A model's files, opened but not read: configuration, tensors that are mapped on demand, tokenizer, digest.

A checkpoint is a Hugging Face directory with safetensors; a GGUF file becomes one first (``gguf.py``). Weights in
pickle files are never opened. Not here: building a model from it (``load.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from exitlm.errors import UserError, nearest, short
from exitlm.model import ModelConfig
from exitlm.model.config import token_ids
from exitlm.values import number, wrong
from exitlm.weights import gguf
from exitlm.weights.source import display_name, resolve
from exitlm.weights.store import kept_digest
from exitlm.weights.tensorfile import DTYPES, Entry, damaged, digest_of_entries, open_file, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEAD = "lm_head.weight"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Prefixes under which a text model lies within the checkpoint of a larger one.
_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
# Classes that take tokenizer.json as it is (the second is transformers 5's name of the first).
_GENERIC = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
# Bytes of tables: the largest of settings, those of tokenizers, have 2 MB, and the index of 140,000 tensors 15 MB.
_MAX_TABLE, _MAX_INDEX = 1 << 23, 1 << 25


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a directory, a ``.gguf`` file (converted on first use), a hub id or a packaged name.

    Raises:
        UserError: there is no such model, or its files are damaged, incomplete or of a kind that is not read.
    """
    path = resolve(source)
    if path.is_dir():
        return Checkpoint(path, display_name(source))
    if path.suffix in _PICKLES:
        raise _is_pickle(path)
    return Checkpoint(gguf.converted(path), display_name(source), path)


class Checkpoint:
    """The checkpoint in ``directory``. ``config`` is the content of its config.json, ``name`` what to call the model,
    ``entries`` says by HF name where each tensor lies (a head that is tied to the embedding may be among them).
    ``source`` is the GGUF file that the directory was converted from."""

    def __init__(self, directory: Path, name: str, source: Path | None = None) -> None:
        self.directory, self.name, self.source = directory, name, source
        if not (directory / "config.json").is_file():
            raise _no_model(directory)
        self.config = read_json(directory / "config.json")
        self.entries = _entries(directory)
        self._files: dict[Path, Any] = {}

    @functools.cached_property
    def model_config(self) -> ModelConfig:
        """The configuration as the model's maths reads it. A text also ends at the ids of generation_config.json, where
        many chat models name the end of a turn."""
        found = ModelConfig.from_hf(self.config)
        path = self.directory / "generation_config.json"
        if not path.is_file():
            return found
        more = token_ids(read_json(path), "eos_token_id", found.vocab_size)
        return dataclasses.replace(found, eos_token_ids=tuple(dict.fromkeys((*found.eos_token_ids, *more))))

    def names(self) -> list[str]:
        """The HF names of the tensors, sorted, without a head that is tied to the embedding."""
        tied = self.model_config.tie_word_embeddings
        return sorted(name for name in self.entries if not (tied and name == HEAD))

    def tensor(self, name: str) -> Tensor:
        """A tensor in the checkpoint's dtype. It is mapped: its bytes are read when first used, writes stay private."""
        entry = self.entries[name]
        if entry.file not in self._files:
            self._files[entry.file] = open_file(entry.file)
        tensor: Tensor = self._files[entry.file].get_tensor(entry.name)
        return tensor

    @property
    def dtype(self) -> torch.dtype:
        """What the configuration says the weights are, or else what most of their bytes are.

        Raises:
            UserError: the configuration names a type that exitlm does not compute in.
        """
        nested = self.config.get("text_config")
        tables = [self.config, nested] if isinstance(nested, dict) else [self.config]
        for said in (table.get(key) for table in tables for key in ("dtype", "torch_dtype")):
            if said is not None and str(said).removeprefix("torch.") not in FLOATS:
                raise UserError(
                    f"{self.directory / 'config.json'} says that the weights are {short(said)}, which exitlm does not "
                    f"compute in; choose a checkpoint in one of {', '.join(FLOATS)}, or load this one with such a dtype"
                )
            if said is not None:
                return dtype_of(said)
        sizes: Counter[torch.dtype] = Counter()
        for entry in self.entries.values():
            sizes[DTYPES[entry.dtype]] += entry.end - entry.start
        return max(FLOATS.values(), key=lambda dtype: sizes[dtype])

    def digest(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of each of the ``names()``; kept while the files are the same."""
        recorded = gguf.recorded_digest(self.directory)
        if recorded is not None:
            return recorded
        chosen = {name: self.entries[name] for name in self.names()}
        files = sorted({entry.file for entry in chosen.values()})
        label = "tensors " + ",".join(f"{name}@{entry.file.name}" for name, entry in sorted(chosen.items()))
        return kept_digest(files, label, lambda: digest_of_entries(chosen))

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer with its chat template, or None if the checkpoint has none.

        Raises:
            UserError: it is damaged or not supported, or has tokens that the model does not.
        """
        return self._tokenizer

    @functools.cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase | None:
        if problem := gguf.tokenizer_problem(self.directory):
            raise UserError(f"{self.name}: {problem}")
        if not any((self.directory / file).is_file() for file in TOKENIZER_FILES):
            return None
        tokenizer = load_tokenizer(self.directory)
        check_vocabulary(tokenizer, self.model_config.vocab_size, self.name)
        return tokenizer


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """The floating-point type of a name such as ``float32``."""
    if not isinstance(name, str | torch.dtype):
        raise wrong("dtype", name, f"one of {', '.join(FLOATS)}")
    said = str(name).removeprefix("torch.")
    if said not in FLOATS:
        raise UserError(f"unknown dtype {said!r}; use one of {', '.join(FLOATS)}{nearest(said, FLOATS)}")
    return FLOATS[said]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory, without its code and without a network."""
    settings = directory / "tokenizer_config.json"
    generic = (directory / "tokenizer.json").is_file() and (
        not settings.is_file() or read_json(settings).get("tokenizer_class") in _GENERIC
    )
    try:
        if generic:  # faster to import, and takes the file as it is
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        number(tokenizer.model_max_length, "model_max_length")  # which nothing looks at before a text is encoded
        tokenizer.decode(tokenizer("a")["input_ids"])
    except Exception as error:  # the libraries raise nearly every type
        raise UserError(
            f"the tokenizer in {directory} can't be loaded ({_reason(error)}); give another one, or token ids for text"
        ) from error
    return cast("PreTrainedTokenizerBase", tokenizer)


def chat_text(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    answer: bool,
    remedy: str,
    tools: Sequence[dict[str, Any]] | None = None,
) -> str:
    """The text of a conversation in the tokenizer's chat template, up to where an ``answer`` begins.

    ``tools``: JSON schemas of functions that the answer may call, in the shape of OpenAI's.

    Raises:
        UserError: the template can't be used; ``remedy`` is what to do then.
    """
    try:
        shown = None if tools is None else list(tools)
        return str(
            tokenizer.apply_chat_template(list(messages), tools=shown, tokenize=False, add_generation_prompt=answer)
        )
    except Exception as error:  # a template is a program: it can raise anything
        raise UserError(f"this model's chat template can't be used ({_reason(error)}); {remedy}") from error


def _reason(error: Exception) -> str:
    """The first line of what a library complains of."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, name: str) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    Special tokens beyond the vocabulary that nothing puts into a text by itself (Gemma 3's image token) are a warning.
    """
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= vocab_size}
    if not beyond:
        return
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    template = str(getattr(tokenizer, "chat_template", None) or "")
    needed = sorted(token for token in beyond if token not in special or token in named or token in template)
    if needed:
        raise UserError(
            f"the tokenizer of {name} does not fit its model: token '{needed[0]}' has id {beyond[needed[0]]}, but the "
            f"model has {vocab_size} tokens; use the tokenizer that belongs to this model"
        )
    first = min(beyond, key=lambda token: beyond[token])
    warnings.warn(
        f"the tokenizer of {name} has {len(beyond)} special token(s) from id {beyond[first]} ('{first}') on that the "
        f"model of {vocab_size} tokens does not know; keep them out of prompts",
        stacklevel=2,
    )


def read_json(path: Path, largest: int = _MAX_TABLE) -> dict[str, Any]:
    """The table in a JSON file of at most ``largest`` bytes. Anything else in it is a UserError."""
    try:
        with path.open("rb") as file:
            text = file.read(largest + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(text) > largest:
        raise UserError(f"{path} has more than the {largest} bytes that such a table needs; choose another file")
    try:
        found = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, "it is no JSON") from error
    if not isinstance(found, dict):
        raise damaged(path, "it holds no table")
    return found


def _entries(directory: Path) -> dict[str, Entry]:
    """Where each tensor lies, by HF name, from the index or the single file."""
    if (directory / INDEX).is_file():
        mapping = read_json(directory / INDEX, _MAX_INDEX).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise damaged(directory / INDEX, "it has no weight_map")
        headers = {}
        for file in sorted({str(file) for file in mapping.values()}):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(
                    f"{directory / INDEX} names '{file}', which is not a safetensors file beside it; do not trust it"
                )
            if not (directory / file).is_file():
                raise UserError(f"{directory} lacks {file}, which its index names; download or copy it again")
            headers[file] = read_header(directory / file)[0]
        found = {}
        for name, file in mapping.items():
            if name not in headers[file]:
                raise UserError(f"{directory / file} lacks the tensor '{name}', which the index places there")
            found[name] = headers[file][name]
    elif (directory / SINGLE).is_file():
        found = read_header(directory / SINGLE)[0]
    else:
        raise _no_weights(directory)
    return _plain_names(found)


def _plain_names(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Names without the prefixes of a larger model, and without the buffers that old checkpoints carry."""
    plain: dict[str, Entry] = {}
    for name, entry in entries.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        for prefix, replacement in _PREFIXES:
            if name.startswith(prefix):
                name = replacement + name.removeprefix(prefix)
                break
        plain[name] = entry
    return plain


def _no_model(directory: Path) -> UserError:
    if (directory / "exits.json").is_file():
        return UserError(f"{directory} holds exits, not a model; load its base with --adapter {directory}")
    return UserError(
        f"{directory} is not a model: it has no config.json; give the directory that has it, or a .gguf file"
    )


def _no_weights(directory: Path) -> UserError:
    pickles = sorted(
        file for file in directory.iterdir() if file.suffix in _PICKLES and not file.name.startswith("training_args")
    )
    if pickles:
        return _is_pickle(pickles[0])
    return UserError(f"{directory} has a config.json but no weights ({SINGLE} or {INDEX}); download or copy it again")


def _is_pickle(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which can run code and is never read; save the model as safetensors: "
        "transformers' save_pretrained does"
    )
