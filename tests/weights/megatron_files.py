"""EE-LLM checkpoints of our tiny models, written as the source of EE-LLM lays them out. Not a test.

Nothing of the reader is used here. The comments name the files of github.com/pan-x-c/EE-LLM that each part follows.
"""

import argparse
import enum
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exitlm.model import EarlyExitModel

SHARD = "model_optim_rng.pt"


def settings_of(model: EarlyExitModel, *, tp: int, pp: int, pre_exit: bool = False, **over: Any) -> argparse.Namespace:
    """The command line of the training, as far as it matters, and some more (megatron/arguments.py)."""
    config, heads = model.config, model.exit_heads().values()
    kinds = {head.config.kind for head in heads}
    multiple = over.get("make_vocab_size_divisible_by", 8) * tp
    values: dict[str, Any] = dict(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=None,
        transformer_impl="local",
        num_layers=config.num_hidden_layers,
        encoder_num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        kv_channels=config.head_dim,
        group_query_attention=config.num_key_value_heads < config.num_attention_heads,
        num_query_groups=config.num_key_value_heads if config.num_key_value_heads < config.num_attention_heads else 1,
        max_position_embeddings=config.max_position_embeddings,
        seq_length=config.max_position_embeddings,
        position_embedding_type="rope",
        use_rotary_position_embeddings=False,
        rotary_percent=1.0,
        rotary_seq_len_interpolation_factor=None,
        normalization="RMSNorm",
        norm_epsilon=config.rms_norm_eps,
        apply_layernorm_1p=False,
        add_bias_linear=False,
        swiglu=True,
        openai_gelu=False,
        onnx_safe=None,
        num_experts=None,
        tokenizer_type="SentencePieceTokenizer",
        vocab_size=None,
        make_vocab_size_divisible_by=8,
        padded_vocab_size=-(-config.vocab_size // multiple) * multiple,  # megatron/tokenizer/tokenizer.py
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        exit_layer_nums=[head.config.layer + pre_exit for head in heads],
        exit_layer_temperature=[1.0 for _ in heads],
        pre_exit=pre_exit,
        use_exit_mlp="mlp" in kinds,
        use_exit_block="block" in kinds,
        use_exit_norm=bool(kinds - {"embed"}),
        untie_exit_output_weights=any(head.config.output == "own" for head in heads),
        params_dtype=model.dtype,
        iteration=7,
        rank=0,
        data_path=["0.5", "somewhere"],
    )
    return argparse.Namespace(**{**values, **over})


def qkv(q: Tensor, k: Tensor, v: Tensor, groups: int, size: int) -> Tensor:
    """ParallelAttention's one matrix: group after group its queries, its key, its value (model/transformer.py)."""
    per = q.shape[0] // size // groups
    rows = []
    for group in range(groups):
        for head in range(per):
            start = (group * per + head) * size
            rows.append(q[start : start + size])
        rows.append(k[group * size : (group + 1) * size])
        rows.append(v[group * size : (group + 1) * size])
    return torch.cat(rows)


def row(matrix: Tensor, rank: int, tp: int) -> Tensor:
    """RowParallelLinear: a rank's part of the columns (core/tensor_parallel/layers.py)."""
    width = matrix.shape[1] // tp
    return matrix[:, rank * width : (rank + 1) * width].clone()


def column(matrix: Tensor, rank: int, tp: int) -> Tensor:
    """ColumnParallelLinear and VocabParallelEmbedding: a rank's part of the rows (core/tensor_parallel/layers.py)."""
    height = matrix.shape[0] // tp
    return matrix[rank * height : (rank + 1) * height].clone()


class Writer:
    """Cuts one model into shards as ``args`` say. ``spread`` is the number of layers of each pipeline stage; ``told``
    replaces the settings in the files (so that they lie)."""

    def __init__(
        self,
        model: EarlyExitModel,
        args: argparse.Namespace,
        spread: list[int] | None = None,
        told: argparse.Namespace | None = None,
    ) -> None:
        self.state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.model, self.args, self.told = model, args, told or args
        self.tp, self.pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        self.spread = spread or [model.config.num_hidden_layers // self.pp] * self.pp

    def padded(self, name: str) -> Tensor:
        """A vocabulary matrix with the rows that round its size up; their values are the training's noise."""
        matrix = self.state[name]
        extra = self.args.padded_vocab_size - matrix.shape[0]
        return torch.cat([matrix, torch.full((extra, matrix.shape[1]), 9.0, dtype=matrix.dtype)])

    def mlp(self, source: str, target: str, rank: int) -> dict[str, Tensor]:
        """ParallelMLP (model/transformer.py): swiglu cuts a rank's rows in two, so each rank has gate over up."""
        gate, up, down = (self.state[f"{source}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        both = torch.cat([column(gate, rank, self.tp), column(up, rank, self.tp)])
        return {f"{target}.dense_h_to_4h.weight": both, f"{target}.dense_4h_to_h.weight": row(down, rank, self.tp)}

    def layer(self, source: str, target: str, rank: int, mlp: str = "mlp") -> dict[str, Tensor]:
        """ParallelTransformerLayer (model/transformer.py)."""
        config = self.model.config
        q, k, v, o = (self.state[f"{source}.self_attn.{name}_proj.weight"] for name in "qkvo")
        fused = qkv(q, k, v, config.num_key_value_heads, config.head_dim)
        return {
            f"{target}.input_norm.weight": self.state[f"{source}.input_layernorm.weight"],
            f"{target}.self_attention.query_key_value.weight": column(fused, rank, self.tp),
            f"{target}.self_attention.dense.weight": row(o, rank, self.tp),
            f"{target}.post_attention_norm.weight": self.state[f"{source}.post_attention_layernorm.weight"],
            **self.mlp(f"{source}.mlp", f"{target}.{mlp}", rank),
        }

    def encoder(self, stage: int, rank: int) -> OrderedDict[str, Tensor]:
        """EarlyExitParallelTransformer: local layer numbers; EarlyExitTransformerLayer adds exit_norm, exit_block and
        the two MLPs of ExitMLP, trunk and branch (model/transformer.py)."""
        found: OrderedDict[str, Tensor] = OrderedDict()
        first = sum(self.spread[:stage])
        for local in range(self.spread[stage]):
            number, target = first + local + 1, f"layers.{local}"
            is_exit = number in self.args.exit_layer_nums
            mine = f"exits.{number - self.args.pre_exit}"
            trunk = "mlp.trunk" if is_exit and self.args.use_exit_mlp else "mlp"
            found.update(self.layer(f"model.layers.{number - 1}", target, rank, trunk))
            if is_exit and self.args.use_exit_mlp:
                found.update(self.mlp(f"{mine}.mlp", f"{target}.mlp.branch", rank))
            if is_exit and self.args.use_exit_block:
                found.update(self.layer(f"{mine}.block", f"{target}.exit_block", rank))
            if is_exit and self.args.use_exit_norm:
                found[f"{target}.exit_norm.weight"] = self.state[f"{mine}.norm.weight"]
        if stage == self.pp - 1:
            found["final_norm.weight"] = self.state["model.norm.weight"]
        return found

    def shard(self, stage: int, rank: int) -> dict[str, Any]:
        """save_checkpoint (checkpointing.py) of EarlyExitGPTModel (model/early_exit_gpt_model.py) and its
        EarlyExitTransformerLanguageModel (model/language_model.py)."""
        args, last = self.args, stage == self.pp - 1
        first = sum(self.spread[:stage])
        here = [n for n in args.exit_layer_nums if first < n <= first + self.spread[stage]]
        language: dict[str, Any] = {}
        if stage == 0:
            words = {"weight": column(self.padded("model.embed_tokens.weight"), rank, self.tp)}
            language["embedding"] = {"word_embeddings": OrderedDict(words)}
        if here and args.untie_exit_output_weights:
            language["exit_output_layer"] = OrderedDict(
                (f"{i}.weight", column(self.padded(f"exits.{n - args.pre_exit}.output.weight"), rank, self.tp))
                for i, n in enumerate(here)
            )
        language["encoder"] = self.encoder(stage, rank)
        if last and args.untie_embeddings_and_output_weights:
            head = {"weight": column(self.padded("lm_head.weight"), rank, self.tp)}
            language["output_layer"] = OrderedDict(head)
        found: dict[str, Any] = {"language_model": language}
        if stage > 0 and (last or here) and not args.untie_embeddings_and_output_weights:
            copy = {"weight": column(self.padded("model.embed_tokens.weight"), rank, self.tp)}
            found["word_embeddings_for_head"] = OrderedDict(copy)
        return {"args": self.told, "checkpoint_version": 3.0, "iteration": args.iteration, "model": found, **beside()}

    def write(self, directory: Path) -> Path:
        """All shards, and the tracker beside them (get_checkpoint_name in checkpointing.py)."""
        place = directory / f"iter_{self.args.iteration:07d}"
        for stage in range(self.pp):
            for rank in range(self.tp):
                name = f"mp_rank_{rank:02d}_{stage:03d}" if self.pp > 1 else f"mp_rank_{rank:02d}"
                (place / name).mkdir(parents=True)
                with megatron_enums() as kinds:
                    self.told.model_type, self.told.old_model_type = kinds
                    torch.save(self.shard(stage, rank), place / name / SHARD)
        (directory / "latest_checkpointed_iteration.txt").write_text(str(self.args.iteration))
        return directory


@contextmanager
def megatron_enums() -> Iterator[list[enum.Enum]]:
    """Values of megatron/core/enums.py, whose module exists only while they are pickled, in both ways that versions of
    Python have."""
    kinds = enum.Enum("ModelType", {"new": 1, "old": 2}, module="megatron.core.enums")  # type: ignore[misc]

    def reduced(kind: enum.Enum, protocol: int) -> Any:
        return (type(kind), (kind.value,)) if kind.value == 1 else (getattr, (type(kind), kind.name))

    kinds.__reduce_ex__ = reduced  # type: ignore[method-assign, assignment]
    names = ("megatron", "megatron.core", "megatron.core.enums")
    sys.modules |= {name: types.ModuleType(name) for name in names}
    sys.modules[names[-1]].ModelType = kinds  # type: ignore[attr-defined]
    try:
        yield list(kinds)
    finally:
        for name in names:
            del sys.modules[name]


def beside() -> dict[str, Any]:
    """What lies beside the model: an optimizer's state and random states (get_rng_state in checkpointing.py)."""
    step = {"state": {0: {"exp_avg": torch.zeros(5)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
    }
    return {"optimizer": {"optimizer": step, "grad_scaler": None}, "rng_state": [states]}
