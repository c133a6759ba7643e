"""``POST /tokenize`` and ``POST /detokenize``: texts as token ids, and back."""

from __future__ import annotations

import asyncio
from typing import Any

from exitlm.serve.conversation import checked, conversation
from exitlm.serve.errors import ApiError
from exitlm.serve.protocol.tokens import DetokenizeBody, TokenizeBody
from exitlm.serve.service import Service


async def tokenize(service: Service, body: TokenizeBody) -> dict[str, Any]:
    """The token ids of a text or of a conversation, and how many fit into the context."""
    service.models.find(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt, a text, or messages, a conversation", param="prompt")
    tokenizer = service.tokenizer
    if body.messages is not None:
        ids = (await conversation(service, body.messages)).ids
    else:
        text = checked(body.prompt or "", "prompt")
        found = await asyncio.to_thread(tokenizer, text, add_special_tokens=body.add_special_tokens, verbose=False)
        ids = list(found["input_ids"])
    return {
        "count": len(ids), "max_model_len": service.engine.engine.config.max_position_embeddings, "tokens": ids,
        "token_strs": [service.words.spelling(token)[0] for token in ids] if body.return_token_strs else None,
    }  # fmt: skip


async def detokenize(service: Service, body: DetokenizeBody) -> dict[str, Any]:
    """The text of token ids, special tokens included."""
    service.models.find(body.model)
    tokenizer, size = service.tokenizer, service.engine.engine.config.vocab_size
    for token in body.tokens:
        if not 0 <= token < size:
            raise ApiError(400, f"token id {token} does not exist: ids are 0 to {size - 1}", param="tokens")
    text = await asyncio.to_thread(
        tokenizer.decode, body.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return {"prompt": text}
