"""Which replica a request goes to: the one that has computed the beginning of its prompt, unless it has too much to do.

A session is whatever its client calls one, or else the beginning of the prompt, which the later requests of a
conversation share. Its home is chosen by rendezvous hashing (Thaler and Ravishankar, 1998): each router finds the same
one without asking, and a replica that comes or goes moves no other session. How much a home may have to do is bounded
as in consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, arXiv 1608.01350); beyond that the less
loaded of two random replicas takes the request (Mitzenmacher, 2001).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

HEADER = b"x-session-id"
BALANCE = 1.5  # how many times the mean a home may have to do
FREE = 4  # requests that a home may have in any case: decoded together they cost little more than one
BEGINNING = 1024  # characters of a prompt that count; numbers where it is token ids

Replica = TypeVar("Replica", bound=str)


def session_of(headers: Sequence[tuple[bytes, bytes]], body: bytes) -> str | None:
    """The session of a request: by the header ``x-session-id``, the fields ``prompt_cache_key`` or ``user`` of its
    body, or the beginning of its prompt. None for a request without any of them."""
    for name, value in headers:
        if name.lower() == HEADER and value.strip():
            return _digest("session", value.strip().decode("latin-1"))
    fields = _object(body)
    for field in ("prompt_cache_key", "user"):
        if isinstance(fields.get(field), str) and fields[field]:
            return _digest(field, fields[field])
    found = _beginning(fields)
    return None if found is None else _digest("prompt", json.dumps(found))


def ranked(session: str | None, loads: Mapping[Replica, int], draw: random.Random) -> list[list[Replica]]:
    """The replicas to try, in groups: of a group the least loaded one that takes a request counts, and a later group
    where none of those before does. ``loads``: requests that each has in progress."""
    names = sorted(loads)
    two = draw.sample(names, min(2, len(names)))
    if session is None or not names:
        return [two, names]
    home = max(names, key=lambda name: _digest(session, name))
    room = max(FREE, math.ceil(BALANCE * (sum(loads.values()) + 1) / len(names)))
    if loads[home] < room:
        return [[home], two, names]
    two = draw.sample([name for name in names if name != home] or names, min(2, max(1, len(names) - 1)))
    return [two, names]


def _beginning(fields: Mapping[str, Any]) -> Any:
    """What the requests of one conversation have in common: all up to its first question, or as much of a text."""
    for name in ("messages", "input"):
        items = fields.get(name)
        if isinstance(items, list):
            first = next((i for i, item in enumerate(items) if _is_question(item)), len(items) - 1)
            return [fields.get("instructions"), items[: first + 1]]
        if isinstance(items, str):
            return [fields.get("instructions"), items[:BEGINNING]]
    for name in ("prompt", "prompts"):
        given = fields.get(name)
        if isinstance(given, list) and given and isinstance(given[0], str | list):
            given = given[0]
        if isinstance(given, str | list) and given:
            return given[:BEGINNING]
    return None


def _is_question(item: Any) -> bool:
    return isinstance(item, Mapping) and item.get("role") == "user"


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):  # the replica says what is wrong with it
        return {}
    return found if isinstance(found, dict) else {}


def _digest(*parts: str) -> str:
    text = "\0".join(parts).encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()
