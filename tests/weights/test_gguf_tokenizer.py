"""Tokenizers rebuilt from GGUF metadata: ids equal those of the tokenizer the metadata was written from."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from exitlm.errors import UserError
from exitlm.weights.checkpoint import load_tokenizer
from exitlm.weights.gguf_tokenizer import merges_of, write_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "It's what they'll say: we've been there, I'm sure they'd know. IT'S!",
    "def f(x):\n    return x ** 2  # naïve café 数学 emoji 🙂\n\n\n\tend",
    "over and over the other brother's mother, 12 and 123 and 1234",
] * 3
TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "  two  spaces ",
    "\n\n\nlines\r\n",
    "x=1;y=22;z=333,4444",
    "\u00e9 versus e\u0301 \u212b",
    "<|im_start|>user\nhi<|im_end|>\n",
    "mixed🙂<think>  no  </think> don't DON'T",
    "a \u2581 literal  \u2581\u2581 marker",
    "\u4f60\u597d\u00a0\u200bworld\u0000",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(*steps: Any, regex: bool) -> Any:
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)])


# As the tokenizer.json of the families has them: gpt2, SmolLM2, Llama 3, Qwen2.
FAMILIES = {
    "gpt-2": byte_level(regex=True),
    "smollm": byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True),
    "llama-bpe": byte_level(pre_tokenizers.Split(Regex(LLAMA3), "isolated"), regex=False),
    "qwen2": byte_level(pre_tokenizers.Split(Regex(QWEN2), "isolated"), regex=False),
}


def trained(pre: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = FAMILIES[pre]
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def metadata_of(tokenizer: Tokenizer, pre: str | None) -> dict[str, Any]:
    import json

    model = json.loads(tokenizer.to_str())["model"]
    size = tokenizer.get_vocab_size()
    tokens = [tokenizer.id_to_token(index) for index in range(size)]
    types = [3 if token in SPECIALS else 4 if "think>" in token else 1 for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    found: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}",
    }
    return found | ({} if pre is None else {"tokenizer.ggml.pre": pre})


def rebuilt(metadata: dict[str, Any], directory: Path) -> Any:
    write_tokenizer(metadata, directory)
    return load_tokenizer(directory)


@pytest.mark.parametrize("pre", FAMILIES)
def test_byte_level_ids_are_the_same(tmp_path: Path, pre: str) -> None:
    original = trained(pre)
    ours = rebuilt(metadata_of(original, pre), tmp_path)
    for text in TEXTS:
        ids = original.encode(text).ids
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == original.decode(ids, skip_special_tokens=False)
    assert len(ours) == original.get_vocab_size()


def test_the_pre_tokenizers_really_differ() -> None:
    """The texts tell the kinds apart: no two cut all of them alike."""
    for left, right in itertools.combinations(FAMILIES.values(), 2):
        assert any(left.pre_tokenize_str(text) != right.pre_tokenize_str(text) for text in TEXTS)


def test_special_tokens_and_chat(tmp_path: Path) -> None:
    ours = rebuilt(metadata_of(trained("smollm"), "smollm"), tmp_path)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 0)
    assert ours.decode([2, *ours.encode("hi"), 1], skip_special_tokens=True) == "hi"
    assert "<think>" in ours.decode(ours.encode("a<think>b"), skip_special_tokens=True)
    text = ours.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    ("settings", "begin", "end"), [({"add_bos_token": True}, [1], []), ({"add_eos_token": True}, [], [2])]
)
def test_begin_and_end_of_text(tmp_path: Path, settings: dict[str, Any], begin: list[int], end: list[int]) -> None:
    metadata = metadata_of(trained("smollm"), "smollm")
    plain = rebuilt(metadata, tmp_path).encode("hello")
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in settings.items()}
    ours = rebuilt(metadata, tmp_path)
    assert ours.encode("hello") == [*begin, *plain, *end]
    assert ours.encode("hello", add_special_tokens=False) == plain


def test_llama3_begins_with_bos_unless_told_otherwise(tmp_path: Path) -> None:
    metadata = metadata_of(trained("llama-bpe"), "llama-bpe")
    del metadata["tokenizer.ggml.add_bos_token"]
    assert rebuilt(metadata, tmp_path).encode("hello")[0] == 1


def test_an_unnamed_pre_tokenizer_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="names no pre-tokenizer"):
        write_tokenizer(metadata_of(trained("gpt-2"), None), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.tokens": []}, "no tokenizer"),
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported"),
        ({"tokenizer.ggml.pre": "viking"}, "pre-tokenizer 'viking' is not supported"),
        ({"tokenizer.ggml.merges": ["q no_such_token"]}, "damaged"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "token types"),
        ({"tokenizer.ggml.model": "llama"}, "no score"),
        (
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": ["a", "a" * 40_000],
                "tokenizer.ggml.scores": [0.0, 1.0],
                "tokenizer.ggml.token_type": [1, 1],
            },
            "pieces longer than any model's; give token ids",
        ),
    ],
)
def test_unsupported_and_damaged_ones_are_a_sentence(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_tokenizer(metadata_of(trained("smollm"), "smollm") | change, tmp_path)


def test_an_id_that_is_none_is_left_out(tmp_path: Path) -> None:
    write_tokenizer(metadata_of(trained("smollm"), "smollm") | {"tokenizer.ggml.unknown_token_id": "x"}, tmp_path)
    assert load_tokenizer(tmp_path).unk_token is None


# --- SentencePiece --------------------------------------------------------------------------------------------------


# User-defined pieces, by whether a space is put before texts: as in Llama 2, and as in Gemma.
WHOLE = {True: ["<think>", "\n\n"], False: ["<think>", "\n\n", "\u2581\u2581"]}


def sentence_piece(directory: Path, *, prefix: bool) -> Any:
    spm = pytest.importorskip("sentencepiece")
    text = directory / "corpus.txt"
    text.write_text("\n".join(line.replace("\n", " ") for line in CORPUS * 5), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(directory / "spm"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=WHOLE[prefix],
        minloglevel=2,
    )
    return spm.SentencePieceProcessor(model_file=str(directory / "spm.model"))


def spm_metadata(processor: Any, *, prefix: bool, architecture: str) -> dict[str, Any]:
    """As llama.cpp's converter writes it: spaces for the marker in user-defined pieces."""
    tokens, types = [], []
    for index in range(processor.get_piece_size()):
        kind = (
            2 if processor.is_unknown(index)
            else 3 if processor.is_control(index)
            else 6 if processor.is_byte(index)
            else 4 if processor.id_to_piece(index) in WHOLE[prefix]
            else 1
        )  # fmt: skip
        piece = processor.id_to_piece(index)
        tokens.append(piece.replace("\u2581", " ") if kind == 4 else piece)
        types.append(kind)
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [processor.get_score(index) for index in range(len(tokens))],
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_ids_are_the_same(tmp_path: Path, prefix: bool) -> None:
    processor = sentence_piece(tmp_path, prefix=prefix)
    ours = rebuilt(spm_metadata(processor, prefix=prefix, architecture="llama"), tmp_path)
    texts = [text for text in TEXTS if "\u0000" not in text and text]
    # llama.cpp (and every tokenizer.json) prefixes each stretch between whole tokens, SentencePiece only the text.
    for text in [text for text in texts if not prefix or not any(piece in text for piece in WHOLE[True])]:
        ids = processor.encode(text)
        assert ours.encode(text) == [processor.bos_id(), *ids], text
        assert ours.decode(ids) == text.replace("\u2581", " "), text


def test_merges_are_every_cut_by_score() -> None:
    tokens = ["<s>", "a", "b", "ab", "abb", "bb", "c"]
    scores = [0.0, -9.0, -9.0, -2.0, -1.0, -3.0, -9.0]
    types = [3, 1, 1, 1, 1, 1, 1]
    assert merges_of(tokens, scores, types) == [("ab", "b"), ("a", "bb"), ("a", "b"), ("b", "b")]


def test_no_warning_in_the_normal_case(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rebuilt(metadata_of(trained("smollm"), "smollm"), tmp_path)
