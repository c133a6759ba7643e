"""The requests of a load run: prompts from a file, or a built-in set in which none begins like another for long.

Servers share the keys and values of texts that begin alike. Prompts that repeat would measure that, so the built-in
ones only repeat when there are none left.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exitlm.errors import UserError
from exitlm.serve.bench.records import Ask
from exitlm.serve.wire import mapping_of

_TOPICS = (
    "a lighthouse", "sourdough bread", "the tides", "a chess opening", "bicycle brakes", "honey bees", "an old map",
    "sleep", "volcanoes", "a small library", "train timetables", "rice farming", "the moon's far side", "tea", "glass",
    "migrating geese", "a broken clock", "city trees", "salt", "hand puppets", "river otters", "concrete", "kites",
    "a village choir", "batteries", "mountain passes", "ink", "snow shovels", "sea ice", "a night market",
)  # fmt: skip
_FORMS = (
    "Explain {} to a ten-year-old.", "Write a short story about {}.", "Give me five facts about {}.",
    "What is most often misunderstood about {}?", "Write a poem of eight lines on {}.", "How would you teach {}?",
    "List the pros and cons of {}.", "Describe {} as a travel guide would.", "Invent a riddle whose answer is {}.",
    "What would change in the world without {}?", "Write a letter of complaint about {}.",
    "Compare {} with something that people mistake for it.",
)  # fmt: skip
_NOTES = "Here are notes for a talk:\n{}\nUse them where they fit. {}"
_NOTE = "- {}: mentioned {} times in {}, last by {}"
_WITH_NOTES, _MOST_NOTES = 0.4, 24  # share of the prompts, and lines


def built_in(count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` prompts of about 10 to 500 tokens."""
    noise = random.Random(seed)
    pairs = [(form, topic) for form in _FORMS for topic in _TOPICS]
    noise.shuffle(pairs)
    return [{"prompt": _prompt(*pairs[i % len(pairs)], noise)} for i in range(count)]


def _prompt(form: str, topic: str, noise: random.Random) -> str:
    question = form.format(topic)
    if noise.random() >= _WITH_NOTES:
        return question
    lines = [
        _NOTE.format(noise.choice(_TOPICS), noise.randrange(2, 90), noise.randrange(1850, 2025), noise.choice(_TOPICS))
        for _ in range(noise.randrange(2, _MOST_NOTES))
    ]
    return _NOTES.format("\n".join(lines), question)


def read_file(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of prompts, as fields of a request: ``prompt`` or ``messages``, and whatever else they have.

    A ``.txt`` file has a prompt on each line, any other one a JSON object; an ``id`` is left out, and
    ``max_new_tokens`` is OpenAI's ``max_tokens``, so that files for ``exitlm generate --prompts`` serve here too.

    Raises:
        UserError: the file can't be read, or has a wrong line, or none.
    """
    try:
        rows = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode().split("\n")
    except OSError as error:
        raise UserError(f"the prompts {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UserError(f"the prompts {path} are not valid UTF-8 text; write them in that encoding") from None
    numbered = [(number, row.strip()) for number, row in enumerate(rows, 1) if row.strip()]
    if not numbered:
        raise UserError(f'{path} holds no prompt; write one JSON object a line, such as {{"prompt": "Hello"}}')
    if path.suffix.lower() == ".txt":
        return [{"prompt": row} for _, row in numbered]
    return [_fields(row, f"line {number} of {path}") for number, row in numbered]


def _fields(row: str, place: str) -> dict[str, Any]:
    found = mapping_of(row)
    if found is None or ("prompt" in found) == ("messages" in found):
        raise UserError(f'{place} is not a JSON object with prompt or messages, such as {{"prompt": "Hello"}}')
    if not isinstance(found.get("prompt", ""), str | list) or not isinstance(found.get("messages", []), list):
        raise UserError(f"{place} has a prompt that is no text and no list of token ids, or messages that are no list")
    fields = {name: value for name, value in found.items() if name != "id"}
    if "max_new_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_new_tokens")
    return fields


def asks_of(lines: Sequence[Mapping[str, Any]], count: int, common: Mapping[str, Any], endpoint: str) -> list[Ask]:
    """``count`` requests to an ``endpoint`` (chat or completions), from the lines in turn; what a line says goes before
    ``common``. A field that is None is left out.

    Raises:
        UserError: messages for an endpoint that takes none, or token ids for one that takes messages.
    """
    found = []
    for index in range(count):
        line = dict(lines[index % len(lines)])
        if endpoint == "chat" and "prompt" in line:
            if not isinstance(line["prompt"], str):
                raise UserError("a prompt of token ids needs --endpoint completions")
            line["messages"] = [{"role": "user", "content": line.pop("prompt")}]
        elif endpoint == "completions" and "messages" in line:
            raise UserError("messages need --endpoint chat")
        body = {name: value for name, value in {**common, **line}.items() if value is not None}
        found.append(Ask(index=index, body=body))
    return found
