"""What the OpenAPI document says of answers: JSON schemas of their fixed parts, and of every refusal.

Answers are built as plain dictionaries, since checking each one would take longer than writing it; the tests check them
against this.
"""

from __future__ import annotations

from typing import Any

_TEXT, _WHOLE, _NUMBER, _FLAG = {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}


def _object(properties: dict[str, Any], *free: str) -> dict[str, Any]:
    """An object with these properties, of which those in ``free`` may be missing."""
    return {"type": "object", "properties": properties, "required": [name for name in properties if name not in free]}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _answer(schema: dict[str, Any], description: str, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if streams:
        content["text/event-stream"] = {}
    return {200: {"description": description, "content": content}}


_REFUSAL = _object(
    {"error": _object({"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _or_null(_TEXT)})}
)
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {"application/json": {"schema": _REFUSAL}}}
    for status, description in (
        ("4XX", "The request is wrong, or comes at the wrong time"),
        ("5XX", "The server can't answer"),
    )
}
_USAGE = _object(
    {
        "prompt_tokens": _WHOLE, "completion_tokens": _WHOLE, "total_tokens": _WHOLE,
        "prompt_tokens_details": {"type": "object"}, "completion_tokens_details": {"type": "object"},
        "exitlm": _object(
            {
                "mode": {"enum": ["full", "lossless", "threshold"]}, "exact": _FLAG, "mean_layers": _or_null(_NUMBER),
                "layers": _WHOLE, "drafts": _WHOLE, "accepted": _WHOLE, "acceptance": _or_null(_NUMBER),
                "tokens_per_second": _or_null(_NUMBER),
            }
        ),
    }
)  # fmt: skip
_TRACE = _object(
    {
        "exit_layers": _list(_WHOLE), "confidences": _list(_or_null(_NUMBER)), "sources": _list(_TEXT),
        "tokens": _list(_TEXT),
        "tested": _list(_list(_object({"layer": _WHOLE, "confidence": _or_null(_NUMBER)}))),
    }
)  # fmt: skip
_CALL = _object({"id": _TEXT, "type": {"const": "function"}, "function": _object({"name": _TEXT, "arguments": _TEXT})})
_MESSAGE = _object(
    {
        "role": {"const": "assistant"}, "content": _or_null(_TEXT), "refusal": _or_null(_TEXT),
        "annotations": _list({}), "tool_calls": _list(_CALL),
    },
    "tool_calls",
)  # fmt: skip
_CHAT_CHOICE = _object(
    {
        "index": _WHOLE, "message": _MESSAGE, "logprobs": _or_null({"type": "object"}),
        "finish_reason": {"enum": ["stop", "length", "tool_calls"]}, "exitlm": _TRACE,
    },
    "exitlm",
)  # fmt: skip
_TEXT_CHOICE = _object(
    {
        "index": _WHOLE, "text": _TEXT, "logprobs": _or_null({"type": "object"}),
        "finish_reason": {"enum": ["stop", "length"]}, "exitlm": _TRACE,
    },
    "exitlm",
)  # fmt: skip
_HEAD = {"id": _TEXT, "created": _WHOLE, "model": _TEXT, "system_fingerprint": _TEXT, "usage": _USAGE}
_MODEL = _object({"id": _TEXT, "object": {"const": "model"}, "created": _WHOLE, "owned_by": _TEXT})
_EXIT = _object({"layer": _WHOLE, "kind": _TEXT, "threshold": _or_null(_NUMBER), "tested": _FLAG})
_EXITS = _object(
    {
        "layers": _WHOLE, "exits": _list(_EXIT), "default_mode": _TEXT, "modes": _list(_TEXT), "rules": _list(_TEXT),
        "exact": _FLAG,
    }
)  # fmt: skip

CHAT = _answer(
    _object({**_HEAD, "object": {"const": "chat.completion"}, "service_tier": _TEXT, "choices": _list(_CHAT_CHOICE)}),
    "The next message, or with stream its chunks as events",
    streams=True,
)
COMPLETION = _answer(
    _object({**_HEAD, "object": {"const": "text_completion"}, "choices": _list(_TEXT_CHOICE)}),
    "What follows each prompt, or with stream its chunks as events",
    streams=True,
)
RESPONSE = _answer(
    _object(
        {
            "id": _TEXT, "object": {"const": "response"}, "created_at": _NUMBER, "model": _TEXT,
            "status": {"enum": ["completed", "incomplete"]}, "output": _list({"type": "object"}),
            "store": {"const": False},
        }
    ),
    "The items that follow, or with stream the events that build them",
    streams=True,
)  # fmt: skip
MODEL = _answer(_MODEL, "The model")
MODELS = _answer(_object({"object": {"const": "list"}, "data": _list(_MODEL)}), "The models")
EXITS = _answer({"type": "object", "additionalProperties": _EXITS}, "The exits of each model")
REFERENCE = _answer(
    _object(
        {
            "text": _list(_TEXT), "segments": _list(_list(_TEXT)),
            "logprobs": _or_null(_list(_list(_or_null(_NUMBER)))), "request_time": _NUMBER, "requst_time": _NUMBER,
            "exit_layers": _list(_list(_WHOLE)), "exact": _FLAG, "max_probs": _list(_list({"type": "object"})),
        },
        "max_probs",
    ),
    "What follows each prompt",
)  # fmt: skip
TOKENIZED = _answer(
    _object({"count": _WHOLE, "max_model_len": _WHOLE, "tokens": _list(_WHOLE), "token_strs": _or_null(_list(_TEXT))}),
    "The token ids",
)
DETOKENIZED = _answer(_object({"prompt": _TEXT}), "The text")
_HEALTH = _object({"status": {"enum": ["ok", "loading", "draining", "broken"]}})
HEALTH: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {"application/json": {"schema": _HEALTH}}}
    for status, description in ((200, "It answers"), (503, "It is loading or ends, or its engine is broken"))
}
