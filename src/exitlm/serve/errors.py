"""Refusals as clients read them: an HTTP status, and OpenAI's error object with one plain sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from exitlm.decode.remote.lost import PipelineDown
from exitlm.errors import UserError
from exitlm.serve.async_engine import Broken, Expired, Full

_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    500: "server_error", 503: "service_unavailable_error", 504: "timeout_error",
}  # fmt: skip


_REPLACED = "10"  # seconds after which somebody may have started another stage


class ApiError(Exception):
    """A refusal. ``param``: the field of the request that is wrong; ``code``: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """The body of the answer; text that UTF-8 can't hold is escaped."""
        return json.dumps(self.to_json()).encode()


class ClientLeft(Exception):
    """The client closed its connection before its answer was done, or reads nothing any more."""


def refusal_of(error: BaseException, param: str | None = None) -> ApiError:
    """The refusal that stands for an exception; ``param`` is the field that a :class:`UserError` is about."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Full):
        retry = {"retry-after": str(error.retry_after)}
        return ApiError(429, str(error), code="queue_full", headers=retry)
    if isinstance(error, Expired):
        return ApiError(504, str(error), code="deadline_exceeded")
    if isinstance(error, UserError):
        return ApiError(400, str(error), param=param)
    if isinstance(error, ClientLeft):
        return ApiError(499, str(error))  # which nobody reads
    if isinstance(error, PipelineDown):
        return ApiError(503, str(error), code="stage_lost", headers={"retry-after": _REPLACED})
    if isinstance(error, Broken):
        return ApiError(500, str(error), code="engine_error")
    return ApiError(500, "the server failed to answer; its log says why", code="internal_error")
