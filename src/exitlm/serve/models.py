"""The models that a server offers by name: the base, which uses no exits, and the base with each adapter's exits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exitlm.decode.engine import Engine
from exitlm.decode.generation import MODES, GenerationConfig
from exitlm.decode.rules import RULES
from exitlm.errors import nearest
from exitlm.serve.errors import ApiError

DEFAULT_MODE = "lossless"


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model as clients name it. ``adapter``: the name of its exits' adapter, None for the base alone."""

    name: str
    adapter: str | None = None

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a generation by this model: those ``given``, with its adapter's exits, or none for the base.

        Raises:
            ApiError: exits are asked for of a model that has none.
        """
        found = dict(given)
        if self.adapter is not None:
            mode, draft = found.get("mode", DEFAULT_MODE), found.get("draft")
            uses_exits = mode == "threshold" or (mode == "lossless" and (draft is None or "exits" in draft))
            return {**found, "adapter": self.adapter} if uses_exits else found
        for name in ("threshold", "rule", "exits", "exit_layer"):
            if found.get(name) is not None:
                raise ApiError(400, f"model '{self.name}' has no exits, so {name} has no effect; {_REMEDY}", param=name)
        if found.get("mode") == "threshold":
            raise ApiError(400, f"mode 'threshold' needs exits, and model '{self.name}' has none; {_REMEDY}")
        return {**found, "exits": ()} if found.get("mode", DEFAULT_MODE) == "lossless" else found


_REMEDY = "name one with an adapter (GET /v1/models lists them), or leave it out"


class Models:
    """What is offered: names, and which one answers where none is named."""

    def __init__(self, base: str, adapters: Sequence[str], engine: Engine, defaults: Mapping[str, Any]) -> None:
        """``adapters``: the names of adapters that the engine has; ``defaults``: settings of a generation."""
        self.engine, self.created = engine, int(time.time())
        served = [ServedModel(name=base), *(ServedModel(name=f"{base}:{a}", adapter=a) for a in adapters)]
        self.by_name = {model.name: model for model in served}
        self.default = served[1] if adapters else served[0]
        self.default_mode = str(defaults.get("mode", DEFAULT_MODE))

    def find(self, name: str | None) -> ServedModel:
        """The model of this name; the first with exits where there is no name.

        Raises:
            ApiError: 404, none of this name.
        """
        if name is None:
            return self.default
        if name not in self.by_name:
            raise ApiError(
                404, f"the model '{name}' does not exist{nearest(name, self.by_name)}; GET /v1/models lists them",
                param="model", code="model_not_found",
            )  # fmt: skip
        return self.by_name[name]

    def listed(self) -> dict[str, Any]:
        """The answer to ``GET /v1/models``."""
        return {"object": "list", "data": [self.entry(model) for model in self.by_name.values()]}

    def entry(self, model: ServedModel) -> dict[str, Any]:
        """One model of the list."""
        context = self.engine.config.max_position_embeddings
        return {
            "id": model.name, "object": "model", "created": self.created, "owned_by": "exitlm",
            "max_model_len": context,
        }  # fmt: skip

    def exits(self) -> dict[str, Any]:
        """The answer to ``GET /v1/exits``: of each model its depth, its exits with the threshold and whether they are
        tested by default, its modes and rules, and whether near-ties fall alike in any company."""
        return {model.name: self._exits_of(model) for model in self.by_name.values()}

    def _exits_of(self, model: ServedModel) -> dict[str, Any]:
        exits, found = self.engine.intake.exits_of(model.adapter), []
        if model.adapter is not None:
            tested, rule = exits.tested(), exits.default_rule(exits.layers)
            for layer in exits.layers:
                found.append(
                    {
                        "layer": layer,
                        "kind": exits.kinds[layer],
                        "threshold": exits.default_threshold(layer, rule),
                        "tested": layer in tested,
                    }
                )
        modes = [mode for mode in MODES if found or mode != "threshold"]
        gated = bool(found) and exits.gated.issuperset(exits.layers)
        return {
            "layers": self.engine.config.num_hidden_layers, "exits": found,
            "default_mode": self.default_mode if self.default_mode in modes else DEFAULT_MODE, "modes": modes,
            "rules": [rule for rule in RULES if found and (gated or rule != "gate")],
            "exact": self.engine.fused.exact,
        }  # fmt: skip


def config_of(
    model: ServedModel, defaults: Mapping[str, Any], *given: Mapping[str, Any], free: Mapping[str, Any]
) -> GenerationConfig:
    """The configuration of a request: ``free`` is what counts where neither it nor the server's ``defaults`` say
    something."""
    settings: dict[str, Any] = {**free, **defaults}
    for part in given:
        settings |= part
    if model.adapter is None:  # defaults for exits are not for the base
        asked = {name for part in given for name in part}
        for name in ("threshold", "rule", "exits", "exit_layer"):
            if name not in asked:
                settings.pop(name, None)
        if settings.get("mode") == "threshold" and "mode" not in asked:
            settings.pop("mode")
    return GenerationConfig.of(model.settings(settings))
