"""A model in this process as a partner: its chat template, and steps of its engine until the reply ends or is stopped.

Each turn encodes the conversation anew, as the template may show earlier turns differently later. Where it shows them
alike, the keys and values of their whole blocks are there already, and only the new part is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exitlm.chat.conversation import Message
from exitlm.chat.partner import Facts, Part, Taken, figure
from exitlm.decode.generation import GenerationConfig, Stats
from exitlm.errors import UserError
from exitlm.llm import LLM

MAX_NEW_TOKENS = 1024
_NOT_HERE = ("n", "logprobs", "prompt_logprobs")


class Local:
    """A partner that decodes here. ``settings`` are fields of :class:`GenerationConfig`."""

    def __init__(self, llm: LLM, name: str, settings: Mapping[str, Any]) -> None:
        self._llm, self._name = llm, name
        llm.encode([{"role": "user", "content": "Hi"}])  # a model without a tokenizer or a template is refused now
        self._config = self._checked(settings)
        self._settings = dict(settings)
        self._stopped = False

    @property
    def facts(self) -> Facts:
        """Who this is."""
        return Facts(
            name=self._name, num_layers=self._llm.num_layers, exit_layers=self._llm.exit_layers,
            context=self._llm.model.config.max_position_embeddings, mode=self._config.mode,
            exact=self._llm.engine.fused.exact,
        )  # fmt: skip

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was set."""
        return self._settings

    def change(self, name: str, value: Any) -> None:
        """Set a setting, or give it back its default (None)."""
        found = {**self._settings, name: value}
        if value is None and name in GenerationConfig.__dataclass_fields__:
            del found[name]
        self._config = self._checked(found)
        self._settings = found

    def _checked(self, settings: Mapping[str, Any]) -> GenerationConfig:
        """A configuration that this model can meet."""
        for name in _NOT_HERE:
            if name in settings:
                raise UserError(f"{name} has no place in a chat; use exitlm generate --json")
        config = GenerationConfig.of({"max_new_tokens": MAX_NEW_TOKENS, **settings})
        self._llm.stream([0], config=config)  # checked, but not begun
        return config

    def reply(self, messages: Sequence[Message]) -> Iterator[Part | Taken]:
        """Answer, a pass at a time."""
        engine, self._stopped = self._llm.engine, False
        key = engine.add(self._llm.encode(messages), self._config)
        try:
            while not self._stopped:
                for event in engine.step():
                    if event.key != key:
                        continue
                    if event.piece is not None:
                        tokens = [(token.text, token.exit_layer) for token in event.piece.tokens]
                        yield Part(text=event.piece.text, tokens=tokens)
                    if event.error is not None:
                        raise event.error
                    if event.generation is not None:
                        yield taken(event.generation.finish_reason, event.generation.stats)
                        return
        finally:
            engine.abort(key)

    def stop(self) -> None:
        """End the reply after the pass that runs."""
        self._stopped = True

    def notes(self) -> Sequence[str]:
        """What the engine has to say."""
        return self._llm.engine.notes


def taken(ended: str, stats: Stats) -> Taken:
    """What a generation took, for the line after a reply."""
    return Taken(
        ended=ended, tokens=stats.tokens, tokens_per_second=figure(stats.tokens_per_second),
        mean_layers=figure(stats.mean_layers), mode=stats.mode, exact=stats.exact, prompt_tokens=stats.prompt_tokens,
        reused=stats.shared_tokens, drafted=stats.drafted, accepted=stats.accepted, seed=stats.seed,
        details={"weights": stats.quant, "kernels": stats.kernels},
    )  # fmt: skip
