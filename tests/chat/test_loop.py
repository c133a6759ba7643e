"""A conversation from end to end with a partner of a script: commands, interrupts, mistakes, and what is shown."""

from __future__ import annotations

import dataclasses
import re
import signal
import sys
import threading
from collections.abc import Sequence

import pytest

from exitlm.chat.commands import COMMANDS, State
from exitlm.chat.conversation import Conversation
from exitlm.chat.entries import Command, Said
from exitlm.chat.loop import converse, stopping
from exitlm.chat.partner import Facts, Taken
from exitlm.chat.screen import Screen, summary
from exitlm.errors import UserError
from tests.chat.partners import WHOLE, Scripted


class Typed:
    """Entries of a list, then the end."""

    def __init__(self, entries: Sequence[str]) -> None:
        self._rest = iter(entries)

    def read(self) -> Said | Command | None:
        entry = next(self._rest, None)
        if entry is None:
            raise EOFError
        if entry.startswith("/"):
            name, _, argument = entry[1:].partition(" ")
            return Command(name, argument)
        return Said(entry) if entry else None


def talk(partner: Scripted, *entries: str, forgiving: bool = True, system: str | None = None) -> State:
    state = State(partner, Conversation(system=system))
    converse(state, Typed(entries), Screen(partner.facts), forgiving=forgiving)
    return state


def test_a_conversation_is_remembered() -> None:
    partner = Scripted(["a", "b", WHOLE])
    state = talk(partner, "one", "", "two", system="be short")
    system = {"role": "system", "content": "be short"}
    one, answer = {"role": "user", "content": "one"}, {"role": "assistant", "content": "ab"}
    assert partner.asked == [[system, one], [system, one, answer, {"role": "user", "content": "two"}]]
    assert state.conversation.turns == [("one", "ab"), ("two", "ab")]
    assert state.totals.replies == 2


def test_without_a_terminal_standard_output_has_the_replies_alone(capsys: pytest.CaptureFixture[str]) -> None:
    talk(Scripted(["a", "b", WHOLE]), "one", "/mode")
    out, err = capsys.readouterr()
    assert out == "ab\nmode: lossless\n"
    assert err == "2 tokens, 10.0 tokens/s, 3.0 of 4 layers on average, lossless, exact\n"


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let standard output be a terminal with colours."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_a_terminal_shows_depth_as_colour(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_terminal(monkeypatch)
    partner = Scripted(["a", "b", WHOLE])
    Screen(partner.facts).legend()
    talk(partner, "one")
    out, err = capsys.readouterr()
    assert "\x1b[1;38;2;0;168;120ma" in out
    assert "layer 2" in out
    assert "\x1b[2m2 tokens, 10.0 tokens/s" in out
    assert err == ""


def test_what_would_play_with_the_terminal_is_shown_instead(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_terminal(monkeypatch)
    talk(Scripted(["\x1b]0;title\x07", "a\tb\nc\x9b2J", WHOLE]), "one")
    out = capsys.readouterr().out
    assert "\x1b]" not in out
    assert "\x9b" not in out
    assert "␛]0;title␇" in out
    assert "b\nc" in re.sub(r"\x1b\[[\d;]*m", "", out)


@pytest.mark.parametrize("raises", [False, True], ids=["flag", "exception"])
def test_an_interrupt_ends_the_reply_and_keeps_what_was_said(raises: bool, capsys: pytest.CaptureFixture[str]) -> None:
    partner = Scripted(["a", "b", "^C", "c", WHOLE], raises=raises)
    before = signal.getsignal(signal.SIGINT)
    state = talk(partner, "one", "two")
    assert state.conversation.turns == [("one", "ab"), ("two", "ab")]
    assert partner.closed == 2
    assert state.totals.stopped == 2
    assert signal.getsignal(signal.SIGINT) == before
    out, err = capsys.readouterr()
    assert out == "ab\nab\n"
    assert err.count("2.0 of 4 layers on average, lossless, exact, stopped") == 2


@pytest.mark.parametrize("raises", [False, True])
def test_an_interrupt_before_the_first_word_leaves_nothing(raises: bool) -> None:
    state = talk(Scripted(["^C", "a", WHOLE], raises=raises), "one")
    assert state.conversation.turns == []


def test_the_second_interrupt_is_one() -> None:
    """A pass that never ends must not keep the user."""
    calls = []
    with stopping(lambda: calls.append(1)):
        signal.raise_signal(signal.SIGINT)
        assert calls == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert calls == [1]


def test_an_interrupt_that_comes_too_late_for_a_reply_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Screen, "gap", lambda self: signal.raise_signal(signal.SIGINT))
    partner = Scripted(["a", WHOLE])
    state = talk(partner, "one", "two")
    assert state.conversation.turns == [("one", "a"), ("two", "a")]
    with pytest.raises(KeyboardInterrupt):
        talk(partner, "three", forgiving=False)


def test_another_thread_may_chat_too() -> None:
    states: list[State] = []
    thread = threading.Thread(target=lambda: states.append(talk(Scripted(["a", WHOLE]), "one")))
    thread.start()
    thread.join()
    assert states[0].conversation.turns == [("one", "a")]


def test_a_reply_that_fails_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    partner = Scripted(["a", UserError("the prompt is\ntoo long")])
    state = talk(partner, "one", "/stats")
    assert (state.conversation.turns, state.totals.replies) == ([], 0)
    out, err = capsys.readouterr()
    assert err == "error: the prompt is too long\n"
    assert out.startswith("a\nmodel")
    with pytest.raises(UserError, match="too long"):
        talk(partner, "one", "two", forgiving=False)
    assert len(partner.asked) == 2


def test_a_defect_is_none_of_the_user_s_mistakes() -> None:
    with pytest.raises(ZeroDivisionError):
        talk(Scripted([ZeroDivisionError()]), "one")


def test_commands_change_settings(capsys: pytest.CaptureFixture[str]) -> None:
    partner = Scripted(["a", WHOLE])
    talk(
        partner, "/mode", "/mode threshold", "/threshold .5", "/threshold", "/temperature 0.7", "/seed 3",
        "/seed default", "/set top_p=.9", "/set", '/threshold {"8": 0.9}', "/set top_p=null",
        "/temperature default", "/set",
    )  # fmt: skip
    assert partner.settings == {"mode": "threshold", "threshold": {8: 0.9}}
    assert capsys.readouterr().out.splitlines() == [
        "mode: lossless", "mode: threshold", "threshold: 0.5", "threshold: 0.5", "temperature: 0.7", "seed: 3",
        "seed: default", "top_p: 0.9", "mode: threshold", "threshold: 0.5", "temperature: 0.7", "top_p: 0.9",
        "threshold: {8: 0.9}", "top_p: default", "temperature: default", "mode: threshold", "threshold: {8: 0.9}",
    ]  # fmt: skip


def test_commands_change_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    partner = Scripted(["a", WHOLE])
    state = talk(
        partner,
        "/system",
        "/system be short",
        "one",
        "two",
        "/undo",
        "three",
        "/clear",
        "four",
        "/system default",
        "five",
    )
    asked = [[message["content"] for message in messages] for messages in partner.asked]
    assert asked == [
        ["be short", "one"], ["be short", "one", "a", "two"], ["be short", "one", "a", "three"], ["be short", "four"],
        ["four", "a", "five"],
    ]  # fmt: skip
    assert state.conversation.system is None
    out = capsys.readouterr().out
    assert "system: default" in out
    assert "forgotten: 'two'" in out
    assert "the system message stays" in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/mod full", "did you mean 'mode'"),
        ("/etc/passwd", "unknown command '/etc/passwd'"),
        ("/", "unknown command '/'"),
        ("/quit now", "/quit takes nothing"),
        ("/undo", "nothing was said yet"),
        ("/set x", "write KEY=VALUE"),
        ("/set x=1", "no setting x"),
    ],
)
def test_a_wrong_command_is_one_sentence(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    partner = Scripted(["a", WHOLE])
    talk(partner, command, "still here")
    out, err = capsys.readouterr()
    assert message in err.splitlines()[0]
    assert err.startswith("error: ")
    assert out == "a\n"
    with pytest.raises(UserError):
        talk(partner, command, forgiving=False)


def test_quit_leaves_at_once() -> None:
    partner = Scripted(["a", WHOLE])
    talk(partner, "one", "/quit", "two")
    assert len(partner.asked) == 1


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    talk(Scripted([]), "/help")
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()][: len(COMMANDS)] == [f"/{name}" for name in COMMANDS]


def test_stats_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    taken = Taken(
        ended="stop", tokens=11, tokens_per_second=5.0, mean_layers=2.0, mode="lossless", exact=False, prompt_tokens=40,
        reused=32, drafted=8, accepted=6, seed=9, details={"kernels": "torch"},
    )  # fmt: skip
    partner = Scripted(["a", "b", taken])
    talk(partner, "one", "two", "/stats")
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])
    assert lines == {
        "model": "scripted", "replies": "2", "tokens": "22, 5.0 tokens/s", "layers": "2.0 of 4 on average",
        "left": "at    2: 100%", "prompts": "80 tokens, 64 of them computed before", "drafts": "16, 75% accepted",
        "context": "51 of 100 tokens", "path": "not exact", "last": "seed  9", "kernels": "torch",
    }  # fmt: skip


def test_stats_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    talk(Scripted([]), "/stats")
    assert capsys.readouterr().out.splitlines() == ["model    scripted", "replies  0", "tokens   0"]


def test_the_line_after_a_reply_says_only_what_is_known() -> None:
    facts = Facts(name="x")
    assert summary(Taken(ended="stop"), facts) == ""
    assert summary(Taken(ended="stop", tokens=1), facts) == "1 token"
    assert summary(dataclasses.replace(WHOLE, exact=False), facts).endswith(
        "3.0 layers on average, lossless, not exact"
    )
    assert summary(dataclasses.replace(WHOLE, ended="length"), facts).endswith("cut short (/set max_new_tokens=N)")


def test_notes_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    partner = Scripted(["a", WHOLE])
    partner.told = ["slower: 0.9 times"]
    state = State(partner)
    screen = Screen(partner.facts)
    converse(state, Typed(["one"]), screen, forgiving=True)
    assert capsys.readouterr().err.count("note: slower: 0.9 times") == 1
    entries = iter(["one", "two", "three"])

    class Changing:
        def read(self) -> Said:
            entry = next(entries, None)
            if entry is None:
                raise EOFError
            partner.told = ["slower: 0.8 times"] + ["another"] * (entry == "three")
            return Said(entry)

    converse(State(partner), Changing(), screen, forgiving=True)
    err = capsys.readouterr().err
    assert (err.count("note: slower"), err.count("note: another")) == (1, 1)
