"""``exitlm chat``: its flags, and what it puts together. Nothing heavy is loaded to parse or to print help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exitlm.assignments import given_settings
from exitlm.errors import UserError

if TYPE_CHECKING:
    from exitlm.chat.loop import Reader
    from exitlm.chat.partner import Facts, Partner
    from exitlm.chat.screen import Screen


def chat(
    source: str | None = None,
    *,
    url: str | None = None,
    model: str | None = None,
    api_key: str | None = None,
    system: str | None = None,
    history: bool = True,
    adapter: Sequence[str] | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    quant: str = "auto",
    allow_other_base: bool = False,
    set: Sequence[str] = (),
    **flags: Any,
) -> int:
    """Talk to a model, or to a server; ``flags`` are settings of ``LLM.generate``, or None."""
    settings, engine = given_settings(flags, set)
    local = {
        "adapter": (adapter, None), "dtype": (dtype, "auto"), "device": (device, "cpu"), "quant": (quant, "auto"),
        "allow_other_base": (allow_other_base, False),
    }  # fmt: skip
    if (source is None) == (url is None):
        raise UserError("give a MODEL, or the address of a server by --url" + ", not both" * (url is not None))
    if url is not None:
        here: dict[str, tuple[Any, Any]] = {**local, "set engine": (engine, {})}
        for name, (value, default) in here.items():
            if value != default:
                raise UserError(f"--{name.replace('_', '-')} is for a MODEL in this process; --url has its own")
        from exitlm.chat.server import Server

        return _talk(Server(url, model, api_key, settings), system, history)
    for name, given in (("model", model), ("api_key", api_key)):
        if given is not None:
            raise UserError(f"--{name.replace('_', '-')} is for --url; leave it out, or name a server")
    assert source is not None
    partner = _load(source, settings, engine, {name: value for name, (value, _) in local.items()})
    return _talk(partner, system, history)


def _load(source: str, settings: Mapping[str, Any], engine: Mapping[str, Any], options: Mapping[str, Any]) -> Partner:
    import exitlm
    from exitlm.chat.local import Local

    return Local(exitlm.load(source, engine=engine, **options), source, settings)


def _talk(partner: Partner, system: str | None, history: bool) -> int:
    """Read from standard input and answer, until it ends or the user leaves."""
    from exitlm.chat.commands import State
    from exitlm.chat.conversation import Conversation
    from exitlm.chat.loop import converse
    from exitlm.chat.screen import Screen

    screen, is_typed = Screen(partner.facts), sys.stdin.isatty()
    if screen.is_terminal:
        _greet(partner.facts, screen)
    state = State(partner, Conversation(system=system))
    converse(state, _reader(screen, history) if is_typed else _pipe(), screen, forgiving=is_typed)
    return 0


def _reader(screen: Screen, history: bool) -> Reader:
    from exitlm.chat.commands import COMMANDS
    from exitlm.chat.history import history_file
    from exitlm.chat.keyboard import Terminal

    return Terminal(history_file() if history else None, [f"/{name}" for name in COMMANDS], screen.aside)


def _pipe() -> Reader:
    from exitlm.chat.keyboard import Pipe

    return Pipe(sys.stdin.buffer)


def _greet(facts: Facts, screen: Screen) -> None:
    layers = ", ".join(map(str, facts.exit_layers))
    exits = f"exits at {layers}" if layers else "no exits"
    depth = "" if facts.num_layers is None else f", {facts.num_layers} layers, {exits}"
    mode = "" if facts.mode is None else f", mode {facts.mode}"
    screen.aside(f"{facts.name}{depth}{mode}; /help lists the commands")
    screen.legend()


def add_chat(parser: argparse.ArgumentParser, models: str) -> None:
    """The flags that only ``chat`` has; ``models`` says what a MODEL may be."""
    add = parser.add_argument
    add("source", nargs="?", metavar="MODEL", help=models)
    add("--url", metavar="URL", help="talk to a server with OpenAI's interface there, instead of a MODEL here")
    add("--model", metavar="NAME", help="a model of that server (default: the first, or the first with exits)")
    add("--api-key", metavar="K", help="that server's key (default: the variable EXITLM_API_KEY)")
    add("--system", metavar="TEXT", help="a system message")
    add(
        "--no-history", dest="history", action="store_false",
        help="keep nothing of what is typed (default: in ~/.local/state/exitlm, for the arrow keys)",
    )  # fmt: skip
