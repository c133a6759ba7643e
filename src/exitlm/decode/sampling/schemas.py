"""JSON schemas as xgrammar reads them right, alone and within a structural tag.

xgrammar 0.2 reads over some keywords and takes others in its own way. This file rewrites and warns; it compiles nothing
(see ``grammar``). xgrammar is imported when the first structural tag is written.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from exitlm.errors import UserError, short

MAX_WHITESPACE = 20  # characters in one gap of a JSON text: a small model may write blanks for ever

# Where a JSON schema holds further ones: by name, in a list, or alone.
NAMED = ("properties", "patternProperties", "$defs", "definitions")
LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
ALONE = ("items", "additionalProperties", "propertyNames")
# Keywords that xgrammar 0.2 reads over, or takes one part of.
UNENFORCED = (
    *("not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains"),
    *("dependentRequired", "dependentSchemas"),
)


def _subschemas(schema: Mapping[str, Any]) -> Iterator[Any]:
    """The schemas directly inside of ``schema``."""
    for key, value in schema.items():
        if key in NAMED and isinstance(value, Mapping):
            yield from value.values()
        elif key in LISTED and isinstance(value, list):
            yield from value
        elif key in ALONE:
            yield value


def plain_schema(schema: Any, *, closed: bool) -> Any:
    """``schema`` as xgrammar reads it right.

    A required property that is not listed is listed: xgrammar would not demand it. ``closed``: an object that lists
    properties and says nothing of others has no others. (xgrammar's strict mode also empties objects and arrays that
    list nothing.)
    """
    if not isinstance(schema, Mapping):
        return schema
    plain: dict[str, Any] = {}
    for key, value in schema.items():
        if key in NAMED and isinstance(value, Mapping):
            plain[key] = {name: plain_schema(one, closed=closed) for name, one in value.items()}
        elif key in LISTED and isinstance(value, list):
            plain[key] = [plain_schema(one, closed=closed) for one in value]
        else:
            plain[key] = plain_schema(value, closed=closed) if key in ALONE else value
    required, listed = plain.get("required"), plain.get("properties", {})
    if isinstance(required, list) and isinstance(listed, Mapping) and plain.get("additionalProperties") is not False:
        others = plain.get("additionalProperties", {})
        missing = {name: others for name in required if isinstance(name, str) and name not in listed}
        if missing:
            plain["properties"] = {**listed, **missing}
    says = ("additionalProperties", "patternProperties", "unevaluatedProperties")
    if closed and "properties" in schema and not any(key in schema for key in says):
        plain["additionalProperties"] = False
    return plain


def warn_of_unenforced(schema: Any) -> None:
    """Warn of the keywords of a JSON schema that no mask enforces."""
    if found := sorted(_unenforced(schema)):
        warnings.warn(f"the grammar of response_format doesn't enforce {', '.join(found)} of its schema", stacklevel=4)


def _unenforced(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    found = {key for key in UNENFORCED if key in schema}
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        found.add("allOf")
    for inner in _subschemas(schema):
        found |= _unenforced(inner)
    return found


def check_references(schema: Any) -> None:
    """Refuse references to other documents, which nobody fetches: xgrammar would allow any value in their place.

    Raises:
        UserError: such a reference, and what to write instead.
    """
    if not isinstance(schema, Mapping):
        return
    target = schema.get("$ref")
    if isinstance(target, str) and not target.startswith("#"):
        raise UserError(f"$ref {short(target)} leads out of the schema; put that part under $defs, and refer to it")
    for inner in _subschemas(schema):
        check_references(inner)


# ---- structural tags


@lru_cache(maxsize=32)
def tag_source(source: str, *, closed: bool, any_whitespace: bool) -> str:
    """The structural tag of xgrammar whose format is the JSON text ``source``, with its schemas as EBNF.

    xgrammar would take the schemas as they are, but leaves no choice of how their texts are laid out. ``closed`` is
    that of :func:`plain_schema`; ``any_whitespace`` that of :class:`~exitlm.decode.sampling.grammar.ResponseFormat`.
    """
    import xgrammar

    def written(part: Any) -> Any:
        if isinstance(part, list):
            return [written(one) for one in part]
        if not isinstance(part, dict):
            return part
        if part.get("type") != "json_schema":
            return {key: written(value) for key, value in part.items()}
        grammar = xgrammar.Grammar.from_json_schema(
            json.dumps(plain_schema(part["json_schema"], closed=closed)),
            any_whitespace=any_whitespace,
            max_whitespace_cnt=MAX_WHITESPACE if any_whitespace else None,
            strict_mode=False,
        )
        return {"type": "grammar", "grammar": str(grammar)}

    return json.dumps({"type": "structural_tag", "format": written(json.loads(source))})


def schemas_of(part: Any) -> Iterator[Any]:
    """The JSON schemas in a structural tag."""
    if isinstance(part, dict) and part.get("type") == "json_schema":
        yield part["json_schema"]
    elif isinstance(part, dict | list):
        for one in part.values() if isinstance(part, dict) else part:
            yield from schemas_of(one)
