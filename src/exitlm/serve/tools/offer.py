"""What a request offers the model to call, and whether it must: ``tools``, ``tool_choice``, ``parallel_tool_calls``.

Reads OpenAI's fields of chat completions and, where their shapes differ, those of responses too. It doesn't say how a
call is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from exitlm.errors import UserError, nearest, short
from exitlm.values import elements, flag, wrong

MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_CHOICES = ("none", "auto", "required")
_CHOICE = "one of 'none', 'auto', 'required', or {'type': 'function', 'function': {'name': NAME}}"
# A schema with one of these may say by itself that it is one of objects.
_COMBINED = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. ``parameters``: the JSON schema of its arguments, which is one of objects."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})

    def definition(self) -> dict[str, Any]:
        """The tool in the shape that chat templates take, which often need all three fields."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, kw_only=True)
class Offer:
    """``tools``: those that the prompt shows; none for ``tool_choice`` "none". ``forced``: the answer must be a call;
    ``name``: of this tool, once. ``parallel``: an answer may hold several calls."""

    tools: tuple[Tool, ...] = ()
    forced: bool = False
    name: str | None = None
    parallel: bool = True


def read_offer(tools: Any = None, tool_choice: Any = None, parallel_tool_calls: Any = None) -> Offer:
    """The offer of a request; each field None where the request lacks it.

    ``tool_choice`` may also be ``{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}``: then the
    prompt shows those tools alone.

    Raises:
        UserError: the field, and what is wrong with it.
    """
    found = _read_tools(tools)
    parallel = True if parallel_tool_calls is None else flag(parallel_tool_calls, "parallel_tool_calls")
    if tool_choice is None:
        return Offer(tools=found, parallel=parallel)
    if isinstance(tool_choice, str):
        return _with_mode(tool_choice, "tool_choice", found, parallel)
    if not isinstance(tool_choice, Mapping):
        raise wrong("tool_choice", tool_choice, _CHOICE)
    kind = tool_choice.get("type")
    if kind == "allowed_tools":
        allowed = tool_choice.get("allowed_tools", tool_choice)
        if not isinstance(allowed, Mapping):
            raise wrong("tool_choice.allowed_tools", allowed, "a mapping with mode and tools")
        named = elements(allowed.get("tools"), "tool_choice.tools", "a list of tools")
        names = {_name_of(one, "tool_choice.tools", found) for one in named}
        kept = tuple(tool for tool in found if tool.name in names)
        return _with_mode(allowed.get("mode", "auto"), "tool_choice.mode", kept, parallel)
    if kind != "function":
        raise UserError(f"tool_choice has type {short(kind)}, but must be {_CHOICE}")
    return Offer(tools=found, forced=True, name=_name_of(tool_choice, "tool_choice", found), parallel=False)


def _with_mode(mode: Any, name: str, tools: tuple[Tool, ...], parallel: bool) -> Offer:
    if mode not in _CHOICES:
        near = nearest(mode, _CHOICES) if isinstance(mode, str) else ""
        raise UserError(f"{name} is {short(mode)}, but must be {_CHOICE}{near}")
    if mode == "required" and not tools:
        raise UserError(f"{name} is 'required', but the request has no tools; give at least one")
    return Offer(tools=() if mode == "none" else tools, forced=mode == "required", parallel=parallel)


def _name_of(value: Any, where: str, tools: Sequence[Tool]) -> str:
    """The name in a choice of a tool, which must be one of ``tools``."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise wrong(where, value, "of the shape {'type': 'function', 'function': {'name': NAME}}")
    names = [tool.name for tool in tools]
    if name not in names:
        raise UserError(f"{where} names {short(name)}, which is not one of the tools{nearest(name, names)}")
    return name


def _read_tools(value: Any) -> tuple[Tool, ...]:
    if value is None:
        return ()
    found: dict[str, Tool] = {}
    items = elements(value, "tools", "a list of {'type': 'function', 'function': {'name': NAME}}")
    if len(items) > MAX_TOOLS:
        raise UserError(f"tools has {len(items)} of them; give at most {MAX_TOOLS}")
    for number, item in enumerate(items):
        tool = _read_tool(item, f"tools[{number}]")
        if tool.name in found:
            raise UserError(f"tools[{number}] has the name {tool.name!r} of an earlier one; give each its own")
        found[tool.name] = tool
    return tuple(found.values())


def _read_tool(item: Any, where: str) -> Tool:
    if not isinstance(item, Mapping) or item.get("type") != "function":
        raise wrong(where, item, "of the shape {'type': 'function', 'function': {'name': NAME}}")
    function = item.get("function", item)
    if not isinstance(function, Mapping):
        raise wrong(f"{where}.function", function, "a mapping with name, description and parameters")
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise wrong(f"{where}.name", name, "1 to 64 letters, digits, '_', '-' and '.'")
    if not isinstance(description, str | None):
        raise wrong(f"{where}.description", description, "a text")
    if parameters is None:
        tool = Tool(name, description or "")
    else:
        tool = Tool(name, description or "", _read_parameters(parameters, f"{where}.parameters"))
    try:
        json.dumps(tool.definition(), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} is not valid UTF-8 text; give it in that encoding") from None
    return tool


def _read_parameters(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise wrong(where, value, "a JSON schema (a mapping)")
    try:
        schema: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))  # a copy, and surely JSON
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} can't be written as JSON: {error}") from error
    if "type" not in schema and not any(key in schema for key in _COMBINED):
        return {"type": "object", **schema}
    if schema.get("type", "object") != "object":
        raise UserError(f"{where} has type {short(schema['type'])}, but arguments are an object; use type 'object'")
    return schema
