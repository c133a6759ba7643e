"""The text and bytes of single tokens, of tokenizers of both kinds."""

from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models

from exitlm.serve.vocabulary import Vocabulary
from tests.checkpoints import write_tokenizer


def test_letters_that_stand_for_bytes(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    words = Vocabulary(tokenizer)
    for text in ("a b\n", "ü", "\x00\x7f", "€𝄞"):
        ids = tokenizer(text)["input_ids"]
        assert b"".join(words.spelling(token)[1] for token in ids) == text.encode()
    first = tokenizer("ü")["input_ids"][0]
    assert words.spelling(first) == ("\ufffd", b"\xc3")
    assert words.name(first) == "bytes:\\xc3"
    assert words.spelling(1) == ("<s>", b"<s>")
    assert words.spelling(270) == ("", b"")
    assert len({words.spelling(token)[1] for token in range(3, 259)}) == 256


def test_words_that_carry_their_space() -> None:
    core = Tokenizer(models.BPE(vocab={"<unk>": 0, "\u2581sky": 1, "<0xE2>": 2, "ü": 3}, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = Vocabulary(transformers.PreTrainedTokenizerFast(tokenizer_object=core))
    assert words.spelling(1) == (" sky", b" sky")
    assert words.spelling(2) == ("\ufffd", b"\xe2")
    assert words.spelling(3) == ("ü", "ü".encode())
