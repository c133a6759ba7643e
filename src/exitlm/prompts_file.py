"""A file of prompts in, a file of answers out, in the order of the prompts: ``exitlm generate --prompts``.

Both files are JSON lines. A line that can't be answered gets a line that says why, and the others are answered. Every
answer carries a digest of its prompt, settings and model, so that an interrupted run resumes behind its last whole
line, and a file of other prompts is never continued. Decoding itself is the engine's (:mod:`exitlm.decode`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from exitlm.assignments import numbered
from exitlm.atomic import locked
from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.decode.prompts import Prompt
from exitlm.decode.settings import GenerationSettings
from exitlm.errors import UserError, nearest
from exitlm.llm import LLM
from exitlm.progress import progress
from exitlm.values import wrong

_OWN_FIELDS = ("prompt", "messages", "id")
_SETTINGS = tuple(GenerationSettings.__annotations__)
_STATS = ("prompt_tokens", "tokens", "mean_layers", "drafted", "accepted")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the prompts: ``index`` counts the prompts from 0, ``number`` the lines of the file from 1."""

    index: int
    number: int
    digest: str
    id: str | int | None = None

    def head(self) -> dict[str, Any]:
        """What its answer begins with."""
        return {"index": self.index, "digest": self.digest, **({} if self.id is None else {"id": self.id})}


@dataclass(frozen=True, kw_only=True)
class PromptLine(Line):
    """A line that can be decoded."""

    prompt: Prompt
    chat: bool
    config: GenerationConfig


@dataclass(frozen=True, kw_only=True)
class WrongLine(Line):
    """A line that can't, and why."""

    error: UserError


@dataclass(frozen=True)
class Answered:
    """How far the answers are: lines that are ``done``, those of them that say what ``failed``, and their bytes."""

    done: int = 0
    failed: int = 0
    size: int = 0


Outcome = Generation | UserError


# ---- prompts


def read_prompts(
    source: Path, settings: Mapping[str, Any], *, chat: bool = False, model: Mapping[str, Any] | None = None
) -> list[Line]:
    """The prompts of a file of JSON lines, empty lines left out.

    A line is an object with ``prompt`` (a text or a list of token ids) or ``messages`` (a list of role and content), an
    ``id`` (a text or a whole number) if wanted, and settings of its own that go before ``settings``. ``chat`` puts
    texts into the chat template. ``model`` is what else the answers depend on; it only enters the digests.

    Raises:
        UserError: the file can't be read, or has no line. A wrong line is a :class:`WrongLine`.
    """
    try:
        rows = source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"the prompts {source} cannot be read: {error.strerror}") from error
    common = json.dumps([dict(settings), chat, model], sort_keys=True, default=repr).encode()
    lines: list[Line] = []
    for number, row in enumerate(rows, 1):
        if row.strip():
            digest = hashlib.sha256(common + b"\n" + row.strip()).hexdigest()[:16]
            lines.append(_line(row, settings, chat, {"index": len(lines), "number": number, "digest": digest}))
    if not lines:
        raise UserError(f'{source} holds no prompt; write one JSON object a line, such as {{"prompt": "Hello"}}')
    return lines


def _line(row: bytes, settings: Mapping[str, Any], chat: bool, place: dict[str, Any]) -> Line:
    try:
        found = _object(row)
        place["id"] = _id(found.get("id"))
        own = {name: numbered(value) for name, value in found.items() if name not in _OWN_FIELDS}
        for name in own:
            if name not in _SETTINGS:
                raise UserError(f"unknown field '{name}'{nearest(name, (*_OWN_FIELDS, *_SETTINGS))}")
        return PromptLine(**place, prompt=_prompt(found), chat=chat, config=GenerationConfig.of({**settings, **own}))
    except UserError as error:
        return WrongLine(**place, error=error)


def _object(row: bytes) -> dict[str, Any]:
    try:
        found = json.loads(row.decode())
    except UnicodeDecodeError:
        raise UserError("this is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"this is not valid JSON ({error.msg}, at character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:  # a number of more than 4,300 digits, brackets in brackets
        raise UserError(f"this is not valid JSON that can be read ({error})") from None
    if not isinstance(found, dict):
        raise wrong("this", found, 'an object such as {"prompt": "Hello"}')
    return found


def _id(value: Any) -> str | int | None:
    if value is None or (isinstance(value, str | int) and not isinstance(value, bool)):
        return value
    raise wrong("id", value, "a text or a whole number")


def _prompt(found: Mapping[str, Any]) -> Prompt:
    given = [name for name in ("prompt", "messages") if name in found]
    if len(given) != 1:
        raise UserError(f"there is {'both prompt and messages' if given else 'no prompt'}; give prompt or messages")
    value: Any = found[given[0]]
    if given[0] == "messages":
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            raise wrong("messages", value, "a list of objects with role and content")
    elif not isinstance(value, str | list) or any(isinstance(item, dict) for item in value):
        raise wrong("prompt", value, "a text or a list of token ids; chat messages are called messages")
    return cast(Prompt, value)


# ---- answers


def answered(out: Path, lines: Sequence[Line]) -> Answered:
    """How far the file of answers is; it may be missing. A last line that was torn does not count.

    Raises:
        UserError: it holds anything else than answers to the first of these ``lines``.
    """
    if not out.exists():
        return Answered()
    if not out.is_file():
        raise UserError(f"{out} is not a file; choose another place for the answers")
    done = failed = size = 0
    remedy = f"choose another file for the answers, or delete {out} to start again"
    with out.open("rb") as file:
        for row in file:
            if done == len(lines):
                raise UserError(f"{out} holds more than the answers to these {len(lines)} prompts; {remedy}")
            line, whole = lines[done], row.endswith(b"\n")
            begin = _dump({"index": line.index, "digest": line.digest})[:-1]
            try:
                if not row.startswith(begin if whole else begin[: len(row)]):
                    raise ValueError
                failed += whole and "error" in json.loads(row)
            except ValueError:
                raise UserError(
                    f"line {done + 1} of {out} does not answer line {line.number} of the prompts with these settings "
                    f"and this model; {remedy}"
                ) from None
            done, size = done + whole, size + len(row) * whole
    return Answered(done, failed, size)


def answer(llm: LLM, lines: Sequence[Line], out: Path) -> Answered:
    """Decode what ``out`` does not answer yet, and append one line for each; a bar on stderr shows how far it is.

    Raises:
        UserError: another process writes there, or it can't be written; what is there already stays as it is.
    """
    with _appending(out, lines) as (start, append):
        done, failed = start.done, start.failed
        try:
            with progress(out.name, len(lines)) as bar:
                bar.update(done)
                for line, outcome in in_order(llm, lines[done:]):
                    append(_dump(_answer(line, outcome)) + b"\n")
                    done, failed = done + 1, failed + isinstance(outcome, UserError)
                    bar.update(done, f"{failed} failed" if failed else "")
        except KeyboardInterrupt:
            print(f"stopped after {done} of {len(lines)} prompts; the same command continues", file=sys.stderr)
            raise
    return Answered(done, failed, out.stat().st_size)


def in_order(llm: LLM, lines: Sequence[Line]) -> Iterator[tuple[Line, Outcome]]:
    """Every line with what became of it, in the order of the file, whatever the order they finish in."""
    early: dict[int, Outcome] = {}
    with contextlib.closing(decode_many(llm, [line for line in lines if isinstance(line, PromptLine)])) as outcomes:
        for line in lines:
            if isinstance(line, WrongLine):
                yield line, line.error
                continue
            while line.index not in early:
                index, outcome = next(outcomes)
                early[index] = outcome
            yield line, early.pop(line.index)


def decode_many(llm: LLM, prompts: Sequence[PromptLine]) -> Generator[tuple[int, Outcome], None, None]:
    """The index of each prompt with its generation, or with the error that ended it, in the order they finish in."""

    def requests() -> Iterator[tuple[list[int] | UserError, GenerationConfig]]:
        for line in prompts:
            try:
                yield llm.encode(line.prompt, chat=line.chat), line.config
            except UserError as error:
                yield error, line.config

    with contextlib.closing(llm.engine.finished(requests())) as outcomes:
        for index, found in outcomes:
            yield prompts[index].index, found if found.error is None else found.error


def _answer(line: Line, outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, UserError):
        return {**line.head(), "error": f"line {line.number}: {outcome}"}
    stats = {name: value for name, value in outcome.stats.to_json().items() if name in _STATS}
    return {**line.head(), "finish_reason": outcome.finish_reason, **as_json(outcome), "stats": stats}


def as_json(found: Generation) -> dict[str, Any]:
    """A generation's text, token ids, exit layers and mode, and all ``choices`` and log-probabilities that were
    asked for."""
    answer: dict[str, Any] = {
        "text": found.text,
        "token_ids": found.token_ids,
        "exit_layers": found.exit_layers,
        "mode": found.stats.mode,
    }
    if found.choices:
        answer["choices"] = [
            {**as_json(replace(one, choices=[])), "finish_reason": one.finish_reason} for one in found.choices
        ]
    if found.prompt_logprobs:
        answer["prompt_logprobs"] = [{"logprob": one, "top": top} for one, top in found.prompt_logprobs]
    if any(token.logprob is not None for token in found.trace):
        answer["logprobs"] = [{"logprob": token.logprob, "top": token.top_logprobs} for token in found.trace]
    return answer


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode()


@contextlib.contextmanager
def _appending(out: Path, lines: Sequence[Line]) -> Iterator[tuple[Answered, Callable[[bytes], None]]]:
    """Own the file of answers: how far it is, once a torn last line is cut off, and a function that appends to it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another file for the answers") from error

    def append(row: bytes) -> None:
        try:
            while row:
                row = row[os.write(descriptor, row) :]
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}; the same command continues once it can") from error

    try:
        with locked(out, timeout=0):
            start = answered(out, lines)
            os.truncate(descriptor, start.size)
            yield start, append
    finally:
        os.close(descriptor)
