"""A server as a partner: OpenAI's chat completions, streamed, over the standard library's HTTP.

With exitlm's own server, the field ``exitlm`` chooses the mode and brings the exit layer of each token. Any other
server never sees that field, and has no modes.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exitlm.chat.conversation import Message
from exitlm.chat.partner import Facts, Part, Taken, figure, speed
from exitlm.errors import UserError, nearest
from exitlm.serve import wire
from exitlm.values import number, whole

_EXIT_SETTINGS = ("mode", "threshold", "rule", "exits")
_ASKING = 30.0  # seconds for what a server knows by heart
_READ = 1 << 16


class _Missing(UserError):
    """The server has nothing at this address."""


class Server:
    """A partner behind ``url``; without ``model``, the first one that it offers, or the first that has exits.

    Raises:
        UserError: nobody there, or no such model.
    """

    def __init__(self, url: str, model: str | None, api_key: str | None, settings: Mapping[str, Any]) -> None:
        self._base, self._headers = wire.base_of(url), wire.headers(api_key)
        offered, exits = self._offered(model), self._known_exits()
        name = wire.first_of(wire.names_of(offered), exits) if model is None else model
        if name is None:
            raise UserError(f"{self._base} offers no model; name one by --model")
        self._exits = wire.mapping_at(exits, name) or None
        self._facts = _facts(name, self._exits, wire.context_of(offered, name))
        self._settings: dict[str, Any] = {}
        for key, value in settings.items():
            self.change(key, value)

    @property
    def facts(self) -> Facts:
        """Who this is."""
        return self._facts

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was set; names beyond OpenAI's go to the server as they are."""
        return self._settings

    def change(self, name: str, value: Any) -> None:
        """Set a setting, or give it back its default (None)."""
        if name in _EXIT_SETTINGS and self._exits is None:
            raise UserError(f"{name} needs a server of exitlm, and {self._base} is none")
        if name == "adapter":
            raise UserError("adapter is for a MODEL in this process; name a server's by --model BASE:ADAPTER")
        if value is None:
            self._settings.pop(name, None)
            return
        if name == "mode":
            known = (self._exits or {}).get("modes") or [value]
            if value not in known:
                raise UserError(f"mode {value!r} is unknown; use one of {', '.join(known)}{nearest(str(value), known)}")
        elif name in ("seed", "max_new_tokens"):
            value = whole(value, name)
        elif name == "temperature":
            value = number(value, name)
        elif name == "threshold" and not isinstance(value, Mapping):
            value = number(value, name)
            if not 0 <= value <= 1:
                raise UserError(f"threshold is {value:g}, but must lie between 0 (always exit) and 1 (never exit)")
        self._settings[name] = value

    def notes(self) -> Sequence[str]:
        """None: the server keeps its own log."""
        return ()

    def stop(self) -> None:
        """End the reply that is being read, in whatever call that waits."""
        raise KeyboardInterrupt

    # ---- a reply

    def reply(self, messages: Sequence[Message]) -> Iterator[Part | Taken]:
        """Answer, as the server sends it."""
        response = self._open("chat/completions", self._body(messages), None)
        ended: str | None = None
        usage: Mapping[str, Any] = {}
        first = last = 0.0
        try:
            for found in _events(response, self._base):
                usage = wire.mapping_at(found, "usage") or usage
                for choice in wire.choices_of(found)[:1]:
                    ended = choice.get("finish_reason") or ended
                    part = _part(choice)
                    if part.text or part.tokens:
                        last = time.perf_counter()
                        first = first or last
                        yield part
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{self._base} broke off: {_words(error)}") from error
        finally:
            response.close()
        if ended is None:
            raise UserError(f"{self._base} broke off within the reply; try again, or look at its log")
        yield _taken(ended, usage, last - first)

    def _body(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The request for a reply."""
        body = {"model": self._facts.name, "messages": messages, "stream": True,
                "stream_options": {"include_usage": True}}  # fmt: skip
        body |= {key: value for key, value in self._settings.items() if key not in _EXIT_SETTINGS}
        if "max_new_tokens" in body:
            body["max_tokens"] = body.pop("max_new_tokens")
        if self._exits is not None:
            own = {key: value for key, value in self._settings.items() if key in _EXIT_SETTINGS}
            body["exitlm"] = {**own, "trace": True}
        return body

    # ---- who is there

    def _offered(self, wanted: str | None) -> Mapping[str, Any]:
        """What the server says of its models, of which ``wanted`` must be one; nothing where it does not tell."""
        try:
            found = self._get("models")
        except _Missing:
            if wanted is None:
                raise
            return {}
        names = wire.names_of(found)
        if wanted is not None and names and wanted not in names:
            raise UserError(f"{self._base} has no model '{wanted}'{nearest(wanted, names)}")
        return found

    def _known_exits(self) -> Mapping[str, Any]:
        """What exitlm's own server tells of the exits of its models; nothing from another server."""
        try:
            return self._get("exits")
        except UserError:
            return {}

    # ---- HTTP

    def _get(self, path: str) -> Mapping[str, Any]:
        with self._open(path, None, _ASKING) as response:
            found = wire.mapping_of(response.read())
        if found is None:
            raise _Missing(f"{self._base}/{path} answered, but not with JSON; is this the address of the server?")
        return found

    def _open(self, path: str, body: Mapping[str, Any] | None, timeout: float | None) -> http.client.HTTPResponse:
        url = f"{self._base}/{path}"
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), self._headers)
        opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if wire.is_here(url) else []))
        try:
            found: http.client.HTTPResponse = opener.open(request, timeout=timeout)
            return found
        except urllib.error.HTTPError as error:
            with error:
                said = wire.refusal(url, error.code, error.read(), error.reason)
            raise (_Missing(str(said)) if error.code in (404, 405) else said) from None
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"cannot reach {url}: {_words(error)}; is the server running?") from error


def _events(response: http.client.HTTPResponse, base: str) -> Iterator[Mapping[str, Any]]:
    """The JSON objects of a stream, up to its end."""
    reader = wire.EventReader()
    while chunk := response.read1(_READ):
        for data in reader.feed(chunk):
            if data == wire.DONE:
                return
            found = wire.mapping_of(data)
            if found is None:
                raise UserError(f"{base} sent an event that is not a JSON object")
            if (message := wire.message_of(found)) is not None:
                raise UserError(f"{base} ended the reply: {message}")
            yield found


def _part(choice: Mapping[str, Any]) -> Part:
    """What an event brings; its tokens only where they make up its text."""
    text = wire.mapping_at(choice, "delta").get("content")
    text = text if isinstance(text, str) else ""
    trace = wire.mapping_at(choice, "exitlm")
    tokens = list(zip(trace.get("tokens") or [], trace.get("exit_layers") or [], strict=False))
    return Part(text=text, tokens=tokens if "".join(token for token, _ in tokens) == text else ())


def _taken(ended: str, usage: Mapping[str, Any], seconds: float) -> Taken:
    """What a reply took, by its usage; ``seconds`` are those from its first part to its last."""
    own = wire.mapping_at(usage, "exitlm")
    tokens = wire.whole_of(usage, "completion_tokens")
    told = figure(own.get("tokens_per_second"))
    return Taken(
        ended=ended, tokens=tokens, tokens_per_second=speed(tokens or 0, seconds) if told is None else told,
        mean_layers=figure(own.get("mean_layers")), mode=own.get("mode"), exact=own.get("exact"),
        prompt_tokens=wire.whole_of(usage, "prompt_tokens"),
        reused=wire.whole_of(usage, "prompt_tokens_details", "cached_tokens"),
        drafted=wire.whole_of(own, "drafts") or 0, accepted=wire.whole_of(own, "accepted") or 0,
        seed=wire.whole_of(own, "seed"),
    )  # fmt: skip


def _facts(name: str, exits: Mapping[str, Any] | None, context: int | None) -> Facts:
    if exits is None:
        return Facts(name=name, context=context)
    listed = exits.get("exits")
    layers = [wire.whole_of(one, "layer") for one in (listed if isinstance(listed, list) else [])]
    return Facts(
        name=name, num_layers=wire.whole_of(exits, "layers"), context=context, mode=exits.get("default_mode"),
        exit_layers=[layer for layer in layers if layer is not None], exact=exits.get("exact"),
    )  # fmt: skip


def _words(error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    inner = getattr(reason, "strerror", None) or reason
    return " ".join(str(inner).split()) or type(error).__name__
