"""How two processes find out that they belong together, before anything else is said.

```
stage                                        head
hello: versions, who it is, a number  ---->  other versions: refused by name
prove that you know the key           <----  a number, and the proof for the stage's
the proof for the head's number       ---->  a wrong one: refused by name
                                      <----  welcome
```
The key itself never travels, and each end proves that it knows it (HMAC-SHA256 over both numbers). What is said after
that is as safe as the network: beyond one machine a link is encrypted (TLS), which :mod:`joining` sees to.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import sys
from dataclasses import dataclass

from exitlm.decode.remote.link import Closed, Link
from exitlm.decode.remote.messages import PROTOCOL
from exitlm.errors import UserError, short
from exitlm.native.library import ABI
from exitlm.native.packfile import LAYOUT
from exitlm.version import __version__

_FIRST, PATIENCE = 3.0, 10.0  # seconds in which the other end has to answer
VERSIONS = {
    "protocol": PROTOCOL, "exitlm": __version__, "kernels": f"{ABI}.{LAYOUT}", "byteorder": sys.byteorder,
}  # fmt: skip
"""What both ends must have in common."""


class Refused(UserError):
    """The other end is not one of ours; a sentence that says why."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end. ``place``: what it calls itself, a host and a process."""

    place: str


def greet(link: Link, key: bytes, versions: dict[str, object] | None = None) -> None:
    """A stage's part.

    Raises:
        Refused: by the head, or the head does not know the key.
        Closed: it ended, or did not answer.
    """
    mine = secrets.token_hex(16)
    link.say(hello=versions or VERSIONS, number=mine, place=f"{socket.gethostname()}:{os.getpid()}")
    answer = heard(link)
    theirs, proof = str(answer.get("number", "")), str(answer.get("proof", ""))
    if not _same(proof, _proof(key, "head", mine, theirs)):
        link.say(refused="the head does not know the key")
        raise Refused(f"{link.peer} does not know the key of this stage; give both the same --key-file")
    link.say(proof=_proof(key, "stage", mine, theirs))
    heard(link)


def receive(link: Link, key: bytes) -> Peer:
    """The head's part.

    Raises:
        Refused: a stage of another version or key; it was told.
        Closed, BadFrame: it ended, or what came was no greeting.
    """
    hello = link.hear(_FIRST)  # a stage says it at once; who says nothing keeps others waiting
    place = _line(hello.get("place", ""), 60) or link.peer
    versions = hello.get("hello")
    for name, wanted in VERSIONS.items():
        found = versions.get(name) if isinstance(versions, dict) else None
        if found != wanted:
            raise refuse(
                link, f"stage {place} has {name} {short(found)}, but this head has {wanted}; install the same exitlm"
            )
    theirs, mine = str(hello.get("number", "")), secrets.token_hex(16)
    link.say(number=mine, proof=_proof(key, "head", theirs, mine))
    answer = link.hear(PATIENCE)
    if not _same(str(answer.get("proof", "")), _proof(key, "stage", theirs, mine)):
        raise refuse(link, f"stage {place} does not know the key; give it the --key-file of this head")
    link.say(welcome=True)
    return Peer(place)


def refuse(link: Link, sentence: str) -> Refused:
    """Tell the other end why, and hang up; the error to raise."""
    with contextlib.suppress(Closed):
        link.say(refused=sentence)
    link.close()
    return Refused(sentence)


def heard(link: Link, timeout: float | None = PATIENCE) -> dict[str, object]:
    """The next thing that the other end says. Raises :class:`Refused` if it is a refusal."""
    found = link.hear(timeout)
    if "refused" in found:
        raise Refused(_line(found["refused"], 500))
    return found


def _line(text: object, most: int) -> str:
    """What the other end wrote, as it may stand in a message of ours."""
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable())[:most]


def _proof(key: bytes, who: str, stage: str, head: str) -> str:
    return hmac.new(key, _bytes(f"{who} {stage} {head}"), "sha256").hexdigest()


def _same(proof: str, expected: str) -> bool:
    """Without telling by the time that it takes how much of it is right."""
    return hmac.compare_digest(_bytes(proof), expected.encode())


def _bytes(text: str) -> bytes:
    """What the other end wrote may be any text, also one that UTF-8 can't hold."""
    return text.encode(errors="backslashreplace")
