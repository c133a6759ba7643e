"""The HTTP application: which path is answered by what, and every refusal in OpenAI's shape.

Endpoints are thin: ``chat.py``, ``completions.py`` and the like answer. ``guard.py`` stands before all of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from exitlm.errors import UserError
from exitlm.serve import chat, completions, reference, responses, tokens
from exitlm.serve.async_engine import Broken
from exitlm.serve.config import ServeConfig
from exitlm.serve.errors import ApiError, ClientLeft, refusal_of
from exitlm.serve.guard import Application, Guard
from exitlm.serve.keys import Keys
from exitlm.serve.metrics import CONTENT_TYPE
from exitlm.serve.playground import page, page_headers
from exitlm.serve.protocol import answers
from exitlm.serve.protocol.chat import ChatBody
from exitlm.serve.protocol.completion import CompletionBody
from exitlm.serve.protocol.reference import ReferenceBody
from exitlm.serve.protocol.refusals import refusal
from exitlm.serve.protocol.response import ResponseBody
from exitlm.serve.protocol.tokens import DetokenizeBody, TokenizeBody
from exitlm.serve.service import State
from exitlm.serve.stream import EventStream

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatBody, "/v1/completions": CompletionBody, "/v1/responses": ResponseBody,
    "/tokenize": TokenizeBody, "/detokenize": DetokenizeBody, "/api": ReferenceBody,
}  # fmt: skip
_SAID = {
    400: "the body can't be read as JSON; send an object in UTF-8, with numbers of fewer than 4,300 digits",
    404: "there is nothing at {path}; see /openapi.json", 405: "{path} takes no {method}; see /openapi.json",
}  # fmt: skip


def application(state: State) -> Application:
    """The whole application, with all that stands before the endpoints."""
    all_requests = state.config.http.log == "requests"
    return guarded(routes(state), state.config, all_requests=all_requests, closed=state.closed)


def guarded(
    app: Application, config: ServeConfig, *, all_requests: bool, closed: Callable[[], ApiError | None]
) -> Application:
    """``app`` behind the guard (``all_requests``, ``closed``: see there), and open to pages of the origins allowed."""
    guard: Application = Guard(
        app, keys=Keys(config.http.api_keys), body_bytes=config.limits.body_bytes,
        read_timeout=config.limits.read_timeout, all_requests=all_requests, closed=closed,
    )  # fmt: skip
    if not config.http.cors_origins:
        return guard
    return CORSMiddleware(
        guard, allow_origins=list(config.http.cors_origins), allow_methods=["GET", "POST", "PUT"],
        allow_headers=["authorization", "content-type", "x-request-id", "x-session-id"],
        expose_headers=["x-request-id"],
    )  # fmt: skip


def routes(state: State) -> FastAPI:
    """The endpoints."""
    app = FastAPI(title="exitlm", version="1", docs_url=None, redoc_url=None, responses=answers.REFUSALS)
    _refusals(app)

    @app.post("/v1/chat/completions", tags=["openai"], responses=answers.CHAT)
    async def chat_completions(body: ChatBody, http: Request) -> Response:
        """The next message of a conversation."""
        return _response(await chat.answer(state.ready(), http, body))

    @app.post("/v1/completions", tags=["openai"], responses=answers.COMPLETION)
    async def text_completions(body: CompletionBody, http: Request) -> Response:
        """What follows a text."""
        return _response(await completions.answer(state.ready(), http, body))

    @app.post("/v1/responses", tags=["openai"], responses=answers.RESPONSE)
    async def response(body: ResponseBody, http: Request) -> Response:
        """The next items of a conversation."""
        return _response(await responses.answer(state.ready(), http, body))

    @app.api_route("/v1/responses/{path:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
    async def kept_response(path: str) -> Response:
        """Nothing is kept."""
        raise responses.not_kept()

    @app.get("/v1/models", tags=["openai"], responses=answers.MODELS)
    async def models() -> Response:
        """The models by name."""
        return _response(state.ready().models.listed())

    @app.get("/v1/models/{name:path}", tags=["openai"], responses=answers.MODEL)
    async def model(name: str) -> Response:
        """One of them."""
        found = state.ready().models
        return _response(found.entry(found.find(name)))

    @app.get("/v1/exits", tags=["exitlm"], responses=answers.EXITS)
    async def exits() -> Response:
        """The exits of each model."""
        return _response(state.ready().models.exits())

    @app.put("/api", tags=["reference"], responses=answers.REFERENCE)
    async def api(body: ReferenceBody, http: Request) -> Response:
        """Answers in the format of EE-LLM's server."""
        return _response(await reference.answer(state.ready(), http, body))

    @app.post("/tokenize", tags=["exitlm"], responses=answers.TOKENIZED)
    async def tokenize(body: TokenizeBody) -> Response:
        """Token ids of a text or a conversation."""
        return _response(await tokens.tokenize(state.ready(), body))

    @app.post("/detokenize", tags=["exitlm"], responses=answers.DETOKENIZED)
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of token ids."""
        return _response(await tokens.detokenize(state.ready(), body))

    @app.get("/health", tags=["exitlm"], responses=answers.HEALTH)
    async def health() -> Response:
        """200 while the server answers, else 503."""
        status, said = state.health()
        return _response(said, status)

    @app.get("/metrics", tags=["exitlm"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(state.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        """The page."""
        return Response(page(), headers=page_headers())

    return app


def _response(found: EventStream | dict[str, Any], status: int = 200) -> Response:
    if isinstance(found, EventStream):
        return found
    return Response(json.dumps(found).encode(), status, media_type="application/json")


def _refusals(app: FastAPI) -> None:
    """Every refusal as OpenAI's error object."""

    async def of_body(http: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _refused(refusal(error.errors(), _BODIES.get(http.url.path)))

    async def of_routing(http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = _SAID.get(error.status_code, str(error.detail)).format(path=http.url.path, method=http.method)
        return _refused(ApiError(error.status_code, said, headers=error.headers))

    async def of_answer(http: Request, error: Exception) -> Response:
        return _refused(refusal_of(error))

    app.add_exception_handler(RequestValidationError, of_body)
    app.add_exception_handler(HTTPException, of_routing)
    for kind in (ApiError, UserError, Broken, ClientLeft, Exception):  # of the last one, the guard logs the traceback
        app.add_exception_handler(kind, of_answer)


def _refused(error: ApiError) -> Response:
    return Response(error.body(), error.status, headers=error.headers, media_type="application/json")
