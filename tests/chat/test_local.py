"""A model of this process in a chat: it says what ``generate`` says, and what was computed is not computed again."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

import exitlm
from exitlm.chat.conversation import Conversation
from exitlm.chat.local import Local
from exitlm.chat.partner import Part, Taken
from exitlm.errors import UserError
from tests.checkpoints import write_checkpoint

pytestmark = pytest.mark.usefixtures("cache")
LETTERS = {3 + ord(letter) - ord("!"): 100.0 for letter in "abcd"}  # keeps answers such that their text encodes to them

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture
def llm(tmp_path_factory: pytest.TempPathFactory) -> exitlm.LLM:
    place = write_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=256)
    model = exitlm.load(place, dtype="float64", engine={"block_size": 4})
    model.add_exits([1, 3], kind="norm")
    return model


def local(llm: exitlm.LLM, **settings: Any) -> Local:
    return Local(llm, "tiny", {"max_new_tokens": 10, "ignore_eos": True, **settings})


def said(partner: Local, messages: list[dict[str, str]]) -> tuple[str, list[int], Taken]:
    *parts, taken = partner.reply(messages)
    assert isinstance(taken, Taken)
    assert all(isinstance(part, Part) for part in parts)
    text = "".join(part.text for part in parts)  # type: ignore[union-attr]
    assert text == "".join(text for part in parts for text, _ in part.tokens)  # type: ignore[union-attr]
    return text, [layer for part in parts for _, layer in part.tokens], taken  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["full", "lossless", "threshold"])
def test_it_says_what_generate_says(llm: exitlm.LLM, mode: str) -> None:
    messages = [{"role": "user", "content": "hello"}]
    settings = {"mode": mode, "max_new_tokens": 10, "ignore_eos": True}
    if mode == "threshold":
        settings |= {"threshold": 0.0, "rule": "probability"}
    expected = llm.generate(messages, **settings)  # type: ignore[arg-type]
    text, layers, taken = said(local(llm, **settings), messages)
    assert text == expected.text
    assert layers == expected.exit_layers or mode == "lossless"
    assert (taken.ended, taken.tokens, taken.mode, taken.exact) == ("length", 10, mode, True)


def test_the_second_turn_computes_only_what_is_new(llm: exitlm.LLM) -> None:
    assert llm.tokenizer is not None
    llm.tokenizer.chat_template = TEMPLATE
    partner, talk = local(llm, mode="full", logit_bias=LETTERS), Conversation()
    text, _, taken = said(partner, talk.ask("tell me something long"))
    assert set(text) <= set("abcd")
    talk.keep("tell me something long", text)
    _, _, again = said(partner, talk.ask("and then?"))
    there = taken.prompt_tokens + taken.tokens - 1  # type: ignore[operator]  # the last token is not computed yet
    assert again.reused == there // 4 * 4 > taken.prompt_tokens  # type: ignore[operator]


def test_an_interrupt_ends_the_reply_after_a_pass(llm: exitlm.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    partner, passes, step = local(llm, mode="full", max_new_tokens=100), [], llm.engine.step
    before = signal.signal(signal.SIGINT, lambda *_: partner.stop())

    def counted() -> Any:
        passes.append(1)
        if len(passes) == 4:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(llm.engine, "step", counted)
    try:
        parts = list(partner.reply([{"role": "user", "content": "hello"}]))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(passes) == 4
    assert 1 <= len(parts) <= 4
    assert not any(isinstance(part, Taken) for part in parts)
    monkeypatch.undo()
    assert not llm.engine.roster.running
    assert said(local(llm), [{"role": "user", "content": "hello"}])[2].tokens == 10


def test_a_reply_that_nobody_reads_is_dropped(llm: exitlm.LLM) -> None:
    parts = local(llm).reply([{"role": "user", "content": "hello"}])
    next(parts)
    parts.close()  # type: ignore[attr-defined]
    assert not llm.engine.roster.running


def test_a_setting_that_can_t_be_met_changes_nothing(llm: exitlm.LLM, checkpoint: Path) -> None:
    partner = local(llm)
    before = dict(partner.settings)
    for name, value, message in (
        ("mode", "fast", "unknown"), ("threshold", 2, "2"), ("temprature", 1, "did you mean 'temperature'"),
        ("temprature", None, "did you mean 'temperature'"), ("exits", [2], "no exit at layer 2"), ("n", 2, "no place"),
        ("logprobs", 1, "no place"), ("seed", "x", "seed"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            partner.change(name, value)
        assert partner.settings == before
    partner.change("temperature", 0.5)
    partner.change("temperature", None)
    partner.change("mode", None)
    assert partner.settings == before
    assert partner.facts.mode == "lossless"
    with pytest.raises(UserError, match="exitlm tune"):
        Local(exitlm.load(checkpoint), "tiny", {"mode": "threshold"})


def test_a_conversation_that_has_no_room_is_told(llm: exitlm.LLM) -> None:
    with pytest.raises(UserError, match="context is 256"):
        list(local(llm).reply([{"role": "user", "content": "x" * 300}]))
    assert not llm.engine.roster.running


def test_models_that_can_t_chat_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without a tokenizer"):
        Local(exitlm.load(write_checkpoint(tmp_path / "model", tokenizer=False)), "tiny", {})


def test_who_it_is(llm: exitlm.LLM) -> None:
    facts = local(llm, mode="full").facts
    assert (facts.name, facts.num_layers, facts.exit_layers, facts.context) == ("tiny", 4, [1, 3], 256)
    assert (facts.mode, facts.exact, facts.of_layers) == ("full", True, " of 4")
