"""What is wrong with a body, as one sentence, from what pydantic found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from exitlm.errors import nearest, short
from exitlm.serve.errors import ApiError


def refusal(errors: Sequence[Mapping[str, Any]], body: type[BaseModel] | None) -> ApiError:
    """The refusal for the first thing that is wrong; of a union, for the last of its branches that came furthest."""
    found = max(enumerate(errors), key=lambda pair: (_depth(pair[1]), pair[0]))[1] if _in_union(errors) else errors[0]
    path = [part for part in found["loc"] if part != "body"]
    name = _name(path, body)
    kind, value = found["type"], found.get("input")
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {found.get('ctx', {}).get('error', found['msg'])}")
    if not path and isinstance(value, bytes):  # it was not read as JSON, since nothing said that it is
        return ApiError(400, "the body comes without the header 'content-type: application/json'; send that header")
    if not path:
        return ApiError(400, f"the body must be a JSON object with the fields of this request, but is {short(value)}")
    if kind == "extra_forbidden":
        field = str(path[-1])
        known = list(body.model_fields) if body is not None and len(path) == 1 else []
        return ApiError(400, f"unknown field '{field}'{nearest(field, known)}", param=name, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"field '{name}' is missing", param=name, code="missing_required_parameter")
    said = found["msg"][:1].lower() + found["msg"][1:]
    return ApiError(400, f"field '{name}' is {short(value)}: {said}", param=name, code="invalid_value")


def _in_union(errors: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the first errors are those of branches of one field."""
    return len(errors) > 1 and len({tuple(error["loc"][:2]) for error in errors}) == 1


def _depth(error: Mapping[str, Any]) -> int:
    return sum(isinstance(part, int) for part in error["loc"])


def _name(path: Sequence[Any], body: type[BaseModel] | None) -> str:
    """A path such as ``messages.0.content``, without the names of a union's branches."""
    if not path:
        return ""
    kept: list[str] = []
    fields: Any = body
    for part in path:
        if isinstance(part, int):
            kept.append(str(part))
            continue
        models = _models(fields)
        if models and not any(part in model.model_fields for model in models) and len(kept) > 0 and part != path[-1]:
            continue
        known = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        if known or not kept or not _is_branch(part):
            kept.append(str(part))
            fields = known[0] if known else None
    return ".".join(kept)


def _is_branch(part: str) -> bool:
    """Whether a part of a path names a branch of a union: a type, and no field."""
    return part in ("str", "int", "float", "bool") or "[" in part or part[:1].isupper()


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for inner in get_args(annotation):
        found += _models(inner)
    return found
