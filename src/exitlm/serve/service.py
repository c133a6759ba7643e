"""What the endpoints share: the model and its engine, the names that it is offered under, and the server's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from exitlm.serve.async_engine import AsyncEngine, Source
from exitlm.serve.config import ServeConfig
from exitlm.serve.errors import ApiError
from exitlm.serve.metrics import Metrics
from exitlm.serve.models import Models
from exitlm.serve.vocabulary import Vocabulary


class Served(Source, Protocol):
    """A model that can be served: an :class:`exitlm.LLM`."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, or None."""


class Service:
    """A model that is ready to answer."""

    def __init__(self, config: ServeConfig, model: Served, adapters: Sequence[str], metrics: Metrics) -> None:
        """``adapters``: the names of those of the model's adapters that are offered."""
        self.config, self.model, self.metrics = config, model, metrics
        self.engine = AsyncEngine(model, max_waiting=config.limits.queue, observer=metrics)
        self.models = Models(str(config.model.name), adapters, self.engine.engine, config.defaults)
        self.vocabulary = None if model.tokenizer is None else Vocabulary(model.tokenizer)

    @property
    def words(self) -> Vocabulary:
        """The texts of tokens. Raises :class:`ApiError` where there is no tokenizer."""
        if self.vocabulary is None:
            raise ApiError(400, "this model came without a tokenizer; give token ids to /v1/completions")
        return self.vocabulary

    @property
    def tokenizer(self) -> Any:
        """The tokenizer. Raises :class:`ApiError` where there is none."""
        return self.words.tokenizer


class State:
    """Where a server is between its start and its end; ``service`` is there once the model is loaded."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.service: Service | None = None
        self.drains = False

    def ready(self) -> Service:
        """The service. Raises :class:`ApiError` while there is none."""
        if self.service is None:
            raise _loading()
        return self.service

    def closed(self) -> ApiError | None:
        """Why nothing is let in, if so."""
        if self.drains:
            headers = {"connection": "close", "retry-after": "5"}
            return ApiError(503, "the server is shutting down; ask another one, or try later", headers=headers)
        return _loading() if self.service is None else None

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of ``GET /health``."""
        if self.service is None or self.drains:
            return 503, {"status": "draining" if self.drains else "loading"}
        if self.service.engine.is_broken:
            return 503, {"status": "broken"}
        return 200, {"status": "ok"}


def _loading() -> ApiError:
    return ApiError(503, "the model is being loaded; try again later", headers={"retry-after": "1"})
