"""Checkpoints of EE-LLM (arXiv 2312.04916, a fork of Megatron-LM), turned into a Hugging Face directory with exits.

The shards of tensor and pipeline parallelism are merged, tensors get their HF names, and each early exit becomes the
:class:`ExitConfig` that computes the same. Theirs after layer n is ours at layer n; with ``--pre-exit`` it lies before
layer n and is ours at layer n - 1. What can't be expressed exactly is refused by the name of its setting. Not here: the
files (``megatron_file.py``), what the settings mean (``megatron_config.py``), and the way back.

Tensors come out bit for bit, and in float32 and float64 so do logits, up to rounding. In bfloat16 and float16 EE-LLM
rounds rotary angles to that type, too (its ``inv_freq`` is a buffer of a converted module), so that far positions fall
together; exitlm computes them in float32, and its logits differ from EE-LLM's by that.

A checkpoint has no tokenizer. Where its settings tell the vocabulary's true size, padding rows are cut; where only the
tokenizer knew it (EE-LLM's own runs), they stay. What ends a text is unknown, too, but for Llama 2's tokenizer: put the
tokenizer's files beside the result, and ``eos_token_id`` into its config.json.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from exitlm.atomic import check_free
from exitlm.errors import UserError
from exitlm.model import EarlyExitModel, ExitHead, ModelConfig
from exitlm.weights.checkpoint import HEAD, dtype_of
from exitlm.weights.export import export
from exitlm.weights.load import Unfilled
from exitlm.weights.megatron_config import MegatronConfig
from exitlm.weights.megatron_file import MegatronCheckpoint, open_megatron

_COPY = "word_embeddings_for_head.weight"


def import_megatron(source: Path, directory: Path, *, dtype: str | torch.dtype | None = None) -> None:
    """Write the model and the exits of an EE-LLM or Megatron-LM checkpoint to ``directory``, as ``export`` does.

    ``source`` is the checkpoint's directory (its latest iteration is taken) or that of one iteration. ``dtype`` None
    keeps that of the weights. One copy of the model is in memory, beside mapped pages of the files. The result has no
    tokenizer: it loads, and decodes token ids.

    Raises:
        UserError: the checkpoint is damaged or incomplete, or holds what can't be expressed exactly; the directory is
            taken or can't be written.
    """
    check_free(directory)
    chosen = None if dtype is None or dtype == "auto" else dtype_of(dtype)
    export(model_of(open_megatron(source)), directory, dtype=chosen)


def model_of(checkpoint: MegatronCheckpoint) -> EarlyExitModel:
    """The model of a checkpoint with its exits, on the CPU and in evaluation mode.

    Raises:
        UserError: as :func:`import_megatron`.
    """
    plan = MegatronConfig.of(checkpoint)
    hidden, depth = plan.config.hidden_size, plan.config.num_hidden_layers
    tensors: dict[str, Tensor] = {}
    matrices: dict[str | int, Tensor] = {}
    below = 0
    for rank in range(checkpoint.pipeline_ranks):
        last = rank == checkpoint.pipeline_ranks - 1
        stage = _Stage(f"pipeline stage {rank} of {checkpoint.directory}", checkpoint.stage(rank))
        layers = range(below, below + stage.layers())
        for local, index in enumerate(layers):
            tensors |= _layer_and_exit(stage, local, index, plan)
        matrices |= _matrices(stage, layers, plan, first=rank == 0, last=last)
        if last:
            tensors["model.norm.weight"] = stage.take("encoder.final_norm.weight", (hidden,))
        stage.finish()
        below = layers.stop
    if below != depth:
        raise UserError(
            f"{checkpoint.directory} holds {below} layers, but its settings speak of {depth}; choose another checkpoint"
        )
    dtypes = sorted({str(tensor.dtype) for tensor in (*tensors.values(), *matrices.values())})
    if len(dtypes) > 1:
        raise UserError(f"{checkpoint.directory} mixes weights of {' and '.join(dtypes)}; choose one of a single dtype")
    return _build(plan, tensors, {name: matrix[: plan.config.vocab_size] for name, matrix in matrices.items()})


def _build(plan: MegatronConfig, tensors: dict[str, Tensor], matrices: Mapping[str | int, Tensor]) -> EarlyExitModel:
    """The model of tensors by our names and of its ``[V, D]`` matrices: "embedding", "head", and those of exits.

    What the settings call tied is so here if it has the same values, and else a matrix of its own.
    """
    head = matrices["head"]
    tied = not plan.untied and torch.equal(matrices["embedding"], head)
    tensors = {**tensors, "model.embed_tokens.weight": matrices["embedding"], HEAD: head}
    exits = []
    for exit in plan.exits.values():
        own = plan.untied_exits or not torch.equal(matrices[exit.layer], head)
        exits.append(replace(exit, output="own" if own else "shared"))
        if own:
            tensors[f"exits.{exit.layer}.output.weight"] = matrices[exit.layer]
    config = ModelConfig.from_hf({**plan.config.hf, "tie_word_embeddings": tied})
    with torch.device("meta"), Unfilled():
        model = EarlyExitModel(config)
        model.exits.update({str(exit.layer): ExitHead(exit, config) for exit in exits})
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model.eval()


class _Stage:
    """The tensors of a pipeline stage, in one table per tensor-parallel rank. Each is taken once, and none is left."""

    def __init__(self, name: str, shards: Sequence[dict[str, Tensor]]) -> None:
        self.name, self.shards = name, shards

    def __contains__(self, name: str) -> bool:
        return name in self.shards[0]

    def layers(self) -> int:
        """How many layers there are, by their local numbers."""
        found = [re.match(r"encoder\.layers\.([0-9]{1,6})\.", name) for name in self.shards[0]]
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def take(self, name: str, shape: tuple[int, ...], split: int | None = None) -> Tensor:
        """A tensor of the whole ``shape``; ranks hold equal parts of dimension ``split``, or each the same (None)."""
        count = len(self.shards)
        asked = [size // count if dim == split else size for dim, size in enumerate(shape)]
        parts = []
        for shard in self.shards:
            if name not in shard:
                raise UserError(
                    f"{self.name} lacks the tensor '{name}' that its settings ask for; choose another checkpoint"
                )
            parts.append(shard.pop(name))
            if list(parts[-1].shape) != asked:
                raise UserError(
                    f"{self.name}: tensor '{name}' has shape {list(parts[-1].shape)}, but its settings ask for {asked}"
                )
        return parts[0] if split is None or count == 1 else torch.cat(parts, dim=split)

    def finish(self) -> None:
        """Refuse what was not taken."""
        left = sorted({name for shard in self.shards for name in shard})
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise UserError(
                f"{self.name} holds the tensor '{left[0]}'{more}, which its settings do not explain; choose another "
                "checkpoint"
            )


def _layer_and_exit(stage: _Stage, local: int, index: int, plan: MegatronConfig) -> dict[str, Tensor]:
    """Layer ``index`` (0-based) of the model, which the stage calls ``local``, and the exit that belongs to it."""
    source, config, exit = f"encoder.layers.{local}", plan.config, plan.exits.get(index + 1)
    kind = None if exit is None else exit.kind
    found = _layer(stage, source, f"model.layers.{index}", config, "mlp.trunk" if kind == "mlp" else "mlp")
    if exit is None or kind == "embed":
        return found
    target = f"exits.{exit.layer}"
    if kind == "mlp":
        found |= _mlp(stage, f"{source}.mlp.branch", f"{target}.mlp", config)
    if kind == "block":
        found |= _layer(stage, f"{source}.exit_block", f"{target}.block", config, "mlp")
    return found | {f"{target}.norm.weight": stage.take(f"{source}.exit_norm.weight", (config.hidden_size,))}


def _layer(stage: _Stage, source: str, target: str, config: ModelConfig, mlp: str) -> dict[str, Tensor]:
    """A decoder layer. Each query group has its queries, its key and its value, in this order, in one matrix."""
    hidden, groups, size = config.hidden_size, config.num_key_value_heads, config.head_dim
    queries = config.num_attention_heads // groups
    shape = ((queries + 2) * groups * size, hidden)
    qkv = stage.take(f"{source}.self_attention.query_key_value.weight", shape, split=0)
    qkv = qkv.reshape(groups, queries + 2, size, hidden)
    wide = (queries * groups * size, hidden)
    return {
        f"{target}.input_layernorm.weight": stage.take(f"{source}.input_norm.weight", (hidden,)),
        f"{target}.self_attn.q_proj.weight": qkv[:, :queries].reshape(wide),
        f"{target}.self_attn.k_proj.weight": qkv[:, queries].reshape(groups * size, hidden),
        f"{target}.self_attn.v_proj.weight": qkv[:, queries + 1].reshape(groups * size, hidden),
        f"{target}.self_attn.o_proj.weight": stage.take(f"{source}.self_attention.dense.weight", wide[::-1], split=1),
        f"{target}.post_attention_layernorm.weight": stage.take(f"{source}.post_attention_norm.weight", (hidden,)),
        **_mlp(stage, f"{source}.{mlp}", f"{target}.mlp", config),
    }


def _mlp(stage: _Stage, source: str, target: str, config: ModelConfig) -> dict[str, Tensor]:
    """An MLP. Each tensor-parallel rank has its part of the gate above its part of the other factor."""
    hidden, inner = config.hidden_size, config.intermediate_size
    both = stage.take(f"{source}.dense_h_to_4h.weight", (2 * inner, hidden), split=0)
    both = both.reshape(len(stage.shards), 2, -1, hidden)
    return {
        f"{target}.gate_proj.weight": both[:, 0].reshape(inner, hidden),
        f"{target}.up_proj.weight": both[:, 1].reshape(inner, hidden),
        f"{target}.down_proj.weight": stage.take(f"{source}.dense_4h_to_h.weight", (hidden, inner), split=1),
    }


def _matrices(
    stage: _Stage, layers: range, plan: MegatronConfig, *, first: bool, last: bool
) -> dict[str | int, Tensor]:
    """The padded embedding and output matrices of a stage: "embedding", "head", and those of exits by our layer.

    A stored output matrix of an exit goes by its place among the stage's exits. What is tied uses the embedding, of
    which later stages keep a copy.
    """
    shape = (plan.padded_vocab, plan.config.hidden_size)
    here = [exit.layer for number, exit in plan.exits.items() if number - 1 in layers]
    found: dict[str | int, Tensor] = {}
    if first:
        found["embedding"] = stage.take("embedding.word_embeddings.weight", shape, split=0)
    needed = (last and not plan.untied) or (here and not plan.untied_exits)
    tied = found.get("embedding")
    if tied is None and (needed or _COPY in stage):
        tied = stage.take(_COPY, shape, split=0)
    for place, layer in enumerate(here):
        if plan.untied_exits:
            found[layer] = stage.take(f"exit_output_layer.{place}.weight", shape, split=0)
        elif tied is not None:
            found[layer] = tied
    if last and plan.untied:
        found["head"] = stage.take("output_layer.weight", shape, split=0)
    elif last and tied is not None:
        found["head"] = tied
    return found
