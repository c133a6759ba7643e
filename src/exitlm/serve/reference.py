"""``PUT /api``: answers in the format of EE-LLM's server, for its clients (see :mod:`exitlm.serve.protocol.reference`).

``text``, ``segments`` (the texts of tokens) and ``logprobs`` are those of the answer, with ``echo_prompts`` those of
prompt and answer; the first token of a prompt has no log-probability. ``requst_time`` is what its clients read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest

from exitlm.decode.generation import Generation
from exitlm.serve.conversation import checked
from exitlm.serve.errors import ApiError
from exitlm.serve.protocol.reference import ReferenceBody
from exitlm.serve.replies import Reply
from exitlm.serve.service import Service
from exitlm.serve.vocabulary import Vocabulary


async def answer(service: Service, http: HttpRequest, body: ReferenceBody) -> dict[str, Any]:
    """The answer to each prompt."""
    begun = time.monotonic()
    body.check()
    reply = Reply(service, http, body, service.models.default)
    reply.facts["quiet"] = body.no_log
    prompts = await asyncio.to_thread(_ids, service, body)
    logprobs, echo = body.logprobs or body.scores_prompts, body.echo_prompts or body.scores_prompts
    given: dict[str, Any] = {}
    if logprobs:
        given["logprobs"] = 1
        if echo:
            given["prompt_logprobs"] = 0
    if body.prevent_newline_after_colon:
        given["bad_words"] = [_encoded(service, ":") + _encoded(service, "\n")]
    asked = body.tokens_to_generate if "tokens_to_generate" in body.model_fields_set else None
    default = body.tokens_to_generate  # less where the server writes less, since nobody has asked for it
    configs = [reply.config(ids, given, new_tokens=asked, default=default) for ids in prompts]
    submission = await reply.submit(list(zip(prompts, configs, strict=True)), streams=False)
    found = [choices[0] for choices in await reply.whole(submission)]
    seconds = time.monotonic() - begun
    parts = [_parts(service.words, ids, one, echo) for ids, one in zip(prompts, found, strict=True)]
    texts = [one.text or "" for one in found]
    result: dict[str, Any] = {
        "text": [prompt + text for prompt, text in zip(body.texts, texts, strict=True)] if echo else texts,
        "segments": [segments for segments, _ in parts],
        "logprobs": [scores for _, scores in parts] if logprobs else None,
        "request_time": seconds, "requst_time": seconds,
        "exit_layers": [one.exit_layers for one in found], "exact": all(one.stats.exact for one in found),
    }  # fmt: skip
    if body.print_max_prob:
        result["max_probs"] = [[_max_prob(service.words, token) for token in one.trace] for one in found]
    return result


def _ids(service: Service, body: ReferenceBody) -> list[list[int]]:
    """The token ids of each prompt; no special token but the one that is asked for."""
    begin: list[int] = []
    if body.add_BOS:
        if service.tokenizer.bos_token_id is None:
            raise ApiError(400, "add_BOS is true, but this model has no such token; leave it out", param="add_BOS")
        begin = [service.tokenizer.bos_token_id]
    return [begin + _encoded(service, checked(text, "prompts")) for text in body.texts]


def _encoded(service: Service, text: str) -> list[int]:
    return list(service.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _parts(
    words: Vocabulary, ids: Sequence[int], found: Generation, echo: bool
) -> tuple[list[str], list[float | None]]:
    """The texts and the log-probabilities of tokens."""
    tokens, scores = list(found.token_ids), [token.logprob for token in found.trace]
    if echo:
        tokens, scores = [*ids, *tokens], [*(score for score, _ in found.prompt_logprobs), *scores]
    return [words.spelling(token)[0] for token in tokens], scores


def _max_prob(words: Vocabulary, token: Any) -> dict[str, Any]:
    return {
        "token": words.spelling(token.id)[0],
        "layer": token.exit_layer,
        "max_prob": {str(layer): score for layer, score in token.confidence.items()},
    }
