"""The facade: one object that holds a model, its exits, its tokenizer and its decoding engine.

``load`` and :class:`LLM` are the Python surface of exitlm. Nothing is computed here: the maths lives in
:mod:`exitlm.model`, files in :mod:`exitlm.weights`, decoding in :mod:`exitlm.decode`.

Shapes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast, overload

import torch
from torch import Tensor

from exitlm.decode.engine import Engine
from exitlm.decode.generation import Generation, GenerationConfig, Piece
from exitlm.decode.kernels.formats import check_quant
from exitlm.decode.options import EngineConfig
from exitlm.decode.prompts import Prompt, encode
from exitlm.decode.requests import configs_of, is_many
from exitlm.decode.settings import GenerationSettings
from exitlm.decode.text import Tokenizer
from exitlm.errors import UserError, nearest
from exitlm.model.decoder import EarlyExitModel
from exitlm.model.exits import OWN_EXITS, ExitConfig
from exitlm.values import flag, path_of, paths_of, seed_of, wholes, wrong
from exitlm.weights.adapter import attach, is_adapter, save_adapter
from exitlm.weights.export import export
from exitlm.weights.load import device_of, load_model
from exitlm.weights.source import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from exitlm.serve.config import ServeConfig

Source = str | PathLike[str]
Ids = Tensor | Sequence[int] | Sequence[Sequence[int]]


def load(
    source: Source,
    adapter: Source | Sequence[Source] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    quant: str = "auto",
    allow_other_base: bool = False,
    engine: EngineConfig | Mapping[str, Any] | None = None,
) -> LLM:
    """Load a model: a directory with safetensors, a ``.gguf`` file, a hub id, or ``smollm2`` for the packaged one.

    ``adapter`` is one adapter directory or several of one base, each called by the last part of its directory; without
    it, a directory that holds exits beside its weights brings its own. ``dtype`` ``auto`` is the checkpoint's.
    ``quant`` is how weights are packed for ``generate`` and ``stream`` on a CPU. ``engine`` says what the engine may
    hold (:class:`EngineConfig`, or its fields in a mapping). Raises :class:`UserError` for anything that can't be
    loaded, and for an adapter that was tuned on other weights unless ``allow_other_base``.
    """
    check_quant(quant)
    options = _engine_config(engine)
    any_base = flag(allow_other_base, "allow_other_base")
    adapters = None if adapter is None else paths_of(adapter, "adapter")
    model = load_model(source, dtype=dtype, device=device)
    if adapters:
        attach(model, adapters, allow_other_base=any_base)
    elif adapters is None and is_adapter(own := resolve(source)):
        attach(model, [own], allow_other_base=any_base, names=[OWN_EXITS])
    return LLM(model, quant=quant, engine=options)


def served(config: ServeConfig) -> LLM:
    """The model that a server offers, by its settings. Raises :class:`UserError` as :func:`load` does."""
    m = config.model
    return load(
        m.source, adapter=m.adapters or None, dtype=m.dtype, device=m.device, quant=m.quant,
        allow_other_base=m.allow_other_base, engine=config.engine,
    )  # fmt: skip


_BUILDING = threading.Lock()  # several threads may ask for an engine first; one lock serves all models


def _engine_config(value: Any) -> EngineConfig:
    if value is None or isinstance(value, EngineConfig):
        return value or EngineConfig()
    if not isinstance(value, Mapping):
        raise wrong("engine", value, "an EngineConfig or a mapping of its fields")
    return EngineConfig.of(value)


class LLM:
    """A decoder-only language model with exits. ``model`` is the plain ``nn.Module`` behind it."""

    def __init__(
        self,
        model: EarlyExitModel,
        *,
        quant: str = "auto",
        engine: EngineConfig | Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, EarlyExitModel):
            raise wrong("model", model, "an EarlyExitModel; exitlm.load gives an LLM from a directory")
        check_quant(quant)
        self.model = model
        self.quant = quant
        self.engine_config = _engine_config(engine)
        self._engine: Engine | None = None
        self._why_no_text = "this model came without a tokenizer"

    def __repr__(self) -> str:
        """Family, depth, exits, dtype, device and weight format (once the engine stands, the one it has chosen)."""
        exits = f"exits {self.exit_layers}" if self.exit_layers else "no exits"
        dtype = str(self.model.dtype).removeprefix("torch.")
        quant = self.quant if self._engine is None else self._engine.quant
        where = f"{dtype} on {self.model.device}"
        return f"<LLM {self.model.config.model_type}, {self.num_layers} layers, {exits}, {where}, quant {quant}>"

    @property
    def num_layers(self) -> int:
        """L, the number of layers; the final head is the exit at L."""
        return self.model.config.num_hidden_layers

    @property
    def exit_layers(self) -> list[int]:
        """The 1-based layers that have an early exit of any adapter, ascending, without L."""
        return [layer for layer in self.model.exit_heads() if layer < self.num_layers]

    @property
    def adapters(self) -> dict[str, list[int]]:
        """The layers of each adapter's early exits by the adapter's name, which is what setting ``adapter`` takes, in
        the order in which they were loaded. Exits that lay beside the weights or were added here are ``exits``."""
        sets = self.model.exit_sets()
        return {name: [layer for layer in heads if layer < self.num_layers] for name, heads in sets.items()}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, or None where there is none that fits: then prompts are token ids, and so are answers."""
        try:
            found: PreTrainedTokenizerBase | None = self.model.checkpoint and self.model.checkpoint.tokenizer()
        except UserError as error:
            self._why_no_text = str(error)
            return None
        return found

    @property
    def engine(self) -> Engine:
        """The decoding engine; built when first needed, and again after the exits have changed."""
        with _BUILDING:
            if self._engine is None:
                self._engine = self._new_engine()
        return self._engine

    def _new_engine(self) -> Engine:
        tokenizer, options = cast(Tokenizer | None, self.tokenizer), self.engine_config
        if options.pipeline * options.tensor > 1:
            from exitlm.decode.remote.build import pipelined_engine

            return pipelined_engine(self.model, quant=self.quant, tokenizer=tokenizer, options=options)
        return Engine(self.model, quant=self.quant, tokenizer=tokenizer, options=options)

    def close(self) -> None:
        """End the engine, and the processes of its stages where it has some; a new one is built when it is needed."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def logits(self, ids: Ids) -> Tensor:
        """Logits of the final head, ``[B, T, V]``, for token ids ``[T]`` or ``[B, T]``."""
        return self.model.logits(ids)

    def exit_logits(self, ids: Ids) -> dict[int, Tensor]:
        """Logits of every early exit, ``{layer: [B, T, V]}``; ``-inf`` outside an exit's candidate vocabulary."""
        return {layer: logits for layer, logits in self.model.exit_logits(ids).items() if layer < self.num_layers}

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts to a type checker
        self,
        prompt: Prompt,
        *,
        chat: bool = False,
        config: GenerationConfig | None = None,
        **settings: Unpack[GenerationSettings],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        *,
        chat: bool = False,
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        **settings: Unpack[GenerationSettings],
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        chat: bool = False,
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        **settings: Unpack[GenerationSettings],
    ) -> Generation | list[Generation]:
        """Continue a prompt, or each of a list of prompts, and return the text with the story of every token.

        A prompt is a text, a list of token ids or a list of chat messages (``{"role": "user", "content": "Hi"}``);
        ``chat`` puts a text into the model's chat template. ``settings`` are the fields of :class:`GenerationConfig`
        (``mode``, ``threshold``, ``max_new_tokens`` and so on); ``config`` gives them all at once instead. Prompts in a
        list are decoded together, and each gets the text that it would get alone; a setting that is one value may then
        be a list of one for each, and ``config`` a list, too. One that can't be answered has an ``error``, and the
        others are answered.
        """
        if not is_many(prompt):
            (chosen,) = configs_of(config, settings, None)
            return self.engine.generate(self.encode(cast(Prompt, prompt), chat=chat), chosen)
        requests = self._requests(cast(Sequence[Prompt], prompt), chat, config, settings)
        return self.engine.generate_all(requests)

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        chat: bool = False,
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        **settings: Unpack[GenerationSettings],
    ) -> Iterator[Piece]:
        """As :meth:`generate`, in pieces as they become certain; in ``lossless`` mode that is after verification.
        Pieces of a list carry the ``index`` of their prompt."""
        if not is_many(prompt):
            (chosen,) = configs_of(config, settings, None)
            return self.engine.stream(self.encode(cast(Prompt, prompt), chat=chat), chosen)
        return self.engine.stream_all(self._requests(cast(Sequence[Prompt], prompt), chat, config, settings))

    def _requests(
        self, prompts: Sequence[Prompt], chat: bool, config: Any, settings: GenerationSettings
    ) -> list[tuple[list[int] | UserError, GenerationConfig]]:
        """Token ids, or what is wrong, and settings for each prompt."""
        configs = configs_of(config, settings, len(prompts))
        ids: list[list[int] | UserError] = []
        for prompt in prompts:
            try:
                ids.append(self.encode(prompt, chat=chat))
            except UserError as error:
                ids.append(error)
        return list(zip(ids, configs, strict=True))

    def encode(self, prompt: Prompt, *, chat: bool = False) -> list[int]:
        """The token ids of a prompt; messages go into the model's chat template, and with ``chat`` so does a text."""
        chat, tokenizer = flag(chat, "chat"), self.tokenizer
        return encode(prompt, tokenizer, chat=chat, why_no_text=self._why_no_text)

    def to(self, device: str | torch.device) -> LLM:
        """Move the model to a device such as ``cuda``; weights are packed again when they are next needed.

        Raises:
            UserError: a device that can't be used.
        """
        self._check_idle()
        self.model.to(device_of(device))
        self.close()
        return self

    def add_exits(
        self,
        layers: Sequence[int],
        *,
        kind: str = "lens",
        output: str = "shared",
        seed: int = 0,
        candidate_ids: Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        """Add untrained exits after ``layers`` (1-based) that have none, and keep those the model has. They are of no
        adapter, and called ``exits``.

        ``settings`` are further fields of :class:`ExitConfig`: ``init``, ``rank``, ``gate``, ``branch``.
        ``candidate_ids`` restricts the new exits to these token ids.
        """
        known = {field.name for field in fields(ExitConfig)} - {"layer", "candidates"}
        for name in settings:
            if name not in known:
                raise UserError(f"an exit has no setting '{name}'{nearest(name, known)}")
        self._check_idle()
        layers, seed = wholes(layers, "layers"), seed_of(seed)
        candidates = None if candidate_ids is None else self.model.check_ids(candidate_ids).flatten()
        count = 0 if candidates is None else candidates.numel()
        configs = [
            ExitConfig(layer=layer, kind=kind, output=output, candidates=count, **settings)  # type: ignore[arg-type]
            for layer in layers
        ]
        self.model.add_exits(configs, seed=seed, candidate_ids=candidates)
        self.close()

    def remove_exits(self, layers: Sequence[int]) -> None:
        """Drop the exits after these layers, those of all adapters."""
        self._check_idle()
        self.model.remove_exits(wholes(layers, "layers"))
        self.close()

    def _check_idle(self) -> None:
        """Refuse to change exits while texts are decoded."""
        if self._engine is not None and (self._engine.roster.running or self._engine.roster.waiting):
            raise UserError("exits can't be changed while texts are decoded; let them end, or close their streams")

    def save_exits(self, directory: Source, *, adapter: str | None = None) -> Path:
        """Write the exits to an adapter directory, whole or not at all.

        ``adapter`` names one of several adapters; None writes the exits of all of them together. Raises
        :class:`UserError` where two of them have an exit at one layer, since a directory holds one a layer.
        """
        place = Path(path_of(directory, "the directory"))
        save_adapter(place, self.model, adapter=adapter)
        return place

    def export(self, directory: Source, *, dtype: str | torch.dtype | None = None) -> Path:
        """Write a directory that ``transformers`` loads as it is, with the exits of all adapters beside the weights.
        Raises :class:`UserError` where two of them have an exit at one layer."""
        place = Path(path_of(directory, "the directory"))
        export(self.model, place, dtype=dtype)
        return place
