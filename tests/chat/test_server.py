"""A server in a chat: what is sent, what is read, and what servers do wrong."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from exitlm.chat.loop import stopping
from exitlm.chat.partner import Part, Taken
from exitlm.chat.server import Server
from exitlm.errors import UserError
from tests.serve.mock_server import Answer, Asked, events, said, serving, usage

HELLO = [{"role": "user", "content": "hello"}]
EXITS = {"tiny": {"layers": 4, "exits": [{"layer": 2, "kind": "norm", "threshold": 0.9, "tested": True}],
                  "default_mode": "lossless", "modes": ["full", "lossless", "threshold"], "exact": True}}  # fmt: skip
OWN = {"mode": "threshold", "exact": False, "mean_layers": 3.5, "drafts": 4, "accepted": 3, "tokens_per_second": 12.5}


def answers(reply: Answer, *, ours: bool = True, models: Answer | None = None) -> Any:
    """A server that gives this reply; ``ours`` is whether it is exitlm's."""

    def answer(asked: Asked) -> Answer:
        if asked.path == "/v1/models":
            return models or Answer(body={"data": [{"id": "tiny", "max_model_len": 99}, {"id": "other"}]})
        if asked.path == "/v1/exits":
            return Answer(body=EXITS) if ours else Answer(404, {"detail": "Not Found"})
        return reply

    return answer


def traced(text: str, tokens: list[str], layers: list[int], **more: Any) -> dict[str, Any]:
    return said(text, exitlm={"tokens": tokens, "exit_layers": layers}, **more)


def test_a_reply_of_our_own_server() -> None:
    counts = {"prompt_tokens_details": {"cached_tokens": 6}, "exitlm": OWN}
    chunks = [
        events({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, done=False),
        events(traced("Hi", ["H", "i"], [2, 4]), done=False),
        events(traced("!", ["!"], [4]), said("", "stop"), usage(9, 3, **counts)),
    ]
    with serving(answers(Answer(chunks=chunks))) as server:
        partner = Server(
            server.url, None, "key", {"mode": "threshold", "threshold": 0.5, "top_p": 0.9, "max_new_tokens": 7}
        )
        *parts, taken = partner.reply(HELLO)
        facts = partner.facts
    assert parts == [Part(text="Hi", tokens=[("H", 2), ("i", 4)]), Part(text="!", tokens=[("!", 4)])]
    assert taken == Taken(
        ended="stop", tokens=3, tokens_per_second=12.5, mean_layers=3.5, mode="threshold", exact=False, prompt_tokens=9,
        reused=6, drafted=4, accepted=3,
    )  # fmt: skip
    assert facts.context == 99
    assert (facts.name, facts.num_layers, facts.exit_layers, facts.mode, facts.exact) == (
        "tiny",
        4,
        [2],
        "lossless",
        True,
    )
    assert server.bodies() == [{
        "model": "tiny", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, "top_p": 0.9,
        "max_tokens": 7, "exitlm": {"mode": "threshold", "threshold": 0.5, "trace": True},
    }]  # fmt: skip
    assert {asked.headers["Authorization"] for asked in server.asked} == {"Bearer key"}


def test_a_server_of_others_sees_nothing_of_ours() -> None:
    with serving(answers(Answer(chunks=[events(said("Hi"), said("", "length"))]), ours=False)) as server:
        partner = Server(server.url, "other", None, {"temperature": 0.5})
        *parts, taken = partner.reply(HELLO)
        for name in ("mode", "threshold", "rule", "exits"):
            with pytest.raises(UserError, match="needs a server of exitlm"):
                partner.change(name, "full")
    assert parts == [Part(text="Hi")]
    assert taken == Taken(ended="length")
    assert "exitlm" not in server.bodies()[0]
    assert server.bodies()[0]["model"] == "other"


def test_tokens_that_do_not_make_up_the_text_are_left_out() -> None:
    chunk = events(traced("Hi", ["Hi", "<tool>"], [2, 4]), said("", "stop"))
    with serving(answers(Answer(chunks=[chunk]))) as server:
        assert next(Server(server.url, None, None, {}).reply(HELLO)) == Part(text="Hi")


def test_settings_are_checked_before_they_are_sent() -> None:
    with serving(answers(Answer())) as server:
        partner = Server(server.url, None, None, {})
        for name, value, message in (
            ("mode", "fast", "mode 'fast' is unknown; use one of full, lossless, threshold"),
            ("seed", "x", "seed is 'x'"), ("temperature", "hot", "temperature is 'hot'"),
            ("threshold", "a", "threshold is 'a'"),
            ("threshold", 3, "threshold is 3, but must lie"), ("max_new_tokens", 1.5, "max_new_tokens is 1.5"),
        ):  # fmt: skip
            with pytest.raises(UserError, match=message):
                partner.change(name, value)
        assert partner.settings == {}
        partner.change("threshold", {2: 0.5})
        partner.change("seed", 3)
        partner.change("threshold", None)
        partner.change("rule", None)
        assert partner.settings == {"seed": 3}
        assert partner.notes() == ()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Answer(400, {"error": {"message": "the prompt is too long"}}), "status 400: the prompt is too long"),
        (Answer(500, b"<html>"), "status 500"),
        (Answer(chunks=[events(said("Hi"), done=False)]), "broke off within the reply"),
        (Answer(chunks=[events(said("Hi"), done=False)], cut=True), "broke off"),
        (
            Answer(chunks=[events(said("Hi"), {"error": {"message": "out of memory"}})]),
            "ended the reply: out of memory",
        ),
        (Answer(chunks=[b"data: {\n\n"]), "an event that is not a JSON object"),
        (Answer(body={"choices": []}), "broke off within the reply"),
    ],
)
def test_a_reply_that_fails_is_one_sentence(reply: Answer, message: str) -> None:
    with serving(answers(reply)) as server:
        partner = Server(server.url, None, None, {})
        with pytest.raises(UserError, match=message):
            list(partner.reply(HELLO))


@pytest.mark.parametrize(
    ("models", "wanted", "message"),
    [
        (Answer(body={"data": []}), None, "offers no model; name one by --model"),
        (Answer(body={"data": [{"id": "tiny"}]}), "tinny", "has no model 'tinny'; did you mean 'tiny'"),
        (Answer(401, {"error": {"message": "wrong key"}}), None, "status 401: wrong key"),
        (Answer(404, b""), None, "status 404"),
        (Answer(body=b"<html>"), None, "not with JSON"),
    ],
)
def test_a_server_that_can_t_be_talked_to_is_refused_at_once(models: Answer, wanted: str | None, message: str) -> None:
    with serving(answers(Answer(), models=models)) as server, pytest.raises(UserError, match=message):
        Server(server.url, wanted, None, {})


@pytest.mark.parametrize("told", [{}, {"other": EXITS["tiny"]}, {"tiny": 3}, [], b"<html>"])
def test_a_server_that_answers_everything_is_none_of_ours(told: Any) -> None:
    def answer(asked: Asked) -> Answer:
        return Answer(body={"data": [{"id": "tiny"}]} if asked.path == "/v1/models" else told)

    with serving(answer) as server:
        partner = Server(server.url, None, None, {})
    assert partner.facts.exit_layers == ()
    with pytest.raises(UserError, match="needs a server of exitlm"):
        partner.change("mode", "full")


def test_a_server_that_lists_no_models_takes_the_name_that_is_given() -> None:
    with serving(answers(Answer(), ours=False, models=Answer(404, b""))) as server:
        assert Server(server.url, "mine", None, {}).facts.name == "mine"


def test_nobody_is_there() -> None:
    with pytest.raises(UserError, match=r"cannot reach http://127.0.0.1:1/v1/models: Connection refused"):
        Server("http://127.0.0.1:1", None, None, {})


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(answers(Answer())) as server:
        assert Server(server.url, None, None, {}).facts.name == "tiny"


def test_an_interrupt_ends_the_wait_for_a_server() -> None:
    """The second part comes only once the interrupt is over: without it this would wait for ever."""
    go_on, main = threading.Event(), threading.get_ident()

    def chunks() -> Iterator[bytes]:
        yield events(said("Hi"), done=False)
        go_on.wait(60)
        yield events(said(" there", "stop"))

    def interrupt() -> None:
        while sys._current_frames()[main].f_code.co_name != "readinto":  # of the socket
            time.sleep(0.001)
        signal.pthread_kill(main, signal.SIGINT)

    with serving(answers(Answer(chunks=chunks()))) as server:
        partner = Server(server.url, None, None, {})
        other = threading.Thread(target=interrupt)
        parts = partner.reply(HELLO)
        try:
            with stopping(partner.stop):
                assert next(parts) == Part(text="Hi")
                other.start()
                with pytest.raises(KeyboardInterrupt):
                    next(parts)
        finally:
            go_on.set()
            other.join()
