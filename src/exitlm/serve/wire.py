"""The wire format of OpenAI-compatible servers, as their clients see it: addresses, server-sent events, errors.

Pure functions of texts and bytes: who sends them is :mod:`exitlm.chat.server` and :mod:`exitlm.serve.bench`. Events are
those of the HTML standard (server-sent events), of which these servers use only ``data``.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from exitlm.errors import UserError

DONE = "[DONE]"
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")  # a return at the end may be the first half of a line's end
_SHOWN = 300  # characters of a server's message


def base_of(url: str) -> str:
    """The address below which ``chat/completions`` and the others lie, with or without its ``/v1`` in ``url``.

    Raises:
        UserError: not an address of HTTP.
    """
    found = url.strip().rstrip("/")
    try:
        parts = urlsplit(found)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that don't close, a port that is no number
        usable = False
    if not usable or any(c.isspace() for c in found):
        raise UserError(f"'{url}' is not the address of a server; write http://HOST:PORT")
    if parts.query or parts.fragment:
        raise UserError(f"'{url}' has a query or a fragment; write http://HOST:PORT")
    if parts.username is not None or parts.password is not None:
        raise UserError("the server's address has a user or a password in it; give a key by --api-key instead")
    return found if re.search(r"/v\d+$", parts.path) else f"{found}/v1"


def headers(api_key: str | None) -> dict[str, str]:
    """The headers of a request; without a key, that of ``EXITLM_API_KEY`` is used if it is set.

    Raises:
        UserError: a key that no header can carry.
    """
    key = os.environ.get("EXITLM_API_KEY") if api_key is None else api_key
    found = {"Content-Type": "application/json", "User-Agent": "exitlm"}
    if not key:
        return found
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError("the API key has spaces or characters beyond ASCII; no header can carry it")
    return {**found, "Authorization": f"Bearer {key}"}


class EventReader:
    """Puts the bytes of a stream together to events, wherever they were cut."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[str]:
        """The data of the events that are complete with these bytes."""
        *lines, self._rest = _LINE_END.split(self._rest + chunk)
        found = []
        for line in lines:
            if not line and self._data:
                found.append(b"\n".join(self._data).decode(errors="replace"))
                self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
        return found


def mapping_of(text: str | bytes) -> Mapping[str, Any] | None:
    """The JSON object that a text is; None if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def message_of(found: Mapping[str, Any] | None) -> str | None:
    """What the error in an answer says, on one line; None where there is no error."""
    error = None if found is None else found.get("error", found.get("detail"))  # FastAPI's own errors have a detail
    if error is None:
        return None
    message = error.get("message", error) if isinstance(error, Mapping) else error
    words = " ".join((message if isinstance(message, str) else json.dumps(message)).split())
    return words if len(words) <= _SHOWN else words[: _SHOWN - 3] + "..."


def refusal(url: str, status: int, body: bytes, reason: str = "") -> UserError:
    """The sentence for an answer that is none: of any status but 200."""
    said = message_of(mapping_of(body))
    advice = {401: "; give its key by --api-key or EXITLM_API_KEY", 404: "; check the address and the model"}
    words = said or f"without saying why{f' ({reason})' if reason else ''}{advice.get(status, '')}"
    return UserError(f"{url} answered with status {status}{': ' if said else ' '}{words}")


def whole_of(found: Mapping[str, Any], *names: str) -> int | None:
    """A whole number that lies in mappings in mappings; None where it is missing."""
    value: Any = found
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def mapping_at(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The mapping under a name; an empty one where there is none."""
    value = found.get(name)
    return value if isinstance(value, Mapping) else {}


def choices_of(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The choices of an answer or an event."""
    value = found.get("choices")
    return [choice for choice in value if isinstance(choice, Mapping)] if isinstance(value, list) else []


def is_here(url: str) -> bool:
    """Whether an address is this machine's, to which no proxy leads."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def first_of(names: Sequence[str], exits: Mapping[str, Any]) -> str | None:
    """The model that is meant where none is named: of exitlm's own server, which tells the ``exits`` of each, the first
    that has some; else the first one."""
    deep = [name for name in names if mapping_at(exits, name).get("exits")]
    return next(iter([*deep, *names]), None)


def context_of(found: Mapping[str, Any] | None, name: str) -> int | None:
    """The tokens that a model's context holds, by what ``/v1/models`` answered; some servers tell it."""
    return next((whole_of(entry, "max_model_len") for entry in _entries(found) if entry["id"] == name), None)


def names_of(found: Mapping[str, Any] | None) -> list[str]:
    """The models in what ``/v1/models`` answered."""
    return [entry["id"] for entry in _entries(found)]


def _entries(found: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    listed = (found or {}).get("data")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    return [entry for entry in entries if isinstance(entry.get("id"), str)]
