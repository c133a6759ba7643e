"""The tokenizer of a GGUF file, rebuilt as a ``tokenizer.json`` for the ``tokenizers`` library.

A GGUF holds a vocabulary, merges or scores, and the *name* of a pre-tokenizer; how text is cut before merging is code
in llama.cpp and therefore a table here. Two models exist among the supported architectures:

* ``gpt2``: byte-level BPE with explicit merges.
* ``llama``: SentencePiece BPE with byte fallback. It has no merges but a score per piece: the adjacent pair whose union
  scores highest is joined first, so the merges are all cuts of each piece into two pieces, best score first.

Both: pieces of type *control* are special tokens, *user-defined* ones are matched whole in the text before all else.
Sources: llama.cpp (src/llama-vocab.cpp, convert_hf_to_gguf.py) and the tokenizer.json of the families named below.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitlm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = "\u2581"
_MAX_CUT_CHARACTERS = 1 << 28  # of all cuts of all pieces, in seconds; the 262,144 of Gemma 3 have some 2**24

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """How byte-level BPE cuts text. ``split``: the pattern of the pieces (None: GPT-2's); ``digits``: one by one before
    that; ``whole``: a piece that is in the vocabulary is not merged but taken; ``bos``: added unless the file says."""

    split: str | None = None
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    bos: bool = False


_LLAMA3 = _Cut(split=_LLAMA3_SPLIT, whole=True, bos=True)
_QWEN2 = _Cut(split=_QWEN2_SPLIT, nfc=True)
_GPT2 = _Cut()
_DIGITS = _Cut(digits=True)
_CUTS: Mapping[str, _Cut] = {
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "phi-2": _GPT2,
    "mpt": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "smaug-bpe": _Cut(split=_LLAMA3_SPLIT),
    "dbrx": _Cut(split=_LLAMA3_SPLIT),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _Cut(split=_TEKKEN_SPLIT, whole=True, bos=True),
}


def write_tokenizer(metadata: Mapping[str, Any], directory: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, chat template included.

    Raises:
        UserError: the file has no tokenizer, one of a kind that is not supported, or a damaged one.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UserError("the GGUF file holds no tokenizer; give token ids instead of text")
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"the GGUF file's tokenizer '{kind}' is not supported (supported: gpt2, llama); give token ids")
    try:
        tokenizer = _byte_level(metadata, tokens) if kind == "gpt2" else _sentence_piece(metadata, tokens)
        _add_tokens(tokenizer, metadata, tokens)
        _add_ends(tokenizer, metadata, tokens)
    except UserError:
        raise
    except Exception as error:  # the library has one exception type for everything
        raise UserError(f"the GGUF file's tokenizer is damaged ({error}); give token ids instead of text") from error
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length", int(1e30)),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            config[f"{name}_token"] = tokens[index]
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def _types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise UserError(f"the GGUF file has {len(types)} token types for {len(tokens)} tokens; give token ids")
    return list(types)


def _cut_of(metadata: Mapping[str, Any]) -> _Cut:
    name = metadata.get("tokenizer.ggml.pre")
    if name in (None, "default"):
        warnings.warn(
            "the GGUF file names no pre-tokenizer, GPT-2's is assumed: its token ids may differ", stacklevel=2
        )
        return _GPT2
    if name not in _CUTS:
        raise UserError(
            f"the GGUF file's pre-tokenizer '{name}' is not supported (supported: {', '.join(_CUTS)}); give token ids"
        )
    return _CUTS[name]


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    cut = _cut_of(metadata)
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut.whole))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    if cut.split is not None:
        steps.append(pre_tokenizers.Split(Regex(cut.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise UserError("the GGUF file's tokenizer has no score for each token; give token ids instead of text")
    if sum(len(token) ** 2 for token in tokens) > _MAX_CUT_CHARACTERS:
        raise UserError("the GGUF file's tokenizer has pieces longer than any model's; give token ids instead of text")
    types = _types(metadata, tokens)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges_of(tokens, scores, types),
            unk_token=tokens[unknown] if 0 <= unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def merges_of(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Every cut of an ordinary piece into two pieces, in the order SentencePiece prefers their union."""
    known = {token: index for index, token in enumerate(tokens)}
    ordinary = [index for index, kind in enumerate(types) if kind == _NORMAL]
    merges: list[tuple[str, str]] = []
    for index in sorted(ordinary, key=lambda index: -scores[index]):
        token = tokens[index]
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        merges += sorted(
            ((left, right) for left, right in cuts if left in known and right in known),
            key=lambda cut: (-len(cut[0]), known[cut[0]]),
        )
    return merges


def _add_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str]) -> None:
    """Register control tokens as special and user-defined ones as whole, all under the ids they have."""
    from tokenizers import AddedToken

    special = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}
    # SentencePiece looks for runs of spaces after it has made them markers, where a literal marker may be beside them.
    marked = metadata["tokenizer.ggml.model"] == "llama" and not metadata.get("tokenizer.ggml.add_space_prefix", True)
    added = [
        AddedToken(token, special=special[kind], normalized=marked and not special[kind] and not token.strip(" "))
        for token, kind in zip(tokens, _types(metadata, tokens), strict=True)
        if kind in special and token
    ]
    for flag in (True, False):
        chosen = [token for token in added if token.special is flag]
        (tokenizer.add_special_tokens if flag else tokenizer.add_tokens)(chosen)


def _add_ends(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str]) -> None:
    """Begin (and end) every text with its token, where the file or its kind of tokenizer says so."""
    from tokenizers import processors

    default = (
        metadata["tokenizer.ggml.model"] == "llama" or _CUTS.get(str(metadata.get("tokenizer.ggml.pre")), _GPT2).bos
    )
    first = (
        metadata.get("tokenizer.ggml.bos_token_id") if metadata.get("tokenizer.ggml.add_bos_token", default) else None
    )
    last = metadata.get("tokenizer.ggml.eos_token_id") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    begin = [tokens[first]] if first is not None else []
    end = [tokens[last]] if last is not None else []
    if begin or end:
        ids = {(tokens[index], index) for index in (first, last) if index is not None}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A:0", *end, *(f"{token}:1" for token in begin), "$B:1", *(f"{token}:1" for token in end)],
            special_tokens=sorted(ids),
        )
