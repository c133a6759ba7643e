"""The commands of a chat: what each does to the conversation and the settings, and what it answers.

A command is a function of the chat's state and its argument; it returns a text to show, or None. Reading and printing
are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from exitlm.assignments import assignments, value_of
from exitlm.chat.conversation import Conversation
from exitlm.chat.entries import Command
from exitlm.chat.partner import Partner
from exitlm.chat.totals import Totals
from exitlm.errors import UserError, nearest, short

DEFAULT = "default"


class Leave(Exception):
    """The user has had enough."""


@dataclass
class State:
    """What commands may look at and change."""

    partner: Partner
    conversation: Conversation = field(default_factory=Conversation)
    totals: Totals = field(default_factory=Totals)


def run(state: State, command: Command) -> str | None:
    """Do what a command says; what it answers.

    Raises:
        UserError: there is no such command, or it has another argument.
        Leave: the chat is to end.
    """
    known = COMMANDS.get(command.name)
    if known is None:
        raise UserError(
            f"unknown command '/{command.name}'{nearest(command.name, COMMANDS)} (/help lists them; // says a slash)"
        )
    if command.argument and not known.argument:
        raise UserError(f"/{command.name} takes nothing behind it")
    return known.run(state, command.argument)


def _setting(name: str) -> Callable[[State, str], str]:
    """A command that shows a setting, or changes it."""

    def change(state: State, argument: str) -> str:
        if argument:
            _change(state, name, None if argument == DEFAULT else value_of(argument))
        return f"{name}: {_shown(state, name)}"

    return change


def _change(state: State, name: str, value: object) -> None:
    state.partner.change(name, value)


def _shown(state: State, name: str) -> str:
    value = state.partner.settings.get(name)
    if value is not None:
        return str(value)
    mode = state.partner.facts.mode if name == "mode" else None
    return DEFAULT if mode is None else mode


def _set(state: State, argument: str) -> str:
    """Any setting; without an argument, all that were set."""
    if argument:
        ((name, value),) = assignments([argument])[0].items()
        _change(state, name, value)
        return f"{name}: {_shown(state, name)}"
    settings = state.partner.settings
    return "\n".join(f"{name}: {settings[name]}" for name in settings) or "nothing was set"


def _system(state: State, argument: str) -> str:
    if argument:
        state.conversation.system = None if argument == DEFAULT else argument
    return f"system: {DEFAULT if state.conversation.system is None else state.conversation.system}"


def _clear(state: State, argument: str) -> str:
    state.conversation.clear()
    return "forgotten; the system message stays" if state.conversation.system is not None else "forgotten"


def _undo(state: State, argument: str) -> str:
    said = state.conversation.undo()
    if said is None:
        raise UserError("nothing was said yet")
    return f"forgotten: {short(said)}"


def _stats(state: State, argument: str) -> str:
    return "\n".join(state.totals.lines(state.partner.facts))


def _help(state: State, argument: str) -> str:
    wide = max(len(f"{name} {known.argument}") for name, known in COMMANDS.items())
    lines = [f"/{f'{name} {known.argument}':<{wide}}  {known.summary}" for name, known in COMMANDS.items()]
    return "\n".join([
        *lines,
        "A line that ends in \\ goes on in the next one; a text between \"\"\" and \"\"\" may have any lines;",
        "// at the start says a slash. Ctrl-C stops a reply; twice at the prompt it leaves, and so does Ctrl-D.",
    ])  # fmt: skip


def _quit(state: State, argument: str) -> None:
    raise Leave


@dataclass(frozen=True)
class Known:
    """A command: what it does, what it takes (empty: nothing), and what it is good for."""

    run: Callable[[State, str], str | None]
    argument: str
    summary: str


COMMANDS = {
    "mode": Known(_setting("mode"), "M", "lossless (the full model's text, drafted at exits), threshold, or full"),
    "threshold": Known(_setting("threshold"), "T", "how sure an exit must be, 0 to 1"),
    "temperature": Known(_setting("temperature"), "T", "0 takes the most likely token"),
    "seed": Known(_setting("seed"), "S", "what all that is random follows from"),
    "set": Known(_set, "KEY=VALUE", "any setting of a generation, such as top_p=0.9; alone, all that were set"),
    "system": Known(_system, "TEXT", "the system message"),
    "clear": Known(_clear, "", "forget the conversation"),
    "undo": Known(_undo, "", "forget the last question and its answer"),
    "stats": Known(_stats, "", "what the replies took"),
    "help": Known(_help, "", "this list; a setting without a value is shown, and 'default' takes it back"),
    "quit": Known(_quit, "", "leave"),
}
