"""From the body of ``/v1/responses`` to that of a chat completion, which is then answered as any other.

```
instructions, leading system items -> the system message      function_call        -> a call in an assistant's message
message                            -> a message               function_call_output -> a tool's message
```
Reasoning items are skipped. What needs responses that are kept is refused: this server keeps none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from exitlm.serve.errors import ApiError
from exitlm.serve.protocol.chat import ChatBody, FunctionCall, Message, ToolCall
from exitlm.serve.protocol.fields import SamplingBody
from exitlm.serve.protocol.response import Item, Part, ResponseBody

STATELESS = "this server keeps no responses"
_SYSTEM = ("system", "developer")
_TEXTS = ("input_text", "output_text", "text")


def chat_body(body: ResponseBody) -> ChatBody:
    """The same request as a chat completion.

    Raises:
        ApiError: a field that needs responses to be kept, or an item that can't be read.
    """
    _check_stateless(body)
    shared = {name: getattr(body, name) for name in SamplingBody.model_fields if name not in ("n", "stream_options")}
    return ChatBody(
        **shared, messages=_messages(body), max_completion_tokens=body.max_output_tokens,
        logprobs=body.logprobs or None, top_logprobs=body.top_logprobs if body.logprobs else None,
        response_format=_response_format(body), tools=body.functions or None, tool_choice=_tool_choice(body),
        parallel_tool_calls=body.parallel_tool_calls,
    )  # fmt: skip


def _check_stateless(body: ResponseBody) -> None:
    remedies = {
        "previous_response_id": f"{STATELESS}; send the whole conversation as input",
        "conversation": f"{STATELESS}; send the whole conversation as input",
        "background": f"{STATELESS} to be fetched later; leave it out, and use stream",
        "prompt": "this server keeps no prompts; send the text as instructions and input",
    }
    for name, remedy in remedies.items():
        if getattr(body, name):
            raise ApiError(400, f"{name} is not supported: {remedy}", param=name, code="unsupported_parameter")
    if body.truncation == "auto":
        said = (
            "truncation 'auto' is not supported: input is never cut; leave it out, and shorten input that is too long"
        )
        raise ApiError(400, said, param="truncation", code="unsupported_parameter")


def _response_format(body: ResponseBody) -> dict[str, Any] | None:
    """``text.format``, whose schema stands beside its type, as chat completions have it."""
    found = None if body.text is None else body.text.format
    if found is None or found == {"type": "text"}:
        return None
    if found.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {k: v for k, v in found.items() if k != "type"}}
    return found


def _tool_choice(body: ResponseBody) -> str | dict[str, Any] | None:
    """``tool_choice``; among allowed tools those that are no functions are skipped, as in ``tools``."""
    choice = body.tool_choice
    if (
        not isinstance(choice, dict)
        or choice.get("type") != "allowed_tools"
        or not isinstance(choice.get("tools"), list)
    ):
        return choice
    functions = [
        tool for tool in choice["tools"]
        if not isinstance(tool, Mapping) or tool.get("type", "function") == "function"
    ]  # fmt: skip
    return {**choice, "tools": functions}


# ---- items


def _messages(body: ResponseBody) -> list[Message]:
    items = [Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    found: list[Message] = []
    if body.instructions:
        found.append(Message(role="system", content=body.instructions))
    opening = True  # only system messages so far: they are one message to a chat template
    for number, item in enumerate(items):
        where = f"input.{number}"
        kind = item.type or "message"
        if kind == "reasoning":
            continue
        if kind == "message":
            message = _message(item, where)
            opening = opening and message.role in _SYSTEM
            _add_message(found, message, opening)
            continue
        opening = False
        if kind == "function_call":
            _add_call(found, item, where)
        elif kind == "function_call_output":
            found.append(Message(
                role="tool", tool_call_id=_given(item.call_id, f"{where}.call_id"),
                content=_text(_given(item.output, f"{where}.output"), f"{where}.output"),
            ))  # fmt: skip
        elif kind == "item_reference":
            raise ApiError(400, f"{where} refers to an item, but {STATELESS}; send the item itself", param=where)
        else:
            said = f"{where} has type {kind!r}, but only messages, function calls and their outputs are read"
            raise ApiError(400, f"{said}; leave it out", param=f"{where}.type")
    if not found:
        raise ApiError(400, "input is empty; give at least one message", param="input")
    return found


def _message(item: Item, where: str) -> Message:
    role = _given(item.role, f"{where}.role")
    return Message(role=role, content=_text(_given(item.content, f"{where}.content"), f"{where}.content"))


def _add_message(found: list[Message], message: Message, opening: bool) -> None:
    """Add a message. An answer's text and calls are one message, and so are the system messages that open it all."""
    last = found[-1] if found else None
    if last is not None and opening:
        found[-1] = Message(role="system", content=f"{last.content}\n\n{message.content}")
    elif last is not None and message.role == last.role == "assistant" and last.tool_calls:
        found[-1] = last.model_copy(update={"content": f"{last.content or ''}{message.content}"})
    else:
        found.append(message)


def _add_call(found: list[Message], item: Item, where: str) -> None:
    """Add a call to the assistant's message that it belongs to."""
    name, arguments = _given(item.name, f"{where}.name"), _given(item.arguments, f"{where}.arguments")
    call = ToolCall(
        id=_given(item.call_id, f"{where}.call_id"), function=FunctionCall(name=name, arguments=arguments)
    )  # fmt: skip
    last = found[-1] if found else None
    if last is not None and last.role == "assistant":
        found[-1] = last.model_copy(update={"tool_calls": [*(last.tool_calls or ()), call]})
    else:
        found.append(Message(role="assistant", tool_calls=[call]))


def _given(value: Any, name: str) -> Any:
    if value is None:
        raise ApiError(400, f"field '{name}' is missing", param=name, code="missing_required_parameter")
    return value


def _text(content: str | Sequence[Part], name: str) -> str:
    """The text of a message or an output."""
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        if part.type not in (*_TEXTS, "refusal"):
            raise ApiError(400, f"{name} has a part of type '{part.type}', but text alone is read", param=name)
        field = "refusal" if part.type == "refusal" else "text"
        texts.append(_given(getattr(part, field), f"{name}.{number}.{field}"))
    return "".join(texts)
