"""A tiny model on disk, as anyone would have it: safetensors, a byte-level tokenizer, a chat template. Not a test."""

from pathlib import Path

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.model.families import tiny_hf_model

SPECIAL = ("<pad>", "<s>", "</s>")
VOCAB = 272  # 3 special tokens, 256 bytes, and some rows that no text uses
CHAT = "{% for message in messages %}<s>{{ message['content'] }}\n{% endfor %}"


def write_tokenizer(directory: Path) -> None:
    """A tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )
    tokenizer.save_pretrained(directory)


def write_checkpoint(directory: Path, *, tokenizer: bool = True, seed: int = 0, **over: object) -> Path:
    """A random float32 Llama of four layers, with or without a tokenizer; returns ``directory``."""
    tiny_hf_model("llama", seed, **{"vocab_size": VOCAB, "max_position_embeddings": 64, **over}).save_pretrained(
        directory
    )
    if tokenizer:
        write_tokenizer(directory)
    return directory
