"""What an answer took, as OpenAI counts it, and as exitlm does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from exitlm.decode.generation import Generation


def usage(answers: Sequence[Sequence[Generation]], layers: int) -> dict[str, Any]:
    """The usage of the choices of each prompt. ``layers``: L of the model."""
    texts = [choice for choices in answers for choice in choices]
    prompt = sum(choices[0].stats.prompt_tokens for choices in answers)
    cached = sum(choices[0].stats.shared_tokens for choices in answers)
    written = sum(len(text.token_ids) for text in texts)
    stats = [text.stats for text in texts]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(s.predicted_accepted for s in stats),
            "rejected_prediction_tokens": sum(s.predicted - s.predicted_accepted for s in stats),
            "reasoning_tokens": 0,
            "audio_tokens": 0,
        },
        "exitlm": depth(texts, layers),
    }


def depth(texts: Sequence[Generation], layers: int) -> dict[str, Any]:
    """How deep the tokens of some texts went, and how they were drafted. ``tokens_per_second`` is of decoding, all
    texts together."""
    written = [layer for text in texts for layer in text.exit_layers]
    drafts, accepted = sum(text.stats.drafted for text in texts), sum(text.stats.accepted for text in texts)
    speeds = [text.stats.tokens_per_second for text in texts]
    speed = sum(speed for speed in speeds if not math.isnan(speed))
    return {
        "mode": texts[0].stats.mode,
        "exact": all(text.stats.exact for text in texts),
        "mean_layers": round(sum(written) / len(written), 4) if written else None,
        "layers": layers,
        "drafts": drafts,
        "accepted": accepted,
        "acceptance": round(accepted / drafts, 4) if drafts else None,
        "tokens_per_second": round(speed, 2) if speed else None,
    }
