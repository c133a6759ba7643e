"""The body of ``PUT /api``: the request format of Megatron-LM's text generation server, with EE-LLM's fields for exits.

What the reference reads over is read here: ``"use_early_exit": false`` means false, and what is wrong has status 400.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from exitlm.serve.errors import ApiError
from exitlm.serve.protocol.fields import Body

MAX_PROMPTS = 128
_REPLACED = {"max_len": "tokens_to_generate", "sentences": "prompts"}


class ReferenceBody(Body):
    """Texts to be continued. ``early_exit_thres``: how sure an exit must be; above 1 none ever is. ``exit_layers``: the
    exits to use; all where the list is empty. ``print_max_prob``: tell of each token the probability at each exit.
    ``no_log``: no line in the log."""

    prompts: str | list[str]
    tokens_to_generate: int = Field(64, ge=0)
    use_early_exit: bool = False
    early_exit_thres: float | None = Field(None, ge=0.0)
    exit_layers: list[int] = Field(default_factory=list)
    print_max_prob: bool = False
    logprobs: bool = False
    echo_prompts: bool = False
    top_k: int = Field(0, ge=0, le=1000)
    top_p: float = Field(0.0, ge=0.0, le=1.0)
    top_p_decay: float = 0.0
    top_p_bound: float = 0.0
    temperature: float = Field(0.0, ge=0.0, le=100.0)
    add_BOS: bool = False
    stop_sequences: list[str] | None = None
    prevent_newline_after_colon: bool = False
    random_seed: Annotated[int, Field(ge=0, lt=2**64)] = 1234
    no_log: bool = False
    beam_width: int | None = None
    length_penalty: float | None = None
    max_len: Any = None
    sentences: Any = None

    @property
    def texts(self) -> list[str]:
        """One or more prompts."""
        return [self.prompts] if isinstance(self.prompts, str) else self.prompts

    @property
    def scores_prompts(self) -> bool:
        """Whether nothing is written, and only the prompts' own tokens are scored."""
        return self.tokens_to_generate == 0

    def check(self) -> None:
        """Refuse what does not go together, and what is not offered. Raises :class:`ApiError`."""
        for old, new in _REPLACED.items():
            if getattr(self, old) is not None:
                raise ApiError(400, f"{old} is no longer used; give {new}", param=old)
        if not self.texts:
            raise ApiError(400, "prompts is empty; give at least one", param="prompts")
        if len(self.texts) > MAX_PROMPTS:
            said = f"prompts has {len(self.texts)} texts, but at most {MAX_PROMPTS} are taken"
            raise ApiError(400, said, param="prompts")
        if not self.add_BOS and not all(self.texts):
            raise ApiError(400, "a prompt is empty; that needs add_BOS to be true", param="prompts")
        if self.top_k and self.top_p:
            raise ApiError(400, "top_k and top_p are both given; leave one of them out", param="top_p")
        for name in ("top_p_decay", "top_p_bound"):
            if getattr(self, name):
                raise ApiError(400, f"{name} is not supported; leave it out, top_p stays as it is", param=name)
        if self.beam_width is not None and self.beam_width != 1:
            raise ApiError(400, "beam search is not supported; leave beam_width out", param="beam_width")
        if self.length_penalty not in (None, 1.0):
            raise ApiError(400, "length_penalty belongs to beam search; leave it out", param="length_penalty")

    def sampling(self) -> dict[str, Any]:
        """Settings of a generation. ``top_k`` of 1 and temperature 0 are greedy, as in the reference."""
        found: dict[str, Any] = {"seed": self.random_seed}
        if self.temperature == 0.0 or self.top_k == 1:
            found["temperature"] = 0.0
        else:
            found |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p or 1.0}
        if self.stop_sequences:
            found["stop"] = self.stop_sequences
        return found

    def exit_settings(self) -> dict[str, Any]:
        """EE-LLM's exits: its rule is the largest probability."""
        if not self.use_early_exit:
            return {"mode": "full"}
        found: dict[str, Any] = {"mode": "threshold"}
        if self.exit_layers:
            found["exits"] = self.exit_layers
        if self.early_exit_thres is not None:
            found |= {"rule": "probability", "threshold": min(1.0, self.early_exit_thres)}
        return found
