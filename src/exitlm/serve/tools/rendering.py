"""A conversation with tools in the shape that a chat template takes.

Requests follow OpenAI: arguments are a JSON text, ids are free, an answer may hold several calls. Templates differ:
most want arguments as a mapping, Mistral's wants ids of nine characters, Llama's one call a message, and a template
that knows of no tools wants plain text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exitlm.errors import UserError, short
from exitlm.serve.tools.formats import Format
from exitlm.serve.tools.offer import Tool
from exitlm.values import elements, wrong

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHORT_ID = 9


@dataclass(frozen=True)
class Rendered:
    """What ``tokenizer.apply_chat_template`` is given. ``tools`` is None where it is given none."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


def template_of(tokenizer: Any) -> str | None:
    """The chat template that a tokenizer of transformers uses for a conversation with tools; None if it has none."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        return str(template.get("tool_use") or template.get("default") or "") or None
    return template or None


def render(format: Format, messages: Sequence[Any], tools: Sequence[Tool] = ()) -> Rendered:
    """``messages`` (OpenAI's, as mappings) and the ``tools`` of an offer, as the template of ``format`` takes them.

    Content may be a text, None, or a list of parts that are texts. The role developer becomes system. Results get the
    name of the tool that was called. What templates don't read (``refusal``, ...) is left out.

    Raises:
        UserError: the message, by its number from 1, and what is wrong with it.
    """
    read = [_read_message(item, f"message {number}", format) for number, item in enumerate(messages, 1)]
    _name_results(read)
    if not format.takes_tools:
        return Rendered(_described(format, read, tools), None)
    if format.single_calls:
        read = _one_call_each(read)
    return Rendered(read, [tool.definition() for tool in tools] or None)


# ---- one message


def _read_message(item: Any, name: str, format: Format) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise wrong(name, item, "a mapping with role and content")
    role = item.get("role")
    if role not in _ROLES:
        raise UserError(f"{name} has role {short(role)}; use one of {', '.join(_ROLES)}")
    calls = item.get("tool_calls") if role == "assistant" else None
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    message["content"] = _read_content(item.get("content"), f"content of {name}", may_lack=role == "assistant")
    if calls:
        where = f"tool_calls of {name}"
        found = enumerate(elements(calls, where, "a list of calls"), 1)
        message["tool_calls"] = [_read_call(call, f"call {number} of {name}", format) for number, call in found]
    if role == "tool":
        message["tool_call_id"] = _read_id(item.get("tool_call_id"), f"tool_call_id of {name}", format)
    return message


def _read_content(value: Any, name: str, *, may_lack: bool) -> str:
    if value is None and may_lack:
        return ""
    if isinstance(value, str):
        return _utf8(value, name)
    texts = []
    for part in elements(value, name, "a text, or a list of {'type': 'text', 'text': TEXT}"):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text" if kind == "text" else "refusal") if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise wrong(name, part, "of the shape {'type': 'text', 'text': TEXT}")
        texts.append(_utf8(text, name))
    return "".join(texts)


def _read_call(value: Any, name: str, format: Format) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping):
        raise wrong(name, value, "of the shape {'id': ID, 'function': {'name': NAME, 'arguments': JSON}}")
    called, arguments = function.get("name"), function.get("arguments")
    if not isinstance(called, str):
        raise wrong(f"the function's name in {name}", called, "a text")
    if not isinstance(arguments, str | Mapping):
        raise wrong(f"arguments of {name}", arguments, "a JSON object as a text")
    read = {"name": _utf8(called, name), "arguments": _read_arguments(arguments)}
    return {"id": _read_id(value.get("id"), f"id of {name}", format), "type": "function", "function": read}


def _read_arguments(value: str | Mapping[str, Any]) -> Any:
    """Arguments as a mapping; a text that is no JSON object, which a model may have written, stays as it is."""
    if isinstance(value, Mapping):
        return dict(value)
    try:
        found = json.loads(value or "{}")
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return value.encode(errors="replace").decode()
    return found if isinstance(found, dict) else value


def _read_id(value: Any, name: str, format: Format) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "the id of a call")
    _utf8(value, name)
    if not format.short_ids or (len(value) == _SHORT_ID and value.isascii() and value.isalnum()):
        return value
    return hashlib.sha256(value.encode()).hexdigest()[:_SHORT_ID]


def _utf8(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} is not valid UTF-8 text; give it in that encoding") from None
    return text


def _name_results(messages: list[dict[str, Any]]) -> None:
    """Put the names of the tools that were called into the messages of their results: some templates show them."""
    names: dict[str, str] = {}
    for message in messages:
        names.update({call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())})
        if message["role"] == "tool" and message["tool_call_id"] in names:
            message["name"] = names[message["tool_call_id"]]


# ---- templates that take less


def _one_call_each(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation with one call a message, each followed by its results."""
    split: list[dict[str, Any]] = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            split.append(message)
            continue
        count = next((n for n, later in enumerate(rest) if later["role"] != "tool"), len(rest))
        results, rest = rest[:count], rest[count:]
        for number, call in enumerate(calls):
            content = message["content"] if number == 0 else ""
            split.append({"role": "assistant", "content": content, "tool_calls": [call]})
            split += [result for result in results if result["tool_call_id"] == call["id"]]
        known = {call["id"] for call in calls}
        split += [result for result in results if result["tool_call_id"] not in known]
    return split


def _described(format: Format, messages: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The same conversation in plain messages: tools in the system's, calls in the assistant's, results in the user's.

    Neighbouring results share a message, since such templates often want the roles to alternate.
    """
    plain: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if plain and plain[-1].get("results"):
                plain[-1]["content"] += f"\n{content}"
            else:
                plain.append({"role": "user", "content": content, "results": True})
            continue
        if calls := message.get("tool_calls"):
            written = format.write((call["function"]["name"], call["function"]["arguments"]) for call in calls)
            content = f"{content}\n{written}" if content else written
        plain.append({"role": message["role"], "content": content})
    found = [{"role": message["role"], "content": message["content"]} for message in plain]
    return _with_description(format, found, tools) if tools else found


def _with_description(format: Format, messages: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    definitions = "\n".join(json.dumps(tool.definition(), ensure_ascii=False) for tool in tools)
    pattern = format.write([("NAME", {"ARGUMENT": "VALUE"})])
    text = (
        f"You may call these functions, each described by a JSON object:\n<tools>\n{definitions}\n</tools>\n"
        f"To call one, write its name and arguments like this:\n{pattern}"
    )
    if messages and messages[0]["role"] == "system":
        first, *rest = messages
        return [{"role": "system", "content": f"{first['content']}\n\n{text}" if first["content"] else text}, *rest]
    return [{"role": "system", "content": text}, *messages]
