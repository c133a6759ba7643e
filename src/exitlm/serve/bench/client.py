"""One request over HTTP, and when the parts of its answer arrived. What goes wrong is noted, never raised.

Needs httpx2, which comes with transformers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx2

from exitlm.errors import UserError
from exitlm.serve import wire
from exitlm.serve.bench.records import Ask, Record

_CONNECTING = 30.0  # seconds


class Broken(Exception):
    """An answer that ended too soon, or is none; ``status`` is what it counts as."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class LoadClient:
    """Sends requests to ``url``; each may take ``timeout`` seconds. Times count from when this is made. ``done`` counts
    answers."""

    def __init__(self, client: httpx2.AsyncClient, url: str, timeout: float) -> None:
        self._client, self._url, self._timeout = client, url, timeout
        self._loop = asyncio.get_running_loop()
        self._begin = self._loop.time()
        self.done = 0

    def clock(self) -> float:
        """The loop's time."""
        return self._loop.time()

    def now(self) -> float:
        """Seconds since the run began."""
        return self._loop.time() - self._begin

    async def send(self, ask: Ask, due: float) -> Record:
        """Send a request that is due at ``due`` of the loop's clock."""
        record = Record(index=ask.index, due=due - self._begin, sent=self.now())
        try:
            async with asyncio.timeout(self._timeout):
                await self._answer(ask, record)
        except TimeoutError:
            record.status, record.message = "timeout", f"no whole answer within {self._timeout:g} s"
        except Broken as error:
            record.status, record.message = error.status, str(error)
        except httpx2.HTTPError as error:
            record.status = "timeout" if isinstance(error, httpx2.TimeoutException) else "connection"
            record.message = str(error) or type(error).__name__
        record.end = self.now()
        self.done += 1
        return record

    async def _answer(self, ask: Ask, record: Record) -> None:
        async with self._client.stream("POST", self._url, json=ask.body) as response:
            if response.status_code != 200:
                found = wire.refusal(self._url, response.status_code, await response.aread(), response.reason_phrase)
                raise Broken(str(response.status_code), str(found))
            if ask.body.get("stream"):
                await self._stream(response, record)
            else:
                self._whole(await response.aread(), record)

    async def _stream(self, response: httpx2.Response, record: Record) -> None:
        reader, is_done = wire.EventReader(), False
        async for chunk in response.aiter_bytes():
            now = self.now()
            for data in reader.feed(chunk):
                if data == wire.DONE:
                    is_done = True
                    continue
                found = wire.mapping_of(data)
                if found is None:
                    raise Broken("broken", "an event is not a JSON object")
                if (message := wire.message_of(found)) is not None:
                    raise Broken("error", message)
                if note(found, record):
                    record.texts.append(now)
        if not is_done and record.finish_reason is None:
            raise Broken("broken", "the stream ended within the answer")

    @staticmethod
    def _whole(body: bytes, record: Record) -> None:
        found = wire.mapping_of(body)
        if found is None or not wire.choices_of(found):
            raise Broken("broken", "the answer is not a JSON object with choices")
        note(found, record)


def note(found: Mapping[str, Any], record: Record) -> bool:
    """Take what an event or a whole answer says beside its text; whether it has any text."""
    if found.get("usage"):
        record.prompt_tokens = wire.whole_of(found, "usage", "prompt_tokens")
        record.completion_tokens = wire.whole_of(found, "usage", "completion_tokens")
        record.cached_tokens = wire.whole_of(found, "usage", "prompt_tokens_details", "cached_tokens")
    has_text = False
    for choice in wire.choices_of(found):
        record.finish_reason = choice.get("finish_reason") or record.finish_reason
        delta = wire.mapping_at(choice, "delta")
        has_text |= bool(choice.get("text") or any(value for name, value in delta.items() if name != "role"))
    return has_text


def new_client(
    base: str, headers: Mapping[str, str], transport: httpx2.AsyncBaseTransport | None = None
) -> httpx2.AsyncClient:
    """A client without a limit of connections: a plan of arrivals is not to wait for one. ``transport`` replaces the
    network."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx2.Timeout(None, connect=_CONNECTING)
    return httpx2.AsyncClient(
        headers=dict(headers), limits=limits, timeout=timeout, transport=transport, trust_env=not wire.is_here(base)
    )


async def first_model(client: httpx2.AsyncClient, base: str) -> str:
    """The model of a server that is meant where none is named: the first, or the first with exits.

    Raises:
        UserError: it is not there, or offers none.
    """
    listed = await _get(client, f"{base}/models")
    if listed.status_code != 200:
        raise wire.refusal(f"{base}/models", listed.status_code, listed.content, listed.reason_phrase)
    told = await _get(client, f"{base}/exits")
    exits = wire.mapping_of(told.content) if told.status_code == 200 else None
    name = wire.first_of(wire.names_of(wire.mapping_of(listed.content)), exits or {})
    if name is None:
        raise UserError(f"{base} offers no model; name one by --model")
    return name


async def _get(client: httpx2.AsyncClient, url: str) -> httpx2.Response:
    try:
        return await client.get(url, timeout=_CONNECTING)
    except httpx2.HTTPError as error:
        said = str(error) or type(error).__name__
        raise UserError(f"cannot reach {url}: {said}; is the server running?") from error
