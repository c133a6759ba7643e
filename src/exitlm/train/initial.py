"""The first value of every tensor of a run, by name: random, or from the weights that it starts from.

A value depends on the seed and the tensor's name alone, so that every layout of processes begins with the same model,
each process making only the tensors that it has.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from exitlm.errors import UserError
from exitlm.model.config import ModelConfig
from exitlm.model.decoder import EarlyExitModel
from exitlm.model.exits import ExitConfig
from exitlm.parallel.tied import HEAD, canonical
from exitlm.train.run import RunConfig
from exitlm.train.sections import ModelSection
from exitlm.weights.checkpoint import Checkpoint
from exitlm.weights.load import Unfilled

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_WRITES_TO_STREAM = ("o_proj.weight", "down_proj.weight")


def has_shape(model: ModelSection) -> bool:
    """Whether the settings give a new model's shape."""
    return bool(model.family) or any(getattr(model, name) for name in SHAPE)


def model_config(config: RunConfig, vocab_size: int, eos_id: int | None = None) -> ModelConfig:
    """The configuration of a new model; ``vocab_size`` and ``eos_id`` are the tokenizer's.

    Raises:
        UserError: a size that is missing or does not fit the others, or a tokenizer larger than the vocabulary.
    """
    m = config.model
    missing = [f"model.{name}" for name in SHAPE if not getattr(m, name)]
    if missing:
        raise UserError(f"{missing[0]} is not set: a new model needs {', '.join(SHAPE)} (or set model.base)")
    if m.vocab_size and m.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size is {m.vocab_size}, but the tokenizer has {vocab_size} tokens; make it at least as large"
        )
    heads = m.num_attention_heads
    if not m.head_dim and m.hidden_size % heads:
        raise UserError(
            f"model.hidden_size ({m.hidden_size}) is no multiple of model.num_attention_heads ({heads}); change one, "
            "or set model.head_dim"
        )
    if not m.init_std:
        raise UserError("model.init_std is 0, and such a model can't learn; use a positive number, such as 0.02")
    hf = {
        "model_type": m.family or "llama",
        "hidden_size": m.hidden_size,
        "num_hidden_layers": m.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": m.num_key_value_heads or heads,
        "head_dim": m.head_dim or m.hidden_size // heads,
        "intermediate_size": m.intermediate_size,
        "vocab_size": m.vocab_size or vocab_size,
        "max_position_embeddings": m.max_position_embeddings or config.data.seq_len,
        "rope_theta": m.rope_theta,
        "rms_norm_eps": m.rms_norm_eps,
        "tie_word_embeddings": m.tie_word_embeddings,
        "initializer_range": m.init_std,
        "bos_token_id": None,
        "eos_token_id": eos_id,
    }
    return ModelConfig.from_hf(hf)


class InitialValues:
    """Whole tensors by canonical name, on the CPU. ``checkpoint`` None: random ones, N(0, ``std``)."""

    def __init__(
        self,
        config: ModelConfig,
        exits: Sequence[ExitConfig],
        *,
        seed: int,
        dtype: torch.dtype,
        checkpoint: Checkpoint | None = None,
        depth_scaled: bool = True,
        candidate_ids: Tensor | None = None,
    ) -> None:
        self.config, self.exits, self.seed, self.dtype = config, {e.layer: e for e in exits}, seed, dtype
        self.checkpoint, self.depth_scaled, self.candidate_ids = checkpoint, depth_scaled, candidate_ids
        self._heads: dict[int, dict[str, Tensor]] = {}

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """The value of the parameter ``name``."""
        if name.startswith("exits."):
            _, layer, rest = name.split(".", 2)
            if int(layer) not in self._heads:
                self._heads = {int(layer): self._head(self.exits[int(layer)])}  # one at a time: it may be large
            return self._heads[int(layer)][rest]
        if self.checkpoint is not None:
            return self.checkpoint.tensor(name).to(self.dtype)
        module = name.split(".")[-2]
        if "norm" in module:
            offset = self._norm_offset()
            return torch.full(tuple(shape), 1.0 - offset, dtype=self.dtype)
        if name.endswith(".bias"):
            return torch.zeros(tuple(shape), dtype=self.dtype)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        std = self.config.initializer_range
        if self.depth_scaled and name.endswith(_WRITES_TO_STREAM):
            std /= math.sqrt(2 * self.config.num_hidden_layers)
        return torch.empty(tuple(shape), dtype=torch.float32).normal_(0.0, std, generator=generator).to(self.dtype)

    def _norm_offset(self) -> float:
        return self.config.norm_offset

    def _head(self, exit: ExitConfig) -> dict[str, Tensor]:
        """The head of one exit, initialised from the parts of the model that it copies."""
        copied = {"mlp": [exit.layer - 1], "block": [self.config.num_hidden_layers - 1]}.get(exit.kind, [])
        if exit.init == "random":
            copied = []
        with torch.device("meta"), Unfilled():
            model = EarlyExitModel(self.config, copied)
        del model.model.embed_tokens
        values = {}
        for name, parameter in model.state_dict().items():
            if name == HEAD and exit.init == "random":
                values[name] = torch.zeros(1, dtype=self.dtype).expand(parameter.shape)
            else:
                values[name] = self.tensor(canonical(name, self.config, ()), parameter.shape)
        model.load_state_dict(values, assign=True)
        model.add_exits([exit], seed=self.seed, candidate_ids=self.candidate_ids)
        return {name: tensor.detach() for name, tensor in model.exits[str(exit.layer)].state_dict().items()}
