"""The sections of a run file: frozen settings with their defaults, which are those of tuning exits on a frozen model.

What training with all parameters sets otherwise is :data:`exitlm.train.run.TRAINING`. Nothing here is read or checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["embed", "norm", "mlp", "block", "lens"]
Output = Literal["shared", "own", "exits", "low_rank"]
Init = Literal["auto", "copy", "random", "identity", "closed_form"]
Dtype = Literal["auto", "float64", "float32", "bfloat16"]
ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "filled"]


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """What is tuned or trained: weights to start from (``base``), or the shape of a model with random ones (the others,
    by their names in Hugging Face configurations)."""

    base: str = ""
    """Directory, hub id, .gguf file, or "smollm2" for the packaged model."""
    family: str = ""
    """The architecture of a new model: llama, qwen2, qwen3, ..."""
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    """0: as many as num_attention_heads."""
    head_dim: int = 0
    """0: hidden_size / num_attention_heads."""
    intermediate_size: int = 0
    vocab_size: int = 0
    """0: what the tokenizer has."""
    max_position_embeddings: int = 0
    """0: data.seq_len."""
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    init_std: float = 0.02
    """The standard deviation of a new model's matrices."""
    depth_scaled_init: bool = True
    """Divide that of the matrices that write to the residual stream by sqrt(2 * num_hidden_layers)."""
    dtype: Dtype = "auto"
    """The dtype of the frozen backbone; auto is bfloat16 where the device computes in it natively (decoding then does
    too), else the checkpoint's."""
    device: str = "auto"
    """auto is cuda where there is one, else cpu."""


@dataclass(frozen=True, kw_only=True)
class ExitsSection:
    """Where the exits are and how their heads are built; ``kind``, ``output``, ``rank``, ``candidates``, ``init``,
    ``gate`` and ``branch`` take one value, or a list with one per exit."""

    layers: tuple[int, ...] = ()
    """1-based layers; empty: three, evenly placed."""
    kind: Kind | tuple[Kind, ...] = "lens"
    output: Output | tuple[Output, ...] = "shared"
    rank: int | tuple[int, ...] = 64
    candidates: int | tuple[int, ...] = -1
    """Restrict the head to this many token ids, the most frequent of the training data; 0: the whole vocabulary; -1:
    4096 where the vocabulary has more than 16384 tokens, else the whole one."""
    init: Init | tuple[Init, ...] = "auto"
    """auto: closed_form for a lens, copy for the others."""
    gate: bool | tuple[bool, ...] = False
    """A probe that predicts from the hidden state alone whether the exit agrees with the final head: cheaper to test
    than a head's largest probability, and less precise."""
    branch: bool | tuple[bool, ...] = True
    """An MLP that starts at zero beside the lens (ignored for the other kinds)."""
    place: Literal["next", "end"] = "next"
    """Which pipeline stage owns an exit at a boundary: the one after it, which evens the load, or the one before it."""

    def of(self, name: str, index: int) -> Any:
        """The value of setting ``name`` for the exit at ``index`` of ``layers``."""
        value = getattr(self, name)
        return value[index] if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True)
class ObjectiveSection:
    """The loss of each exit: ``weight * ((1 - distill) * CE + distill * KL(final || exit)) + gate * BCE``."""

    final: float = 1.0
    """The weight of the final head's loss, where all parameters are trained."""
    weight: float | tuple[float, ...] = 1.0
    weight_init: float | tuple[float, ...] = 1.0
    """The weight at step 0; it goes to ``weight`` over ``warmup_steps``."""
    warmup_steps: int = 0
    warmup: Literal["linear", "cosine"] = "linear"
    confidence_weighted: bool = False
    """Weight each token with the exit's own (detached) maximum probability."""
    temperature: float = 1.0
    """The temperature of the probability that confidence_weighted reads."""
    distill: float = 1.0
    """0: cross-entropy with the text; 1: distillation from the final head alone, needs no labels."""
    distill_temperature: float = 1.0
    gate: float = 1.0
    """The weight of the gate's loss, for exits that have a gate."""
    candidate_loss: bool = True
    """Train on a sampled part of the vocabulary, and on the whole one only in the last part of the run: on a CPU
    several times as fast, and as good. Small vocabularies are always whole."""
    candidate_tokens: int = 3072
    """How many token ids are drawn per step, half of them frequent and half uniform, besides those the batch needs."""
    candidate_share: float = 0.7
    """The share of the steps that use the sampled vocabulary."""
    layer_dropout: float = 0.0
    """How often the last layer is skipped at the end of the run: rarer below it and before (LayerSkip, arXiv
    2404.16710)."""
    rotate_exits: int = 0
    """Every step trains every n-th exit, another n-th in the next one; 0: all of them."""
    exit_forward: Literal["eager", "checkpoint", "deferred"] = "deferred"
    """When the logits of an exit are computed: in the forward and kept, twice, or just before they are needed."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """What is read, or written by the model itself."""

    files: tuple[str, ...] = ("self:100000",)
    """Text, JSONL, Parquet, Hugging Face dataset directories, globs; or "self:N": N tokens that the model writes."""
    validation_files: tuple[str, ...] = ()
    """Empty: part of ``files`` is held out, or held-out prompts are answered greedily."""
    validation_sequences: int = 32
    """How many sequences are held out (or held-out prompts answered), and the most that a validation reads."""
    tokenizer: str = ""
    """Empty: the base's own ("bytes" for a new model); "bytes"; or a directory with a tokenizer."""
    across_documents: bool = False
    """Let attention and positions run on from one document to the next in a row: faster on GPUs, and less exact."""
    weights: tuple[float, ...] = ()
    """How often each entry of files is drawn, relative to the others; empty: every text once per epoch."""
    seq_len: int = 256
    prompts: str = ""
    """Prompts for self text, a text file with one per line or JSONL with "prompt"; empty: the packaged ones."""
    self_temperature: float = 0.9
    self_batch: int = 64
    """How many prompts are answered at once."""
    self_dtype: Dtype = "auto"
    """auto: the backbone's, where the native kernels run; else bfloat16 if the device computes in it natively, or the
    backbone's."""


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The optimizer and its schedule; ``global_batch`` and ``microbatch`` count sequences."""

    parameters: Literal["all", "exits"] = "exits"
    """all: the whole model; exits: the exits alone, on a frozen model."""
    steps: int = 500
    global_batch: int = 8
    microbatch: int = 8
    lr: float = 2e-3
    min_lr: float = 2e-5
    warmup: int = 20
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    """The largest gradient norm, of all parameters, or of each exit where only exits are tuned; 0 clips nothing."""
    seed: int = 0
    recompute: Literal["none", "layers"] = "none"
    """layers: keep only what enters each layer, and run it again for its backward."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    spike: float = 0.0
    """Skip a step whose gradient norm exceeds this many times the recent mean; 0: only one that is not finite."""
    patience: int = 5
    """Stop the run after this many skipped steps in a row."""
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """What the heads compute in; parameters and optimizer keep at least float32. auto: bfloat16 where native."""
    validate_every: int = 100
    """0: only after the last step."""
    hidden_cache: Literal["memory", "disk", "none"] = "memory"
    """Where the frozen backbone's hidden states are kept once computed; the result does not depend on it."""
    hidden_cache_gib: float = 4.0
    """The most that the cache may hold; what does not fit is computed again."""


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """How the work is laid over processes: ``data * tensor * pipeline`` of them."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = True
    """Split sequences over the tensor ranks between matrix products (sequence parallelism)."""
    schedule: ScheduleName = "1f1b"
    stages_per_rank: int = 0
    """0: 1, or 2 for interleaved, zero_bubble and zbv."""
    shard: bool = True
    """Shard parameters, gradients and optimizer over the data ranks (FSDP2), or keep them whole on each."""
    layers_per_stage: Literal["balanced"] | tuple[int, ...] = "balanced"
    """By the cost of layers, heads and embedding, or a list with one number per stage."""
    fill_warmup: Literal["auto"] | int = "auto"
    """Extra microbatches of schedule "filled" in the warm-up; auto: as many as fit."""
    fill_cooldown: Literal["auto"] | int = "auto"
    backward_forward_ratio: float = 2.0
    """The time of a backward over that of a forward, by which "filled" is planned."""
    timeout: float = 600.0
    """Seconds after which a rank that waits for another one gives up and names it."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """Where the run lives, and how often it is saved."""

    dir: str = ""
    every: int = 100
    """Steps between checkpoints; 0: only at the start and the end, and when the run is interrupted."""
    keep: int = 2
    async_: bool = True
    """Write while training goes on (full training)."""


@dataclass(frozen=True, kw_only=True)
class LoggingSection:
    """``metrics.jsonl`` is always written; trackers are extras."""

    every: int = 1
    tensorboard: bool = False
    wandb: str = ""
    """A project's name; empty: off."""
    trackio: str = ""
    """A project's name; empty: off."""
