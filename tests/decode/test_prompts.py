"""One prompt: a text, token ids or chat messages; every other thing is one sentence."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from exitlm.decode.prompts import encode, messages_of
from exitlm.errors import UserError
from tests.checkpoints import write_tokenizer

HELLO = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(place)
    return transformers.AutoTokenizer.from_pretrained(place)


def ids_of(prompt: Any, tokenizer: Any, chat: bool = False) -> list[int]:
    return encode(prompt, tokenizer, chat=chat, why_no_text="it has none")


def test_a_text_and_a_message_of_it(tokenizer: Any) -> None:
    text = ids_of("Hi\n", tokenizer)
    assert text == tokenizer("Hi\n")["input_ids"]
    assert ids_of("Hi", tokenizer, chat=True) == ids_of([HELLO], tokenizer) == [1, *text]
    assert ids_of([HELLO], tokenizer, chat=True) == ids_of((HELLO,), tokenizer) == [1, *text]
    turns = [{"role": "system", "content": ""}, HELLO, {"role": "assistant", "content": "Yes"}, HELLO]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert ids_of(turns, tokenizer) == expected


@pytest.mark.parametrize("ids", [[5, 9], (5, 9), np.array([5, 9]), torch.tensor([5, 9]), iter([5, 9])])
def test_token_ids_stay_what_they_are(ids: Any) -> None:
    assert ids_of(ids, None) == [5, 9]
    assert ids_of([], None) == []


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "the prompt is empty; give at least one character"),
        ("\ud800", "the prompt is not valid UTF-8 text"),
        (5, r"the prompt is 5 \(int\), but must be a text, a list of token ids"),
        (None, r"the prompt is None \(NoneType\)"),
        (b"x", r"the prompt is b'x' \(bytes\)"),
        (HELLO, r"the prompt is \{'role'.* \(dict\), but must be a text, .* or a list of chat messages"),
        ([1.5], r"the prompt is \[1\.5\] \(list\)"),
        (["a", "b"], r"the prompt is \['a', 'b'\] \(list\)"),
        ([[1], [2]], r"the prompt is \[\[1\], \[2\]\] \(list\)"),
        ([[HELLO]], r"the prompt is \[\[\{.* \(list\)"),
        ([HELLO, 5], r"message 2 is 5 \(int\), but must be a mapping with role and content"),
        ([HELLO, "x"], r"message 2 is 'x' \(str\)"),
        ([{"content": "x"}], "message 1 has no role; write {'role': 'user', 'content': TEXT}"),
        ([HELLO, {"role": "user"}], "message 2 has no content"),
        ([{}], "message 1 has no role"),
        ([{**HELLO, "contents": "x"}], "message 1 has an unknown field 'contents'; did you mean 'content'"),
        ([{**HELLO, 5: "x"}], "message 1 has an unknown field 5"),
        ([{"role": 1, "content": "x"}], r"role of message 1 is 1 \(int\), but must be a text"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], r"content of message 1 is .* \(list\)"),
        ([{"role": "user", "content": None}], r"content of message 1 is None \(NoneType\), but must be a text"),
        ([{"role": "user", "content": "\ud800"}], "content of message 1 is not valid UTF-8 text"),
    ],
)
def test_what_is_no_prompt(tokenizer: Any, prompt: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        ids_of(prompt, tokenizer)


def test_token_ids_are_no_chat(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="chat needs a prompt that is a text or a list of messages, not token ids"):
        ids_of([5], tokenizer, chat=True)


def test_without_a_tokenizer_or_a_template(tokenizer: Any) -> None:
    for prompt in ("Hi", [HELLO]):
        with pytest.raises(UserError, match="the prompt must be a list of token ids: it has none"):
            ids_of(prompt, None)
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no chat template; leave chat off"):
        ids_of("Hi", plain, chat=True)
    with pytest.raises(UserError, match="no chat template; give the prompt as a text"):
        ids_of([HELLO], plain)


def test_a_template_that_refuses_the_messages(tokenizer: Any) -> None:
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    plain.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"can't be used \(roles must alternate\); give the prompt as a text, or mess"):
        ids_of([HELLO, HELLO], plain)
    with pytest.raises(UserError, match=r"can't be used \(roles must alternate\); leave chat off"):
        ids_of("Hi", plain, chat=True)


def test_messages_are_copied() -> None:
    given = [dict(HELLO)]
    found = messages_of(given)
    found[0]["content"] = "other"
    assert given == [HELLO]
